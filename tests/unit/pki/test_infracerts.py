"""Infrastructure leaves: from the intermediate, kept until due, for sane names only."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from clawker_cp.errors import ClawkerError, InvalidInput
from clawker_cp.pki.certificates import problems
from clawker_cp.pki.infracerts import InfraCertificates
from clawker_cp.pki.profiles import infra_client
from clawker_cp.pki.tree import INFRA_CA, AuthTree

NOW = dt.datetime.now(dt.UTC)


@pytest.fixture
def tree(tmp_path: Path) -> AuthTree:
    tree = AuthTree(tmp_path / "auth", now=lambda: NOW)
    tree.ensure()
    return tree


def test_a_leaf_is_kept_until_it_is_due(tree: AuthTree) -> None:
    """The same one is given out for eleven months, then a new one."""
    certificates = InfraCertificates(tree)
    leaf = certificates.leaf("netlogger", NOW)
    intermediate = tree.identity(INFRA_CA).certificate
    assert list(problems(leaf.certificate, infra_client("netlogger"), intermediate, NOW)) == []
    assert certificates.leaf("netlogger", NOW + dt.timedelta(days=334)) is leaf
    assert certificates.leaf("netlogger", NOW + dt.timedelta(days=336)) is not leaf


@pytest.mark.parametrize("service", ["", "Upper", "a.b", "-x", "x" * 60, "a b"])
def test_a_name_that_is_no_label_is_refused(tree: AuthTree, service: str) -> None:
    """It would become a DNS name and a directory."""
    with pytest.raises(InvalidInput, match="service"):
        InfraCertificates(tree).leaf(service, NOW)


def test_a_missing_intermediate_is_named(tree: AuthTree) -> None:
    """The error has the file."""
    tree.path(INFRA_CA.key).unlink()
    with pytest.raises(ClawkerError, match="infra-ca"):
        InfraCertificates(tree).leaf("cp", NOW)
