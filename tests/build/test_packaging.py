"""What is shipped: the source archive has every source, the wheel what runs and nothing else, and both work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def tracked(pattern: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        return {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)}
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def backend(call: str, directory: Path, cwd: Path) -> Path:
    """Ask the build backend as any front end would, in a process of its own; returns what it made."""
    script = f"import sys; from setuptools import build_meta as b; print('made', b.{call}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return directory / done.stdout.splitlines()[-1].removeprefix("made ")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, made from a copy so that the working tree stays as it is."""
    copy = tmp_path_factory.mktemp("tree")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in names.stdout.splitlines():
        source = ROOT / name
        if source.is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(source.read_bytes())
    return backend("build_sdist", tmp_path_factory.mktemp("sdist"), copy)


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    return next(target.iterdir())


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source archive and nothing else."""
    return backend("build_wheel", tmp_path_factory.mktemp("wheel"), unpacked)


def test_the_source_archive_has_every_source(unpacked: Path) -> None:
    """Python, Cython, C, headers, protos, tools and the licence are in; nothing that was built is."""
    has = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md", "tools/toolchain.py", "tools/toolchain.txt"}
    for pattern in ("src/**/*.py", "src/**/*.pyx", "src/**/*.pxd", "src/**/*.pyi", "src/**/*.[ch]", "proto/**/*.proto"):
        wanted |= tracked(pattern)
    wanted |= tracked("bpf/**/*.[ch]") | tracked("bpf/*.[ch]")

    assert sorted(wanted - has) == []
    assert [name for name in has if name.endswith((".so", ".o", ".pyc")) or "/_bpf/" in name] == []


def test_the_wheel_has_what_runs_and_nothing_else(wheel: Path) -> None:
    """Extensions, stubs, BPF objects with their manifest and every module are in; sources of C are not."""
    with zipfile.ZipFile(wheel) as archive:
        has = set(archive.namelist())
        manifest = json.loads(archive.read("clawker_cp/_bpf/manifest.json"))
    modules = {name.removeprefix("src/") for name in tracked("src/clawker_cp/*.py") | tracked("src/**/*.py")}
    extensions = {path.stem for path in (ROOT / "src/clawker_cp/_fast").glob("*.pyx")}
    made = {match[1] for name in has if (match := re.match(r"clawker_cp/_fast/(\w+)\..*\.so$", name))}

    assert sorted(modules - has) == []
    assert made == extensions
    assert [name for name in has if name.endswith((".c", ".h", ".pyx", ".pxd", ".proto"))] == []
    assert {name for name in has if name.endswith(".bpf.o")} == {
        f"clawker_cp/_bpf/{name}" for name in manifest["objects"]
    }
    assert "clawker.bpf.o" in manifest["objects"]
    assert {"clawker_cp/py.typed", "clawker_cp/_fast/names.pyi"} <= has


def test_the_wheel_works_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    """Every module imports alone from the wheel, with warnings as errors, and the compiled paths are chosen."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = """
import importlib, pkgutil, pathlib, clawker_cp
assert pathlib.Path(clawker_cp.__file__).is_relative_to(pathlib.Path.cwd()), clawker_cp.__file__
from clawker_cp import accel
assert accel.IMPLEMENTATION == "fast"
for module in pkgutil.walk_packages(clawker_cp.__path__, "clawker_cp."):
    # What tests use may read the repository.
    if not module.name.endswith("__main__") and not module.name.startswith("clawker_cp.testing."):
        importlib.import_module(module.name)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_missing_is_named_all_at_once() -> None:
    """Without any tool the build stops with one message: each tool, its Debian package, its override variable."""
    environment = {"PATH": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    for said in (
        "clang 14 or later: apt-get install clang, or set CLAWKER_CP_BUILD_CLANG",
        "llvm-strip: apt-get install llvm, or set CLAWKER_CP_BUILD_LLVM_STRIP",
        "pkg-config: apt-get install pkg-config, or set CLAWKER_CP_BUILD_PKG_CONFIG",
        "lib:libbpf 1.1 or later: apt-get install libbpf-dev libelf-dev zlib1g-dev",
        "cc: apt-get install gcc libc6-dev, or set CC",
    ):
        assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_build_description_stays_short() -> None:
    """setup.py holds only what needs code."""
    assert len((ROOT / "setup.py").read_text().splitlines()) < 200
