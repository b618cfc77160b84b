"""
The system call filter of a sandbox, as classic BPF for bubblewrap's --seccomp.

Hardening only (threats, layer C): egress is decided elsewhere. Everything is allowed but socket
families other than local, IPv4, IPv6 and netlink, io_uring, new user namespaces, kernel keyrings,
BPF, tracing of the kernel, and pushing input into a terminal. A handful of comparisons, so it is
written out here instead of taking a binding of libseccomp along.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterable

from clawker_cp.errors import Unsupported

_INSTRUCTION = struct.Struct("<HBBI")  # struct sock_filter
_LOAD, _AND, _JUMP_EQUAL, _JUMP_AND, _JUMP_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x45, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; arguments are 8 bytes, low half first
_X32_BIT = 0x40000000

_CLONE_NEWUSER = 0x10000000
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
# The old name of a packet socket: the kernel makes one of AF_INET with this type (socket(2)).
_SOCK_PACKET, _TYPE_MASK = 10, 0xF
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

# name -> number, per machine; clone3 answers ENOSYS because its flags are behind a pointer.
_CALLS = {
    "x86_64": (
        0xC000003E,
        {
            "ioctl": 16,
            "socket": 41,
            "clone": 56,
            "unshare": 272,
            "clone3": 435,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "perf_event_open": 298,
            "open_by_handle_at": 304,
            "bpf": 321,
            "userfaultfd": 323,
            "io_uring_setup": 425,
            "io_uring_enter": 426,
            "io_uring_register": 427,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "ioctl": 29,
            "socket": 198,
            "clone": 220,
            "unshare": 97,
            "clone3": 435,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "perf_event_open": 241,
            "open_by_handle_at": 265,
            "bpf": 280,
            "userfaultfd": 282,
            "io_uring_setup": 425,
            "io_uring_enter": 426,
            "io_uring_register": 427,
        },
    ),
}
_REFUSED = ("add_key", "request_key", "keyctl", "perf_event_open", "open_by_handle_at", "bpf", "userfaultfd")
_ABSENT = ("clone3", "io_uring_setup", "io_uring_enter", "io_uring_register")


def filter_program(machine: str | None = None) -> bytes:
    """
    The filter as an array of `struct sock_filter`.

    Raises `Unsupported` for a machine whose call numbers are not known here.
    """
    machine = machine or platform.machine()
    if machine not in _CALLS:
        raise Unsupported(f"no system call filter for {machine}", feature="seccomp", needs="x86_64 or aarch64")
    arch, calls = _CALLS[machine]
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),  # another ABI has other numbers: 32-bit programs do not run
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        program += [(_JUMP_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for name in _REFUSED:
        program += [(_JUMP_EQUAL, 0, 1, calls[name]), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    for name in _ABSENT:
        program += [(_JUMP_EQUAL, 0, 1, calls[name]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    for name in ("clone", "unshare"):
        program += _when(calls[name], 0, [(_JUMP_AND, 0, 1, _CLONE_NEWUSER), (_RETURN, 0, 0, _ERRNO | errno.EPERM)])
    program += _when(calls["ioctl"], 1, _each_refused((_TIOCSTI, _TIOCLINUX)))
    allowed: list[tuple[int, int, int, int]] = []
    for index, family in enumerate(_FAMILIES):
        # Over the remaining comparisons and the refusal, to the allowing end.
        allowed.append((_JUMP_EQUAL, len(_FAMILIES) - index, 0, family))
    program += _when(calls["socket"], 0, [*allowed, (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)])
    old = [(_AND, 0, 0, _TYPE_MASK), (_JUMP_EQUAL, 0, 1, _SOCK_PACKET), (_RETURN, 0, 0, _ERRNO | errno.EAFNOSUPPORT)]
    program += _when(calls["socket"], 1, old)
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(_INSTRUCTION.pack(code, yes, no, value) for code, yes, no, value in program)


def _when(number: int, argument: int, body: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    # The accumulator holds the argument inside the body, and the number again after it.
    inner = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument), *body]
    return [(_JUMP_EQUAL, 0, len(inner) + 1, number), *inner, (_LOAD, 0, 0, _NUMBER)]


def _each_refused(values: Iterable[int]) -> list[tuple[int, int, int, int]]:
    body = []
    for value in values:
        body += [(_JUMP_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    return body
