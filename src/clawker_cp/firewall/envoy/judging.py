"""
A plan as one static configuration, for an Envoy that only judges it (`--mode validate`, R19).

In that mode Envoy reads no dynamic files, so routes and secrets are put where it looks.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson

from clawker_cp.errors import ClawkerError, DeadlineExceeded, Unavailable
from clawker_cp.firewall.envoy.options import EnvoyOptions
from clawker_cp.firewall.envoy.resources import CDS, LDS, ConfigFile, Resources, bootstrap

VALIDATE_LIMIT_S = 20.0


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


async def judge(binary: Path, configuration: Path) -> None:
    """
    Let an Envoy that serves nothing read a configuration.

    Raises `ClawkerError` `RULE_INVALID` with its words; `Unavailable` or `DeadlineExceeded` when it did not say.
    """
    process = await asyncio.create_subprocess_exec(
        str(binary), "--mode", "validate", "-c", str(configuration), "-l", "error",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(VALIDATE_LIMIT_S):
            output, _ = await process.communicate()
    except TimeoutError as error:
        raise DeadlineExceeded("Envoy did not finish judging the change", code="STACK_UNHEALTHY") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode is not None and process.returncode < 0:
        raise Unavailable(
            "Envoy was killed while it judged the change", code="STACK_UNHEALTHY", hint="nothing was changed; try again"
        )
    if process.returncode:
        words = output.decode("utf-8", "replace").strip().splitlines()
        raise ClawkerError(f"Envoy refused the change: {words[-1] if words else ''}", code="RULE_INVALID")
