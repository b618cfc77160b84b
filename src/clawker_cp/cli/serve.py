"""
`clawker-cp serve`: the control plane of this host, in the foreground.

Reads options and settings, starts `app.ControlPlane` and turns its end into an exit code:
0 drained, 1 failed, 2 settings, 3 host not supported (contract 10.1).
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import click
import orjson

from clawker_cp.app import ControlPlane
from clawker_cp.cli.check import check
from clawker_cp.errors import ClawkerError, unexpected
from clawker_cp.pki.tree import CA, SERVER, SIGNING_JWK
from clawker_cp.processes.descriptors import raise_limit
from clawker_cp.processes.first import leave_first_process
from clawker_cp.runtime.runner import run_until_signal
from clawker_cp.telemetry.log import configure
from clawker_cp.wiring.engine_choice import chosen_engine
from clawker_cp.wiring.host_table import preflight
from clawker_cp.wiring.placement import look
from clawker_cp.wiring.translation import load_configuration

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command("serve")
@click.option("--config-dir", type=click.Path(path_type=Path), help="Directory of control-plane.yaml.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Rules, allocations, certificates.")
@click.option("--log-dir", type=click.Path(path_type=Path), help="Logs and flow records.")
@click.option("--tls-ca", type=_FILE, help="CA certificate (default: the auth tree's).")
@click.option("--tls-cert", type=_FILE, help="Server certificate.")
@click.option("--tls-key", type=_FILE, help="Server key.")
@click.option("--jwk", type=_FILE, help="Public key of the CLI's assertions, a JWK.")
@click.option("--check", "only_check", is_flag=True, help="Validate the settings, print the host table, exit.")
@click.option("--ephemeral", is_flag=True, hidden=True, help="End when the last sandbox is gone (started by run).")
@click.option("--ready-fd", type=int, hidden=True, help="Write one JSON line there when ready or failed.")
@click.pass_context
def serve(
    context: click.Context,
    *,
    config_dir: Path | None,
    data_dir: Path | None,
    log_dir: Path | None,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    jwk: Path | None,
    only_check: bool,
    ephemeral: bool,
    ready_fd: int | None,
) -> None:
    """
    Run the control plane of this host until a signal ends it.
    """
    # A hangup is never the end: before the loop handles it, it is nothing. Caught, not ignored: children inherit that.
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    leave_first_process()
    open_files = raise_limit()
    notify = _Notifier(ready_fd)
    try:
        settings, directories = load_configuration(config_dir=config_dir, data_dir=data_dir)
        if only_check:
            context.invoke(check, as_json=False)
            return
        sink = configure(log_dir or directories.logs, stderr=not ephemeral)
        try:
            named = {CA.certificate: tls_ca, SERVER.certificate: tls_cert, SERVER.key: tls_key, SIGNING_JWK: jwk}

            async def run(stop: asyncio.Event) -> int:
                where = look()
                async with chosen_engine(
                    settings, directories, where, only_host=ephemeral, open_files=open_files
                ) as engine:
                    control_plane = ControlPlane(
                        settings,
                        directories,
                        preflight(settings, engine=engine.name),
                        engine,
                        where,
                        log_dir=log_dir,
                        ephemeral=ephemeral,
                        certificates={place: path for place, path in named.items() if path is not None},
                        listen=sink.listen,
                    )
                    return await control_plane.run(stop, on_ready=notify.ready)

            code = run_until_signal(run)
        finally:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # also while the interpreter ends
            sink.close()
    except asyncio.CancelledError:
        context.exit(1)  # a second signal: nothing was taken apart, enforcement stays as it is
    except BaseExceptionGroup as group:
        error = _leaf(group)
        error = unexpected(error) if isinstance(error, OSError) and not isinstance(error, ClawkerError) else error
        notify.failed(error)
        raise error from group
    except ClawkerError as error:
        notify.failed(error)
        raise
    except OSError as error:
        told = unexpected(error)
        notify.failed(told)
        raise told from error
    context.exit(code)


class _Notifier:
    """Tells the process that started us, once, that we are ready or why we are not."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def ready(self) -> None:
        self._say({"ready": True, "pid": os.getpid()})

    def failed(self, error: BaseException) -> None:
        self._say(
            {
                "ready": False,
                "code": getattr(error, "code", "INTERNAL"),
                "message": str(error) or type(error).__name__,
                "hint": getattr(error, "hint", None),
            }
        )

    def _say(self, message: dict[str, object]) -> None:
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            os.write(fd, orjson.dumps(message) + b"\n")
        except BrokenPipeError:
            return
        finally:
            os.close(fd)


def _leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
