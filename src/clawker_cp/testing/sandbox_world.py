"""
A host and an outside world for tests of the host engine, each a network namespace of its own.

The test's main thread stands in the "host"; the world owns 198.51.100.0/24 and 203.0.113.0/24 and
has no way further. Everything carries this process's number and is taken away at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clawker_cp.engines.base import RingEvent, SandboxSpec
from clawker_cp.engines.host.engine import HostEngine
from clawker_cp.engines.host.namespaces import in_netns

SUBNET = "10.231.80.0/20"
GATEWAY = "10.231.80.1"
HOST = "198.51.100.254"
WORLD = "198.51.100.1"
FAR = "203.0.113.1"
LIMIT_S = 20.0
_libc = ctypes.CDLL(None, use_errno=True)


def sh(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout


def enter(namespace: Path) -> None:
    with namespace.open() as file:
        if _libc.setns(file.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll for something another process does; the value, or a failure after the limit."""
    end = time.monotonic() + LIMIT_S
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {LIMIT_S:.0f} s: {what}")
        time.sleep(0.01)
    return value


async def eventually(condition: Callable[[], Any], what: str) -> Any:
    """As `until`, for what the test's own loop has to do."""
    end = time.monotonic() + LIMIT_S
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {LIMIT_S:.0f} s: {what}")
        await asyncio.sleep(0.01)
    return value


@contextlib.contextmanager
def host_and_world() -> Iterator[Path]:
    """Stand in a fresh host namespace, joined to a fresh world; yields the world's file."""
    mark = f"t{os.getpid():x}{secrets.token_hex(2)}"
    host, world = f"h-{mark}", f"w-{mark}"
    home = Path("/proc/self/ns/net")
    back = os.open(home, os.O_RDONLY)
    try:
        for name in (host, world):
            sh("ip", "netns", "add", name)
            sh("ip", "-n", name, "link", "set", "lo", "up")
        sh("ip", "-n", host, "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", world)
        for name, address in ((host, HOST), (world, WORLD)):
            sh("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "up0")
            sh("ip", "-n", name, "link", "set", "up0", "up")
        sh("ip", "-n", world, "addr", "add", f"{FAR}/32", "dev", "lo")
        sh("ip", "-n", host, "route", "add", "203.0.113.0/24", "via", WORLD)
        enter(Path("/run/netns", host))
        yield Path("/run/netns", world)
    finally:
        if _libc.setns(back, 0x40000000):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(back)
        for name in (host, world):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@dataclass
class Host:
    """An engine in its namespace, what it reported, and where its files are."""

    engine: HostEngine
    world: Path
    state: Path
    workdir: Path
    cgroup_parent: str
    events: list[RingEvent] = field(default_factory=list)

    def spec(self, *argv: str, **fields: Any) -> SandboxSpec:
        values: dict[str, Any] = {"project": "p", "agent": f"a-{secrets.token_hex(3)}", "workdir": str(self.workdir)}
        return SandboxSpec(argv=argv, **{**values, **fields})

    async def run(self, *argv: str, **fields: Any) -> tuple[int, str]:
        """Run one command to its end; its exit code and everything it wrote."""
        sandbox = await self.engine.create(self.spec(*argv, **fields))
        try:
            return await self.finish(sandbox.id)
        finally:
            await self.engine.remove(sandbox.id, force=True, grace_s=0)

    async def finish(self, sandbox_id: str) -> tuple[int, str]:
        output = self.workdir.parent / f"output-{sandbox_id[:12]}"
        with output.open("w+b") as file, Path(os.devnull).open("rb") as nothing:
            await self.engine.run(sandbox_id, (nothing.fileno(), file.fileno(), file.fileno()))
            code = await self.engine.wait(sandbox_id)
        return code, output.read_text(errors="replace")

    async def start(self, *argv: str, **fields: Any) -> str:
        """Start one command and leave it running; the sandbox's id."""
        return await self.begin((await self.engine.create(self.spec(*argv, **fields))).id)

    async def begin(self, sandbox_id: str) -> str:
        """Run the command of a sandbox that was created and leave it running; its id again."""
        output = self.workdir.parent / f"output-{sandbox_id[:12]}"
        with output.open("w+b") as file, Path(os.devnull).open("rb") as nothing:
            await self.engine.run(sandbox_id, (nothing.fileno(), file.fileno(), file.fileno()))
        return sandbox_id

    def output(self, sandbox_id: str) -> str:
        return (self.workdir.parent / f"output-{sandbox_id[:12]}").read_text(errors="replace")


def make_engine(state: Path, parent: str, **options: Any) -> HostEngine:
    certificates = state.parent / "certificates"
    certificates.mkdir(exist_ok=True)
    for name in ("bundle.pem", "ca.pem"):
        (certificates / name).write_text(f"{name}\n")
    return HostEngine(
        state_dir=state,
        bridge="cwtest0",
        subnet=SUBNET,
        cgroup_parent=parent,
        masked=[state],
        ca_dir=certificates,
        **options,
    )


@contextlib.asynccontextmanager
async def running_host(base: Path, **options: Any) -> AsyncIterator[Host]:
    """A started engine below `base`; every sandbox, cgroup and namespace is gone afterwards."""
    base.chmod(0o755)
    state, workdir = base / "state", base / "work"
    state.mkdir()
    workdir.mkdir()
    workdir.chmod(0o777)
    parent = f"cwtest-{os.getpid()}-{secrets.token_hex(3)}.slice"
    events: list[RingEvent] = []
    with host_and_world() as world:
        engine = make_engine(state, parent, on_drop=events.append, **options)
        try:
            await engine.start()
            yield Host(engine, world, state, workdir, parent, events)
        finally:
            await end(engine)


async def end(engine: HostEngine) -> None:
    for sandbox in engine.living():
        await engine.remove(sandbox.id, force=True, grace_s=0)
    await engine.aclose(remove=True)


@contextlib.contextmanager
def tcp_server(address: str, port: int, namespace: Path | None = None) -> Iterator[list[str]]:
    """Answers every line with who sent it; the list is who connected."""
    seen: list[str] = []

    def listen() -> socket.socket:
        return socket.create_server((address, port))

    listener = in_netns(namespace, listen)

    def serve(connection: socket.socket, peer: str) -> None:
        with connection, contextlib.suppress(OSError):
            while connection.recv(100):
                connection.sendall(f"{peer}\n".encode())

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, peer = listener.accept()
                seen.append(peer[0])
                threading.Thread(target=serve, args=(connection, peer[0]), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield seen
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
