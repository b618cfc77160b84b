"""
The command line that puts an agent's process into its sandbox: cgroup, network, files, user.

Pure: a sandbox in, an argument list out. The stages, each an exec of the next: a shell joins the
cgroups, `nsenter` the network namespace, `bwrap` builds the file system and the process namespace
and reaps as process 1, `setsid` makes a session, `setpriv` becomes the user, a shell enters its
directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clawker_cp.engines.base import Sandbox, SandboxSpec
from clawker_cp.engines.host.cgroups import MountPoint
from clawker_cp.engines.host.filesystem import CA_DIR, HOME, NO_WORKDIR, OwnFiles, view_arguments
from clawker_cp.runtime.gate import AWAIT

# Docker's default set without raw sockets, devices and file capabilities, for agents that are root.
ROOT_CAPABILITIES = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "net_bind_service", "setgid", "setuid", "setpcap",
    "sys_chroot",
)  # fmt: skip
# What an agent has in Docker; for programs that need it, and for tests that attack from inside.
DOCKER_CAPABILITIES = (*ROOT_CAPABILITIES, "audit_write", "mknod", "net_raw", "setfcap")
# What setpriv needs to become somebody else, and gives up by becoming it.
_SWITCH_CAPABILITIES = ("setgid", "setuid", "setpcap")
CA_VARIABLES = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO", "DENO_CERT", "NIX_SSL_CERT_FILE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)  # fmt: skip

OPEN_FILES = 1024  # what programs that know nothing of limits are made for

# $1 = namespace file, $2 = limit on open files, $3 = descriptor of the gate, $4 = how many cgroup directories follow,
# then those, then the command.
_STAGE = f"""
ns=$1 gate=$3 n=$4; ulimit -S -n "$2" || exit 125; shift 4
while [ "$n" -gt 0 ]; do echo 0 > "$1/cgroup.procs" || exit 125; shift; n=$((n - 1)); done
umask 022
{AWAIT}
exec nsenter --net="$ns" -- "$@"
"""

# As the agent's user, who may be the only one that can enter its directories. $1 = where to start.
_START = 'cd -- "$1" && unset OLDPWD || exit 125; shift; exec "$@"'


def command_line(
    sandbox: Sandbox,
    cgroups: Sequence[Path],
    netns: Path,
    *,
    gate_fd: int,
    args_fd: int,
    status_fd: int,
    seccomp_fd: int,
    open_files: int = OPEN_FILES,
) -> list[str]:
    """
    The whole argument list; the descriptors have to be inherited (`seccomp_fd` -1 = no filter).
    """
    line = ["/bin/sh", "-c", _STAGE, "stage", str(netns), str(open_files), str(gate_fd), str(len(cgroups))]
    line += map(str, cgroups)
    # The gate is at its end by then: bwrap reads that, and closes it, which it does for no descriptor it does not know.
    line += ["bwrap", "--args", str(args_fd), "--json-status-fd", str(status_fd), "--block-fd", str(gate_fd)]
    if seccomp_fd >= 0:
        line += ["--seccomp", str(seccomp_fd)]
    return [*line, "--", *_inner(sandbox.spec)]


def sandbox_arguments(
    sandbox: Sandbox, *, masked: Sequence[Path], ca_dir: Path | None, mounts: Sequence[MountPoint]
) -> list[str]:
    """
    bubblewrap's options up to the command; handed over in a file, for the environment is not for `ps`.
    """
    spec = sandbox.spec
    files = OwnFiles(home=sandbox.directory / "home", etc=sandbox.directory / "etc", certificates=ca_dir)
    line = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup", "--hostname", spec.agent[:63]]
    # bubblewrap keeps everything root has unless told otherwise.
    line += ["--cap-drop", "ALL"]
    for name in capabilities(spec) if spec.uid == 0 else (*_SWITCH_CAPABILITIES, *capabilities(spec)):
        line += ["--cap-add", f"CAP_{name.upper()}"]
    line += view_arguments(spec, files, masked, mounts)
    line.append("--clearenv")
    for name, value in environment(spec, certificates=ca_dir is not None).items():
        line += ["--setenv", name, value]
    return [*line, "--chdir", "/"]


def capabilities(spec: SandboxSpec) -> tuple[str, ...]:
    """
    What the agent's program keeps.
    """
    if spec.capabilities is not None:
        return spec.capabilities
    return ROOT_CAPABILITIES if spec.uid == 0 else ()


def environment(spec: SandboxSpec, *, certificates: bool) -> dict[str, str]:
    """
    The environment of the agent's program: ours first, the spec's over it, identity last.
    """
    name = "root" if spec.uid == 0 else "clawker"
    values = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": HOME,
        "USER": name,
        "LOGNAME": name,
        "SHELL": "/bin/sh",
    }
    if certificates:
        values.update(dict.fromkeys(CA_VARIABLES, f"{CA_DIR}/bundle.pem"))
        values["NODE_EXTRA_CA_CERTS"] = f"{CA_DIR}/ca.pem"
    values.update(spec.env)
    return {
        **values,
        "CLAWKER_AGENT": spec.agent,
        "CLAWKER_PROJECT": spec.project,
        "CLAWKER_FIREWALL_ENABLED": "true",
    }


def _inner(spec: SandboxSpec) -> list[str]:
    # A session of its own keeps the terminal's signals away from bubblewrap, which has to live to
    # tell the exit code; with a terminal, it becomes the controlling one of that session.
    line = ["/usr/bin/setsid", *(["--ctty"] if spec.tty else []), "--"]
    line += ["/usr/bin/setpriv", "--no-new-privs", "--reuid", str(spec.uid), "--regid", str(spec.gid), "--clear-groups"]
    keep = "".join(f",+{name}" for name in capabilities(spec))
    for kind in ("--inh-caps", "--ambient-caps", "--bounding-set"):
        line += [kind, f"-all{keep}"]
    directory = HOME if spec.workdir in NO_WORKDIR else spec.workdir
    return [*line, "--", "/bin/sh", "-c", _START, "clawker-cp", directory, *spec.argv]
