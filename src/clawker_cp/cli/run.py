"""
`clawker-cp run`: one command in a sandbox, its egress enforced and every decision shown.

A client of the server on this host (ruling R26): it reads the options, hands over its standard
streams, forwards signals, prints decisions and ends with the command's own exit code. Policy,
sandboxes and enforcement are the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import orjson

from clawker_cp.cli import run_options
from clawker_cp.cli.decisions import FirstOfEachKind, decision_line, is_outcome
from clawker_cp.cli.joining import join_server
from clawker_cp.cli.terminal import TerminalBridge, is_interactive, terminal_bridge
from clawker_cp.config import Directories
from clawker_cp.errors import ClawkerError, InvalidInput, Unavailable
from clawker_cp.firewall.documents import emit_rules, read_rules_file
from clawker_cp.firewall.rules import Rule
from clawker_cp.firewall.shorthand import parse_shorthands
from clawker_cp.rpc.local_protocol import SANDBOX_GONE, LocalChannel
from clawker_cp.runtime.runner import run_main

ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT})
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
REATTACH_PATIENCE_S = 600.0  # for a command that runs; one that does not yet is not worth that
START_PATIENCE_S = 60.0
STABLE_AFTER_S = 5.0  # a server that lives this long after we came is not one that our coming ends
OUTPUT_DRAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Output:
    """What goes to standard error while the command runs and after it."""

    as_json: bool
    quiet: bool
    verbose: bool
    learn_to: Path | None


def build_request(options: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """
    Turn the parsed options into the request the server gets.

    Raises `InvalidInput` naming the option.
    """
    workdir = run_options.resolve_workdir(options["workdir"])
    user = run_options.parse_user(options["user"], environ, workdir, allow_root=options["allow_root"])
    project, agent = run_options.sandbox_names(options["project"], options["agent"], workdir)
    if options["learn_to"] and not options["learn"]:
        raise InvalidInput("--learn-to needs --learn")
    if options["tty"] and not is_interactive():
        raise InvalidInput("--tty: standard input and output are not a terminal")
    return {
        "op": "run",
        "project": project,
        "agent": agent,
        "argv": list(options["command"]),
        "env": run_options.parse_env(options["env"], environ),
        "workdir": str(workdir),
        "mounts": [run_options.parse_mount(item) for item in options["mount"]],
        "uid": user.uid,
        "gid": user.gid,
        "allow_root": options["allow_root"],
        "tty": bool(options["tty"] or (options["tty"] is None and is_interactive())),
        "publish": [run_options.parse_publish(item) for item in options["publish"]],
        "rules": collect_rules(options),
        "learn": options["learn"],
        "capabilities": list(options["capability"]) or None,
        "seccomp": not options["no_seccomp"],
    }


def collect_rules(options: Mapping[str, Any]) -> str:
    """
    The rules of `--allow`, `--deny` and `--rules` as one YAML document of contract 7.1.
    """
    rules = list(parse_shorthands(options["allow"], options["deny"]))
    for name in options["rules"]:
        rules.extend(read_rules_file(Path(name)))
    if options["passthrough"]:
        rules = [replace(rule, tls="passthrough") if _may_pass(rule) else rule for rule in rules]
    return emit_rules(rules)


def _may_pass(rule: Rule) -> bool:
    reads = rule.path_rules or rule.path_default or rule.insecure_skip_tls_verify
    return rule.proto == "https" and not rule.is_deny and not reads and rule.tls == "auto"


class RunClient:
    """
    One run: from the request to the exit code.

    If the server dies while the command runs, enforcement holds (I2), a new server is started
    and the client attaches to the sandbox again, for as long as that takes up to ten minutes.
    """

    def __init__(self, directories: Directories, request: dict[str, Any], output: Output) -> None:
        self._directories = directories
        self._request = request
        self._output = output
        self._sandbox_id = ""
        self._started = False
        self._channel: LocalChannel | None = None
        self._first = FirstOfEachKind()
        self._colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
        self._newline = "\r\n" if request["tty"] else "\n"
        self._pending_signals: list[int] = []
        self._attached_at = time.monotonic()
        self._failing_since: float | None = None
        self._alone = True  # no server has us just now
        self._ended_by: int | None = None

    async def run(self) -> int:
        if not self._request["tty"]:
            return await self._follow((0, 1, 2), None)
        with terminal_bridge() as bridge:
            return await self._follow((bridge.slave, bridge.slave, bridge.slave), bridge)

    async def _follow(self, streams: tuple[int, int, int], bridge: TerminalBridge | None) -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        async with asyncio.TaskGroup() as group:
            for number in FORWARDED:
                loop.add_signal_handler(number, self._on_signal, group, task, number)
            try:
                self._channel = await join_server(self._directories, streams)
                await self._channel.send(self._request)
                return await self._events(streams, bridge)
            except asyncio.CancelledError:
                if self._ended_by is None or task is None:
                    raise
                task.uncancel()
                return 128 + self._ended_by
            finally:
                for number in FORWARDED:
                    loop.remove_signal_handler(number)
                if self._channel is not None:
                    await self._channel.aclose()

    async def _events(self, streams: tuple[int, int, int], bridge: TerminalBridge | None) -> int:
        while True:
            channel = self._channel
            if channel is None:
                raise Unavailable("not connected to a server")
            message = await channel.receive()
            if message is None:
                self._lost()
                await channel.aclose()
                await self._attach_again(streams)
                continue
            if message.get("code") == SANDBOX_GONE and not self._started:
                # Made, but the server died before anything ran in it: nothing was lost, ask again.
                self._sandbox_id = ""
                await channel.aclose()
                await self._attach_again(streams)
                continue
            code = await self._handle(message, bridge)
            if code is not None:
                if bridge is not None:
                    await bridge.wait_drained(OUTPUT_DRAIN_S)
                    bridge.close()
                self._finish(message)
                return code

    def _lost(self) -> None:
        """Say that the server is gone; raise if none has stayed for as long as the command is worth."""
        self._alone = True
        now = time.monotonic()
        if now - self._attached_at > STABLE_AFTER_S or self._failing_since is None:
            self._failing_since = now
        elif now - self._failing_since > self._patience_s:
            raise Unavailable(
                "the server ends again and again",
                hint=f"enforcement holds; the server's log is in {self._directories.logs}",
            )
        self._say("the server went away; enforcement holds, starting a new one", level="warning")

    @property
    def _patience_s(self) -> float:
        return REATTACH_PATIENCE_S if self._started else START_PATIENCE_S

    async def _attach_again(self, streams: tuple[int, int, int]) -> None:
        if self._sandbox_id:
            streams, request = (0, 1, 2), {"op": "attach", "id": self._sandbox_id}
        else:  # it died before there was a sandbox: the next one sweeps the rest, and is asked again
            request = self._request
        self._channel = await join_server(
            self._directories,
            streams,
            patience_s=REATTACH_PATIENCE_S if self._started else 0.0,
            tell=lambda why: self._say(f"no server yet, trying again: {why}", level="warning"),
        )
        # A dying server may still take a connection: the next `receive` then sees its end.
        with contextlib.suppress(Unavailable):
            await self._channel.send(request)
        self._attached_at = time.monotonic()

    async def _handle(self, message: dict[str, Any], bridge: TerminalBridge | None) -> int | None:
        event = message.get("event")
        if event == "created":
            self._sandbox_id = message["id"]
            for item in message.get("publish", ()):
                self._say(f"127.0.0.1:{item['host_port']} on this host reaches port {item['port']} of the sandbox")
        elif event == "started":
            if bridge is not None and not self._started:
                bridge.release_slave()
                bridge.start()
            self._started = True
            self._alone = False
            await self._send_pending()
        elif event == "flow":
            self._show(message["flow"])
        elif event == "warning":
            self._say(message["message"], level="warning")
        elif event == "error":
            raise ClawkerError(message["message"], code=message.get("code"), hint=message.get("hint"))
        elif event == "exit":
            return int(message["code"])
        return None

    def _on_signal(self, group: asyncio.TaskGroup, task: asyncio.Task[Any] | None, number: int) -> None:
        if not self._alone:
            group.create_task(self._forward(number), name="run-signal")
        elif number in ENDING and task is not None and (not self._started or number in self._pending_signals):
            # Nothing runs that could take it, or it was asked for twice while no server was there.
            self._ended_by = number
            task.cancel()
        else:
            self._pending_signals.append(number)

    async def _send_pending(self) -> None:
        while self._pending_signals:
            await self._forward(self._pending_signals.pop(0))

    async def _forward(self, number: int) -> None:
        if self._channel is not None:
            with contextlib.suppress(Unavailable):
                await self._channel.send({"op": "signal", "signo": number})

    def _show(self, flow: dict[str, Any]) -> None:
        if self._output.as_json:
            self._emit({"event": "flow", "flow": flow})
        elif not self._output.quiet and is_outcome(flow) and (self._output.verbose or self._first.passes(flow)):
            self._write(decision_line(flow, colour=self._colour))

    def _finish(self, message: dict[str, Any]) -> None:
        self._newline = "\n"
        learned = message.get("learned_rules")
        if learned is not None and self._output.learn_to is not None:
            self._output.learn_to.write_text(learned, encoding="utf-8")
        if self._output.as_json:
            self._emit({"event": "summary", **{k: v for k, v in message.items() if k != "event"}})
            return
        for line in message.get("summary", ()) if not self._output.quiet else ():
            self._write(f"clawker-cp: {line}")
        if learned is not None:
            if self._output.learn_to is not None:
                self._say(f"the rules that would have sufficed are in {self._output.learn_to}")
            else:
                self._say("these rules would have sufficed (use them with --rules FILE):")
                self._write(learned.rstrip("\n"))

    def _say(self, text: str, *, level: str = "info") -> None:
        if self._output.as_json:
            self._emit({"event": level, "message": text})
        elif level != "info" or not self._output.quiet:
            self._write(f"clawker-cp: {text}")

    def _emit(self, message: dict[str, Any]) -> None:
        self._write(orjson.dumps(message).decode())

    def _write(self, text: str) -> None:
        if self._newline != "\n":
            text = text.replace("\n", self._newline)
        sys.stderr.write(text + self._newline)
        sys.stderr.flush()


RUN_HELP = """
Run COMMAND in a sandbox that reaches only what the rules allow.

The sandbox has a network, process and file system view of its own; the working directory is
mounted writable, system directories read-only. Whatever is not allowed is refused at once and
shown on standard error with the reason. Signals and the terminal pass to COMMAND. The exit code is
the command's own, 128 and the number of the signal that ended it; 125 means that clawker-cp itself
failed, 126 and 127 that the command could not be started.

\b
A RULE is  [METHOD[,METHOD] ][proto://]dst[:port[-port]][/path]
  proto  https (default), http, ws, wss, tcp, ssh, udp
  dst    a name, *.name or .name (the name and everything below it), an IPv4
         address, an [IPv6] address, or a CIDR (tcp://10.1.0.0/16:5432)
  /path  a literal prefix, or ~ and an RE2 expression for the whole path

\b
Examples:
  clawker-cp run --allow api.example.com -- curl https://api.example.com/
  clawker-cp run --allow 'GET https://api.github.com/repos/' -- ./agent
  clawker-cp run --allow '*.pypi.org' --allow ssh://git.example.org -- bash
  clawker-cp run --learn -- make deps      # record, then print the rules
"""


@click.command("run", help=RUN_HELP, context_settings={"ignore_unknown_options": False})
@click.option("--allow", metavar="RULE", multiple=True, help="Allow what RULE names. Repeatable.")
@click.option("--deny", metavar="RULE", multiple=True, help="Deny what RULE names; beats an equally specific allow.")
@click.option("--rules", metavar="FILE", multiple=True, help="Rules from a YAML file (docs/rules.md).")
@click.option("--project", metavar="NAME", help="Project of the sandbox [default: name of the working directory].")
@click.option("--agent", metavar="NAME", help="Agent name [default: run-XXXX].")
@click.option("--user", metavar="NAME|UID[:GID]", help="Run as this user [default: who called sudo].")
@click.option("--workdir", metavar="DIR", help="Mounted writable; where COMMAND starts [default: here].")
@click.option("--env", metavar="NAME[=VALUE]", multiple=True, help="Set or pass an environment variable.")
@click.option("--mount", metavar="SRC[:DST][:rw]", multiple=True, help="Mount a path of the host, read-only unless rw.")
@click.option("--publish", metavar="[HOST:]PORT", multiple=True, help="Reach a TCP port of the sandbox on 127.0.0.1.")
@click.option("--allow-root", is_flag=True, help="Let COMMAND run as root of the sandbox.")
@click.option("--passthrough", is_flag=True, help="Pass https names without paths through, unread.")
@click.option("--learn", is_flag=True, help="Allow and record, then print the rules that would have sufficed.")
@click.option("--learn-to", metavar="FILE", type=click.Path(path_type=Path), help="Write the learned rules to FILE.")
@click.option("--tty/--no-tty", default=None, help="Give COMMAND a terminal [default: if there is one].")
@click.option("--capability", metavar="NAME", multiple=True, hidden=True, help="Keep a capability (threat tests).")
@click.option("--no-seccomp", is_flag=True, hidden=True, help="Without the system call filter (threat tests).")
@click.option("--json", "as_json", is_flag=True, help="Decisions and summary as JSON lines on standard error.")
@click.option("--quiet", is_flag=True, help="Print no decisions and no summary.")
@click.option("--verbose", is_flag=True, help="Print every decision, also repeated ones.")
@click.argument("command", metavar="COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED, required=True)
@click.pass_context
def run(context: click.Context, /, **options: Any) -> None:
    request = build_request(options, os.environ)
    output = Output(options["as_json"], options["quiet"], options["verbose"], options["learn_to"])
    client = RunClient(Directories.from_environment(os.environ), request, output)
    try:
        code = run_main(client.run())
    except BaseExceptionGroup as group:
        raise first_error(group) from group
    context.exit(code)


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """
    The first leaf of a task group's failure: what went wrong before the others were cancelled.
    """
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
