"""Telemetry material on disk: whole directories, written only when needed."""

from __future__ import annotations

import datetime as dt
import stat
from pathlib import Path

import pytest

from clawker_cp.pki.certificates import load_identity
from clawker_cp.pki.infracerts import InfraCertificates
from clawker_cp.pki.otelcerts import provision
from clawker_cp.pki.tree import INFRA_CA, AuthTree

NOW = dt.datetime.now(dt.UTC)


@pytest.fixture
def tree(tmp_path: Path) -> AuthTree:
    tree = AuthTree(tmp_path / "auth", now=lambda: NOW)
    tree.ensure()
    return tree


def test_material_is_written_once_and_renewed_when_due(tree: AuthTree, tmp_path: Path) -> None:
    """Readable by the service's user, unchanged while good, and nothing is left beside it."""
    out = tmp_path / "otel-clients"
    assert provision(out, "envoy", tree, InfraCertificates(tree), NOW)
    files = {path.name: path.read_bytes() for path in (out / "envoy").iterdir()}
    assert set(files) == {"client.pem", "client.key", "ca.pem"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (out / "envoy").iterdir()} == {0o644}
    load_identity(files["client.pem"], files["client.key"])
    assert not provision(out, "envoy", tree, InfraCertificates(tree), NOW)
    assert provision(out, "envoy", tree, InfraCertificates(tree), NOW + dt.timedelta(days=340))
    assert (out / "envoy" / "client.pem").read_bytes() != files["client.pem"]
    assert [path.name for path in out.iterdir()] == ["envoy"]


@pytest.mark.parametrize("spoil", ["client.pem", "client.key", "ca.pem"])
def test_broken_material_is_made_anew(tree: AuthTree, tmp_path: Path, spoil: str) -> None:
    """Whichever file is gone or garbage."""
    provision(tmp_path, "envoy", tree, InfraCertificates(tree), NOW)
    (tmp_path / "envoy" / spoil).write_bytes(b"garbage")
    assert provision(tmp_path, "envoy", tree, InfraCertificates(tree), NOW)
    assert not provision(tmp_path, "envoy", tree, InfraCertificates(tree), NOW)


def test_material_of_an_earlier_intermediate_is_replaced(tree: AuthTree, tmp_path: Path) -> None:
    """After the tree was rotated the old leaf would not be trusted."""
    provision(tmp_path, "envoy", tree, InfraCertificates(tree), NOW)
    before = tree.path(INFRA_CA.certificate).read_bytes()
    tree.rotate()
    assert tree.path(INFRA_CA.certificate).read_bytes() != before
    assert provision(tmp_path, "envoy", tree, InfraCertificates(tree), NOW)
