"""
The command line that puts an agent's process into its sandbox: cgroup, network, files, user.

Pure: a sandbox in, an argument list out. The stages, each an exec of the next: a shell joins
the cgroup, `ip netns exec` the network namespace, `setsid` takes the terminal, `bwrap` builds the
file system and the process namespace, `setpriv` becomes the user.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clawker_cp.engines.base import Sandbox
from clawker_cp.errors import InvalidInput

CA_DIRECTORY = "/usr/local/share/clawker/ca"
HOME = "/home/clawker"
# Docker's default set without raw sockets and devices, for agents that are root.
ROOT_CAPABILITIES = (
    "chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "net_bind_service",
    "sys_chroot", "audit_write", "setfcap",
)  # fmt: skip
# What of /etc programs need; everything else, secrets above all, is not there.
ETC = (
    "alternatives", "bash.bashrc", "ca-certificates", "ca-certificates.conf", "debian_version", "environment",
    "fonts", "gai.conf", "host.conf", "inputrc", "java-17-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
    "locale.alias", "locale.conf", "localtime", "login.defs", "magic", "mime.types", "nsswitch.conf", "os-release",
    "perl", "profile", "profile.d", "protocols", "python3", "python3.11", "rpc", "services", "shells", "skel",
    "terminfo", "timezone", "vim", "wgetrc",
)  # fmt: skip
CA_VARIABLES = (
    "SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT", "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO", "DENO_CERT", "NIX_SSL_CERT_FILE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)  # fmt: skip


def check_paths(sandbox_workdir: str, masked: Sequence[Path]) -> None:
    """
    Refuse a working directory inside our own directories (R27).
    """
    workdir = Path(sandbox_workdir)
    for own in masked:
        if workdir == own or own in workdir.parents:
            raise InvalidInput(f"--workdir: {workdir} is inside {own}, which belongs to the control plane")


def command_line(
    sandbox: Sandbox, *, masked: Sequence[Path], ca_dir: Path | None, status_fd: int, seccomp_fd: int
) -> list[str]:
    """
    The whole argument list; `status_fd` and `seccomp_fd` have to be inherited (-1 = none).
    """
    spec = sandbox.spec
    line = ["/bin/sh", "-c", 'echo 0 > "$1" && shift && exec "$@"', "sh", str(sandbox.cgroup_path / "cgroup.procs")]
    line += ["ip", "netns", "exec", sandbox.netns]
    if spec.tty:
        line += ["setsid", "-c"]
    line += ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    line += ["--hostname", sandbox.agent[:63], "--clearenv"]
    line += _files(sandbox, masked, ca_dir)
    line += _environment(sandbox, ca_dir)
    line += ["--chdir", spec.workdir]
    line += ["--json-status-fd", str(status_fd)]
    if seccomp_fd >= 0:
        line += ["--seccomp", str(seccomp_fd)]
    wanted = _capabilities(sandbox)
    for capability in {*wanted, "setuid", "setgid", "setpcap"}:
        line += ["--cap-add", f"CAP_{capability.upper()}"]
    return [*line, "--", *_become_user(sandbox, wanted), *spec.argv]


def _capabilities(sandbox: Sandbox) -> tuple[str, ...]:
    if sandbox.spec.capabilities is not None:
        return sandbox.spec.capabilities
    return ROOT_CAPABILITIES if sandbox.spec.uid == 0 else ()


def _become_user(sandbox: Sandbox, capabilities: Sequence[str]) -> list[str]:
    line = ["setpriv", f"--reuid={sandbox.spec.uid}", f"--regid={sandbox.spec.gid}", "--clear-groups", "--no-new-privs"]
    keep = "".join(f",+{capability}" for capability in capabilities)
    # All three sets, for root too: bwrap leaves the whole ambient set of who started us.
    return [*line, f"--bounding-set=-all{keep}", f"--inh-caps=-all{keep}", f"--ambient-caps=-all{keep}"]


def _files(sandbox: Sandbox, masked: Sequence[Path], ca_dir: Path | None) -> list[str]:
    spec, own = sandbox.spec, sandbox.directory
    line = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        path = Path("/") / name
        if path.is_symlink():
            line += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            line += ["--ro-bind", str(path), str(path)]
    line += ["--ro-bind-try", "/opt", "/opt", "--tmpfs", "/etc"]
    for name in ETC:
        line += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    line += ["--ro-bind-try", "/etc/ssl/certs", "/etc/ssl/certs"]
    line += ["--ro-bind-try", "/etc/ssl/openssl.cnf", "/etc/ssl/openssl.cnf"]
    for name in ("passwd", "group", "resolv.conf", "hosts", "hostname"):
        line += ["--ro-bind", str(own / "etc" / name), f"/etc/{name}"]
    line += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp", "--tmpfs", "/run"]
    line += ["--perms", "1777", "--tmpfs", "/var/tmp", "--symlink", "/run", "/var/run", "--dir", "/home"]
    line += ["--bind", str(own / "home"), HOME]
    line += ["--bind", spec.workdir, spec.workdir]
    for mount in spec.mounts:
        line += ["--ro-bind" if mount.read_only else "--bind", mount.source, mount.target]
    visible = [(Path(spec.workdir), Path(spec.workdir)), *((Path(m.source), Path(m.target)) for m in spec.mounts)]
    for directory in (*masked, Path("/run"), Path("/sys"), Path("/proc"), Path("/var/run"), Path("/var/lib/docker")):
        for source, target in visible:
            if source == Path("/") or source in directory.parents:
                line += ["--tmpfs", str(target / directory.relative_to(source))] if directory.exists() else []
    if ca_dir is not None:
        line += ["--ro-bind", str(ca_dir), CA_DIRECTORY]
    return line


def _environment(sandbox: Sandbox, ca_dir: Path | None) -> list[str]:
    spec = sandbox.spec
    name = "root" if spec.uid == 0 else "clawker"
    values = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": HOME,
        "USER": name,
        "LOGNAME": name,
        "SHELL": "/bin/bash",
        "CLAWKER_AGENT": spec.agent,
        "CLAWKER_PROJECT": spec.project,
        "CLAWKER_FIREWALL_ENABLED": "true",
    }
    if ca_dir is not None:
        values.update(dict.fromkeys(CA_VARIABLES, f"{CA_DIRECTORY}/bundle.pem"))
        values["NODE_EXTRA_CA_CERTS"] = f"{CA_DIRECTORY}/ca.pem"
    values.update(spec.env)
    return [word for key, value in values.items() for word in ("--setenv", key, value)]
