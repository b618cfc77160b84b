"""Tests of the inspection CA and its leaves."""

from __future__ import annotations

import contextlib
import datetime as dt
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from cryptography.x509.verification import PolicyBuilder, Store

from clawker_cp.errors import CapacityExceeded, ClawkerError
from clawker_cp.firewall import inspection
from clawker_cp.firewall.inspection import InspectionAuthority, shard_of
from clawker_cp.firewall.plan import Plan, Policy
from clawker_cp.runtime.durable import write_durably
from clawker_cp.testing.plan_world import build, rule


class Killed(Exception):
    """The process ends here."""


def _authority(directory: Path, **more: Any) -> InspectionAuthority:
    authority = InspectionAuthority(directory / "certs", **more)
    authority.open()
    return authority


def _plan(*sans: str) -> Plan:
    return Plan({1: Policy(1, "global", sans=sans)}, {}, frozenset(), {}, frozenset(), ())


def _verify(chain_pem: str, name: str, *trusted: str) -> None:
    leaf, *more = x509.load_pem_x509_certificates(chain_pem.encode())
    store = Store([x509.load_pem_x509_certificate(pem.encode()) for pem in trusted])
    PolicyBuilder().store(store).build_server_verifier(x509.DNSName(name)).verify(leaf, more)


def test_the_ca_has_its_profile_and_its_key_is_private(tmp_path: Path) -> None:
    """Two CAs never share a name; pathlen 1, ten years, directory and key closed."""
    authority = _authority(tmp_path)
    certificate = x509.load_pem_x509_certificate(authority.certificate_pem().encode())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)

    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "Clawker Firewall CA"
    assert len(str(certificate.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)[0].value)) == 16
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 1)
    assert stat.S_IMODE((tmp_path / "certs").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "certs/ca-key.pem").stat().st_mode) == 0o600
    assert _authority(tmp_path / "other").certificate_pem() != authority.certificate_pem()


def test_leaves_are_minted_once_and_reused(tmp_path: Path) -> None:
    """Same names, same certificate: in this life and the next."""
    plan = _plan("api.example.com", "*.wild.example", "wild.example")
    first = _authority(tmp_path).leaves(plan)

    again = _authority(tmp_path)
    assert again.leaves(plan) == first
    assert again.leaves(plan) == first


def test_a_new_name_re_mints_its_shard_only(tmp_path: Path) -> None:
    """The other shard of the policy keeps its certificate."""
    authority = _authority(tmp_path)
    before = authority.leaves(_plan("a.example.com"))
    after = authority.leaves(_plan("a.example.com", "b.example.com"))
    changed = {name for name in before if before[name] != after[name]}

    assert changed == {f"p1_s{shard_of('b.example.com')}"}


def test_leaves_hold_their_names_and_verify(tmp_path: Path) -> None:
    """Exact, wildcard and apex names verify against the CA; a wildcard and its base share a shard."""
    authority = _authority(tmp_path)
    leaves = authority.leaves(_plan("api.example.com", "*.wild.example", "wild.example"))

    assert shard_of("*.wild.example") == shard_of("wild.example")
    for name in ("api.example.com", "wild.example", "x.wild.example"):
        shard = shard_of("wild.example" if "wild" in name else name)
        _verify(leaves[f"p1_s{shard}"].chain_pem, name, authority.certificate_pem())
    assert "PRIVATE" not in repr(leaves)


def test_an_empty_shard_holds_a_name_that_nobody_has(tmp_path: Path) -> None:
    """Envoy gets a certificate for every shard, `none.invalid` if there is nothing to serve."""
    leaves = _authority(tmp_path).leaves(_plan())
    certificate = x509.load_pem_x509_certificate(leaves["p1_s0"].chain_pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert names.get_values_for_type(x509.DNSName) == ["none.invalid"]


def test_address_rules_get_a_leaf_with_the_address(tmp_path: Path) -> None:
    """The SAN is an IP address, and the files have the contract's names."""
    leaves = _authority(tmp_path).leaves(build(rule("https://192.0.2.7")).plan)
    leaf = leaves["addr-192.0.2.7"]
    certificate = x509.load_pem_x509_certificate(leaf.chain_pem.encode())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value

    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]
    assert Path(leaf.cert_path).name == "addr-192_0_2_7-cert.pem"
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(leaf.cert_path, leaf.key_path)


def test_a_rotation_breaks_nobody(tmp_path: Path) -> None:
    """After it clients that trust the old CA, and clients that trust the new one, verify what is served."""
    authority = _authority(tmp_path)
    old = authority.certificate_pem()
    plan = _plan("api.example.com")
    before = authority.leaves(plan)
    authority.rotate()
    new = authority.certificate_pem()
    name = f"p1_s{shard_of('api.example.com')}"
    leaves = authority.leaves(plan)

    assert new != old
    assert leaves[name] != before[name]
    _verify(leaves[name].chain_pem, "api.example.com", old)
    _verify(leaves[name].chain_pem, "api.example.com", new)
    assert _authority(tmp_path).leaves(plan) == leaves


@pytest.mark.parametrize("written", range(5))
def test_a_rotation_that_was_killed_is_done_or_never_was(
    tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its files was written last, the next start has a whole CA, and who trusts the old one is served."""
    authority = InspectionAuthority(tmp_path)
    authority.open()
    old, count = authority.certificate_pem(), 0

    def write_some(*arguments: Any) -> None:
        nonlocal count
        if count == written:
            raise Killed
        count += 1
        write_durably(*arguments)

    monkeypatch.setattr(inspection, "write_durably", write_some)
    with contextlib.suppress(Killed):
        authority.rotate()
    monkeypatch.undo()
    following = InspectionAuthority(tmp_path)
    following.open()
    assert (following.certificate_pem() == old) is (written == 0)
    assert len(list(tmp_path.glob("ca-*"))) == (2 if written == 0 else 3)
    if written:
        _verify(
            following.leaves(_plan("a.example.com"))[f"p1_s{shard_of('a.example.com')}"].chain_pem, "a.example.com", old
        )


def test_a_first_ca_that_was_killed_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key alone, from a start that was killed between the two files, does not keep the next one from starting."""

    def write_key_only(path: Path, *arguments: Any) -> None:
        if path.name == "ca-cert.pem":
            raise Killed
        write_durably(path, *arguments)

    monkeypatch.setattr(inspection, "write_durably", write_key_only)
    with pytest.raises(Killed):
        InspectionAuthority(tmp_path).open()
    monkeypatch.undo()
    authority = InspectionAuthority(tmp_path)
    authority.open()
    assert authority.certificate_pem() == (tmp_path / "ca-cert.pem").read_text()


def test_a_ca_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """Something in the place of a file: CERT_REGEN with the path, and the CA of before goes on signing."""
    authority = InspectionAuthority(tmp_path)
    authority.open()
    old = authority.certificate_pem()
    (tmp_path / "ca-pending.json").mkdir()
    with pytest.raises(ClawkerError, match="ca-cert.pem could not be written") as refused:
        authority.rotate()
    assert refused.value.code == "CERT_REGEN" and authority.certificate_pem() == old


def test_the_overlap_ends_with_its_file(tmp_path: Path) -> None:
    """Without `ca-cross.pem` the chain is the leaf alone."""
    authority = _authority(tmp_path)
    authority.rotate()
    (tmp_path / "certs/ca-cross.pem").unlink()
    authority.open()
    leaf = authority.leaves(_plan("api.example.com"))["p1_s0"]

    assert leaf.chain_pem.count("BEGIN CERTIFICATE") == 1


@pytest.mark.parametrize("damage", ["key of another", "no key", "garbage", "expired", "leaf instead"])
def test_a_ca_that_does_not_fit_is_refused_not_replaced(tmp_path: Path, damage: str) -> None:
    """CERT_REGEN names the files; nothing is overwritten."""
    authority = _authority(tmp_path)
    certs = tmp_path / "certs"
    now = inspection._utc_now
    if damage == "key of another":
        _authority(tmp_path / "other")
        (certs / "ca-key.pem").write_bytes((tmp_path / "other/certs/ca-key.pem").read_bytes())
    elif damage == "no key":
        (certs / "ca-key.pem").unlink()
    elif damage == "garbage":
        (certs / "ca-cert.pem").write_text("nothing")
    elif damage == "leaf instead":
        leaf = authority.leaves(_plan("a.example.com"))["p1_s0"]
        (certs / "ca-cert.pem").write_text(leaf.chain_pem)
        (certs / "ca-key.pem").write_text(leaf.key_pem)
    else:

        def now() -> dt.datetime:
            return dt.datetime.now(dt.UTC) + dt.timedelta(days=3651)

    before = {path.name: path.read_bytes() for path in certs.iterdir()}
    with pytest.raises(ClawkerError, match="ca-cert.pem") as failure:
        InspectionAuthority(certs, now=now).open()

    assert failure.value.code == "CERT_REGEN"
    assert {path.name: path.read_bytes() for path in certs.iterdir()} == before


def test_leaves_are_renewed_before_their_end(tmp_path: Path) -> None:
    """With thirty days left a leaf is minted anew, not earlier."""
    plan = _plan("api.example.com")
    first = _authority(tmp_path).leaves(plan)

    def later(days: int) -> dt.datetime:
        return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)

    assert _authority(tmp_path, now=lambda: later(59)).leaves(plan) == first
    assert _authority(tmp_path, now=lambda: later(61)).leaves(plan) != first


def test_too_many_names_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """A certificate that clients would refuse is never made (R17)."""
    sans = [f"{'x' * 40}.{number:05}.example.com" for number in range(2500)]
    with pytest.raises(CapacityExceeded, match="certificate of") as failure:
        _authority(tmp_path).leaves(_plan(*sans))

    assert failure.value.limit == "rules"


def test_files_of_leaves_that_nobody_uses_are_deleted(tmp_path: Path) -> None:
    """After a policy has gone its certificates go too; the CA stays."""
    authority = _authority(tmp_path)
    authority.leaves(build(rule("https://192.0.2.7"), rule("https://a.example.com", scope="agent:p/a")).plan)
    authority.sweep(_plan())

    names = {path.name for path in (tmp_path / "certs").iterdir()}
    assert names == {"ca-cert.pem", "ca-key.pem"} | {f"p1-{s}-{kind}.pem" for s in (0, 1) for kind in ("cert", "key")}


def test_a_broken_leaf_on_disk_is_made_anew(tmp_path: Path) -> None:
    """Half a file or a foreign signature costs a mint, nothing else."""
    plan = _plan("api.example.com")
    _authority(tmp_path).leaves(plan)
    for path in (tmp_path / "certs").glob("p1-*-cert.pem"):
        path.write_text(path.read_text()[:200])
    authority = _authority(tmp_path)
    leaf = authority.leaves(plan)[f"p1_s{shard_of('api.example.com')}"]

    _verify(leaf.chain_pem, "api.example.com", authority.certificate_pem())
