#!/bin/sh
# Certificates, keys and a JWK as the contract describes them, by openssl alone, into the working directory.
# usage: openssl.sh | openssl.sh leaf NAME CN EKU SAN DAYS
set -eu
umask 077
leaf() { # name cn eku san days
    openssl ecparam -name prime256v1 -genkey -noout -out "$1.key" 2>/dev/null
    openssl req -new -key "$1.key" -subj "/O=clawker/CN=$2" -out "$1.csr" 2>/dev/null
    {
        echo "keyUsage=critical,digitalSignature${6:-}"
        echo "extendedKeyUsage=$3"
        echo "authorityKeyIdentifier=keyid"
        [ -z "$4" ] || echo "subjectAltName=$4"
    } >"$1.ext"
    openssl x509 -req -in "$1.csr" -CA "${CA:-ca}.pem" -CAkey "${CA:-ca}.key" -set_serial "0x$(openssl rand -hex 15)" \
        -days "$5" -sha256 -extfile "$1.ext" -out "$1.pem" 2>/dev/null
}
ca() { # name
    openssl ecparam -name prime256v1 -genkey -noout -out "$1.key" 2>/dev/null
    openssl req -new -x509 -key "$1.key" -subj "/O=clawker/CN=clawker CLI CA" -days 1800 -sha256 -out "$1.pem" \
        -config /dev/stdin -extensions v3 <<CONFIG
[req]
distinguished_name = dn
[dn]
[v3]
basicConstraints = critical, CA:TRUE, pathlen:1
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
CONFIG
}
if [ "${1:-}" = leaf ]; then
    shift
    leaf "$@"
    exit
fi
ca ca
ca other-ca
leaf server clawker-controlplane serverAuth "DNS:localhost,DNS:clawker-controlplane,IP:127.0.0.1" 365 ",keyEncipherment"
leaf cli clawker-cli clientAuth "" 365
leaf cli-again clawker-cli clientAuth "" 365
leaf cp clawker-controlplane clientAuth "" 365
leaf server-only clawker-cli serverAuth "" 365
leaf ended clawker-cli clientAuth "" 0
leaf agent clawker-clawkerd "clientAuth,serverAuth" "URI:urn:clawker:agent:clawker.shop.dev,URI:urn:clawker:container:ab" 1 ",keyEncipherment"
CA=other-ca leaf stranger clawker-cli clientAuth "" 365
openssl ecparam -name prime256v1 -genkey -noout -out signing.key 2>/dev/null
openssl ecparam -name prime256v1 -genkey -noout -out other-signing.key 2>/dev/null
point=$(openssl ec -in signing.key -pubout -outform DER 2>/dev/null | tail -c 64 | od -An -v -tx1 | tr -d ' \n')
b64url() { printf '%s' "$1" | sed 's/../\\x&/g' | xargs -0 printf '%b' | base64 | tr '+/' '-_' | tr -d '=\n'; }
x=$(b64url "$(printf '%s' "$point" | cut -c1-64)")
y=$(b64url "$(printf '%s' "$point" | cut -c65-128)")
printf '{"kty":"EC","crv":"P-256","use":"sig","alg":"ES256","x":"%s","y":"%s"}\n' "$x" "$y" >signing-jwk.json
chmod 644 ./*.pem signing-jwk.json
