"""The words after `clawker-cp run` become a request, or an error that names the option."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clawker_cp.cli import run_options as options
from clawker_cp.errors import InvalidInput


def test_the_user_is_who_called_sudo_else_the_owner(tmp_path: Path) -> None:
    """Without --user the caller of sudo runs the command, and never root."""
    sudo = {"SUDO_UID": "1234", "SUDO_GID": "55"}
    assert options.parse_user(None, sudo, tmp_path, allow_root=False) == options.User(1234, 55)
    if os.geteuid() == 0:
        found = options.parse_user(None, {"SUDO_UID": "0"}, tmp_path, allow_root=False)
        assert found == options.User(options.DEFAULT_UID, options.DEFAULT_UID)


def test_root_has_to_be_meant(tmp_path: Path) -> None:
    """UID 0, by number or name, needs --allow-root."""
    for text in ("0", "root", "0:5"):
        with pytest.raises(InvalidInput, match="root"):
            options.parse_user(text, {}, tmp_path, allow_root=False)
    assert options.parse_user("root", {}, tmp_path, allow_root=True) == options.User(0, 0)
    assert options.parse_user("7:8", {}, tmp_path, allow_root=False) == options.User(7, 8)


@pytest.mark.parametrize("text", ["no-such-user-here", "5:staff", "4294967295", "1:9" + "9" * 5000, "9" * 50])
def test_a_wrong_user_is_named(text: str, tmp_path: Path) -> None:
    """An unknown name, a group in letters and numbers beyond what the kernel has are refused."""
    with pytest.raises(InvalidInput, match="--user"):
        options.parse_user(text, {}, tmp_path, allow_root=False)


def test_a_mount_is_read_only_unless_said(tmp_path: Path) -> None:
    """Target defaults to the source, and only `rw` makes it writable."""
    source = str(tmp_path.resolve())
    assert options.parse_mount(source) == {"source": source, "target": source, "read_only": True}
    assert options.parse_mount(f"{source}:/c:rw") == {"source": source, "target": "/c", "read_only": False}
    assert options.parse_mount(f"{source}:ro")["read_only"] is True


@pytest.mark.parametrize("tail", [":relative", ":/a:/b", "::rw", "/missing"])
def test_a_wrong_mount_is_refused(tail: str, tmp_path: Path) -> None:
    """A relative target, too many parts, an empty part and a missing source are errors."""
    with pytest.raises(InvalidInput, match="--mount"):
        options.parse_mount(f"{tmp_path}{tail}")


@pytest.mark.parametrize("source", ["~no-such-user-here/x", "x" * 300, "a\0b"])
def test_a_mount_of_what_cannot_be_a_path_is_refused(source: str) -> None:
    """The home of nobody, a name that is too long and a NUL byte are errors that name the option."""
    with pytest.raises(InvalidInput, match="--mount"):
        options.parse_mount(source)


def test_publish_reads_both_forms() -> None:
    """Without a host port zero means: choose one."""
    assert options.parse_publish("80") == {"host_port": 0, "port": 80}
    assert options.parse_publish("8080:80") == {"host_port": 8080, "port": 80}
    for wrong in ("", "0", "80:0", "65536", "70000:1", "a:1", "1:2:3", "-1", "1" * 5000):
        with pytest.raises(InvalidInput, match="--publish"):
            options.parse_publish(wrong)


def test_the_environment_passes_only_what_is_named() -> None:
    """Terminal and locale pass, others by name or value, an unset one is an error."""
    caller = {"TERM": "xterm", "SECRET": "s", "MINE": "m"}
    assert options.parse_env(["MINE", "NEW=a=b", "EMPTY="], caller) == {
        "TERM": "xterm",
        "MINE": "m",
        "NEW": "a=b",
        "EMPTY": "",
    }
    for wrong in ("UNSET", "1A=x", "=x"):
        with pytest.raises(InvalidInput, match="--env"):
            options.parse_env([wrong], caller)


def test_names_come_from_the_directory(tmp_path: Path) -> None:
    """The project is the directory's name made safe, the agent a fresh run-<hex>."""
    project, agent = options.sandbox_names(None, None, tmp_path / "my project!")
    assert project == "my-project"
    assert agent.startswith("run-") and len(agent) == 8
    assert options.sandbox_names("", "a", tmp_path) == ("", "a")
    for wrong in (("-p", "a"), ("p", ""), ("p", "a/b")):
        with pytest.raises(InvalidInput, match="not a name"):
            options.sandbox_names(*wrong, tmp_path)


def test_the_workdir_has_to_be_a_directory(tmp_path: Path) -> None:
    """A missing directory is named."""
    assert options.resolve_workdir(str(tmp_path)) == tmp_path.resolve()
    with pytest.raises(InvalidInput, match="--workdir"):
        options.resolve_workdir(str(tmp_path / "missing"))
    with pytest.raises(InvalidInput, match="--workdir"):
        options.resolve_workdir("~no-such-user-here")
