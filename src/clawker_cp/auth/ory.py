"""
The Ory servers' configuration: files that the real Hydra, Kratos and Oathkeeper accept, and their command lines.

Everything listens on this host's loopback; Hydra's public port is 4446, because our front owns the one that
clients know (`auth.front`). Starting and supervising the servers is `wiring.ory_stack`'s job.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from clawker_cp.config import Settings
from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.durable import write_durably

LOOPBACK = "127.0.0.1"
HYDRA_BEHIND_FRONT = 4446
OATHKEEPER_METRICS = 4458
LEAST_SECRET = 16  # characters; Hydra refuses less
TREE = Path("/etc/clawker/auth/tls")
# Kratos starts with no flow of its own, but wants one identity schema with traits.
IDENTITY_SCHEMA = {
    "$id": "https://clawker.dev/identity.schema.json",
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"traits": {"type": "object", "properties": {"name": {"type": "string"}}}},
}
# One rule that lets nobody through: Oathkeeper is not ready without any.
DENY_ALL = [
    {
        "id": "deny-all",
        "match": {"url": "<.*>", "methods": ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]},
        "authenticators": [{"handler": "noop"}],
        "authorizer": {"handler": "deny"},
        "mutators": [{"handler": "noop"}],
    }
]


@dataclass(frozen=True, slots=True)
class OryConfigs:
    """Where the three files are, and Hydra's database."""

    hydra: Path
    kratos: Path
    oathkeeper: Path
    dsn: str


def write_ory_configs(
    settings: Settings,
    hydra_secret: str,
    directory: Path,
    *,
    certificate: Path = TREE / "server.pem",
    key: Path = TREE / "server.key",
    behind_port: int = HYDRA_BEHIND_FRONT,
) -> OryConfigs:
    """
    Write `hydra.yaml`, `kratos.yaml` and `oathkeeper.yaml` into `directory`, mode 0600, replacing what is there.

    They are written at every start, so that they always fit this version; equal input gives equal files. Hydra's
    public port is `behind_port`, its issuer that of the front.
    Raises `InvalidInput` for a secret that Hydra would refuse.
    """
    if len(hydra_secret) < LEAST_SECRET:
        raise InvalidInput(f"hydra_secret: has to have at least {LEAST_SECRET} characters")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    dsn = f"sqlite://{directory / 'hydra.db'}?_fk=true&_journal_mode=WAL&_busy_timeout=5000"
    pair = {"cert": {"path": str(certificate)}, "key": {"path": str(key)}}
    configs = OryConfigs(directory / "hydra.yaml", directory / "kratos.yaml", directory / "oathkeeper.yaml", dsn)
    for path, document in (
        (configs.hydra, hydra_config(settings, hydra_secret, dsn, pair, behind_port)),
        (configs.kratos, kratos_config(settings, pair)),
        (configs.oathkeeper, oathkeeper_config(settings, pair)),
    ):
        write_durably(path, _yaml(document), mode=0o600)
    return configs


def hydra_config(
    settings: Settings, secret: str, dsn: str, pair: Mapping[str, Any], behind_port: int
) -> dict[str, Any]:
    """
    Hydra: JWT access tokens of an hour, a file database, both ports on loopback with TLS.
    """
    ports = settings.cli.control_plane
    issuer = f"https://{LOOPBACK}:{ports.hydra_public_port}/"
    return {
        "dsn": dsn,
        "log": {"level": "warn", "format": "json"},
        "serve": {
            "public": {"host": LOOPBACK, "port": behind_port},
            "admin": {"host": LOOPBACK, "port": ports.hydra_admin_port},
            "tls": {"enabled": True, **pair},
        },
        # The issuer is the front's: assertions name it as their audience.
        "urls": {"self": {"issuer": issuer, "public": issuer}},
        "strategies": {"access_token": "jwt"},
        "secrets": {"system": [secret]},
        "ttl": {"access_token": "1h"},
    }


def kratos_config(settings: Settings, pair: Mapping[str, Any]) -> dict[str, Any]:
    """
    Kratos: no database on disk and no self-service flow.
    """
    ory = settings.ory
    schema = base64.b64encode(json.dumps(IDENTITY_SCHEMA, sort_keys=True).encode()).decode()

    def served(port: int) -> dict[str, Any]:
        return {"host": LOOPBACK, "port": port, "base_url": f"https://{LOOPBACK}:{port}/", "tls": dict(pair)}

    return {
        "dsn": "memory",
        "log": {"level": "warning", "format": "json"},  # `warn` is refused here, `warning` by the others
        "serve": {"public": served(ory.kratos_public_port), "admin": served(ory.kratos_admin_port)},
        "selfservice": {"default_browser_return_url": f"https://{LOOPBACK}:{ory.kratos_public_port}/"},
        "identity": {"default_schema_id": "none", "schemas": [{"id": "none", "url": f"base64://{schema}"}]},
    }


def oathkeeper_config(settings: Settings, pair: Mapping[str, Any]) -> dict[str, Any]:
    """
    Oathkeeper: one rule that denies everything, metrics on loopback instead of every interface.
    """
    ory = settings.ory
    rules = base64.b64encode(json.dumps(DENY_ALL, sort_keys=True).encode()).decode()
    return {
        "log": {"level": "warn", "format": "json"},
        "serve": {
            "proxy": {"host": LOOPBACK, "port": ory.oathkeeper_proxy_port, "tls": dict(pair)},
            "api": {"host": LOOPBACK, "port": ory.oathkeeper_api_port, "tls": dict(pair)},
            "prometheus": {"host": LOOPBACK, "port": OATHKEEPER_METRICS},
        },
        "access_rules": {"repositories": [f"inline://{rules}"]},
        "authenticators": {"noop": {"enabled": True}},
        "authorizers": {"deny": {"enabled": True}},
        "mutators": {"noop": {"enabled": True}},
        "errors": {"handlers": {"json": {"enabled": True}}},
    }


def _yaml(document: Mapping[str, Any]) -> bytes:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    text = io.BytesIO()
    yaml.dump(document, text)
    return text.getvalue()
