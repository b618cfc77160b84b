"""
What the system has of `toolchain.txt`: looked for before it is used, everything missing named at once.

Used by setup.py and by `make`; runs on any Python 3.9 or later, without any package:
`toolchain.py doctor` is a table for people, `toolchain.py packages` the missing Debian packages.
"""

from __future__ import annotations

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

INCLUDES = [Path("/usr/include"), *sorted(Path("/usr/include").glob("*-linux-gnu"))]


def table() -> list[list[str]]:
    """The rows of toolchain.txt: when, what, Debian packages, least version, override variable."""
    lines = Path(__file__).with_name("toolchain.txt").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines if line and not line.startswith("#")]


def tool(name: str) -> str:
    """The command to start for a tool, as its override variable says."""
    variable = next((row[4] for row in table() if row[1] == name), "")
    return (os.environ.get(variable) if variable else "") or name


def output(*argv: str) -> str:
    """What a command printed; empty when it cannot be run or fails."""
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def found(what: str, least: str) -> str:
    """The version of something, or "present"; empty if it is missing or too old."""
    kind, _, name = what.partition(":")
    if kind == "python3":
        here = Path(sysconfig.get_path("include"), "Python.h")
        version = sysconfig.get_python_version() if here.exists() else ""
    elif kind == "lib":
        version = output(tool("pkg-config"), "--modversion", name).strip()
    elif kind == "so":
        version = "present" if ctypes.util.find_library(name) else ""
    elif kind == "header":
        version = "present" if any((base / name).exists() for base in INCLUDES) else ""
    elif kind == "target":
        version = "present" if re.search(rf"^ *{name} ", output(tool("clang"), "-print-targets"), re.M) else ""
    elif kind == "file":
        version = "present" if Path(name).exists() else ""
    elif shutil.which(tool(kind)) and least:
        number = re.search(r"\d+(\.\d+)*", output(tool(kind), "--version"))
        version = number[0] if number else ""
    else:
        version = "present" if shutil.which(tool(kind)) else ""
    if version and least and [*map(int, re.findall(r"\d+", version))] < [*map(int, least.split("."))]:
        return ""
    return version


def check(when: str = "build") -> tuple[str, list[str]]:
    """The versions found, as one line, and one line for each missing thing: packages, override variable."""
    versions, missing = [], []
    for moment, what, packages, least, variable in table():
        if moment != when:
            continue
        version = found(what, least)
        if version not in {"", "present"}:
            versions.append(f"{what.removeprefix('lib:')} {version}")
        if not version:
            wanted = f"{what} {least} or later" if least else what
            missing.append(f"  {wanted}: apt-get install {packages}" + (f", or set {variable}" if variable else ""))
    return ", ".join(versions), missing


COSTS = {
    "build": "nothing can be compiled",
    "run": "no sandbox can be started; compiling rules and judging requests still works",
    "test": "parts of the tests and of the tour cannot run",
}


def doctor() -> int:
    """Print what is missing and what that costs. Returns 3 if something is."""
    code = 0
    for when, cost in COSTS.items():
        versions, missing = check(when)
        print(f"to {when}: " + ("all there" + (f" ({versions})" if versions else "") if not missing else cost))
        for line in missing:
            print(line)
            code = 3
    if os.geteuid() != 0:
        print("not root: enforcement, sandboxes and their tests need it; unit tests work without")
        code = 3
    return code


def packages() -> None:
    """Print the Debian packages of everything that is missing, one a line."""
    lacking = [row for row in table() if not found(row[1], row[3])]
    print("\n".join(sorted({name for row in lacking for name in row[2].split()})))


if __name__ == "__main__":
    if sys.argv[1:] == ["packages"]:
        packages()
    elif sys.argv[1:] == ["doctor"]:
        sys.exit(doctor())
    else:
        sys.exit("usage: toolchain.py doctor | packages")
