"""
What a sandbox sees of the host's files: an argument list for bubblewrap, built by pure reading.

System directories read-only, /etc by an allow-list without anything that is not readable by all,
the working directory and mounts as asked; private /tmp, /run, /dev, /proc, home. The control
plane's directories, bpffs, cgroupfs and the like are covered wherever a mount would show them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clawker_cp.engines.base import SandboxSpec
from clawker_cp.engines.host.cgroups import MountPoint
from clawker_cp.errors import InvalidInput

HOME = "/home/clawker"
CA_DIR = "/usr/local/share/clawker/ca"
SHARE = "/usr/local/share"
NO_WORKDIR = ("", "/")  # nothing of the host is writable; the command starts in its home
SYSTEM_LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")

# Top-level entries of /etc that hold configuration of libraries and tools, and nothing of the host's
# services, accounts or keys.
ETC_SHOWN = (
    "alternatives", "bash.bashrc", "bash_completion.d", "bindresvport.blacklist", "ca-certificates",
    "ca-certificates.conf", "debian_version", "dictionaries-common", "dpkg", "emacs", "environment.d", "fonts",
    "gai.conf", "gdb", "glvnd", "groff", "gss", "host.conf", "inputrc", "issue", "java", "java-11-openjdk",
    "java-17-openjdk", "java-21-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "libaudit.conf",
    "locale.alias", "locale.gen", "localtime", "login.defs", "magic", "magic.mime", "mailcap", "manpath.config",
    "maven", "mime.types", "networks", "os-release", "papersize", "pam.d", "perl", "pki", "profile", "profile.d",
    "protocols", "python3", "python3.11", "python3.12", "python3.13", "rpc", "security", "services", "sgml", "shells",
    "skel", "ssl", "system-release", "terminfo", "timezone", "vim", "xattr.conf", "xdg", "xml",
)  # fmt: skip
PROC_FIXED = (
    "/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/driver", "/proc/mtrr",
    "/proc/pressure",
)  # fmt: skip
PROC_HIDDEN = (
    "/proc/acpi", "/proc/asound", "/proc/kallsyms", "/proc/kcore", "/proc/key-users", "/proc/keys", "/proc/kmsg",
    "/proc/kpagecgroup", "/proc/kpagecount", "/proc/kpageflags", "/proc/latency_stats", "/proc/sched_debug",
    "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/proc/vmallocinfo",
)  # fmt: skip
_SECRET_NAMES = ("private", "auth.conf", "auth.conf.d", "credentials", "keytab")
_SECRET_ENDINGS = (".key", "_key", ".keytab", ".p12", ".pfx")
_HIDDEN_KINDS = frozenset({
    "bpf", "cgroup", "cgroup2", "proc", "sysfs", "debugfs", "tracefs", "securityfs", "configfs", "devtmpfs", "devpts",
    "efivarfs", "pstore", "fusectl", "mqueue", "nsfs", "binfmt_misc",
})  # fmt: skip
_NEVER_WORKDIR = frozenset({
    "/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/libx32", "/opt", "/proc", "/run",
    "/sbin", "/sys", "/tmp", "/usr", "/var", "/var/tmp", "/usr/bin", "/usr/lib", "/usr/local",  # noqa: S108
})  # fmt: skip
_NEVER_BELOW = ("/proc", "/sys", "/dev", "/run", "/var/run", "/boot")


@dataclass(frozen=True, slots=True)
class OwnFiles:
    """What of the host was made for sandboxes and appears in them under fixed names."""

    home: Path
    etc: Path
    certificates: Path | None


def check_view(spec: SandboxSpec, masked: Sequence[Path]) -> None:
    """
    Refuse a working directory or mount that would show what no sandbox may see.

    Raises `InvalidInput` naming every field and its fix; touches nothing.
    """
    problems = []
    hidden = [path.resolve() for path in masked]
    if spec.workdir not in NO_WORKDIR:
        workdir = Path(spec.workdir)
        problems += _path_problems("workdir", workdir, hidden)
        if workdir.is_absolute() and not workdir.is_dir():
            problems.append(f"workdir: {workdir} is not a directory")
        if str(workdir.resolve()) in _NEVER_WORKDIR:
            problems.append(f"workdir: {workdir} would be writable as a whole, choose a directory below it")
    for index, mount in enumerate(spec.mounts):
        field = f"mounts[{index}]"
        source = Path(mount.source)
        problems += _path_problems(f"{field}.source", source, hidden)
        if source.is_absolute() and not source.exists():
            problems.append(f"{field}.source: {source} does not exist")
        target = os.path.normpath(mount.target)
        if not mount.target.startswith("/") or ".." in Path(mount.target).parts:
            problems.append(f"{field}.target: {mount.target!r} is not an absolute path")
        elif target == "/" or _below(target, ("/proc", "/sys", "/dev")) or _below(CA_DIR, (target,)):
            problems.append(f"{field}.target: {target} belongs to the sandbox itself")
    if problems:
        raise InvalidInput("; ".join(problems))


def _path_problems(field: str, path: Path, hidden: Sequence[Path]) -> list[str]:
    if not path.is_absolute():
        return [f"{field}: {path} is not an absolute path"]
    real = path.resolve()
    if _below(str(real), _NEVER_BELOW) or str(real) == "/":
        return [f"{field}: {path} holds the host's own sockets, devices or kernel files and is never shown"]
    for directory in hidden:
        if real == directory or directory in real.parents:
            return [f"{field}: {path} is inside {directory}, which belongs to the control plane"]
    try:
        mode = real.stat().st_mode
    except OSError:
        return []
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        return [f"{field}: {path} is a socket or device, a way out of the sandbox"]
    return []


def view_arguments(
    spec: SandboxSpec, files: OwnFiles, masked: Sequence[Path], mounts: Sequence[MountPoint]
) -> list[str]:
    """
    bubblewrap's arguments for the whole file system of a sandbox.

    Reads directories, writes none but missing masked ones below a mount, which have to exist
    to be covered.
    """
    args = ["--ro-bind", "/usr", "/usr"]
    for link in SYSTEM_LINKS:
        path = Path(link)
        if path.is_symlink():
            args += ["--symlink", str(path.readlink()), link]
        elif path.is_dir():
            args += ["--ro-bind", link, link]
    args += ["--ro-bind-try", "/opt", "/opt"]
    args += ["--proc", "/proc", *_kernel_arguments(), "--dev", "/dev"]
    for directory in ("/tmp", "/var/tmp", "/dev/shm"):  # noqa: S108 - the sandbox's own
        args += ["--perms", "1777", "--tmpfs", directory]
    args += ["--perms", "0755", "--tmpfs", "/run", "--perms", "1777", "--dir", "/run/lock"]
    args += ["--symlink", "/run", "/var/run", "--symlink", "/run/lock", "/var/lock"]
    args += ["--dir", "/var/lib", "--dir", "/var/cache", "--dir", "/var/log", "--dir", "/mnt", "--dir", "/srv"]
    args += _parents("/sys/devices/system/cpu")
    args += ["--ro-bind-try", "/sys/devices/system/cpu", "/sys/devices/system/cpu"]
    args += _etc_arguments(files)
    args += _certificate_arguments(files)
    args += [*_parents(HOME), "--bind", str(files.home), HOME]
    shown = [("/usr", "/usr"), ("/opt", "/opt")]
    asked = [(mount.source, os.path.normpath(mount.target), mount.read_only) for mount in spec.mounts]
    if spec.workdir not in NO_WORKDIR:
        asked.insert(0, (spec.workdir, os.path.normpath(spec.workdir), False))
    for source, target, read_only in asked:
        real = os.path.realpath(source)
        args += _parents(target)
        args += ["--ro-bind" if read_only else "--bind", real, target]
        shown.append((real, target))
    for source, target in shown:
        args += _covers(source, target, masked, mounts)
    return args


def _kernel_arguments() -> list[str]:
    # Files of proc ask for the user, not for capabilities: root of a sandbox is root there, and
    # kernel/core_pattern alone would let it run a program on the host. What bubblewrap itself covers
    # depends on what it may write, so nothing is left to it.
    args = []
    for name in PROC_FIXED:
        if Path(name).exists():
            args += ["--ro-bind", name, name]
    for name in PROC_HIDDEN:
        path = Path(name)
        if path.is_dir():
            args += ["--tmpfs", name, "--remount-ro", name]
        elif path.exists():
            args += ["--ro-bind", "/dev/null", name]
    return args


def _parents(target: str) -> list[str]:
    # bubblewrap makes missing parents for root alone; the agent's user has to pass through them.
    parents = [str(path) for path in reversed(Path(target).parents) if str(path) != "/"]
    return [word for path in parents for word in ("--perms", "0755", "--dir", path)]


def _etc_arguments(files: OwnFiles) -> list[str]:
    args = ["--perms", "0755", "--dir", "/etc"]
    for name in ETC_SHOWN:
        path = Path("/etc", name)
        if path.is_symlink():
            target = str(path.readlink())
            # A link out of /etc and /usr would show a file that is not there anyway.
            args += ["--symlink", target, str(path)]
        elif path.exists() and not _is_secret(path):
            args += ["--ro-bind", str(path), str(path)]
            if path.is_dir():
                args += _covered_secrets(path)
    for entry in sorted(files.etc.iterdir()):
        args += ["--ro-bind", str(entry), f"/etc/{entry.name}"]
    return [*args, "--symlink", "/proc/self/mounts", "/etc/mtab"]


def _covered_secrets(directory: Path) -> list[str]:
    args = []
    for base, directories, names in os.walk(directory):
        for name in sorted(directories):
            path = Path(base, name)
            if not path.is_symlink() and _is_secret(path):
                args += ["--tmpfs", str(path)]
                directories.remove(name)
        for name in sorted(names):
            path = Path(base, name)
            if not path.is_symlink() and _is_secret(path):
                args += ["--ro-bind", "/dev/null", str(path)]
    return args


def _is_secret(path: Path) -> bool:
    mode = path.lstat().st_mode
    readable = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
    name = path.name
    return mode & readable != readable or name in _SECRET_NAMES or name.endswith(_SECRET_ENDINGS)


def _certificate_arguments(files: OwnFiles) -> list[str]:
    if files.certificates is None:
        return []
    # /usr is read-only, so there is no place for our directory in it: its parent is made anew, with
    # everything the host has there, and then closed.
    args = ["--perms", "0755", "--tmpfs", SHARE]
    share = Path(SHARE)
    if share.is_dir():
        for entry in sorted(share.iterdir()):
            if entry.name == "clawker" or _is_secret(entry):
                continue
            if entry.is_symlink():
                args += ["--symlink", str(entry.readlink()), str(entry)]
            elif entry.is_dir() or entry.is_file():
                args += ["--ro-bind", str(entry), str(entry)]
    return [*args, *_parents(CA_DIR), "--ro-bind", str(files.certificates), CA_DIR, "--remount-ro", SHARE]


def _covers(source: str, target: str, masked: Sequence[Path], mounts: Sequence[MountPoint]) -> list[str]:
    hidden = {str(path.resolve()) for path in masked}
    for path in hidden:
        if _below(path, (source,)):
            # One that is made later would show up: it has to be there to be covered.
            Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden |= {str(mount.path) for mount in mounts if mount.kind in _HIDDEN_KINDS and mount.path.is_dir()}
    args = []
    for path in sorted(hidden):
        if path != source and _below(path, (source,)):
            args += ["--perms", "0700", "--tmpfs", target + path.removeprefix(source), "--remount-ro"]
            args.append(target + path.removeprefix(source))
    return args


def _below(path: str, directories: Sequence[str]) -> bool:
    return any(path == directory or path.startswith(directory.rstrip("/") + "/") for directory in directories)


def etc_files(spec: SandboxSpec, address: str, gateway: str) -> dict[str, str]:
    """
    The files of /etc that are the sandbox's own.
    """
    uid, gid = spec.uid, spec.gid
    name = spec.agent[:63]
    users = [line for line in _system_lines("/etc/passwd") if line.split(":")[2] != str(uid) or uid == 0]
    groups = [line for line in _system_lines("/etc/group") if line.split(":")[2] != str(gid) or gid == 0]
    if uid:
        users.append(f"clawker:x:{uid}:{gid}::/home/clawker:/bin/sh")
    if gid:
        groups.append(f"clawker:x:{gid}:")
    return {
        "passwd": "\n".join(users) + "\n",
        "group": "\n".join(groups) + "\n",
        "hostname": f"{name}\n",
        "hosts": f"127.0.0.1 localhost\n{address} {name}\n",
        "resolv.conf": f"nameserver {gateway}\noptions timeout:5 attempts:2\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\n"
        "protocols: files\nservices: files\nethers: files\nrpc: files\n",
    }


def _system_lines(path: str) -> list[str]:
    # Accounts of people are nobody's business inside; those of packages have names programs look for.
    lines = []
    for line in Path(path).read_text().splitlines():
        fields = line.split(":")
        if len(fields) > 3 and fields[2].isdecimal() and (int(fields[2]) < 1000 or int(fields[2]) == 65534):
            if path.endswith("group"):
                fields[3] = ""
            lines.append(":".join(fields))
    return lines
