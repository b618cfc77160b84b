"""The auth tree: made whole, verified before use, never re-rooted by accident, never seen half."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from clawker_cp.errors import ClawkerError
from clawker_cp.pki import profiles
from clawker_cp.pki.certificates import load_identity, mint
from clawker_cp.pki.tree import (
    AGENTS_CA,
    CA,
    CLI_CLIENT,
    ISSUED,
    SERVER,
    SIGNING_JWK,
    SIGNING_KEY,
    AuthTree,
    find_tree,
    paths,
)
from clawker_cp.runtime.jwk import read_jwks
from clawker_cp.wiring.own_container import MATERIAL

NOW = dt.datetime.now(dt.UTC)


def tree(root: Path, *, later: dt.timedelta = dt.timedelta()) -> AuthTree:
    return AuthTree(root / "auth", now=lambda: NOW + later)


@pytest.fixture
def made(tmp_path: Path) -> AuthTree:
    made = tree(tmp_path)
    made.ensure()
    return made


def contents(made: AuthTree) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in paths(made) if path.exists()}


def refusal(one: AuthTree) -> ClawkerError:
    before = contents(one)
    with pytest.raises(ClawkerError) as refused:
        one.ensure()
    assert refused.value.code == "PKI_INCONSISTENT"
    assert contents(one) == before
    return refused.value


def test_an_empty_place_gets_the_whole_tree(made: AuthTree) -> None:
    """Every file of the contract with its mode, and a second run changes nothing."""
    before = contents(made)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in paths(made) if path.exists()}
    assert modes.pop(made.path("otel/server.key")) == 0o644
    for path, mode in modes.items():
        assert mode == (0o600 if path.suffix == ".key" else 0o644), path
    for directory in ("", "ca", "cli", "tls", "cp", "otel", "infra-ca"):
        assert stat.S_IMODE(made.path(directory).stat().st_mode) == 0o700, directory
    assert not made.path(AGENTS_CA.certificate).exists()
    made.ensure()
    assert contents(made) == before
    assert not [finding for finding in made.findings() if finding.problem]


def test_openssl_verifies_every_leaf_for_its_purpose(made: AuthTree) -> None:
    """A foreign implementation agrees on chain and purpose, with the infra leaf over its intermediate."""
    leaf = mint(profiles.infra_client("cp"), made.identity(ISSUED[4]), NOW)
    extra = made.root / "cp-otel-client.pem"
    extra.write_bytes(leaf.certificate_pem)
    cases = [
        (made.path("tls/server.pem"), "sslserver", []),
        (made.path("cli/client.pem"), "sslclient", []),
        (made.path("cp/client.pem"), "sslclient", []),
        (made.path("otel/server.pem"), "sslserver", []),
        (extra, "sslclient", ["-untrusted", str(made.path("infra-ca/infra-ca.pem"))]),
    ]
    for path, purpose, more in cases:
        subprocess.run(
            ["openssl", "verify", "-x509_strict", "-CAfile", str(made.path(CA.certificate)), "-purpose", purpose,
             *more, str(path)],
            check=True, capture_output=True, timeout=20,
        )  # fmt: skip
    text = subprocess.run(
        ["openssl", "x509", "-noout", "-text", "-in", str(made.path(SERVER.certificate))],
        check=True, capture_output=True, text=True, timeout=20,
    ).stdout  # fmt: skip
    assert "O = clawker, CN = clawker-controlplane" in text
    assert "DNS:localhost, DNS:clawker-controlplane, IP Address:127.0.0.1" in text
    assert "X509v3 Key Usage: critical" in text and "Digital Signature, Key Encipherment" in text
    assert "CA:TRUE" not in text and "BEGIN EC PRIVATE KEY" in made.path(SERVER.key).read_text()


def test_the_signing_key_and_its_jwk_belong_together(made: AuthTree) -> None:
    """The JWK is padded, has no kid, and is the public half of the key."""
    (jwk,) = read_jwks(made.path(SIGNING_JWK).read_bytes())
    assert "kid" not in jwk and len(jwk["x"]) == len(jwk["y"]) == 43
    assert b"EC PRIVATE KEY" in made.path(SIGNING_KEY).read_bytes()


def test_missing_leaves_are_made_again_under_the_same_ca(made: AuthTree) -> None:
    """A directory that was removed comes back; the CA and the others stay."""
    before = contents(made)
    shutil.rmtree(made.path("tls"))
    made.ensure()
    after = contents(made)
    changed = {Path(name).relative_to(made.root).parts[0] for name in after if after[name] != before.get(name)}
    assert changed == {"tls"}


def test_modes_that_others_opened_are_closed_again(made: AuthTree) -> None:
    """A readable key and a listable directory are set back."""
    made.path("infra-ca/infra-ca.key").chmod(0o644)
    made.path("ca").chmod(0o755)
    made.ensure()
    assert stat.S_IMODE(made.path("infra-ca/infra-ca.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(made.path("ca").stat().st_mode) == 0o700


def test_a_missing_root_is_never_made_anew(made: AuthTree) -> None:
    """Without ca/ every leaf is an orphan: an error that names the way out, and nothing is written."""
    shutil.rmtree(made.path("ca"))
    error = refusal(made)
    assert "ca/ca.pem is missing while certificates" in error.message and "rotate --force" in str(error.hint)


def test_a_ca_without_its_key_verifies_and_cannot_make(made: AuthTree) -> None:
    """What is there is fine; what is missing is told, not made by somebody else's CA."""
    made.path(CA.key).unlink()
    shutil.rmtree(made.path("cp"))
    error = refusal(made)
    assert "cp/client.pem is missing and cannot be made here" in error.message


def test_leaves_of_another_ca_are_refused(made: AuthTree, tmp_path: Path) -> None:
    """Every one of them is named at once."""
    other = tree(tmp_path / "other")
    other.ensure()
    for name in ("tls", "cli"):
        shutil.rmtree(made.path(name))
        shutil.copytree(other.path(name), made.path(name))
    error = refusal(made)
    assert error.message.count("was not issued by 'clawker CLI CA'") == 2


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.path(SERVER.certificate).write_bytes(b"-----BEGIN CERTIFICATE-----\ngarbage"), "not PEM"),
        (lambda t: t.path(SERVER.certificate).write_bytes(t.path(SERVER.certificate).read_bytes()[:200]), "not PEM"),
        (lambda t: t.path(SERVER.key).write_bytes(b""), "not an unencrypted PEM key"),
        (lambda t: t.path(SERVER.key).write_bytes(t.path(CLI_CLIENT.key).read_bytes()), "do not belong together"),
        (lambda t: t.path(SERVER.key).unlink(), "cannot be read: No such file"),
        (lambda t: (t.path(SERVER.key).unlink(), t.path(SERVER.key).mkdir()), "cannot be read: Is a directory"),
        (
            lambda t: (
                t.path(SERVER.certificate).write_bytes(t.path(CLI_CLIENT.certificate).read_bytes()),
                t.path(SERVER.key).write_bytes(t.path(CLI_CLIENT.key).read_bytes()),
            ),
            "is for 'clawker-cli', not 'clawker-controlplane'; lacks the purpose serverAuth",
        ),
        (lambda t: t.path(SIGNING_JWK).write_bytes(b'{"kty":"EC","crv":"P-256","x":"AA"}'), "jwk: "),
        (lambda t: t.path(SIGNING_JWK).write_bytes(b"{"), "jwk: is not JSON"),
    ],
)
def test_what_does_not_fit_is_named(made: AuthTree, spoil: Callable[[AuthTree], object], said: str) -> None:
    """Broken, swapped and misplaced files are an error with the file's name; nothing is replaced."""
    spoil(made)
    if made.path(SERVER.key).is_dir():
        with pytest.raises(ClawkerError, match=said):
            made.ensure()
        return
    assert said in refusal(made).message


def test_no_error_holds_a_key(made: AuthTree) -> None:
    """A key pasted where the certificate belongs is not quoted."""
    secret = made.path(SERVER.key).read_text()
    made.path(SERVER.certificate).write_text(secret)
    made.path(CLI_CLIENT.key).write_text(secret[:100])
    error = refusal(made)
    for line in secret.splitlines()[1:-1]:
        assert line not in error.message + repr(error.__dict__)


def test_a_leaf_that_is_due_is_renewed_where_the_ca_key_is(made: AuthTree, tmp_path: Path) -> None:
    """29 days before its end, and after it; without the key it is only told of."""
    server = made.path(SERVER.certificate).read_bytes()
    assert made.renew() == []
    later = tree(tmp_path, later=profiles.YEAR - dt.timedelta(days=29))
    assert SERVER in later.renew() and later.path(SERVER.certificate).read_bytes() != server
    much_later = tree(tmp_path, later=3 * profiles.YEAR)
    much_later.ensure()
    assert not [finding for finding in much_later.findings() if finding.problem]
    much_later.path(CA.key).unlink()
    last = tree(tmp_path, later=3 * profiles.YEAR + dt.timedelta(days=360))
    before = contents(last)
    with structlog.testing.capture_logs() as lines:
        assert last.renew() == [] and contents(last) == before
        told = len(lines)
        assert last.renew() == []
    assert told and {line["event"] for line in lines} == {"pki_expiring"}
    assert len(lines) == told  # once a day


def test_the_next_renewal_is_when_the_first_leaf_is_due(made: AuthTree) -> None:
    """A year less thirty days after it was made."""
    due = made.next_renewal() - NOW
    assert dt.timedelta(days=334) < due < dt.timedelta(days=336)
    made.enable_agents_ca()
    assert made.next_renewal() - NOW < dt.timedelta(days=306)


def test_rotating_keeps_the_root_unless_forced(made: AuthTree) -> None:
    """New leaves under the same CA; a forced rotation makes a new one and a new signing key."""
    before = contents(made)
    made.rotate()
    after = contents(made)
    assert after[str(made.path(CA.certificate))] == before[str(made.path(CA.certificate))]
    assert after[str(made.path(SERVER.certificate))] != before[str(made.path(SERVER.certificate))]
    assert after[str(made.path(SIGNING_JWK))] == before[str(made.path(SIGNING_JWK))]
    made.rotate(force=True)
    for name, data in contents(made).items():
        assert data != after[name], name
    made.ensure()


def test_a_pair_is_never_seen_half_changed(made: AuthTree) -> None:
    """A reader that opens both files over and over while leaves rotate always gets one pair."""
    script = (
        "import sys; from pathlib import Path; from clawker_cp.pki.tree import AuthTree\n"
        "t = AuthTree(Path(sys.argv[1]))\nprint('go', flush=True)\n"
        "while True: t.rotate()\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(made.root)], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"go\n"
        seen: set[bytes] = set()
        until = time.monotonic() + 20
        while len(seen) < 20 and time.monotonic() < until:
            # One open directory is one generation, as a reader that keeps it sees it.
            directory = os.open(made.path("tls"), os.O_RDONLY | os.O_DIRECTORY)
            try:
                pair = [_read_at(directory, name) for name in ("server.pem", "server.key")]
            except FileNotFoundError:
                continue  # that generation was removed meanwhile, as a whole
            finally:
                os.close(directory)
            load_identity(*pair)
            seen.add(pair[0])
        assert len(seen) == 20
    finally:
        writer.kill()
        writer.communicate()


def _read_at(directory: int, name: str) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=directory), "rb") as file:
        return file.read()


def test_a_writer_killed_at_any_moment_leaves_a_tree_that_can_be_used(tmp_path: Path) -> None:
    """After each of thirty kills the next start finds a consistent tree under the same CA."""
    made = AuthTree(tmp_path / "auth")  # by the clock of the writer
    made.ensure()
    root = made.path(CA.certificate).read_bytes()
    script = (
        "import sys; from pathlib import Path; from clawker_cp.pki.tree import AuthTree\n"
        "t = AuthTree(Path(sys.argv[1]))\nprint('go', flush=True)\n"
        "while True: t.rotate()\n"
    )
    for attempt in range(30):
        writer = subprocess.Popen([sys.executable, "-c", script, str(made.root)], stdout=subprocess.PIPE)
        try:
            assert writer.stdout is not None and writer.stdout.readline() == b"go\n"
            threshold = time.monotonic() + attempt * 0.0007
            while time.monotonic() < threshold:
                pass
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        made.ensure()
        assert not [finding for finding in made.findings() if finding.problem]
        assert not list(made.root.glob(".clawker-new-*"))
    assert made.path(CA.certificate).read_bytes() == root


def test_a_mounted_tree_is_verified_and_not_written(made: AuthTree) -> None:
    """A server needs CA, its own pair and the JWK; what is missing is named."""
    made.verify()
    made.path(SIGNING_JWK).unlink()
    with pytest.raises(ClawkerError, match=r"signing-jwk\.json is missing"):
        made.verify()


def test_the_pairs_work_in_a_handshake(made: AuthTree) -> None:
    """Server and CLI client verify each other over TLS 1.3 with nothing but the tree's files."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.minimum_version = ssl.TLSVersion.TLSv1_3
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_cert_chain(made.path(SERVER.certificate), made.path(SERVER.key))
    server.load_verify_locations(made.path(CA.certificate))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_cert_chain(made.path(CLI_CLIENT.certificate), made.path(CLI_CLIENT.key))
    client.load_verify_locations(made.path(CA.certificate))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(to_server, to_client, server_side=True)
    two = client.wrap_bio(to_client, to_server, server_hostname="clawker-controlplane")
    for _ in range(4):
        for side in (two, one):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert one.version() == two.version() == "TLSv1.3"
    peer = one.getpeercert()
    assert peer is not None and (("commonName", "clawker-cli"),) in peer["subject"]


def test_the_mounted_tree_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container what was mounted counts, elsewhere the data directory's tree."""
    assert find_tree(tmp_path).root == tmp_path / "auth"
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr("clawker_cp.pki.tree.MOUNTED", tmp_path / "mounted")
    assert find_tree(tmp_path).root == tmp_path / "mounted"


def test_a_container_has_the_certificate_of_the_ca_beside_the_servers(
    made: AuthTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mounted there, and no more than that, is enough to serve; a flag still names another file."""
    mounted = tmp_path / "mounted"
    for source, target in MATERIAL.items():
        if made.path(source).exists():
            (mounted / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(made.path(source), mounted / target)
    monkeypatch.setattr("clawker_cp.pki.tree.MOUNTED", mounted)
    tree = find_tree(tmp_path)
    assert not tree.is_ours and not tree.holds_ca_key
    tree.verify()
    assert tree.path(CA.certificate) == mounted / "tls/ca.pem"
    assert find_tree(tmp_path, {CA.certificate: tmp_path / "x.pem"}).path(CA.certificate) == tmp_path / "x.pem"


def test_named_files_win_over_the_tree_and_are_only_verified(made: AuthTree, tmp_path: Path) -> None:
    """A server with its own files needs nothing else, writes nothing, and a wrong pair is an error."""
    apart = tmp_path / "apart"
    apart.mkdir()
    names = {CA.certificate: "a.pem", SERVER.certificate: "b.pem", SERVER.key: "c.key", SIGNING_JWK: "d.json"}
    for place, name in names.items():
        shutil.copy(made.path(place), apart / name)
    named = AuthTree(tmp_path / "empty", overrides={place: apart / name for place, name in names.items()})
    assert not named.is_ours and made.is_ours
    named.verify()
    assert not (tmp_path / "empty").exists()
    shutil.copy(made.path(CLI_CLIENT.key), apart / "c.key")
    with pytest.raises(ClawkerError, match="do not belong together"):
        named.verify()
