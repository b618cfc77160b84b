"""The token authority over real HTTPS: one way in, every other one refused by its row of the contract.

The suite runs against the embedded authority and against the real Hydra behind our front.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import pytest_asyncio
import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from clawker_cp.auth.authority.endpoints import admin_application
from clawker_cp.auth.authority.keys import signing_key
from clawker_cp.auth.authority.registration import read_registration
from clawker_cp.auth.clients import register_cli_client
from clawker_cp.auth.introspect import HydraIntrospector
from clawker_cp.errors import Conflict, InvalidInput, Unavailable
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.testing.authority_world import SERVED, AuthorityWorld, EmbeddedWorld, HydraWorld
from clawker_cp.testing.certificates import TestCa
from clawker_cp.testing.peers import WHY, peer


def new_world(kind: str, directory: Path) -> AuthorityWorld:
    """An authority that is not running yet; without Hydra its tests are skipped with the reason."""
    if kind == "embedded":
        return EmbeddedWorld(directory, TestCa(directory))
    binary = peer("hydra")
    if binary is None:
        pytest.skip(WHY.format(name="hydra"))
    return HydraWorld(directory, TestCa(directory), binary=binary)


@pytest.fixture(params=["embedded", "hydra"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> AuthorityWorld:
    return new_world(request.param, tmp_path)


@pytest_asyncio.fixture
async def authority(either: AuthorityWorld) -> AsyncIterator[AuthorityWorld]:
    async with either.running() as running:
        yield running


def with_spoilt_signature(token: str) -> str:
    """The same token with the first bits of its signature turned; those of its last letters may be padding."""
    signed, _, signature = token.rpartition(".")
    return f"{signed}.{'B' if signature[0] == 'A' else 'A'}{signature[1:]}"


def reply(answer: httpx.Response) -> tuple[int, str | None]:
    """Status and `error` of an answer."""
    return answer.status_code, answer.json().get("error")


@pytest.fixture
def world(tmp_path: Path) -> EmbeddedWorld:
    return EmbeddedWorld(tmp_path, TestCa(tmp_path))


@pytest_asyncio.fixture
async def live(world: EmbeddedWorld) -> AsyncIterator[EmbeddedWorld]:
    async with world.running() as live:
        yield live


async def test_an_assertion_becomes_a_token_that_introspection_knows(authority: AuthorityWorld) -> None:
    """The success reply and the active answer are those of the contract, field by field."""
    live = authority
    answer = await live.post(data=live.form(live.sign(live.claims())))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json;charset=UTF-8"
    assert (answer.headers["cache-control"], answer.headers["pragma"]) == ("no-store", "no-cache")
    said = answer.json()
    token = said.pop("access_token")
    # Hydra counts the second it took.
    assert said == {"expires_in": 3599 if live.is_hydra else 3600, "scope": "admin", "token_type": "bearer"}
    header = jwt.get_unverified_header(token)
    keys = {key["kid"]: key for key in (await live.http.get(f"{live.public}/.well-known/jwks.json")).json()["keys"]}
    claims = jwt.decode(
        token, jwt.PyJWK(keys[header["kid"]]).key, algorithms=["ES256"], issuer=live.issuer,
        audience=None if live.is_hydra else "clawker", options={"verify_aud": not live.is_hydra},
    )  # fmt: skip
    assert (header["alg"], header["typ"]) == ("ES256", "JWT" if live.is_hydra else "at+jwt")
    assert claims["exp"] - claims["iat"] == 3600 and claims["sub"] == claims["client_id"] == "clawker-cli"
    active = await live.introspect(token=token)
    expected = {
        "active": True, "aud": ["clawker"], "client_id": "clawker-cli", "exp": claims["exp"], "iat": claims["iat"],
        "iss": live.issuer, "jti": claims["jti"], "nbf": claims["iat"], "scope": "admin", "sub": "clawker-cli",
        "token_type": "Bearer", "token_use": "access_token",
    }  # fmt: skip
    if live.is_hydra:
        del expected["jti"]
        expected["aud"] = []
    assert active == expected
    introspector = HydraIntrospector(f"{live.admin}/admin/oauth2/introspect", live.tls)
    result = await introspector.introspect(token, "admin")
    await introspector.aclose()
    assert (result.active, result.scope, result.client_id, result.sub, result.exp) == (
        True, "admin", "clawker-cli", "clawker-cli", claims["exp"],
    )  # fmt: skip
    if isinstance(live, EmbeddedWorld):
        assert result == await live.authority.introspect(token, "admin")
    assert (await live.introspect(token=token, scope="admin"))["active"] is True
    assert await live.introspect(token=token, scope="agent:self:register") == {"active": False}


async def test_both_keys_of_the_agents_client_count(authority: AuthorityWorld) -> None:
    """Without a kid the first key, with `sandbox` the second; without a scope it is the agents' own."""
    live = authority
    claims = live.claims("clawker-agent", exp=int(live.now) + 86_400)
    granted = await live.post(data=live.form(live.sign(claims), scope=""))
    # Hydra grants nothing to who asks for nothing.
    assert granted.json()["scope"] == ("" if live.is_hydra else "agent:self:register")
    signed = live.sign(live.claims("clawker-agent"), key=live.sandbox, kid="sandbox")
    granted = await live.post(data=live.form(signed, scope="agent:self:register"))
    assert (granted.status_code, granted.json()["scope"]) == (200, "agent:self:register")
    signed = live.sign(live.claims("clawker-agent"), key=live.sandbox)
    assert (await live.post(data=live.form(signed, scope=""))).status_code == 401


def hs256(claims: dict[str, Any], secret: bytes) -> str:
    """A token signed with a shared secret, as libraries no longer make it with a public key."""

    def part(octets: bytes) -> bytes:
        return base64.urlsafe_b64encode(octets).rstrip(b"=")

    text = part(b'{"alg":"HS256","typ":"JWT"}') + b"." + part(json.dumps(claims).encode())
    return (text + b"." + part(hmac.digest(secret, text, "sha256"))).decode()


def rejected(world: AuthorityWorld) -> dict[str, str]:
    """Assertions that must not count, by what is wrong with them."""
    now = int(world.now)
    other = ec.generate_private_key(ec.SECP256R1())
    secret = world.jwk().encode()
    good = world.sign(world.claims())
    return {
        "nothing": "",
        "garbage": "a.b.c",
        "foreign signature": world.sign(world.claims(), key=other),
        "no signature": ".".join(good.split(".")[:2]) + ".",
        "changed claims": world.sign(world.claims(sub="clawker-agent")),
        "alg none": jwt.encode(world.claims(), "", algorithm="none"),
        "HS256 with the public key": hs256(world.claims(), secret),
        "unknown kid": world.sign(world.claims(), kid="other"),
        "crit": world.sign(world.claims(), crit=["exp"]),
        "unknown client": world.sign(world.claims("clawker-nobody")),
        "iss is not sub": world.sign(world.claims(iss="clawker-agent")),
        "wrong aud": world.sign(world.claims(aud="https://127.0.0.1:4445/oauth2/token")),
        "two auds": world.sign(world.claims(aud=[world.audience, world.audience])),
        "no aud": world.sign(world.claims(aud=None)),
        "expired": world.sign(world.claims(iat=now - 60, exp=now - 11)),
        "too early": world.sign(world.claims(iat=now + 61, exp=now + 90)),
        "nbf in the future": world.sign(world.claims(nbf=now + 61)),
        "lives too long": world.sign(world.claims(exp=now + 301)),
        "no exp": world.sign(world.claims(exp=None)),
        "no iat": world.sign(world.claims(iat=None)),
        "no jti": world.sign(world.claims(jti=None)),
        "empty jti": world.sign(world.claims(jti="")),
        "spoilt signature": with_spoilt_signature(good),
        "too long": world.sign(world.claims(filler="x" * 9000)),
    }


async def test_every_bad_assertion_is_an_invalid_client(authority: AuthorityWorld) -> None:
    """One status, one code, one text for all of them; the cause is in our log, the assertion is not."""
    live = authority
    for what, assertion in rejected(live).items():
        with structlog.testing.capture_logs() as logs:
            answer = await live.post(data=live.form(assertion))
        assert reply(answer) == live.expected(what, (401, "invalid_client")), what
        if live.is_hydra:
            continue
        assert answer.json()["error_description"] == "client authentication failed", what
        (line,) = [line for line in logs if line["event"] == "token_refused"]
        assert line["cause"] and (not assertion or assertion not in repr(line)), what


async def test_the_leeway_is_that_of_the_contract(authority: AuthorityWorld) -> None:
    """Ten seconds past its end, and sixty before its beginning, still count; a one-element aud does."""
    live, now = authority, int(authority.now)
    for what, changes in (
        ("just ended", {"iat": now - 60, "exp": now - 9}),
        ("just too early", {"iat": now + 60, "exp": now + 90}),
        ("one aud", {"aud": [live.audience]}),
    ):
        assert reply(await live.post(data=live.form(live.sign(live.claims(**changes))))) == live.expected(what, SERVED)
    assert (await live.post(data=live.form(live.sign(live.claims(), kid="")))).status_code == 200


async def test_an_assertion_counts_once(authority: AuthorityWorld) -> None:
    """Of eight copies at the same time exactly one is a token, and also after a failed use it is spent."""
    live = authority
    copies = live.form(live.sign(live.claims()))
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(live.post(data=copies)) for _ in range(8)]
    spent = live.expected("used before", (401, "invalid_client"))
    assert sorted((reply(call.result()) for call in calls), key=lambda one: one[0]) == [SERVED] + [spent] * 7
    wasted = live.form(live.sign(live.claims()))
    assert (await live.post(data={**wasted, "scope": "everything"})).json()["error"] == "invalid_scope"
    assert reply(await live.post(data=wasted)) == spent


async def test_many_exchanges_at_once_all_count(authority: AuthorityWorld) -> None:
    """Sixty assertions at the same time are sixty tokens."""
    live = authority
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(live.token()) for _ in range(60)]
    assert len({call.result() for call in calls}) == 60


async def test_tokens_and_spent_numbers_outlive_the_process(world: EmbeddedWorld) -> None:
    """After a restart a token is still good, and an assertion spent before is still spent."""
    form = world.form(world.sign(world.claims()))
    async with world.running() as live:
        token = (await live.post(data=form)).json()["access_token"]
        revoked = await live.token()
        await live.authority.bar("digest", hashlib.sha256(revoked.encode()).hexdigest())
    async with world.running() as live:
        assert (await live.introspect(token=token))["active"] is True
        assert await live.introspect(token=revoked) == {"active": False}
        assert (await live.post(data=form)).status_code == 401


FORM = {"content-type": "application/x-www-form-urlencoded"}
MALFORMED: dict[str, tuple[dict[str, Any], int, str]] = {
    "JSON": ({"json": {}}, 400, "invalid_request"),
    "nothing at all": ({"content": b"", "headers": FORM}, 400, "invalid_request"),
    "repeated": ({"content": b"grant_type=a&grant_type=a", "headers": FORM}, 400, "invalid_request"),
    "undecodable": ({"content": b"grant_type=%ff", "headers": FORM}, 400, "invalid_request"),
    "octets": ({"content": b"\xff\xfe", "headers": FORM}, 400, "invalid_request"),
    "no pair": ({"content": b"no-pair", "headers": FORM}, 400, "invalid_request"),
    "another grant": ({"content": b"grant_type=authorization_code", "headers": FORM}, 400, "unsupported_grant_type"),
    "no assertion": ({"content": b"grant_type=client_credentials", "headers": FORM}, 401, "invalid_client"),
    "wrong assertion type": (
        {"content": b"grant_type=client_credentials&client_assertion_type=x&client_assertion=y", "headers": FORM},
        401,
        "invalid_client",
    ),
    "giant": ({"content": b"a=" + b"x" * 17_000, "headers": FORM}, 413, "invalid_request"),
}


async def test_malformed_requests_have_their_row(authority: AuthorityWorld) -> None:
    """Wrong types, repeated and undecodable parameters, other grants, giants; no input is repeated."""
    for what, (arguments, status, error) in MALFORMED.items():
        answer = await authority.post(**arguments)
        assert reply(answer) == authority.expected(what, (status, error)), what


async def test_a_client_id_that_is_not_the_subject_is_refused(authority: AuthorityWorld) -> None:
    """Present it has to be equal; unknown fields are ignored."""
    live = authority
    assert (await live.post(data=live.form(live.sign(live.claims()), client_id="clawker-agent"))).status_code == 401
    answer = await live.post(data=live.form(live.sign(live.claims()), client_id="clawker-cli", more="ignored"))
    assert answer.status_code == 200


async def test_other_methods_and_places(authority: AuthorityWorld) -> None:
    """405 says what is allowed, and nothing of the admin API is on the public port."""
    live = authority
    answer = await live.http.get(f"{live.public}/oauth2/token")
    assert (answer.status_code, answer.headers["allow"], answer.json()["error"]) == (405, "POST", "invalid_request")
    for path in ("/admin/clients", "/admin/oauth2/introspect", "/", "/oauth2/token/x", "/oauth2/auth"):
        assert (await live.http.post(f"{live.public}{path}")).status_code == 404, path
    metadata = (await live.http.get(f"{live.public}/.well-known/openid-configuration")).json()
    assert (metadata["issuer"], metadata["token_endpoint"]) == (live.issuer, live.audience)
    for base in (live.public, live.admin):
        for path in ("alive", "ready"):
            assert (await live.http.get(f"{base}/health/{path}")).json() == {"status": "ok"}


async def test_readiness_waits_for_clients(world: EmbeddedWorld) -> None:
    """Alive from the start, ready once somebody can get a token, on both ports; who asks before is told to wait."""
    async with world.running(register=False) as live:
        for base in (live.public, live.admin):
            assert (await live.http.get(f"{base}/health/alive")).json() == {"status": "ok"}
            answer = await live.http.get(f"{base}/health/ready")
            assert (answer.status_code, answer.json()) == (503, {"status": "starting"})
        early = await live.post(data=live.form(live.sign(live.claims())))
        assert (reply(early), early.headers["retry-after"]) == ((503, "temporarily_unavailable"), "1")
        await register_cli_client(live.admin, live.jwk(), live.tls)
        assert (await live.http.get(f"{live.public}/health/ready")).status_code == 200


async def test_registration_is_repeated_without_harm_and_follows_a_new_key(authority: AuthorityWorld) -> None:
    """A second time is success; a re-minted key replaces the old one; garbage is an error that says why."""
    live = authority
    await register_cli_client(live.admin, live.jwk(), live.tls)
    old = live.sign(live.claims())
    live.key = ec.generate_private_key(ec.SECP256R1())
    await register_cli_client(live.admin, live.jwk(), live.tls)
    assert (await live.post(data=live.form(old))).status_code == 401
    await live.token()
    for document, field_ in (
        ({}, "client_id"),
        ({"client_id": "a/b"}, "client_id"),
        ({"client_id": "x", "scope": "s", "grant_types": ["implicit"]}, "grant_types"),
    ):
        answer = await live.http.post(f"{live.admin}/admin/clients", json=document)
        if live.is_hydra:  # anything is a client there; none of these can get a token
            assert answer.status_code == 201
            continue
        assert answer.status_code == 400 and field_ in answer.json()["error_description"]
    with pytest.raises(Unavailable, match="clawker-cli"):
        await register_cli_client("https://localhost:1", live.jwk(), live.tls)


async def test_revoking_ends_a_token(authority: AuthorityWorld) -> None:
    """Its own client may; another's request, and a token nobody knows, are 200 and change nothing; later ones count."""
    live = authority
    token, kept = await live.token(), await live.token()
    url = f"{live.public}/oauth2/revoke"
    other = live.form(live.sign(live.claims("clawker-agent")), token=token)
    assert (await live.http.post(url, data=other)).status_code == 200
    assert (await live.introspect(token=token))["active"] is True
    mine = live.form(live.sign(live.claims()), token=token)
    answer = await live.http.post(url, data=mine)
    assert (answer.status_code, answer.content) == (200, b"")
    assert await live.introspect(token=token) == {"active": False}
    assert (await live.http.post(url, data=live.form("x", token=token))).status_code == 401
    unknown = live.form(live.sign(live.claims()), token="garbage")
    assert (await live.http.post(url, data=unknown)).status_code == 200
    assert (await live.introspect(token=kept))["active"] is True
    assert (
        await live.http.delete(f"{live.admin}/admin/oauth2/tokens", params={"client_id": "clawker-cli"})
    ).status_code == 204
    assert await live.introspect(token=kept) == {"active": False}
    # Also in the same second: whoever is told that all are revoked fetches a new one at once.
    assert (await live.introspect(token=await live.token()))["active"] is True


async def test_no_foreign_token_is_active(authority: AuthorityWorld) -> None:
    """Garbage, another key's, another issuer's and an ended one are all the same answer."""
    live = authority
    token = await live.token()
    claims = jwt.decode(token, options={"verify_signature": False})
    forged = jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256")
    unsigned = jwt.encode(claims, "", algorithm="none")
    for text in ("garbage", "a.b.c", forged, with_spoilt_signature(token), unsigned):
        assert await live.introspect(token=text) == {"active": False}, text
    answer = await live.http.post(f"{live.admin}/admin/oauth2/introspect", data={"token": ""})
    assert reply(answer) == live.expected("no token", (400, "invalid_request"))
    if isinstance(live, EmbeddedWorld):  # the other one has a clock of its own
        live.now += 3600
        assert await live.introspect(token=token) == {"active": False}


async def test_one_address_gets_so_many_exchanges(either: AuthorityWorld) -> None:
    """Beyond the burst it is 429 with a time to wait."""
    either.rate = 1
    async with either.running() as live:
        answers = [(await live.post(data={})).status_code for _ in range(210)]
        assert answers[:199] == [400] * 199 and answers[-1] == 429
        answer = await live.post(data={})
        assert (answer.headers["retry-after"], answer.json()["error"]) == ("1", "temporarily_unavailable")


@pytest.mark.slow
async def test_tls_is_1_3_and_slow_or_silent_connections_end(authority: AuthorityWorld) -> None:
    """An older version is refused in the handshake; a head or a body that does not come is not waited for."""
    old = authority.ca.client_context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", authority.public_port, ssl=old, server_hostname="localhost")
    head = b"POST /oauth2/token HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    async with asyncio.timeout(20):
        for sent in (b"", b"POST /oauth2/to", head + b"half"):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", authority.public_port, ssl=authority.tls, server_hostname="localhost"
            )
            writer.write(sent)
            answer = await reader.read()
            assert not answer or answer.startswith(b"HTTP/1.1 408"), answer
            writer.close()


async def test_a_head_without_end_is_refused(authority: AuthorityWorld) -> None:
    """More than 16 KiB of headers end the connection."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", authority.public_port, ssl=authority.tls, server_hostname="localhost"
    )
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 40_000)
    async with asyncio.timeout(10):
        try:
            answer = await reader.read()
        except ConnectionError:
            answer = b""
    assert not answer or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    writer.close()


async def test_a_taken_port_is_named(live: EmbeddedWorld) -> None:
    """Nothing stays bound after the refusal."""
    listener = HttpListener("token endpoint", admin_application(live.authority), [("127.0.0.1", live.public_port)])
    with pytest.raises(Conflict, match=f"token endpoint: cannot listen on 127.0.0.1:{live.public_port}"):
        listener.open()
    assert listener.ports == []


def test_a_signing_key_is_never_replaced_by_accident(tmp_path: Path) -> None:
    """Made once and kept; a file that holds something else is an error that says what it would cost."""
    path = tmp_path / "token-signing.key"
    first = signing_key(path)
    assert signing_key(path).private_numbers() == first.private_numbers()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"garbage")
    with pytest.raises(Unavailable, match="holds no P-256 key"):
        signing_key(path)
    assert path.read_bytes() == b"garbage"
    with pytest.raises(Unavailable, match="cannot be read: Is a directory"):
        signing_key(tmp_path)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"no json", "not JSON"),
        (b"[]", "not an object"),
        (b'{"client_id":"c"}', "scope: is missing"),
        (b'{"client_id":"c","scope":["s"]}', "scope: is missing"),
        (b'{"client_id":"c","scope":"s","grant_types":["client_credentials"]}', "private_key_jwt"),
        (
            b'{"client_id":"c","scope":"s","grant_types":["client_credentials"],"token_endpoint_auth_method":'
            b'"private_key_jwt","token_endpoint_auth_signing_alg":"RS256"}',
            "only ES256",
        ),
    ],
)
def test_a_registration_that_cannot_be_kept_names_its_field(body: bytes, says: str) -> None:
    """Whatever is wrong, nobody is registered with less than a key of ours."""
    with pytest.raises(InvalidInput, match=says):
        read_registration(body, lambda _client: 30)


async def test_malformed_questions_of_the_admin_side(live: EmbeddedWorld) -> None:
    """A client put under another's name, a deletion of nobody's tokens and a revocation of nothing are 400."""
    clients = f"{live.admin}/admin/clients"
    document = (await live.http.get(f"{clients}/clawker-cli")).json()
    assert (await live.http.put(f"{clients}/clawker-agent", json=document)).status_code == 400
    assert (await live.http.delete(f"{live.admin}/admin/oauth2/tokens")).status_code == 400
    assert (await live.http.post(f"{live.public}/oauth2/revoke", data={"x": "y"})).status_code == 400
    assert (await live.authority.introspect("garbage", "admin")).active is False


async def test_revocations_count_against_the_rate(world: EmbeddedWorld) -> None:
    """One address cannot keep the authority busy with tokens that nobody has."""
    world.rate = 1
    async with world.running() as live:
        url = f"{live.public}/oauth2/revoke"
        assert 429 in [(await live.http.post(url, data={"token": "x"})).status_code for _ in range(210)]
