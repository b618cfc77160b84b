"""Registering our clients: what is sent, what is success, and what is told when it is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from clawker_cp.auth.clients import register_agent_client, register_cli_client
from clawker_cp.errors import InvalidInput, Unavailable
from clawker_cp.pki.certificates import new_key
from clawker_cp.runtime.asgi import Answer, Application, Request
from clawker_cp.runtime.jwk import public_jwk
from clawker_cp.runtime.listeners import HttpListener
from clawker_cp.testing.certificates import TestCa

KEY, OTHER = (public_jwk(new_key().public_key()) for _ in range(2))


class Authority:
    """An admin API that answers what a test wants."""

    def __init__(self, ca: TestCa) -> None:
        self.ca = ca
        self.seen: list[tuple[str, str, dict[str, object]]] = []
        self.answers: dict[str, Answer] = {}
        self.url = ""

    async def handle(self, request: Request) -> Answer:
        self.seen.append((request.method, request.path, json.loads(request.body or b"{}")))
        return self.answers[request.method]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Authority]:
        routes = {("/admin/clients", "POST"): self.handle}
        routes |= {("/admin/clients/", method): self.handle for method in ("GET", "PUT")}
        listener = HttpListener("admin", Application(routes), [("127.0.0.1", 0)])
        listener.open()
        self.url = f"https://localhost:{listener.ports[0]}/"
        async with asyncio.TaskGroup() as group:
            group.create_task(listener.run(self.ca.server_context()))
            try:
                yield self
            finally:
                listener.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(TestCa(tmp_path))


async def test_a_new_client_is_created_with_a_wrapped_key(authority: Authority) -> None:
    """A bare JWK becomes a set with `use` and `alg`, or Hydra would store none."""
    authority.answers["POST"] = Answer(201, {"client_secret": "never shown"})
    bare = {name: KEY[name] for name in ("kty", "crv", "x", "y")}
    async with authority.running():
        await register_cli_client(authority.url, json.dumps(bare), authority.ca.client_context())
        both = json.dumps({"keys": [KEY, {**OTHER, "kid": "sandbox"}]})
        await register_agent_client(authority.url, both, authority.ca.client_context())
    first, second = (document for _, _, document in authority.seen)
    assert first == {
        "client_id": "clawker-cli", "grant_types": ["client_credentials"], "scope": "admin",
        "token_endpoint_auth_method": "private_key_jwt", "token_endpoint_auth_signing_alg": "ES256",
        "jwks": {"keys": [KEY]},
    }  # fmt: skip
    assert second["scope"] == "agent:self:register"
    assert second["jwks"] == {"keys": [KEY, {**OTHER, "kid": "sandbox"}]}


@pytest.mark.parametrize(
    ("known", "methods"),
    [
        (lambda: Answer(200, {"jwks": {"keys": [KEY]}, "scope": "admin"}), ["POST", "GET"]),
        (lambda: Answer(200, {"jwks": {"keys": [OTHER]}, "scope": "admin"}), ["POST", "GET", "PUT"]),
        (lambda: Answer(200, {"jwks": {"keys": [KEY]}, "scope": "other"}), ["POST", "GET", "PUT"]),
        (lambda: Answer(200, b"no json"), ["POST", "GET", "PUT"]),
        (lambda: Answer(500), ["POST", "GET", "PUT"]),
    ],
)
async def test_an_existing_client_is_replaced_if_it_differs(
    authority: Authority, known: Callable[[], Answer], methods: list[str]
) -> None:
    """409 is success; with other keys or another scope it is put anew."""
    authority.answers = {"POST": Answer(409), "GET": known(), "PUT": Answer(200)}
    async with authority.running():
        await register_cli_client(authority.url, json.dumps(KEY), authority.ca.client_context())
    assert [method for method, _, _ in authority.seen] == methods


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"POST": Answer(200, {"client_secret": "hush"})}, "200"),
        ({"POST": Answer(400, {"error": "bad scope"})}, "400.*bad scope"),
        ({"POST": Answer(409), "GET": Answer(404), "PUT": Answer(404, {"error": "gone"})}, "404.*gone"),
    ],
)
async def test_anything_else_is_an_error_without_secrets(
    authority: Authority, answers: dict[str, Answer], said: str
) -> None:
    """Client, status and, of a refusal, the body; of a strange success nothing."""
    authority.answers = answers
    async with authority.running():
        with pytest.raises(Unavailable, match=f"(?s)clawker-cli.*{said}") as refused:
            await register_cli_client(authority.url, json.dumps(KEY), authority.ca.client_context())
    assert "hush" not in str(refused.value)


async def test_nobody_there_and_no_key_are_errors(authority: Authority) -> None:
    """Before and after dialling."""
    with pytest.raises(Unavailable, match="clawker-agent"):
        await register_agent_client("https://localhost:1", json.dumps(KEY), authority.ca.client_context())
    with pytest.raises(InvalidInput, match="jwk"):
        await register_cli_client("https://localhost:1", "{}", authority.ca.client_context())
