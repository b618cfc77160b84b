"""The command line that puts a process into its sandbox."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clawker_cp.engines.base import Sandbox, SandboxSpec
from clawker_cp.engines.host.bubble import (
    DOCKER_CAPABILITIES,
    ROOT_CAPABILITIES,
    capabilities,
    command_line,
    environment,
    sandbox_arguments,
)


def sandbox_of(spec: SandboxSpec, directory: Path = Path("/state")) -> Sandbox:
    return Sandbox("ab" * 32, spec, "198.51.100.7", "ns", "veth", Path("/cg"), 1, directory)


def spec_of(**changes: Any) -> SandboxSpec:
    return SandboxSpec(**{"project": "demo", "agent": "one", "argv": ("id",)} | changes)


def test_cgroup_and_namespace_are_joined_before_anything_of_the_agent() -> None:
    """The stages come in order: cgroups, network namespace, bubblewrap, session, user, and the command last."""
    line = command_line(
        sandbox_of(spec_of(argv=("prog", "--", "x"))), [Path("/a"), Path("/b")], Path("/ns"),
        gate_fd=4, args_fd=5, status_fd=6, seccomp_fd=7,
    )  # fmt: skip
    assert line[4:10] == ["/ns", "1024", "4", "2", "/a", "/b"]
    order = [line.index(word) for word in ("/bin/sh", "bwrap", "/usr/bin/setsid", "/usr/bin/setpriv", "prog")]
    assert order == sorted(order)
    assert line[-3:] == ["prog", "--", "x"]
    assert line[line.index("--seccomp") + 1] == "7"
    assert line[line.index("--json-status-fd") + 1] == "6"
    assert line[line.index("--block-fd") + 1] == "4"


def test_filter_is_left_out_only_when_there_is_none() -> None:
    """Without a filter's descriptor bubblewrap is not told of one."""
    assert "--seccomp" not in command_line(
        sandbox_of(spec_of()), [], Path("/ns"), gate_fd=4, args_fd=5, status_fd=6, seccomp_fd=-1
    )


def test_the_users_shell_enters_the_directory() -> None:
    """The working directory is entered after the user was switched: root without privileges may not enter it."""
    line = command_line(
        sandbox_of(spec_of(workdir="/w d")), [], Path("/ns"), gate_fd=4, args_fd=5, status_fd=6, seccomp_fd=-1
    )
    inner = line[line.index("/usr/bin/setpriv") :]

    assert inner[inner.index("clawker-cp") + 1 :] == ["/w d", "id"]
    assert "--chdir" not in line


def test_terminal_becomes_the_controlling_one_only_when_asked() -> None:
    """A session takes the terminal with --tty and not otherwise."""

    def line(tty: bool) -> list[str]:
        return command_line(
            sandbox_of(spec_of(tty=tty)), [], Path("/ns"), gate_fd=4, args_fd=5, status_fd=6, seccomp_fd=-1
        )

    assert "--ctty" in line(True)
    assert "--ctty" not in line(False)


def test_user_keeps_nothing_root_a_small_set_and_a_named_set_wins() -> None:
    """An ordinary user has no capability; root has no raw sockets unless the spec names them."""
    assert capabilities(spec_of()) == ()
    assert capabilities(spec_of(uid=0)) == ROOT_CAPABILITIES
    assert "net_raw" not in ROOT_CAPABILITIES
    assert "net_raw" in DOCKER_CAPABILITIES
    assert capabilities(spec_of(uid=0, capabilities=())) == ()
    line = command_line(sandbox_of(spec_of()), [], Path("/ns"), gate_fd=4, args_fd=5, status_fd=6, seccomp_fd=-1)
    assert line[line.index("--bounding-set") + 1] == "-all"
    assert "--no-new-privs" in line


def test_environment_is_in_the_arguments_and_never_on_the_command_line(tmp_path: Path) -> None:
    """What `ps` shows of a sandbox holds no variable of the agent."""
    (tmp_path / "etc").mkdir()
    box = sandbox_of(spec_of(env={"TOKEN": "of-the-agent"}), tmp_path)
    assert "of-the-agent" not in " ".join(
        command_line(box, [], Path("/ns"), gate_fd=4, args_fd=5, status_fd=6, seccomp_fd=-1)
    )
    handed = sandbox_arguments(box, masked=(), ca_dir=None, mounts=())
    assert handed[handed.index("TOKEN") - 1 : handed.index("TOKEN") + 2] == ["--setenv", "TOKEN", "of-the-agent"]
    assert handed.index("--clearenv") < handed.index("--setenv")


def test_every_namespace_is_its_own(tmp_path: Path) -> None:
    """Processes, IPC, host name and cgroups are apart from the host's, and all privileges are dropped first."""
    (tmp_path / "etc").mkdir()
    handed = sandbox_arguments(sandbox_of(spec_of(), tmp_path), masked=(), ca_dir=None, mounts=())
    assert {"--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"} <= set(handed)
    assert handed[handed.index("--cap-drop") + 1] == "ALL"
    assert handed.index("--cap-drop") < handed.index("--cap-add")


def test_identity_cannot_be_overridden_and_certificates_can() -> None:
    """The spec's variables win over ours, except those that say which agent this is."""
    own = {"CLAWKER_AGENT": "other", "CLAWKER_FIREWALL_ENABLED": "false", "SSL_CERT_FILE": "/own.pem", "PATH": "/own"}
    values = environment(spec_of(env=own), certificates=True)
    assert (values["CLAWKER_AGENT"], values["CLAWKER_FIREWALL_ENABLED"]) == ("one", "true")
    assert (values["SSL_CERT_FILE"], values["PATH"]) == ("/own.pem", "/own")
    assert values["REQUESTS_CA_BUNDLE"] == "/usr/local/share/clawker/ca/bundle.pem"
    assert values["NODE_EXTRA_CA_CERTS"] == "/usr/local/share/clawker/ca/ca.pem"


def test_without_certificates_none_are_named() -> None:
    """No variable points at a bundle that is not there."""
    assert not any("clawker/ca" in value for value in environment(spec_of(), certificates=False).values())
