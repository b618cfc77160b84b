"""
A plan as one static configuration, for an Envoy that only judges it (`--mode validate`, R19).

Pure. In that mode Envoy reads no dynamic files, so routes and secrets are put where it looks.
"""

from __future__ import annotations

from typing import Any

import orjson

from clawker_cp.firewall.envoy.options import EnvoyOptions
from clawker_cp.firewall.envoy.resources import CDS, LDS, ConfigFile, Resources, bootstrap


def static_configuration(resources: Resources, options: EnvoyOptions) -> bytes:
    """Return a bootstrap that holds everything a plan says, without subscriptions."""
    document = orjson.loads(bootstrap(options))
    del document["dynamic_resources"]
    secrets: list[dict[str, Any]] = []
    routes: dict[str, dict[str, Any]] = {}
    for name, file in resources.files.items():
        if file.secret:
            secrets += _read(file)
        elif name not in (CDS, LDS):
            routes.update((one["name"], one) for one in _read(file))
    static = document["static_resources"]
    static["clusters"] = _read(resources.files[CDS])
    static["secrets"] = secrets
    static["listeners"] += [_inline(listener, routes) for listener in _read(resources.files[LDS])]
    return orjson.dumps(document)


def _read(file: ConfigFile) -> list[dict[str, Any]]:
    return [_plain(orjson.loads(data)) for data in file.resources.values()]


def _plain(resource: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in resource.items() if key != "@type"}


def _inline(value: Any, found: dict[str, dict[str, Any]]) -> Any:
    """Put routes in the place of their subscription; secrets are found by name."""
    if isinstance(value, list):
        return [_inline(one, found) for one in value]
    if not isinstance(value, dict):
        return value
    made = {key: _inline(one, found) for key, one in value.items() if key not in ("rds", "sds_config")}
    if "rds" in value:
        made["route_config"] = found[value["rds"]["route_config_name"]]
    return made
