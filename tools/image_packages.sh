#!/bin/sh
# Install the Debian packages that toolchain.txt (beside this file) lists for a purpose. A base that has
# all of them already needs no package registry.
set -eu
packages=$(grep -E "^$1 " "$(dirname "$0")/toolchain.txt" | cut -d'|' -f3)
for package in $packages; do
  dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -q '^installed$' || missing=yes
done
[ -n "${missing:-}" ] || exit 0
apt-get update -qq
# shellcheck disable=SC2086 # one word a package
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
rm -rf /var/lib/apt/lists/*
