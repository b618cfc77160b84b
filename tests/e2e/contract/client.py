"""
A client of the wire contract alone: plain grpcio, urllib and the openssl command; nothing of the package.

Run in a directory with the compiled contract and the material that `openssl.sh` made. Not a test by itself.
"""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import admin_pb2 as A
import agent_pb2 as G
import control_pb2 as C
import grpc
from google.protobuf import message_factory
from google.protobuf.json_format import MessageToDict
from google.rpc import error_details_pb2, status_pb2

ADMIN, AGENT = "127.0.0.1:7443", "10.231.80.1:7444"
AUDIENCE = "https://127.0.0.1:4444/oauth2/token"
Metadata = tuple[tuple[str, str | bytes], ...]
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (A, G, C)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
OPERATORS = sorted(name for name in METHODS if "AgentService" not in name)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def raw_signature(der: bytes) -> bytes:
    """The two numbers of a DER signature, 32 bytes each."""
    out, at = b"", 2
    for _ in range(2):
        length = der[at + 1]
        out += der[at + 2 : at + 2 + length].lstrip(b"\0").rjust(32, b"\0")
        at += 2 + length
    return out


def signed(header: dict[str, Any], claims: dict[str, Any], key: str) -> str:
    body = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims).encode())}"
    done = subprocess.run(
        ["openssl", "dgst", "-sha256", "-sign", key], input=body.encode(), capture_output=True, check=True
    )
    return f"{body}.{b64(raw_signature(done.stdout))}"


def assertion(client: str, key: str = "signing.key", **claims: object) -> str:
    now = int(time.time())
    whole = {"iss": client, "sub": client, "aud": AUDIENCE, "jti": str(uuid.uuid4()), "iat": now, "exp": now + 30}
    return signed({"alg": "ES256", "typ": "JWT"}, {**whole, **claims}, key)


def exchange(said: str, scope: str) -> tuple[int, dict[str, Any]]:
    """Status and body of the token endpoint."""
    tls = ssl.create_default_context(cafile="ca.pem")
    form = {
        "client_assertion": said, "scope": scope, "grant_type": "client_credentials",
        "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
    }  # fmt: skip
    try:
        answer = urllib.request.urlopen(AUDIENCE, urllib.parse.urlencode(form).encode(), context=tls, timeout=10)
        return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def token(client: str = "clawker-cli", scope: str = "admin") -> str:
    status, body = exchange(assertion(client), scope)
    assert status == 200, body
    return str(body["access_token"])


def channel(leaf: str = "cli", ca: str = "ca.pem", target: str = ADMIN, **options: object) -> grpc.Channel:
    pair = (Path(f"{leaf}.key").read_bytes(), Path(f"{leaf}.pem").read_bytes()) if leaf else (None, None)
    credentials = grpc.ssl_channel_credentials(Path(ca).read_bytes(), *pair)
    more = [("grpc.ssl_target_name_override", "clawker-controlplane"), ("grpc.use_local_subchannel_pool", 1)]
    return grpc.secure_channel(target, credentials, options=[*more, *options.items()])


def bearer(value: str) -> Metadata:
    return (("authorization", f"Bearer {value}"),)


def wrong_tokens(client: str, scope: str, mine: str, key: str) -> dict[str, Metadata]:
    """
    Metadata that opens nothing where tokens of a client with a scope do, by what is wrong with it.

    `mine` is a good token, `key` the file of the authority's own key: what it never signed, and what it did not mean.
    """
    now, other = int(time.time()), {"clawker-cli": "clawker-agent"}.get(client, "clawker-cli")
    # Issued after whatever was revoked a moment ago.
    claims = {
        "iss": "https://127.0.0.1:4444/", "sub": client, "client_id": client, "aud": ["clawker"], "scope": scope,
        "jti": str(uuid.uuid4()), "iat": now + 5, "nbf": now, "exp": now + 3600,
    }  # fmt: skip
    head = json.loads(base64.urlsafe_b64decode(mine.split(".")[0] + "=="))

    def forged(**more: object) -> Metadata:
        return bearer(signed(head, {**claims, **more, "jti": str(uuid.uuid4())}, key))

    return {
        "none": (), "twice": bearer(mine) * 2, "lower case": (("authorization", "bearer " + mine),),
        "basic": (("authorization", "Basic Zm9vOmJhcg=="),), "empty": bearer(""), "blank inside": bearer("a b"),
        "9 KiB": bearer("x" * 9000), "in a binary header": (("authorization-bin", b"Bearer " + mine.encode()),),
        "garbage": bearer("garbage"), "cut": bearer(mine[:-8]),
        "alg none": bearer(b64(b'{"alg":"none"}') + "." + mine.split(".")[1] + "."),
        "another key": bearer(signed(head, claims, "other-signing.key")),
        "the assertion itself": bearer(assertion(client)),
        "ended": forged(iat=now - 7200, nbf=now - 7200, exp=now - 1),
        "from the future": forged(iat=now + 7200, nbf=now + 7200, exp=now + 9000),
        "no end": forged(exp=None),
        "of another client with the scope": forged(sub=other, client_id=other),
        "without the scope": forged(scope=f"{scope}istrator {scope}.read {scope.title()}"),
    }  # fmt: skip


def call(
    made: grpc.Channel, method: str, request: object = None, metadata: Metadata = (), timeout: float = 15
) -> list[Any]:
    """[code, what came or the message, details]: every kind of method, streams up to `most` messages."""
    described = METHODS[method]
    request = request or message_factory.GetMessageClass(described.input_type)()
    kind = ("stream" if described.client_streaming else "unary") + (
        "_stream" if described.server_streaming else "_unary"
    )
    begin = getattr(made, kind)(
        method,
        request_serializer=lambda one: one.SerializeToString(),
        response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
    )
    # A stream of requests that is never ended from here: a call that is refused ends it.
    given = iter([request]) if described.client_streaming else request
    try:
        answer = begin(given, metadata=metadata, timeout=timeout)
        if described.server_streaming:
            return ["OK", [MessageToDict(one, preserving_proto_field_name=True) for one in answer], []]
        return ["OK", MessageToDict(answer, preserving_proto_field_name=True), []]
    except grpc.RpcError as error:
        return [error.code().name, error.details(), reasons(error)]


def reasons(error: grpc.RpcError) -> list[Any]:
    """Reason, domain and facts of every detail."""
    found = []
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            assert status.code == error.code().value[0] and status.message == error.details()
            for one in status.details:
                info = error_details_pb2.ErrorInfo()
                assert one.Unpack(info)
                found.append([info.reason, info.domain, dict(info.metadata)])
    return found


def begun(made: grpc.Channel, method: str, request: object, metadata: Metadata) -> grpc.Call:
    """A server stream that is being followed."""
    output = message_factory.GetMessageClass(METHODS[method].output_type)
    return made.unary_stream(
        method, request_serializer=lambda one: one.SerializeToString(), response_deserializer=output.FromString
    )(request, metadata=metadata, timeout=30)
