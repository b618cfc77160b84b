"""
Ports of the agents' bridge: which one is a container's, and word of new ones.

A container's is found from the host's side: the port whose other end is in the network namespace of the
container's first process, by the number the kernel gave that namespace. Nothing inside is believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

import structlog

from clawker_cp.engines.host.commands import host_netns, in_host, run
from clawker_cp.engines.host.namespaces import in_netns
from clawker_cp.errors import NotFound, Unavailable

log = structlog.get_logger()

_ROUTE = 0  # NETLINK_ROUTE
_GROUP_LINK = 1  # RTMGRP_LINK
_NEWLINK, _DELLINK, _GETNSID = 16, 17, 90
_REQUEST, _ERROR = 0x1, 2
_NSID, _FD = 1, 3  # NETNSA_*
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_MASTER = 10  # IFLA_MASTER
_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True)
class Port:
    """The host's side of a container's veth: name, index, and the MAC of the container's side."""

    interface: str
    index: int
    mac: str


async def find_port(pid: int, bridge: str, *, host_pid: int = 1) -> Port:
    """
    The port of `bridge` that leads into the network namespace of `pid`.

    Raises `NotFound` when the process is gone or has no port there, as with the host's own network.
    """
    try:
        number = await asyncio.to_thread(in_netns, host_netns(host_pid), lambda: _namespace_number(pid))
    except (FileNotFoundError, ProcessLookupError) as error:
        raise NotFound(f"process {pid} is gone") from error
    except OSError as error:
        raise Unavailable(f"cannot look up the network namespace of {pid}: {error.strerror or error}") from error
    ports = await _links(*in_host(host_pid), "ip", "-j", "link", "show", "master", bridge, "type", "veth")
    port = next((port for port in ports if number >= 0 and port.get("link_netnsid") == number), None)
    if port is None:
        raise NotFound(f"process {pid} has no port of {bridge}")
    inside = await _links("nsenter", f"--net=/proc/{pid}/ns/net", "--", "ip", "-j", "link", "show", "type", "veth")
    # The kernel numbers interfaces per namespace: this is the other end, whatever it is called.
    end = next((link for link in inside if link["ifindex"] == port.get("link_index")), None)
    if end is None:
        raise NotFound(f"the end of {port['ifname']} inside process {pid} is gone")
    return Port(port["ifname"], port["ifindex"], end["address"])


async def _links(*command: str) -> list[dict[str, Any]]:
    try:
        listed = json.loads(await run(*command) or "[]")
    except Unavailable as error:
        raise NotFound(str(error)) from error
    return [link for link in listed if "ifname" in link]


def _namespace_number(pid: int) -> int:
    # RTM_GETNSID: what this thread's namespace calls that of `pid`; -1 when it has no name for it.
    target = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _ROUTE) as netlink:
            netlink.settimeout(_LIMIT_S)
            body = bytes(4) + _ATTRIBUTE.pack(8, _FD) + struct.pack("=i", target)
            netlink.send(_HEADER.pack(16 + len(body), _GETNSID, _REQUEST, 1, 0) + body)
            answer = netlink.recv(4096)
    finally:
        os.close(target)
    kind = _HEADER.unpack_from(answer)[1]
    if kind == _ERROR:
        number = -struct.unpack_from("=i", answer, 16)[0]
        raise OSError(number, os.strerror(number))
    return int(struct.unpack("=i", dict(attributes(answer[20:]))[_NSID])[0])


class PortWatch:
    """
    Says when the ports of a bridge may have changed; one waiter.

    Changes while nobody waits are remembered as one. What the kernel could not hand over counts as a change.
    """

    def __init__(self, bridge: str, *, host_pid: int = 1) -> None:
        self._bridge = bridge
        self._host_pid = host_pid
        self._index = 0
        self._socket: socket.socket | None = None
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """
        Listen; raises `NotFound` without the bridge, `Unavailable` when the kernel refuses.
        """
        links = await _links(*in_host(self._host_pid), "ip", "-j", "link", "show", "dev", self._bridge)
        self._index = int(links[0]["ifindex"])
        try:
            netlink = await asyncio.to_thread(in_netns, host_netns(self._host_pid), _link_socket)
        except OSError as error:
            raise Unavailable(f"cannot watch the host's interfaces: {error.strerror or error}") from error
        self._socket = netlink
        self._changed.set()  # whatever was before we listened
        asyncio.get_running_loop().add_reader(netlink.fileno(), self._readable)

    def close(self) -> None:
        """
        Stop listening; not open is fine.
        """
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None
            self._changed.set()

    async def wait_changed(self) -> None:
        """
        Return once ports may have changed since the last call; at once the first time.

        Raises `Unavailable` when nobody listens any more: a port that appears now is not told.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._socket is None:
            raise Unavailable("the host's interfaces are not watched any more")

    def _readable(self) -> None:
        while self._socket is not None:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                self._changed.set()
                if error.errno == errno.ENOBUFS:
                    continue
                log.warning("engines_port_watch_failed", error=str(error))
                self.close()
                return
            if touches(data, self._index):
                self._changed.set()


def _link_socket() -> socket.socket:
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _ROUTE)
    with contextlib.ExitStack() as on_failure:
        on_failure.callback(netlink.close)
        netlink.bind((0, _GROUP_LINK))
        on_failure.pop_all()
    return netlink


def touches(data: bytes, bridge_index: int) -> bool:
    """
    Whether messages of the kernel tell of a port of this bridge, or cannot be read.
    """
    at = 0
    while at + 16 <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        if length < 16:
            return True
        if kind in {_NEWLINK, _DELLINK}:
            values = dict(attributes(data[at + 16 + _LINK.size : at + length]))
            if values.get(_MASTER, b"")[:4] == struct.pack("=I", bridge_index):
                return True
        at += (length + 3) & ~3
    return False


def attributes(data: bytes) -> list[tuple[int, bytes]]:
    """
    The attributes of a netlink message; what is cut off at the end is left out.
    """
    found, at = [], 0
    while at + 4 <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4:
            break
        found.append((kind & 0x3FFF, data[at + 4 : at + length]))
        at += (length + 3) & ~3
    return found
