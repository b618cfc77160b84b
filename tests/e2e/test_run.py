"""
`clawker-cp run` end to end: real processes, kernel, gate and Envoy against real servers.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest

from clawker_cp.testing.machine import Machine

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

ECHO = """
import socket, sys, time
kind, host, port = sys.argv[1:4] if len(sys.argv) > 3 else {args!r}
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
s.settimeout(5)
s.connect((host, int(port)))
s.send(b"ping\\n")
print(s.recv(100), s.getpeername())
"""


def echo(kind: str, host: str, port: int) -> str:
    return ECHO.format(args=(kind, host, str(port)))


async def test_an_allowed_https_name_is_reached_and_inspected(machine: Machine) -> None:
    """An allowed https name answers with the origin's own page and its end is the command's own."""
    done = await machine.run(
        "--allow", "https://api.example.com", command=["curl", "-sS", "https://api.example.com/echo"]
    )

    assert done.code == 0, done.err
    assert json.loads(done.out)["sni"] == "api.example.com"
    assert any(flow.get("host") == "api.example.com" and flow.get("reason") == "forwarded" for flow in done.flows)


async def test_passthrough_shows_the_origins_own_certificate(machine: Machine) -> None:
    """With --passthrough the client sees the origin's certificate, not the inspection CA's."""
    done = await machine.run(
        "--passthrough", "--allow", "https://api.example.com",
        command=["curl", "-svk", "https://api.example.com/echo"],
    )  # fmt: skip

    assert done.code == 0, done.err
    assert "clawker egress" not in done.err
    assert json.loads(done.out)["sni"] == "api.example.com"


async def test_http_reaches_by_host(machine: Machine) -> None:
    """An allowed http name is reached and another Host header on the same listener is refused with 403."""
    done = await machine.run(
        "--allow", "http://www.example.com",
        command=["sh", "-c", "curl -sS http://www.example.com/echo; curl -sS -H 'Host: evil.example.org' http://www.example.com/"],
    )  # fmt: skip

    assert '"target": "/echo"' in done.out
    assert '"reason":"host_not_allowed"' in done.out.replace(" ", "")


async def test_path_rules_decide_by_path_and_method(machine: Machine) -> None:
    """A path rule lets its paths through and answers others with a JSON 403 that names the rule."""
    done = await machine.run(
        "--allow", "GET https://api.example.com/repos/",
        command=["sh", "-c", "for u in repos/x other 'repos/%2e%2e/x'; do"
                 " curl -sS --path-as-is https://api.example.com/$u -o /dev/null -w '%{http_code} '; done;"
                 "curl -sS --http1.1 -X POST -d x https://api.example.com/repos/x"],
    )  # fmt: skip

    assert done.out.startswith("200 403 403 ")
    assert '"reason":"path_denied"' in done.out.replace(" ", "")


async def test_raw_tcp_udp_and_ssh_reach_their_origins(machine: Machine) -> None:
    """Opaque rules carry bytes to the name and port, and the application sees the peer it dialled."""
    tcp = await machine.python(echo("tcp", "db.example.com", 5432), "--allow", "tcp://db.example.com:5432")
    udp = await machine.python(echo("udp", "udp.example.com", 5000), "--allow", "udp://udp.example.com:5000")

    assert "ping" in tcp.out and "203.0.113.30" in tcp.out, tcp.err
    assert "ping" in udp.out and "203.0.113.31" in udp.out, udp.err


async def test_wildcards_reach_names_below(machine: Machine) -> None:
    """A wildcard rule lets names below it through and the kernel, gate and proxy agree."""
    done = await machine.run(
        "--allow", "*.wild.example.com",
        command=["sh", "-c", "curl -sS https://a.wild.example.com/echo && curl -sS https://b.wild.example.com/echo"],
    )  # fmt: skip

    assert done.code == 0, done.err
    assert done.out.count('"sni"') == 2


async def test_address_and_cidr_rules_reach_addresses(machine: Machine) -> None:
    """A CIDR rule lets its ports straight through and nothing else of the range."""
    done = await machine.python(
        echo("tcp", "203.0.113.30", 5432)
        + "\ntry: socket.create_connection(('203.0.113.30', 6379), 3)\nexcept OSError as e: print('refused', e.errno)",
        "--allow", "tcp://203.0.113.0/24:5432",
    )  # fmt: skip

    assert "ping" in done.out, done.err
    assert "refused 111" in done.out


async def test_everything_else_is_refused_at_once_with_a_reason(machine: Machine) -> None:
    """Names, addresses, ports and families that no rule names fail without any waiting and are recorded."""
    code = """
import errno, socket
targets = [(2, ("198.51.100.10", 22)), (2, ("198.51.100.10", 6379)), (2, ("192.0.2.2", 80))]
targets.append((10, ("2001:db8::10", 443)))
for family, address in targets:
    s = socket.socket(family, socket.SOCK_STREAM)
    s.setblocking(False)  # a connection that is only being tried is EINPROGRESS
    try:
        s.connect(address)
        print("CONNECTED", address)
    except OSError as error:
        print("connect", errno.errorcode[error.errno])
try:
    socket.getaddrinfo("evil.example.org", 443)
    print("RESOLVED")
except OSError as error:
    print("no name")
"""
    await machine.world.reset()
    done = await machine.python(code, "--allow", "https://api.example.com")

    assert "CONNECTED" not in done.out and "RESOLVED" not in done.out
    assert [line for line in done.out.splitlines() if line.startswith("connect")] == ["connect ECONNREFUSED"] * 4
    assert done.denied(reason="no_route", port=22)
    assert done.denied(reason="ipv6_unrouted")
    assert done.denied(reason="not_allowed", host="evil.example.org")
    assert await machine.world.connections() == []


async def test_exit_codes_and_signals_pass(machine: Machine) -> None:
    """The command's own exit code comes back, 127 for one that does not exist, 125 for our refusals."""
    assert (await machine.run(command=["sh", "-c", "exit 7"])).code == 7
    assert (await machine.run(command=["/nonexistent"])).code == 127
    assert (await machine.run("--allow", "nonsense://x", command=["true"])).code == 125


async def test_a_private_working_directory_is_entered(machine: Machine) -> None:
    """A directory that only its owner may enter is where the owner's command starts; the default is its home."""
    private = machine.workdir / "private"
    private.mkdir(mode=0o700)
    os.chown(private, 12345, 12345)
    own = await machine.run("--workdir", str(private), command=["sh", "-c", "pwd; id -u; touch x; env | grep OLDPWD"])
    nowhere = await machine.run("--workdir", "/", command=["sh", "-c", "pwd; touch x"])

    assert own.out.split() == [str(private), "12345"], own.err
    assert (private / "x").exists()
    assert (nowhere.out.strip(), nowhere.code) == ("/home/clawker", 0), nowhere.err


async def test_a_sandbox_sees_nothing_of_the_host(machine: Machine) -> None:
    """No host socket, BPF file system, cgroup file system, secret or process is visible inside."""
    code = """
import os
import signal
shown = [n for n in os.listdir("/run") if os.listdir("/run/" + n)]
print(shown, os.path.exists("/sys/fs/bpf"), os.path.exists("/sys/fs/cgroup"))
print(os.path.exists("/etc/shadow"), os.path.exists("/var/run/docker.sock"), os.getuid() != 0)
print(all(int(p) < 50 for p in os.listdir("/proc") if p.isdigit()))
for name in ("state", "data", "config"):
    print(os.path.exists(os.path.join(os.path.dirname(os.getcwd()), name)))
print([l.split()[1] for l in open("/proc/self/status") if l.startswith(("CapEff", "CapBnd", "NoNewPrivs", "Seccomp:"))])
"""
    done = await machine.python(code)

    assert done.out.splitlines()[0] == "[] False False", done.err
    assert done.out.splitlines()[1] == "False False True"
    assert done.out.splitlines()[2] == "True"
    assert done.out.splitlines()[3:6] == ["False"] * 3
    assert "'0000000000000000', '0000000000000000', '1', '2'" in done.out


async def test_two_sandboxes_see_neither_each_others_names_nor_traffic(machine: Machine) -> None:
    """Side by side, each resolves and reaches only its own rules, and neither reaches the other."""
    code = """
import socket, subprocess, sys, time
for name in ("api.example.com", "www.example.com"):
    try: print(name, socket.gethostbyname(name))
    except OSError: print(name, "unknown")
own = socket.gethostbyname(socket.gethostname())
other = own.rsplit(".", 1)[0] + (".3" if own.endswith(".2") else ".2")
try: socket.create_connection((other, 8000), 2); print("REACHED")
except OSError as error: print("sibling", error.errno)
"""
    one, two = await asyncio.gather(
        machine.python(code, "--agent", "one", "--allow", "https://api.example.com"),
        machine.python(code, "--agent", "two", "--allow", "https://www.example.com"),
    )

    assert "api.example.com 198.51.100.10" in one.out and "www.example.com unknown" in one.out, one.err
    assert "www.example.com 198.51.100.11" in two.out and "api.example.com unknown" in two.out, two.err
    assert "sibling 111" in one.out and "sibling 111" in two.out


async def test_learning_prints_the_rules_that_would_have_sufficed(machine: Machine) -> None:
    """A learning run lets traffic pass and ends with rules under which the same command works."""
    learned = machine.workdir / "learned.yaml"
    command = ["curl", "-sSk", "https://api.example.com/echo"]
    first = await machine.run("--learn", "--learn-to", str(learned), command=command)
    second = await machine.run("--rules", str(learned), command=["curl", "-sS", "https://api.example.com/echo"])

    assert first.code == 0, first.err
    assert "api.example.com" in learned.read_text()
    assert second.code == 0, second.err


async def test_nothing_is_left_when_the_last_sandbox_is_gone(machine: Machine) -> None:
    """After the last run the bridge, the pins, the namespaces, the rules and the processes are gone."""
    done = await machine.run(command=["true"])
    left = await machine.host.run(
        ["sh", "-c", "for i in $(seq 100); do ip link show clawker0 >/dev/null 2>&1 || break; sleep 0.1; done;"
         "ip -o link show type bridge; ls /sys/fs/bpf; ip netns list; nft list tables"],
        timeout_s=30,
    )  # fmt: skip

    assert done.code == 0, done.err
    assert "clawker" not in left.out
    assert left.code == 0, left.err


async def test_a_run_that_waits_for_its_server_is_ended_by_a_signal(machine: Machine) -> None:
    """Before the command runs nothing but the client can take Ctrl-C: it ends with 128 + signal, and all with it."""
    stopped = machine.host.directory / "fake-envoy"
    stopped.write_text(f"#!/bin/sh\n: > {machine.workdir}/started\nexec sleep 100\n")
    stopped.chmod(0o755)
    (machine.workdir / "started").unlink(missing_ok=True)
    await machine.host.run(["sh", "-c", "while ip link show clawker0; do sleep 0.1; done >/dev/null 2>&1"])
    environment = {**machine.environment, "CLAWKER_CP_ENVOY__BINARY": str(stopped)}
    nothing = asyncio.subprocess.DEVNULL
    process = await machine.host.start(
        machine.argv(command=["true"]), env=environment, stdin=nothing, stdout=nothing, stderr=nothing
    )
    async with asyncio.timeout(30):
        while not (machine.workdir / "started").exists():
            await asyncio.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code = await process.wait()
    gone = await machine.host.run(
        [
            "sh",
            "-c",
            "for i in $(seq 300); do ip link show clawker0 >/dev/null 2>&1 || exit 0; sleep 0.1; done; exit 1",
        ],
        timeout_s=40,
    )

    assert code == 128 + signal.SIGINT
    assert gone.code == 0


async def test_programs_keep_the_limit_on_open_files_that_the_server_was_started_with(machine: Machine) -> None:
    """The server takes all it may have; what runs in a sandbox begins with what was set."""
    body = machine.argv(command=["sh", "-c", "ulimit -S -n; ulimit -H -n"])
    script = 'ulimit -n 4000; ulimit -S -n 200; exec "$@"'
    done = await machine.host.run(["sh", "-c", script, "sh", *body], env=machine.environment, timeout_s=60)

    assert done.out == "200\n4000\n", done.err
