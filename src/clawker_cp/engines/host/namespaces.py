"""
Doing one thing inside another network namespace, from a thread that ends afterwards.

The main thread never changes its namespace. Sockets opened there stay in that namespace for their
life, so listeners and connections can be made inside and used outside.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from clawker_cp.errors import NotFound, Unavailable

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

SANDBOX_SYSCTLS = {
    "net/ipv4/ping_group_range": "1 0",
    "net/ipv4/ip_forward": "0",
    "net/ipv4/conf/all/rp_filter": "1",
    "net/ipv4/conf/default/rp_filter": "1",
    "net/ipv4/conf/all/accept_redirects": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/all/accept_source_route": "0",
    "net/ipv4/conf/all/route_localnet": "0",
    "net/ipv6/conf/all/disable_ipv6": "1",
    "net/ipv6/conf/default/disable_ipv6": "1",
    "net/ipv6/conf/all/accept_ra": "0",
    "net/ipv6/conf/default/accept_ra": "0",
    "net/mptcp/enabled": "0",
}


def in_netns(path: Path | None, action: Callable[[], T]) -> T:
    """
    Run `action` in the namespace at `path` and return its result; None is our own namespace.

    Blocks: call through `asyncio.to_thread` unless the action is a socket call or two. Raises what
    the action raises, and `NotFound` when the namespace is gone.
    """
    if path is None:
        return action()
    outcome: list[T] = []
    failure: list[BaseException] = []

    def enter() -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if _libc.setns(fd, _CLONE_NEWNET):
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number), str(path))
            finally:
                os.close(fd)
            outcome.append(action())
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=enter, name="netns", daemon=True)
    thread.start()
    thread.join()
    if failure:
        error = failure[0]
        if isinstance(error, FileNotFoundError) and error.filename == str(path):
            raise NotFound(f"network namespace {path} is gone") from error
        raise error
    return outcome[0]


def write_sysctls(values: dict[str, str]) -> list[str]:
    """
    Write keys below /proc/sys for the calling thread's network namespace.

    Returns the keys this kernel does not have; any other failure raises `Unavailable`.
    """
    missing = []
    for key, value in values.items():
        try:
            Path("/proc/sys", key).write_text(value)
        except FileNotFoundError:
            missing.append(key)
        except OSError as error:
            raise Unavailable(f"cannot set {key.replace('/', '.')}={value}: {error.strerror}") from error
    return missing
