"""The three files: where they are, who may read them, what they say. That the real servers take them: tests/e2e."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ruamel.yaml import YAML

from clawker_cp.auth.ory import write_ory_configs
from clawker_cp.config import CliPorts, CliSettings, OrySettings, Settings
from clawker_cp.errors import InvalidInput

PORTS = CliPorts(hydra_public_port=14444, hydra_admin_port=14445)
ORY = OrySettings(
    oathkeeper_proxy_port=14456, oathkeeper_api_port=14457, kratos_public_port=14433, kratos_admin_port=14434
)


def written(directory: Path) -> dict[str, Any]:
    settings = msgspec.structs.replace(Settings(), ory=ORY, cli=CliSettings(control_plane=PORTS))
    configs = write_ory_configs(settings, "s" * 64, directory, certificate=Path("/c.pem"), key=Path("/k.pem"))
    yaml = YAML(typ="safe", pure=True)
    return {path.stem: yaml.load(path.read_text()) for path in (configs.hydra, configs.kratos, configs.oathkeeper)}


def test_the_ports_are_those_of_the_settings_and_all_on_loopback(tmp_path: Path) -> None:
    """Hydra behind the front, the others as set, every one with our certificate."""
    said = written(tmp_path)
    served = [
        said["hydra"]["serve"]["public"], said["hydra"]["serve"]["admin"],
        *said["kratos"]["serve"].values(), *said["oathkeeper"]["serve"].values(),
    ]  # fmt: skip
    assert [one["host"] for one in served] == ["127.0.0.1"] * 7
    assert sorted(one["port"] for one in served) == [4446, 4458, 14433, 14434, 14445, 14456, 14457]
    pair = {"cert": {"path": "/c.pem"}, "key": {"path": "/k.pem"}}
    assert said["hydra"]["serve"]["tls"] == {"enabled": True, **pair}
    assert [one["tls"] for one in served if one["port"] in {14433, 14434, 14456, 14457}] == [pair] * 4
    assert said["hydra"]["urls"]["self"]["issuer"] == "https://127.0.0.1:14444/"
    (rule,) = json.loads(
        base64.b64decode(said["oathkeeper"]["access_rules"]["repositories"][0].removeprefix("inline://"))
    )
    assert rule["authorizer"] == {"handler": "deny"}


def test_they_are_written_again_and_equal_and_nobody_else_reads_them(tmp_path: Path) -> None:
    """Mode 0600 in a directory of 0700; what somebody changed is ours again."""
    directory = tmp_path / "ory"
    first = written(directory)
    for path in directory.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        path.write_text("spoilt")
    assert directory.stat().st_mode & 0o777 == 0o700
    assert written(directory) == first


def test_a_secret_that_hydra_would_refuse_is_refused_here(tmp_path: Path) -> None:
    """And nothing is written."""
    with pytest.raises(InvalidInput, match="hydra_secret"):
        write_ory_configs(Settings(), "short", tmp_path / "ory")
    assert not (tmp_path / "ory").exists()
