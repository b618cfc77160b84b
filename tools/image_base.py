"""
Base images out of this machine's own Debian packages, where no registry of images can be reached.

`image_base.py build|image OUT.tar` writes the files of the packages that `toolchain.txt` lists for that
purpose, of what they depend on and of Debian's essential packages: what `docker import` makes a base of.
Only what packages shipped goes in, so nothing that was configured here does. Runs on any Python 3.9 or later.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from toolchain import table

STATUS = Path("/var/lib/dpkg/status")
INFO = Path("/var/lib/dpkg/info")
LEFT_OUT = re.compile(r"/usr/share/(doc|doc-base|man|info|locale|lintian|bug|bash-completion)/|/var/cache/|.*\.pyc$")
DIRECTORIES = ("dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var/tmp", "var/lib/dpkg/info")
BUNDLE = "etc/ssl/certs/ca-certificates.crt"
ROOTS = Path("/usr/share/ca-certificates/mozilla")
MADE = {"etc/passwd": "/usr/share/base-passwd/passwd.master", "etc/group": "/usr/share/base-passwd/group.master"}


def stanzas(text: str) -> dict[str, dict[str, str]]:
    """The installed packages of a dpkg status file, their fields by name; the whole stanza as field ""."""
    found = {}
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z-]+):(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE))
        if fields.get("Status", "").split()[2:] == ["installed"]:
            found[fields["Package"].strip()] = {**fields, "": stanza}
    return found


def closure(installed: dict[str, dict[str, str]], wanted: Iterable[str]) -> set[str]:
    """
    The packages `wanted`, the essential ones, and everything they depend on.

    Raises LookupError naming what is not installed here.
    """
    providers: dict[str, str] = {}
    for name, fields in installed.items():
        for word in _names(fields.get("Provides", "")):
            providers.setdefault(word[0], name)
    todo = [*wanted, *(name for name, fields in installed.items() if fields.get("Essential", "").strip() == "yes")]
    chosen: set[str] = set()
    while todo:
        name = todo.pop()
        name = name if name in installed else providers.get(name, name)
        if name not in installed:
            raise LookupError(f"{name} is not installed here: `make system` installs what toolchain.txt lists")
        if name in chosen:
            continue
        chosen.add(name)
        fields = installed[name]
        for alternatives in _names(f"{fields.get('Pre-Depends', '')},{fields.get('Depends', '')}"):
            here = [one for one in alternatives if one in installed or one in providers]
            todo.append((here or alternatives)[0])
    return chosen


def _names(relations: str) -> Iterator[list[str]]:
    """Package names of a relationship field: one list per comma, its alternatives in order."""
    for relation in relations.split(","):
        words = [re.split(r"[\s(:\[]", one.strip())[0] for one in relation.split("|") if one.strip()]
        if words:
            yield words


def shipped(names: Iterable[str], installed: dict[str, dict[str, str]]) -> Iterator[Path]:
    """Every file, link and directory of the packages as it lies here; what somebody changed is left out."""
    for name in sorted(names):
        fields = installed[name]
        architecture = fields.get("Architecture", "").strip()
        lists = [INFO / f"{name}:{architecture}.list", INFO / f"{name}.list"]
        listing = next((one for one in lists if one.exists()), None)
        conffiles = dict(re.findall(r"^ (/\S+) ([0-9a-f]{32})", fields.get("Conffiles", ""), re.MULTILINE))
        for line in listing.read_text().splitlines() if listing else ():
            path = Path(line)
            if line in {"/.", ""} or LEFT_OUT.match(line) or not os.path.lexists(path):
                continue
            digest = conffiles.get(line)
            if digest and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != digest:
                continue
            # Debian merged /bin into /usr/bin; a package's list may still have the old name.
            yield path.parent.resolve() / path.name


def write(purpose: str, out: Path) -> None:
    """Write the base for `purpose` (a word of toolchain.txt's first column) as a tar archive."""
    installed = stanzas(STATUS.read_text())
    wanted = {name for row in table() if row[0] == purpose for name in row[2].split()}
    names = closure(installed, wanted)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    with tarfile.open(temporary, "w") as archive:
        for directory in DIRECTORIES:
            _directory(archive, directory, 0o1777 if directory.endswith("tmp") else 0o755)
        for merged in ("bin", "sbin", "lib", "lib64"):
            if Path("/", merged).is_symlink():
                archive.add(f"/{merged}", merged, recursive=False)
        seen = {f"/{one}" for one in (*DIRECTORIES, "bin", "sbin", "lib", "lib64")}
        for path in shipped(names, installed):
            if str(path) not in seen:
                seen.add(str(path))
                archive.add(path, str(path)[1:], recursive=False, filter=_anonymous)
        _alternatives(archive, seen)
        for name, source in MADE.items():
            _text(archive, name, Path(source).read_text())
        if "ca-certificates" in names:
            _text(archive, BUNDLE, "".join(one.read_text() for one in sorted(ROOTS.glob("*.crt"))))
        _text(archive, "var/lib/dpkg/status", "\n\n".join(installed[name][""] for name in sorted(names)) + "\n\n")
    temporary.rename(out)


def _alternatives(archive: tarfile.TarFile, seen: set[str]) -> None:
    """The links that update-alternatives made, where they lead to something that is in the archive."""
    for link in sorted(Path("/etc/alternatives").iterdir()):
        if link.is_symlink() and str(link.resolve()) in seen:
            archive.add(link, str(link)[1:], recursive=False)
            for place in ("/usr/bin", "/usr/sbin"):
                user = Path(place, link.name)
                if user.is_symlink() and str(user.readlink()) == str(link) and str(user) not in seen:
                    archive.add(user, str(user)[1:], recursive=False)


def _directory(archive: tarfile.TarFile, name: str, mode: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, mode
    archive.addfile(entry)


def _text(archive: tarfile.TarFile, name: str, text: str) -> None:
    data = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o644
    archive.addfile(entry, io.BytesIO(data))


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: image_base.py PURPOSE OUT.tar")
    try:
        write(sys.argv[1], Path(sys.argv[2]))
    except LookupError as error:
        sys.exit(f"image_base.py: {error.args[0]}")
