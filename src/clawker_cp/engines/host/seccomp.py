"""
The system call filter of a sandbox: which socket families exist, and no io_uring.

The cgroup hooks see internet sockets only; vsock, packet, XDP, crypto and the other families
are ways around them and are refused here (threats.md 17, 36). Classic BPF, as `bwrap --seccomp`
takes it; layout: struct sock_filter and struct seccomp_data of <linux/filter.h>, <linux/seccomp.h>.
"""

from __future__ import annotations

import errno
import platform
import struct

from clawker_cp.errors import Unsupported

# (AUDIT_ARCH value, socket, socketpair, io_uring_setup, x32 bit or 0)
_ARCHITECTURES = {
    "x86_64": (0xC000003E, 41, 53, 425, 0x40000000),
    "aarch64": (0xC00000B7, 198, 199, 425, 0),
}
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK
_LD_W_ABS, _JEQ, _JGE, _RET = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16


def _op(code: int, k: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, jump_true, jump_false, k)


def socket_filter(machine: str | None = None) -> bytes:
    """
    The filter's instructions for this machine. Raises `Unsupported` on an architecture without one.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHITECTURES:
        raise Unsupported(f"no system call filter for {machine}", feature="seccomp", needs="x86_64 or aarch64")
    arch, socket, socketpair, io_uring, x32 = _ARCHITECTURES[machine]
    program = [
        _op(_LD_W_ABS, _ARCH),
        _op(_JEQ, arch, 1, 0),
        _op(_RET, _KILL),
        _op(_LD_W_ABS, _NUMBER),
    ]
    if x32:
        program += [_op(_JGE, x32, 0, 1), _op(_RET, _ERRNO | errno.ENOSYS)]
    program += [
        _op(_JEQ, io_uring, 0, 1),
        _op(_RET, _ERRNO | errno.ENOSYS),
        _op(_JEQ, socket, 2, 0),
        _op(_JEQ, socketpair, 1, 0),
        _op(_RET, _ALLOW),
        _op(_LD_W_ABS, _ARGUMENT),
    ]
    program += [_op(_JEQ, family, len(_FAMILIES) - at, 0) for at, family in enumerate(_FAMILIES)]
    program += [_op(_RET, _ERRNO | errno.EAFNOSUPPORT), _op(_RET, _ALLOW)]
    return b"".join(program)
