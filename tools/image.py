"""
Build the image from this machine's own packages: `make image`, and the test of the image.

Asks no registry of images. Debian's packages are those installed here (image_base.py), Python's come through
pip as it is set up here and are handed to the build as files, so that no registry's name gets into the image.
Where a registry is reachable, `docker build -t clawker-cp .` does the same from Debian's own image.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import image_base

ROOT = Path(__file__).parent.parent.resolve()
CACHE = ROOT / "build" / "image"
IMAGE_PYTHON = "/usr/bin/python3"  # Debian's, which comes with the base; the one that runs this may be another
BASES = {"BUILD_BASE": ("build", "clawker-build-base"), "RUNTIME_BASE": ("image", "clawker-runtime-base")}


def fetch_wheels(directory: Path = CACHE / "wheels") -> None:
    """Have the wheels of everything that the build and the package ask for; again only when that changes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = sorted([*project["build-system"]["requires"], *project["project"]["dependencies"]])
    said = subprocess.run([IMAGE_PYTHON, "--version"], check=True, capture_output=True, text=True).stdout
    stamp = directory / "wanted.txt"
    text = said + "\n".join(wanted)
    if stamp.exists() and stamp.read_text() == text:
        return
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.whl"):
        old.unlink()
    download = [sys.executable, "-m", "pip", "--python", IMAGE_PYTHON, "download", "-q", "--only-binary", ":all:"]
    subprocess.run([*download, "-d", str(directory), *wanted], check=True)
    stamp.write_text(text)


def have_base(docker: list[str], purpose: str, name: str) -> str:
    """Import the base for `purpose` unless the engine has the very same one; returns its reference."""
    status = image_base.STATUS.read_bytes() + (ROOT / "tools/toolchain.txt").read_bytes()
    code = Path(image_base.__file__).read_bytes()
    reference = f"{name}:{hashlib.sha256(status + code).hexdigest()[:12]}"
    if subprocess.run([*docker, "image", "inspect", reference], capture_output=True, check=False).returncode:
        archive = CACHE / f"{name}.tar"
        image_base.write(purpose, archive)
        try:
            subprocess.run([*docker, "import", str(archive), reference], check=True, stdout=subprocess.DEVNULL)
        finally:
            archive.unlink()  # hundreds of megabytes that take seconds to make
    return reference


def build(docker: list[str], tag: str, extra: list[str]) -> None:
    """Build the image; its containers have no network while it is built. Several may be built at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = [f"--build-arg={key}={have_base(docker, *where)}" for key, where in BASES.items()]
        fetch_wheels()
    arguments.append(f"--build-arg=VERSION={version('clawker-cp')}")
    subprocess.run(
        [*docker, "build", "--network", "none", *arguments, *extra, "-t", tag, str(ROOT)],
        check=True,
        # BuildKit where the client has it; the older builder's deprecation is no news.
        env={**os.environ, "DOCKER_CLI_HINTS": "false"},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the image from this machine's own packages.")
    parser.add_argument("--docker", default="docker", help="the client, with its options, as one word each")
    parser.add_argument("--tag", default="clawker-cp", help="name of the image (default: clawker-cp)")
    options, more = parser.parse_known_args()
    try:
        build(options.docker.split(), options.tag, more)
    except LookupError as error:
        sys.exit(f"image.py: {error.args[0]}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"image.py: {' '.join(error.cmd[:2])} failed, see above")
