"""Sandboxes of the host engine: what runs, what it sees, how it ends, and what is left."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from clawker_cp.engines.base import Limits, Mount, Publish
from clawker_cp.engines.host import network
from clawker_cp.engines.host.bubble import DOCKER_CAPABILITIES
from clawker_cp.engines.host.process import STATUS_FILE
from clawker_cp.errors import Conflict, InvalidInput, NotFound, Unavailable
from clawker_cp.testing.sandbox_world import GATEWAY, Host, end, make_engine, running_host, sh, tcp_server, until

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    async with running_host(tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("kill -TERM $$", 143), ("no-such-tool", 127)],
)
async def test_exit_code_is_the_commands_own(host: Host, script: str, code: int) -> None:
    """A sandbox ends with its command's exit code, 128 and the signal if one killed it."""
    assert (await host.run("sh", "-c", script))[0] == code


async def test_program_that_is_not_there_is_127(host: Host) -> None:
    """A command that cannot be found ends as a shell would end."""
    code, output = await host.run("/no/such/program")
    assert code == 127
    assert "/no/such/program" in output


async def test_nothing_runs_before_run_and_everything_runs_in_the_cgroup(host: Host) -> None:
    """`create` leaves an empty cgroup of the reported id; later every process is in it."""
    sandbox = await host.engine.create(host.spec("sleep", "1000"))
    procs = sandbox.cgroup_path / "cgroup.procs"
    assert procs.read_text() == ""
    assert sandbox.cgroup_id == sandbox.cgroup_path.stat().st_ino
    assert sandbox.cgroup_path.parent == host.engine.parent_cgroup
    with open(os.devnull, "r+b") as nothing:
        await host.engine.run(sandbox.id, (nothing.fileno(),) * 3)
    until(lambda: _names(procs) == {"bwrap", "sleep"}, "bwrap and sleep in the cgroup")
    namespace = Path("/run/netns", sandbox.netns).stat().st_ino
    assert {Path(f"/proc/{pid}/ns/net").stat().st_ino for pid in procs.read_text().split()} == {namespace}


async def test_a_start_that_is_cancelled_leaves_the_streams_open_until_the_command_has_them(host: Host) -> None:
    """A caller closes them when its call is over: before that their numbers are given to nothing else of ours."""
    sandbox = await host.engine.create(host.spec("echo", "mine"))
    status = sandbox.directory / STATUS_FILE
    os.mkfifo(status)  # whoever starts the command waits here for a reader
    read, write = os.pipe()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        starting = group.create_task(host.engine.run(sandbox.id, (write, write, write)))
        await asyncio.sleep(0)
        over = []
        for _ in range(3):
            starting.cancel()
            await asyncio.sleep(0)
            over.append(starting.done())
        reader = os.open(status, os.O_RDONLY | os.O_NONBLOCK)
        await asyncio.wait([starting])
    os.close(write)
    status.unlink()
    status.touch()
    output = await asyncio.to_thread(os.read, read, 100)
    os.close(reader)
    os.close(read)

    assert over == [False] * 3
    assert starting.cancelled() and sandbox.pid
    assert output == b"mine\n"


def _names(procs: Path) -> set[str]:
    names = set()
    for pid in procs.read_text().split():
        with contextlib.suppress(OSError):
            names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


async def test_file_system_holds_nothing_of_the_hosts_services_or_secrets(host: Host) -> None:
    """No host socket, bpffs, cgroupfs, account secret or key is visible, even to root (threats 35)."""
    script = (
        "find / -xdev -type s 2>/dev/null; find /run /tmp /var /home -type s 2>/dev/null;"
        "grep -E ' (bpf|cgroup2?|debugfs|tracefs|securityfs) ' /proc/mounts;"
        "cat /etc/shadow /etc/gshadow /etc/ssh/* /etc/sudoers 2>/dev/null; ls -A /etc/ssl/private/* /root 2>/dev/null;"
        "ls -d /sys/fs /sys/kernel 2>/dev/null"
    )
    code, output = await host.run("sh", "-c", script + "; echo end", uid=0, gid=0, allow_root=True)
    assert (code, output.strip()) == (0, "end")


async def test_system_is_read_only_and_own_places_are_writable(host: Host) -> None:
    """An ordinary user writes in its home, the working directory and the temporary ones, nowhere else."""
    script = (
        "for d in ~ . /tmp /var/tmp /dev/shm; do touch $d/x || echo no $d; done;"
        "for d in / /usr /etc /opt /run /usr/local/share; do touch $d/x 2>/dev/null && echo yes $d; done; id -u; id -g"
    )
    code, output = await host.run("sh", "-c", script)
    assert (code, output.split()) == (0, ["1001", "1001"])
    assert (host.workdir / "x").stat().st_uid == 1001


async def test_kernel_settings_are_read_only_even_for_root_with_dockers_capabilities(host: Host) -> None:
    """No file of proc outside processes can be opened for writing, core_pattern above all; insides are hidden."""
    script = (
        "for f in $(find /proc/[a-z]* -path /proc/self -prune -o -path /proc/thread-self -prune -o -type f -perm /222 "
        '-print 2>/dev/null); do (exec 3>>"$f") 2>/dev/null && echo "open $f"; done;'
        "cat /proc/keys /proc/kallsyms /proc/timer_list 2>/dev/null; cat /proc/sys/net/ipv4/ping_group_range"
    )
    fields = {"uid": 0, "gid": 0, "allow_root": True, "seccomp": False, "capabilities": DOCKER_CAPABILITIES}
    code, output = await host.run("bash", "-c", script, **fields)
    assert (code, output.split()) == (0, ["1", "0"])


async def test_our_directories_are_masked_inside_a_mount(host: Host) -> None:
    """A working directory that holds the control plane's state shows an empty, closed directory there (R27)."""
    (host.state / "secret").write_text("key")
    host.workdir.parent.chmod(0o755)
    code, output = await host.run(
        "sh", "-c", "ls -a state; cat state/*", workdir=str(host.state.parent), uid=0, gid=0, allow_root=True
    )
    assert "secret" not in output
    assert "key" not in output
    assert code != 0


async def test_views_that_would_lead_out_are_refused(host: Host, tmp_path: Path) -> None:
    """Our directories, the host's runtime directories, whole system directories and sockets are never mounted."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "service.sock"))
    listener.close()
    for fields, named in (
        ({"workdir": str(host.state / "sandboxes")}, "workdir"),
        ({"workdir": "/etc"}, "workdir"),
        ({"workdir": "/run/user"}, "workdir"),
        ({"mounts": (Mount(str(host.state), "/mnt/x"),)}, r"mounts\[0\].source"),
        ({"mounts": (Mount("/run", "/mnt/x"),)}, r"mounts\[0\].source"),
        ({"mounts": (Mount("/sys/fs/cgroup", "/mnt/x"),)}, r"mounts\[0\].source"),
        ({"mounts": (Mount(str(tmp_path / "service.sock"), "/mnt/x"),)}, "socket"),
        ({"mounts": (Mount("/usr", "/proc/x"),)}, r"mounts\[0\].target"),
        ({"uid": 0}, "allow-root"),
        ({"uid": 0, "allow_root": True, "capabilities": ("sys_admin",)}, "sys_admin"),
    ):
        with pytest.raises(InvalidInput, match=named):
            await host.engine.create(host.spec("true", **fields))
    assert host.engine.living() == []


async def test_mounts_are_read_only_unless_asked(host: Host, tmp_path: Path) -> None:
    """A mount shows the host's files, and takes writing only when it was asked for."""
    for name in ("fixed", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
        (tmp_path / name / "file").write_text(name)
    mounts = (
        Mount(str(tmp_path / "fixed"), "/data/fixed"),
        Mount(str(tmp_path / "open"), "/data/open", read_only=False),
    )
    code, output = await host.run(
        "sh",
        "-c",
        "cat /data/*/file; touch /data/open/y; touch /data/fixed/y 2>/dev/null || echo refused",
        mounts=mounts,
    )
    assert (code, output) == (0, "fixedopenrefused\n")
    assert (tmp_path / "open" / "y").exists()


async def test_processes_of_the_host_are_out_of_sight_and_reach(host: Host) -> None:
    """A sandbox sees its own processes only and cannot signal or trace others, even as root (threats 35)."""
    script = f"kill -0 {os.getpid()} && echo reached; ls /proc | grep -c '^[0-9]'; ls /proc/{os.getpid()} && echo seen"
    _code, output = await host.run("sh", "-c", script, uid=0, gid=0, allow_root=True)
    assert "reached" not in output
    assert "seen" not in output
    assert int(output.splitlines()[-2 if "ls:" in output.splitlines()[-1] else -1].split()[-1]) < 12


async def test_abstract_sockets_of_the_host_are_unreachable(host: Host) -> None:
    """A listener on an abstract address of the host does not exist in a sandbox (threats 35)."""
    name = f"clawker-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        code, output = await host.run(
            "python3", "-c", f"import socket; socket.socket(socket.AF_UNIX).connect('\\0{name}')"
        )
    assert code == 1
    assert "ConnectionRefusedError" in output


async def test_user_has_no_privileges_and_cannot_gain_any(host: Host) -> None:
    """No capability in any set, no-new-privileges, a filter; no user namespace, packet socket or io_uring."""
    script = """
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
print(*sorted({line.split()[1] for line in open('/proc/self/status') if line.startswith('Cap')}))
print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith(('NoNewPrivs', 'Seccomp:'))])
for family in (socket.AF_PACKET, 40, 38, 44):
    try:
        socket.socket(family, socket.SOCK_RAW)
        print('open', family)
    except OSError as error:
        print(errno.errorcode[error.errno])
for call, *arguments in ((425, 1, 0), (272, 0x10000000), (435, 0, 0), (250, 0, 0), (16, 0, 0x5412, 0)):
    ctypes.set_errno(0)
    print(libc.syscall(call, *arguments), errno.errorcode.get(ctypes.get_errno()))
"""
    code, output = await host.run("python3", "-c", script)
    assert code == 0, output
    assert output.split("\n")[:2] == ["0" * 16, "1 2"]
    assert output.split("\n")[2:6] == ["EAFNOSUPPORT"] * 4
    assert output.split("\n")[6:11] == ["-1 ENOSYS", "-1 EPERM", "-1 ENOSYS", "-1 EPERM", "-1 EPERM"]


async def test_root_keeps_a_small_set_and_dockers_only_when_asked(host: Host) -> None:
    """Root of a sandbox has no raw sockets unless the caller gives Docker's set and takes the filter off."""
    script = "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('raw')"
    root = {"uid": 0, "gid": 0, "allow_root": True}
    assert (await host.run("python3", "-c", script, **root))[0] == 1
    assert (await host.run("python3", "-c", script, seccomp=False, **root))[0] == 1
    code, output = await host.run("python3", "-c", script, seccomp=False, capabilities=DOCKER_CAPABILITIES, **root)
    assert (code, output) == (0, "raw\n")


async def test_orphans_are_reaped(host: Host) -> None:
    """Processes whose parents left do not stay as zombies."""
    script = "for i in 1 2 3; do (true & ) ; done; sleep 0.2; cat /proc/[0-9]*/stat | grep -c ') Z '"
    assert (await host.run("sh", "-c", script))[1] == "0\n"


async def test_signals_reach_the_command_as_from_a_terminal(host: Host) -> None:
    """SIGINT ends a shell and what it waits for; a handled SIGTERM runs the handler; SIGUSR1 is the command's alone."""
    sandbox_id = await host.start("sh", "-c", "sleep 1000; echo after")
    procs = host.engine.living()[0].cgroup_path / "cgroup.procs"
    # A shell that is just about to start its program takes the signal note and waits all the same.
    until(lambda: "sleep" in _names(procs), "the program")
    await host.engine.signal(sandbox_id, signal.SIGINT)
    assert await host.engine.wait(sandbox_id) == 130
    sandbox_id = await host.start(
        "sh", "-c", "trap 'echo usr' USR1; trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.05; done"
    )
    until(lambda: "up" in host.output(sandbox_id), "the traps")
    await host.engine.signal(sandbox_id, signal.SIGUSR1)
    until(lambda: "usr" in host.output(sandbox_id), "the handler of SIGUSR1")
    await host.engine.signal(sandbox_id, signal.SIGTERM)
    assert await host.engine.wait(sandbox_id) == 3


async def test_terminal_interrupt_ends_the_command_and_its_code_is_known(host: Host) -> None:
    """With a terminal, Ctrl-C goes to the foreground job of the sandbox and the exit code is still told."""
    master, slave = pty.openpty()
    try:
        sandbox = await host.engine.create(host.spec("sh", "-c", "tty; exec cat", tty=True))
        await host.engine.run(sandbox.id, (slave, slave, slave))
        os.set_blocking(master, False)
        seen = b""

        def ready() -> bool:
            nonlocal seen
            try:
                seen += os.read(master, 1000)
            except BlockingIOError:
                return False
            return b"/dev/" in seen or b"tty" in seen

        until(ready, "the program on the terminal")
        attributes = termios.tcgetattr(slave)
        assert attributes[3] & termios.ISIG
        until(lambda: fcntl.ioctl(slave, termios.TIOCOUTQ, b"\0" * 4) is not None, "the terminal")
        os.write(master, b"\x03")
        async with asyncio.timeout(10):
            assert await host.engine.wait(sandbox.id) == 130
    finally:
        os.close(master)
        os.close(slave)


async def test_remove_needs_force_gives_grace_and_leaves_nothing(host: Host) -> None:
    """A running sandbox is removed by force only, after SIGTERM and its grace, with everything that was its."""
    sandbox_id = await host.start("sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: "up" in host.output(sandbox_id), "the trap")
    sandbox = host.engine.living()[0]
    with pytest.raises(Conflict) as refused:
        await host.engine.remove(sandbox_id, force=False, grace_s=0)
    assert refused.value.code == "AGENT_RUNNING"
    await host.engine.remove(sandbox_id, force=True, grace_s=5)
    assert await host.engine.wait(sandbox_id) == 9
    assert not sandbox.cgroup_path.exists()
    assert not sandbox.directory.exists()
    assert not Path("/run/netns", sandbox.netns).exists()
    assert sandbox.interface not in sh("ip", "link")
    assert sandbox.interface not in sh("nft", "list", "ruleset")
    with pytest.raises(NotFound):
        await host.engine.signal(sandbox_id, 15)
    stubborn = await host.start("sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    until(lambda: "up" in host.output(stubborn), "the trap")
    await host.engine.remove(stubborn, force=True, grace_s=0.1)
    assert await host.engine.wait(stubborn) == 137


async def test_what_cannot_be_taken_away_stays_listed_until_it_can(host: Host) -> None:
    """Somebody removed the packet filter, so a pin cannot be taken back: name and address stay taken meanwhile."""
    sandbox_id = await host.start("sh", "-c", "echo up; sleep 100", agent="one")
    until(lambda: "up" in host.output(sandbox_id), "the command")
    sh("nft", "delete", "table", "inet", "clawker_cwtest0")
    for _ in range(2):
        with pytest.raises(Unavailable, match="nft"):
            await host.engine.remove(sandbox_id, force=True, grace_s=0)
    (kept,), left = host.engine.living(), host.engine.left()
    with pytest.raises(Conflict, match="one"):
        await host.engine.create(host.spec("true", agent="one"))
    await host.engine.ring.install([])
    both = [host.engine.remove(sandbox_id, force=True, grace_s=0) for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for one in both:
            group.create_task(one)

    assert (kept.id, left) == (sandbox_id, [sandbox_id])
    assert await host.engine.wait(sandbox_id) == 137
    assert host.engine.living() == [] and host.engine.left() == []
    assert not kept.cgroup_path.exists() and not Path("/run/netns", kept.netns).exists()


async def test_names_are_taken_once_and_addresses_are_not_reused_at_once(host: Host) -> None:
    """Two living sandboxes never share a name or an address; a freed address rests."""
    first = await host.engine.create(host.spec("true", agent="one"))
    with pytest.raises(Conflict, match="one"):
        await host.engine.create(host.spec("true", agent="one"))
    assert host.engine.by_address(first.address) is first
    await host.engine.remove(first.id, force=True, grace_s=0)
    again = await host.engine.create(host.spec("true", agent="one"))
    assert again.address != first.address
    assert host.engine.by_address(first.address) is None


async def test_environment_names_the_certificates_and_the_agent(host: Host) -> None:
    """The bundle's variables point to a readable file, identity is ours, the caller's variables pass."""
    code, output = await host.run(
        "sh", "-c",
        'cat "$SSL_CERT_FILE" "$NODE_EXTRA_CA_CERTS"; echo $CLAWKER_PROJECT $CLAWKER_AGENT $HOME $EXTRA; hostname',
        agent="worker", env={"EXTRA": "yes", "CLAWKER_AGENT": "somebody"},
    )  # fmt: skip
    assert (code, output) == (0, "bundle.pem\nca.pem\np worker /home/clawker yes\nworker\n")


async def test_limits_hold_or_are_told(host: Host) -> None:
    """A limit on processes stops a fork bomb; where the host has no controller the record says so."""
    sandbox = await host.engine.create(
        host.spec("sh", "-c", "for i in $(seq 40); do sleep 5 & done; wait", limits=Limits(pids=16))
    )
    code, output = await host.finish(sandbox.id) if "pids" not in sandbox.limits_unmet else (2, "fork")
    assert code != 0
    assert "fork" in output


async def test_published_port_is_reached_from_this_host(host: Host) -> None:
    """A published port forwards from 127.0.0.1 of the host, and the sandbox sees the gateway (R33)."""
    server = (
        "import socket; s = socket.create_server(('0.0.0.0', 8000)); print('up', flush=True); c, a = s.accept();"
        "c.sendall(a[0].encode()); c.close()"
    )
    sandbox_id = await host.start("python3", "-c", server, publish=(Publish(0, 8000),))
    until(lambda: "up" in host.output(sandbox_id), "the server")
    (published,) = host.engine.living()[0].publish
    reader, writer = await asyncio.open_connection("127.0.0.1", published.host_port)
    assert await asyncio.wait_for(reader.read(), 10) == GATEWAY.encode()
    writer.close()
    with pytest.raises(Conflict, match=str(published.host_port)):
        await host.engine.create(host.spec("true", publish=(Publish(published.host_port, 1),)))
    assert len(host.engine.living()) == 1


async def test_cut_destroys_exactly_the_matching_sockets(host: Host) -> None:
    """Cutting by port ends that connection at once, IPv6 sockets that carry IPv4 included, and no other."""
    client = (
        "import socket, sys\n"
        "kept = socket.create_connection(('10.231.80.1', 10001))\n"
        "cut = socket.create_connection(('10.231.80.1', 10000))\n"
        "six = socket.socket(socket.AF_INET6); six.connect(('::ffff:10.231.80.1', 10000))\n"
        "for s in (kept, cut, six): s.sendall(b'x'); s.recv(100)\n"
        "print('up', flush=True)\n"
        "for s in (cut, six):\n"
        "    try: s.recv(10); print('alive', flush=True)\n"
        "    except OSError as error: print(type(error).__name__, flush=True)\n"
        "kept.sendall(b'x'); print(len(kept.recv(100)) > 0, flush=True)\n"
    )
    with tcp_server(GATEWAY, 10000), tcp_server(GATEWAY, 10001):
        sandbox = await host.engine.create(host.spec("python3", "-c", client))
        await host.engine.ring.admit(sandbox.address, [], [(6, 10000), (6, 10001)])
        sandbox_id = await host.begin(sandbox.id)
        until(lambda: host.output(sandbox_id), "the connections")
        assert host.output(sandbox_id) == "up\n"
        assert {info.destination_port for info in await host.engine.sockets(sandbox_id)} == {10000, 10001}
        assert await host.engine.cut(sandbox_id, lambda info: info.destination_port == 10000) == 2
        assert await host.engine.wait(sandbox_id) == 0
    assert host.output(sandbox_id).split() == ["up", "ConnectionAbortedError", "ConnectionAbortedError", "True"]


async def test_pause_stops_and_continues(host: Host) -> None:
    """A paused sandbox does nothing until it is continued."""
    sandbox_id = await host.start("sh", "-c", "while :; do date +%N > beat; sleep 0.02; done")
    beat = host.workdir / "beat"
    until(beat.exists, "the first beat")
    await host.engine.pause(sandbox_id, on=True)
    frozen = host.engine.living()[0].cgroup_path / "cgroup.events"
    until(lambda: "frozen 1" in frozen.read_text(), "frozen")
    before = beat.read_text()
    assert beat.read_text() == before
    await host.engine.pause(sandbox_id, on=False)
    until(lambda: beat.read_text() not in {"", before}, "a further beat")


async def test_interface_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """A taken bridge name or subnet is an error that names the setting, and that interface stays as it was."""
    async with running_host(tmp_path) as host:
        await host.engine.aclose(remove=True)
        sh("ip", "link", "add", "cwtest0", "type", "bridge")
        with pytest.raises(Conflict, match="host.bridge"):
            await host.engine.start()
        assert "DOWN" in sh("ip", "link", "show", "cwtest0")
        sh("ip", "link", "del", "cwtest0")
        sh("ip", "addr", "add", "10.231.82.1/24", "dev", "up0")
        with pytest.raises(Conflict, match="host.subnet"):
            await host.engine.start()


STARTER = """
import asyncio, os, sys
from pathlib import Path
from clawker_cp.engines.base import SandboxSpec
from clawker_cp.testing.sandbox_world import make_engine
async def main():
    engine = make_engine(Path({state!r}), {parent!r})
    await engine.start()
    script = "trap 'exit 5' TERM; echo up > up; while :; do sleep 0.05; done"
    spec = SandboxSpec(project="p", agent="lasting", argv=("sh", "-c", script), workdir={workdir!r})
    sandbox = await engine.create(spec)
    with open(os.devnull, "r+b") as nothing:
        await engine.run(sandbox.id, (nothing.fileno(),) * 3)
    half = await engine.create(SandboxSpec(project="p", agent="half", argv=("true",)))
    print(sandbox.id, half.id, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""


async def test_sandboxes_outlive_a_killed_server_and_are_adopted(tmp_path: Path) -> None:
    """After kill -9 the command runs on, the next start adopts it and learns its code; half-made ones are swept."""
    async with running_host(tmp_path) as host:
        await host.engine.aclose(remove=True)
        script = STARTER.format(state=str(host.state), parent=host.cgroup_parent, workdir=str(host.workdir))
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            lasting, half = server.stdout.readline().split()
            until((host.workdir / "up").exists, "the command")
            server.kill()
        namespaces = sh("ip", "netns", "list")
        assert half[:12] in namespaces
        adopting = make_engine(host.state, host.cgroup_parent)
        try:
            await adopting.start()
            (sandbox,) = adopting.living()
            assert sandbox.id == lasting
            assert half[:12] not in sh("ip", "netns", "list")
            assert sandbox.interface in sh("nft", "list", "ruleset")
            waiting = asyncio.ensure_future(adopting.wait(lasting))
            await adopting.signal(lasting, signal.SIGTERM)
            async with asyncio.timeout(10):
                assert await waiting == 5
            await adopting.remove(lasting, force=True, grace_s=0)
            new = await adopting.create(host.spec("true"))
            assert new.address != sandbox.address
        finally:
            await end(adopting)
        assert not list((host.state / "sandboxes").iterdir())


async def test_the_code_of_a_sandbox_that_is_gone_is_told_by_the_next_server(tmp_path: Path) -> None:
    """Whoever waits for it may hear it from a server that never saw the sandbox."""
    async with running_host(tmp_path) as host:
        one = await host.start("sh", "-c", "exit 8")
        await host.engine.wait(one)
        await host.engine.remove(one, force=True, grace_s=0)
        await host.engine.aclose(remove=False)
        adopting = make_engine(host.state, host.cgroup_parent)
        try:
            await adopting.start()
            told = adopting.exit_code(one), await adopting.wait(one)
        finally:
            await end(adopting)

        assert told == (8, 8)


@pytest.mark.parametrize("made", ["namespace", "interface", "everything"])
async def test_what_was_half_made_is_taken_away_whole(host: Host, made: str) -> None:
    """However far a server that was killed had come: no namespace, no interface and no neighbour stays."""
    bridge, address, name, interface = host.engine.network.bridge, "10.231.80.77", f"cwtest-{os.getpid()}", "cwhalf0"
    sh("ip", "netns", "add", name)
    try:
        if made != "namespace":
            sh("ip", "link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", name)
        if made == "everything":
            sh("ip", "neigh", "replace", address, "lladdr", "02:ca:00:00:00:01", "dev", bridge, "nud", "permanent")
        await network.remove_sandbox(name, interface, (address, bridge))
        left = name in sh("ip", "netns", "list")
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)

    assert not left and interface not in sh("ip", "link", "show")
    assert address not in sh("ip", "neigh", "show", "dev", bridge)


KILLED_WHILE_STARTING = """
import asyncio, os, signal
from pathlib import Path
from clawker_cp.engines.base import SandboxSpec
from clawker_cp.engines.host import engine as module, process
from clawker_cp.testing.sandbox_world import make_engine
def dies(_what):
    os.kill(os.getpid(), signal.SIGKILL)
write_record = module.write_record
def writes_and_dies(sandbox):
    write_record(sandbox)
    dies(sandbox)
async def main():
    engine = make_engine(Path({state!r}), {parent!r})
    await engine.start()
    spec = SandboxSpec(project="p", agent="one", argv=("touch", "ran"), workdir={workdir!r})
    sandbox = await engine.create(spec)
    print(sandbox.id, flush=True)
    {place}
    with open(os.devnull, "r+b") as nothing:
        await engine.run(sandbox.id, (nothing.fileno(),) * 3)
asyncio.run(main())
"""


@pytest.mark.parametrize("place", ["dies(None)", "module.write_record = dies", "module.write_record = writes_and_dies"])
async def test_a_command_that_no_server_could_tell_of_never_runs(tmp_path: Path, place: str) -> None:
    """A server killed before it let the command go leaves nothing that runs or has ended: it can be asked for again."""
    async with running_host(tmp_path) as host:
        await host.engine.aclose(remove=True)
        script = KILLED_WHILE_STARTING.format(
            state=str(host.state), parent=host.cgroup_parent, workdir=str(host.workdir), place=place
        )
        server = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
        async with asyncio.timeout(20):
            out, _err = await server.communicate()
        assert server.returncode == -signal.SIGKILL
        adopting = make_engine(host.state, host.cgroup_parent)
        try:
            await adopting.start()
            left, code = adopting.living(), adopting.exit_code(out.decode().strip())
        finally:
            await end(adopting)

        assert (left, code) == ([], None)
        assert not (host.workdir / "ran").exists()
