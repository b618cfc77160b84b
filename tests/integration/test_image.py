"""The image of the control plane, built on a real engine without any registry."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from clawker_cp.testing.docker_world import missing
from clawker_cp.testing.image_world import EngineHost, engine_host
from clawker_cp.testing.peers import WHY, peer

pytestmark = [
    pytest.mark.root, pytest.mark.slow, pytest.mark.docker, pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(600), pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]  # fmt: skip

IMAGE = "clawker-cp:tested"
COMPILERS = ("gcc", "cc", "c++", "clang", "cc1", "as", "ld", "make", "llvm-strip", "cython", "pip", "pip3")
SOURCES = (".c", ".cc", ".h", ".pyx", ".pxd", ".o", ".a")
LISTING = "find / -xdev -not -path '/proc/*' -not -path '/sys/*' -printf '%y%m %p\\n'"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[EngineHost]:
    async with engine_host() as engine:
        await engine.build_image(IMAGE)
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def files(engine: EngineHost) -> dict[str, str]:
    """Every path in the image, with the letter of its type and its mode, like `f755`."""
    listed = await engine.out("run", "--rm", "--network=none", "--entrypoint=sh", IMAGE, "-c", LISTING)
    return {path: mode for mode, path in (line.split(" ", 1) for line in listed.splitlines())}


async def run(engine: EngineHost, *words: str, options: tuple[str, ...] = ()) -> str:
    return await engine.out("run", "--rm", "--network=none", *options, IMAGE, *words)


async def test_there_is_no_compiler_and_no_source(files: dict[str, str]) -> None:
    """What was needed to build it stayed in the other stage."""
    names = {Path(path).name for path, mode in files.items() if mode[0] in "fl"}
    assert not names & set(COMPILERS)
    assert not [one for one in names if one.startswith(("clang-", "gcc-", "x86_64-linux-gnu-gcc", "llvm-"))]
    assert not [path for path in files if path.startswith("/opt/") and path.endswith(SOURCES) and "_bpf/" not in path]
    assert not [path for path in files if path.startswith(("/src", "/wheels", "/wheel", "/build"))]


async def test_nothing_in_it_gains_privilege(files: dict[str, str]) -> None:
    """No file is set-uid or set-gid."""
    assert not [path for path, mode in files.items() if mode[0] == "f" and int(mode[1:], 8) & 0o6000]


async def test_what_it_runs_with_is_there(files: dict[str, str]) -> None:
    """The package with programs for the kernel, the proxy, and the host tools; no host sandboxes."""
    assert "/opt/clawker-cp/bin/clawkerctl" in files and "/opt/clawker-cp/bin/ebpf-manager" in files
    assert [path for path in files if path.endswith("clawker_cp/_bpf/clawker.bpf.o")]
    assert [path for path in files if path.endswith("envoy/_bin/envoy")]
    assert {"/usr/sbin/nft", "/usr/bin/nsenter", "/etc/ssl/certs/ca-certificates.crt"} < set(files)
    assert "/usr/bin/bwrap" not in files and "/usr/local/bin/hydra" not in files


async def test_no_registry_is_named_in_it(engine: EngineHost) -> None:
    """Neither in a file of pip or apt, nor in the history of how it was made."""
    told = [os.environ[name] for name in os.environ if name.startswith("PIP_") and "//" in os.environ[name]]
    look = "cat /etc/pip.conf /root/.config/pip/pip.conf /opt/*/pip.conf /etc/apt/sources.list 2>/dev/null; true"
    found = await engine.out("run", "--rm", "--network=none", "--entrypoint=sh", IMAGE, "-c", look)
    history = await engine.out("history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    configured = json.loads(await engine.out("inspect", IMAGE))[0]["Config"]["Env"]
    assert found == "" and "index" not in history
    assert not [one for one in told if one in history or one in str(configured)]


async def test_it_says_what_it_is(engine: EngineHost) -> None:
    """Labels that the released CLI looks for, the entry point, a health check, the stop signal."""
    config = json.loads(await engine.out("inspect", IMAGE))[0]["Config"]
    labels = config["Labels"]
    assert (labels["dev.clawker.managed"], labels["dev.clawker.purpose"]) == ("true", "controlplane")
    assert labels["org.opencontainers.image.title"] == "clawker-cp"
    assert labels["org.opencontainers.image.version"]
    assert (config["Entrypoint"], config["Cmd"][0], config["StopSignal"]) == (["clawker-cp"], "serve", "SIGTERM")
    assert "/healthz" in config["Healthcheck"]["Test"][-1]


async def test_the_compiled_parts_run(engine: EngineHost) -> None:
    """libbpf is found and the fast paths are chosen; every dependency is the one that was asked for."""
    version = await run(engine, "--version")
    assert "libbpf 1." in version and "hot paths: fast" in version
    code = (
        "from importlib.metadata import requires, version\n"
        "import re\n"
        "for line in requires('clawker-cp'):\n"
        "    print(version(re.match('[A-Za-z0-9.-]+', line)[0]))\n"
    )
    versions = await run(engine, "-c", code, options=("--entrypoint=/opt/clawker-cp/bin/python",))
    assert len(versions.splitlines()) > 15


async def test_the_check_tells_what_a_bare_container_lacks(engine: EngineHost) -> None:
    """Without mounts and capabilities it may not enforce, and says which are missing; with them it sees the host's."""
    bare = await engine.docker("run", "--rm", "--network=none", IMAGE, "serve", "--check")
    assert bare.code == 3 and "cannot enforce" in bare.err and "bpffs" in bare.err
    given = (
        "--cap-add=SYS_ADMIN", "--cap-add=NET_ADMIN", "--cap-add=SYS_PTRACE", "--pid=host", "--cgroupns=host",
        "--volume=/sys/fs/bpf:/sys/fs/bpf", "--volume=/sys/fs/cgroup:/sys/fs/cgroup:ro",
    )  # fmt: skip
    whole = await engine.docker("run", "--rm", "--network=none", *given, IMAGE, "check", "--json")
    rows = {row["name"]: row["present"] for row in json.loads(whole.out)}
    assert {name for name in ("root", "kernel", "BTF", "bpffs", "cgroup2", "envoy", "host ring") if rows[name]} == {
        "root", "kernel", "BTF", "bpffs", "cgroup2", "envoy", "host ring",
    }  # fmt: skip


async def test_wrong_settings_end_it_with_two(engine: EngineHost) -> None:
    """The message names the key; the engine sees the exit code, process 1 or not."""
    options = ("--env", "CLAWKER_CP_ENVOY__CONCURRENCY=many")
    for more in ((), ("--pid=host",)):
        done = await engine.docker("run", "--rm", "--network=none", *options, *more, IMAGE)
        assert done.code == 2 and "CONCURRENCY" in done.err


async def test_the_other_makers_servers_come_from_their_images(engine: EngineHost) -> None:
    """Named as build arguments, they are on the PATH of the server; what is not named is not there."""
    hydra = peer("hydra")
    if hydra is None:
        pytest.skip(WHY.format(name="hydra"))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(hydra, "usr/bin/hydra")
        archive.add("/etc/passwd", "etc/passwd")
    await engine.out("import", "-", "some/hydra:1", data=buffer.getvalue())
    await engine.build_image("clawker-cp:hydra", "--build-arg", "HYDRA_IMAGE=some/hydra:1")
    told = await engine.out(
        "run", "--rm", "--network=none", "--entrypoint=sh", "clawker-cp:hydra", "-c", "hydra version; ls /usr/local/bin"
    )
    assert "Version:" in told and told.splitlines()[-1] == "hydra"
