"""The system call filter, executed by a small interpreter of classic BPF."""

from __future__ import annotations

import errno
import struct

import pytest

from clawker_cp.engines.host.seccomp import filter_program
from clawker_cp.errors import Unsupported

ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
X86, ARM = 0xC000003E, 0xC00000B7


def judge(machine: str, arch: int, number: int, *arguments: int) -> int:
    data = struct.pack("<IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    program = list(struct.iter_unpack("<HBBI", filter_program(machine)))
    at, accumulator = 0, 0
    while True:
        code, yes, no, value = program[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return int(value)
        else:
            holds = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += yes if holds else no


@pytest.mark.parametrize(("machine", "arch", "call"), [("x86_64", X86, 41), ("aarch64", ARM, 198)])
def test_only_four_socket_families_exist(machine: str, arch: int, call: int) -> None:
    """Local, IPv4, IPv6 and netlink sockets are made, every other family does not exist."""
    allowed = {family for family in range(64) if judge(machine, arch, call, family) == ALLOW}
    assert allowed == {1, 2, 10, 16}
    assert judge(machine, arch, call, 17) == ERRNO | errno.EAFNOSUPPORT


@pytest.mark.parametrize(("machine", "arch", "call"), [("x86_64", X86, 41), ("aarch64", ARM, 198)])
def test_a_packet_socket_does_not_come_by_its_old_name(machine: str, arch: int, call: int) -> None:
    """IPv4 with the type SOCK_PACKET is AF_PACKET to the kernel, with whatever flags; the other types are made."""
    judged = {kind: judge(machine, arch, call, 2, kind) for kind in (1, 2, 3, 5, 10, 10 | 0o2004000, 1 | 0o2004000)}
    refused = {kind for kind, verdict in judged.items() if verdict == ERRNO | errno.EAFNOSUPPORT}
    assert refused == {10, 10 | 0o2004000}
    assert set(judged.values()) == {ALLOW, ERRNO | errno.EAFNOSUPPORT}


def test_high_half_of_an_argument_does_not_matter() -> None:
    """The kernel reads 32 bits of a family, of flags and of a request; so does the filter."""
    assert judge("x86_64", X86, 41, 17 | 1 << 32) == ERRNO | errno.EAFNOSUPPORT
    assert judge("x86_64", X86, 16, 0, 0x5412 | 1 << 32) == ERRNO | errno.EPERM
    assert judge("x86_64", X86, 272, 0x10000000 | 1 << 40) == ERRNO | errno.EPERM


@pytest.mark.parametrize(
    ("number", "arguments", "verdict"),
    [
        (0, (), ALLOW), (59, (), ALLOW), (1000, (), ALLOW),
        (425, (), ERRNO | errno.ENOSYS), (426, (), ERRNO | errno.ENOSYS), (427, (), ERRNO | errno.ENOSYS),
        (435, (), ERRNO | errno.ENOSYS), (56, (0x11,), ALLOW), (56, (0x10000011,), ERRNO | errno.EPERM),
        (272, (0x40000000,), ALLOW), (272, (0x50000000,), ERRNO | errno.EPERM), (321, (), ERRNO | errno.EPERM),
        (250, (), ERRNO | errno.EPERM), (16, (0, 0x5401), ALLOW), (16, (0, 0x5412), ERRNO | errno.EPERM),
        (16, (0, 0x541C), ERRNO | errno.EPERM), (0x40000000 | 41, (1,), ERRNO | errno.ENOSYS),
    ],
)  # fmt: skip
def test_calls(number: int, arguments: tuple[int, ...], verdict: int) -> None:
    """Ordinary calls pass; io_uring, user namespaces, keyrings, BPF and terminal input do not."""
    assert judge("x86_64", X86, number, *arguments) == verdict


def test_other_abis_end_the_process() -> None:
    """A 32-bit program has other call numbers and does not run."""
    assert judge("x86_64", 0x40000003, 41, 2) == KILL
    with pytest.raises(Unsupported):
        filter_program("riscv64")
