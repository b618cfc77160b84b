"""
What the options of `clawker-cp run` mean: pure functions from words to a request.

Each raises `InvalidInput` naming the option and the fix. Called by `cli.run` only.
"""

from __future__ import annotations

import pwd
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from clawker_cp.errors import InvalidInput
from clawker_cp.runtime.agent_names import is_name

_NOT_NAME = re.compile(r"[^a-zA-Z0-9_.-]+")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PASSED_VARIABLES = ("TERM", "COLORTERM", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "NO_COLOR")
DEFAULT_UID = 1001
MAX_PORT = 65535
MAX_ID = 2**32 - 2  # the last number means nobody to the kernel


@dataclass(frozen=True, slots=True)
class User:
    """Who the command runs as."""

    uid: int
    gid: int


def parse_user(text: str | None, environ: Mapping[str, str], workdir: Path, *, allow_root: bool) -> User:
    """
    Read `--user NAME|UID[:GID]`; without it: who called sudo, else the owner of the working directory.

    Root needs `--allow-root`, and is never the default.
    """
    if text is None:
        return _default_user(environ, workdir)
    name, _, group = text.partition(":")
    if name.isdecimal():
        uid = gid = _id(name)
    else:
        try:
            entry = pwd.getpwnam(name)
        except KeyError as error:
            raise InvalidInput(f"--user: no user {name!r} on this host", hint="give a name or UID[:GID]") from error
        uid, gid = entry.pw_uid, entry.pw_gid
    if group:
        if not group.isdecimal():
            raise InvalidInput(f"--user: group {group!r} is not a number", hint="write UID:GID")
        gid = _id(group)
    if uid == 0 and not allow_root:
        raise InvalidInput("--user: the command would run as root", hint="add --allow-root if that is meant")
    return User(uid, gid)


def _id(text: str) -> int:
    if len(text) > len(str(MAX_ID)) or int(text) > MAX_ID:
        raise InvalidInput(f"--user: {text[:80]} is no user or group: they end at {MAX_ID}")
    return int(text)


def _default_user(environ: Mapping[str, str], workdir: Path) -> User:
    uid, gid = environ.get("SUDO_UID", ""), environ.get("SUDO_GID", "")
    if uid.isdecimal() and int(uid) != 0:
        return User(int(uid), int(gid) if gid.isdecimal() else int(uid))
    owner = workdir.stat()
    if owner.st_uid != 0:
        return User(owner.st_uid, owner.st_gid)
    return User(DEFAULT_UID, DEFAULT_UID)


def parse_mount(text: str) -> dict[str, str | bool]:
    """
    Read `--mount SRC[:DST][:rw]`; read-only unless `rw` is said, DST defaults to SRC.
    """
    parts = text.split(":")
    writable = parts[-1] == "rw"
    if parts[-1] in {"rw", "ro"}:
        parts.pop()
    if len(parts) not in {1, 2} or not all(parts):
        raise InvalidInput(f"--mount {text!r} is not SRC[:DST][:rw]", hint="for example --mount ~/.cache:/cache:rw")
    try:
        source = Path(parts[0]).expanduser().resolve(strict=True)
    except FileNotFoundError as error:
        raise InvalidInput(f"--mount {text!r}: {parts[0]} does not exist on this host") from error
    except (OSError, RuntimeError, ValueError) as error:  # no such user's home; no path at all
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidInput(f"--mount {text[:80]!r}: {why}") from error
    target = parts[1] if len(parts) == 2 else str(source)
    if not target.startswith("/"):
        raise InvalidInput(f"--mount {text!r}: {target!r} has to be an absolute path inside the sandbox")
    return {"source": str(source), "target": target, "read_only": not writable}


def parse_publish(text: str) -> dict[str, int]:
    """
    Read `--publish [HOST_PORT:]PORT`; without HOST_PORT one is chosen.
    """
    host, _, port = text.rpartition(":")
    numbers = [host or "0", port]
    if not all(n.isdecimal() and len(n) <= 5 and int(n) <= MAX_PORT for n in numbers) or int(port) == 0:
        raise InvalidInput(f"--publish {text!r} is not [HOST_PORT:]PORT with ports 1 to {MAX_PORT}")
    return {"host_port": int(numbers[0]), "port": int(port)}


def parse_env(items: Iterable[str], environ: Mapping[str, str]) -> dict[str, str]:
    """
    Read `--env NAME=VALUE` or `--env NAME` (taken from the caller), over the few that always pass.
    """
    result = {name: environ[name] for name in PASSED_VARIABLES if name in environ}
    for item in items:
        name, separator, value = item.partition("=")
        if not _ENV_NAME.fullmatch(name):
            raise InvalidInput(f"--env {name!r} is not a variable name", hint="write --env NAME=VALUE or --env NAME")
        if separator:
            result[name] = value
        elif name in environ:
            result[name] = environ[name]
        else:
            raise InvalidInput(f"--env {name}: not set in this shell", hint=f"write --env {name}=VALUE")
    return result


def sandbox_names(project: str | None, agent: str | None, workdir: Path) -> tuple[str, str]:
    """
    Project and agent, by default the working directory's name and `run-<4 hex>`.
    """
    if project is None:
        project = _NOT_NAME.sub("-", workdir.name).strip("-._")
    if agent is None:
        agent = f"run-{secrets.token_hex(2)}"
    for option, value, may_be_empty in (("--project", project, True), ("--agent", agent, False)):
        if not (value == "" and may_be_empty) and not is_name(value):
            raise InvalidInput(
                f"{option}: {value[:80]!r} is not a name",
                hint="letters, digits, '_', '.', '-', at most 255; the first a letter or digit",
            )
    return project, agent


def resolve_workdir(text: str | None) -> Path:
    """
    The directory that is mounted writable and in which the command starts.
    """
    try:
        path = Path(text).expanduser() if text else Path.cwd()
    except RuntimeError as error:  # no such user
        raise InvalidInput(f"--workdir: {text}: {error}") from error
    if not path.is_dir():
        raise InvalidInput(f"--workdir: {path} is not a directory")
    return path.resolve()
