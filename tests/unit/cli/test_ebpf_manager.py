"""
The break-glass tool, on maps that a real manager pinned in a scratch directory.
"""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from clawker_cp.cli.ebpf_manager import cli
from clawker_cp.ebpf import AgentConfig, Manager
from clawker_cp.engines.host.cgroups import find_cgroup2
from clawker_cp.errors import InvalidInput
from clawker_cp.testing.bridge_world import end, hold

pytestmark = [pytest.mark.root, pytest.mark.slow]
GATE = "192.0.2.1"


@pytest.fixture
def pins() -> Iterator[tuple[Path, int]]:
    name = f"ckmt{os.getpid()}-{secrets.token_hex(3)}"
    parent = find_cgroup2() / name
    agent = parent / "agent"
    agent.mkdir(parents=True)
    directory = Path("/sys/fs/bpf") / name
    manager = Manager(directory)
    try:
        manager.load(parent)
        manager.enroll(agent.stat().st_ino, AgentConfig(3, GATE, GATE, GATE, GATE))
        yield directory, agent.stat().st_ino
    finally:
        manager.flush(force=True)
        agent.rmdir()
        parent.rmdir()


def run(directory: Path, *arguments: str) -> str:
    result = CliRunner().invoke(cli, ["--pin-dir", str(directory), *arguments])

    assert result.exit_code == 0, result.output
    return result.output


def test_an_enrolled_agent_is_listed_and_a_bypass_counts_down(pins: tuple[Path, int]) -> None:
    """The tool shows an agent's row, gives it a bypass that the kernel times, and ends it."""
    directory, cgroup_id = pins

    before = json.loads(run(directory, "dump-containers", "--json"))
    run(directory, "bypass", str(cgroup_id), "60")
    during = json.loads(run(directory, "dump-containers", "--json"))
    run(directory, "unbypass", str(cgroup_id))
    after = json.loads(run(directory, "dump-containers", "--json"))

    assert [row["cgroup_id"] for row in before] == [cgroup_id]
    assert before[0]["policy"] == 3
    assert before[0]["bypass_s"] == 0
    assert 50 < during[0]["bypass_s"] <= 60
    assert after[0]["bypass_s"] == 0


def test_status_counts_what_is_pinned(pins: tuple[Path, int]) -> None:
    """Status shows the links and the rows of each map."""
    directory, _cgroup_id = pins
    row = json.loads(run(directory, "status", "--json"))[0]

    assert (row["links"], row["attached"]) == (12, 0)
    assert row["container_map"] == 1
    assert run(directory, "dump-routes") == ""
    assert run(directory, "dump-dns") == ""


def test_containers_outside_the_parent_are_shown(pins: tuple[Path, int]) -> None:
    """One that is attached by itself is counted apart, and listed whether it is enrolled or not."""
    directory, agent = pins
    parent = next(one for one in find_cgroup2().rglob("agent") if one.stat().st_ino == agent).parent
    boxes = [find_cgroup2() / f"{parent.name}-{name}" for name in ("one", "two")]
    manager = Manager(directory)
    try:
        manager.load(parent)
        for box in boxes:
            box.mkdir()
        one, two = (manager.attach(box) for box in boxes)
        manager.enroll(one, AgentConfig(4, GATE, GATE, GATE, GATE))
        status = asked(directory, "status")[0]
        rows = {row["cgroup_id"]: row for row in asked(directory, "dump-containers")}
    finally:
        for box in boxes:
            box.rmdir()
        manager.close()

    assert (status["links"], status["attached"]) == (12, 2)
    assert (rows[agent]["own_links"], rows[one]["own_links"], rows[one]["policy"]) == (0, 12, 4)
    assert rows[two] == {"cgroup_id": two, "enrolled": False, "own_links": 12, "path": str(boxes[1])}


def test_nothing_pinned_is_said_with_a_hint(tmp_path: Path) -> None:
    """A pin directory without pins is one line and a hint, not a traceback."""
    result = CliRunner().invoke(cli, ["--pin-dir", str(tmp_path), "status"])

    assert result.exit_code == 1
    assert "nothing is pinned" in result.output


def asked(directory: Path, *arguments: str, stdin: str = "") -> list[dict[str, object]]:
    result = CliRunner().invoke(cli, ["--pin-dir", str(directory), *arguments, "--json"], input=stdin)

    assert result.exit_code == 0, result.output
    said = json.loads(result.output)
    return said if isinstance(said, list) else [said]


def refused(directory: Path, *arguments: str, stdin: str = "") -> str:
    result = CliRunner().invoke(cli, ["--pin-dir", str(directory), *arguments], input=stdin)

    assert result.exit_code != 0
    assert "Traceback" not in result.output and not isinstance(result.exception, AttributeError | KeyError)
    return result.output


def test_disabling_denies_and_enabling_enrols_again(pins: tuple[Path, int]) -> None:
    """A row that is taken away opens nothing; a new one has the policy that was asked for."""
    directory, agent = pins
    assert "denied everything" in run(directory, "disable", str(agent))
    assert asked(directory, "dump-containers") == []
    assert "not enrolled" in refused(directory, "disable", str(agent))
    assert "no agent is enrolled whose gateway" in refused(directory, "enable", str(agent))


def test_another_cgroup_is_enrolled_like_the_present_ones(pins: tuple[Path, int]) -> None:
    """It takes over the gateway's addresses, and an enrolled one only changes its policy."""
    directory, agent = pins
    run(directory, "enable", "77", "--policy", "5")
    run(directory, "enable", str(agent), "--policy", "6")
    rows = {row["cgroup_id"]: row for row in asked(directory, "dump-containers")}
    assert (rows[77]["policy"], rows[77]["proxy"], rows[agent]["policy"]) == (5, GATE, 6)
    assert "policy: 0" in refused(directory, "enable", "77", "--policy", "0")


ROUTE = {"policy": 3, "identity": 300, "port": 5432, "l4": "tcp", "action": "proxy", "proxy_port": 10001}


def test_routes_become_those_of_the_file(pins: tuple[Path, int]) -> None:
    """What is not in it goes, and nothing is written when anything in it is wrong."""
    directory, _ = pins
    other = {**ROUTE, "port": 22, "action": "deny", "proxy_port": 0}
    assert asked(directory, "sync-routes", "-", stdin=json.dumps([ROUTE, other]))[0] == {"written": 2, "removed": 0}
    assert asked(directory, "sync-routes", "-", stdin=json.dumps([ROUTE]))[0] == {"written": 1, "removed": 1}
    (row,) = asked(directory, "dump-routes")
    assert (row["policy"], row["identity"], row["port"], row["action"], row["proxy_port"]) == (
        3,
        300,
        5432,
        "proxy",
        10001,
    )
    bad = [ROUTE, {**ROUTE, "port": 0, "l4": "sctp"}, 5, {**ROUTE, "colour": 1}, {**ROUTE, "proxy_port": 0}]
    said = refused(directory, "sync-routes", "-", stdin=json.dumps(bad))
    for part in (
        "routes[1].port: 0",
        "routes[1].l4: 'sctp'",
        "routes[2].has to be",
        "routes[3].colour",
        "routes[4].proxy_port",
    ):
        assert part in said, said
    assert len(asked(directory, "dump-routes")) == 1
    assert "not JSON" in refused(directory, "sync-routes", "-", stdin="[")
    assert "list" in refused(directory, "sync-routes", "-", stdin="{}")


def test_an_address_is_named_for_a_time_and_collected(pins: tuple[Path, int]) -> None:
    """The row is there with its time, an ended one is removed, and impossible ones are refused."""
    directory, agent = pins
    run(directory, "dns-update", str(agent), "198.51.100.7", "300", "--ttl", "60")
    (row,) = asked(directory, "dump-dns")
    assert (row["address"], row["identities"]) == ("198.51.100.7", [300]) and 55 <= int(str(row["left_s"])) <= 60
    assert asked(directory, "gc-dns")[0] == {"removed": 0}
    for words, said in (
        ((str(agent), "nonsense", "300"), "address"),
        ((str(agent), "198.51.100.7", "255"), "identity: 255"),
        ((str(agent), "198.51.100.7", "300", "--ttl", "0"), "ttl: 0"),
        (("5", "198.51.100.7", "300"), "not enrolled"),
    ):
        assert said in refused(directory, "dns-update", *words)


def test_no_break_glass_opens_what_is_reserved(pins: tuple[Path, int]) -> None:
    """Addresses of R12 are refused here as everywhere."""
    directory, agent = pins
    manager = Manager(directory)
    manager.load(next(one for one in find_cgroup2().rglob("agent") if one.stat().st_ino == agent).parent)
    manager.set_reserved([ipaddress.ip_network("198.51.100.0/24")])
    manager.close()
    assert "reserved" in refused(directory, "dns-update", str(agent), "198.51.100.7", "300")


def test_a_cgroup_is_resolved_by_id_and_by_path(pins: tuple[Path, int]) -> None:
    """An enrolled one by itself, one inside it by its agent, and nothing by nothing."""
    directory, agent = pins
    path = next(one for one in find_cgroup2().rglob("agent") if one.stat().st_ino == agent)
    inner = path / "inner"
    inner.mkdir()
    try:
        (row,) = asked(directory, "resolve", str(agent))
        assert (row["path"], row["enrolled"], row["policy"]) == (str(path), True, 3)
        (row,) = asked(directory, "resolve", str(inner))
        assert (row["enrolled"], row["judged_as"]) == (False, agent)
    finally:
        inner.rmdir()
    assert "neither exists" in refused(directory, "resolve", "1")
    assert "no cgroup" in refused(directory, "resolve", "no/such/group")


def test_counters_states_and_errors_are_shown(pins: tuple[Path, int]) -> None:
    """An agent that did nothing has a state and no counters; nothing has failed."""
    directory, agent = pins
    assert asked(directory, "dump-metrics") == [] and asked(directory, "dump-errors") == []
    assert {row["cgroup_id"]: row["sequence"] for row in asked(directory, "dump-flows")}[agent] == 0


def test_refusals_are_seen_live_and_counted(pins: tuple[Path, int]) -> None:
    """A process of an unenrolled neighbour is refused: the record is shown and the counter has it."""
    directory, agent = pins
    neighbour = next(one for one in find_cgroup2().rglob("agent") if one.stat().st_ino == agent).parent / "stranger"
    neighbour.mkdir()
    code = "import socket\ntry: socket.create_connection(('198.51.100.9', 9), 1)\nexcept OSError as e: print(e.errno)"
    try:
        done = subprocess.run(
            ["sh", "-c", f"echo $$ > {neighbour}/cgroup.procs && exec python3 -c \"$0\"", code],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        assert done.stdout.strip()
        result = CliRunner().invoke(cli, ["--pin-dir", str(directory), "events", "--seconds", "0.2", "--json"])
        records = [json.loads(line) for line in result.output.splitlines()]
    finally:
        neighbour.rmdir()
    assert any(one["reason"] == "not_enrolled" and one["verdict"] == "denied" for one in records), result.output
    assert any(row["reason"] == "not_enrolled" for row in asked(directory, "dump-metrics"))


def test_records_are_not_taken_from_a_running_control_plane(
    pins: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody holds the pid file the tool refuses and says who shows them."""
    monkeypatch.setattr("clawker_cp.wiring.host_files.server_runs.__defaults__", (tmp_path / "cp.pid",))
    with (tmp_path / "cp.pid").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "clawkerctl flows" in refused(pins[0], "events", "--seconds", "0.1")
    run(pins[0], "events", "--seconds", "0.01")


def test_flush_takes_everything_once_nobody_is_judged(
    pins: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an agent has a process, or a server runs, nothing goes; then pins and filters do, once."""
    monkeypatch.setattr("clawker_cp.wiring.host_files.server_runs.__defaults__", (tmp_path / "cp.pid",))
    directory, agent = pins
    procs = next(one for one in find_cgroup2().rglob("agent") if one.stat().st_ino == agent) / "cgroup.procs"
    network, living = hold("unshare", "--net"), hold("env")
    nft = ("nsenter", "-t", str(network.pid), "-n", "nft")
    try:
        subprocess.run([*nft, "add table inet clawker_x; add table arp clawker_x; add table ip mine"], check=True)
        flush = ("flush", "--host-pid", str(network.pid), "--json")
        procs.write_text(str(living.pid))
        judged = refused(directory, *flush)
        with (tmp_path / "cp.pid").open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            served = refused(directory, *flush)
        kept = directory.exists()
        (find_cgroup2() / "cgroup.procs").write_text(str(living.pid))
        whole, again = (json.loads(run(directory, *flush))["removed"] for _ in range(2))
        tables = subprocess.run([*nft, "list", "tables"], check=True, capture_output=True, text=True).stdout
    finally:
        for one in (network, living):
            end(one)

    assert "1 agent cgroups still have processes" in judged and "a control plane runs" in served and kept
    assert (whole, again) == ([str(directory), "table arp clawker_x", "table inet clawker_x"], [])
    assert tables == "table ip mine\n" and not directory.exists()


def test_the_programs_are_verified_against_their_budget(pins: tuple[Path, int]) -> None:
    """Every program loads here and is within what was reviewed."""
    rows = {row["program"]: row for row in asked(pins[0], "verify")}
    assert "clawker_connect4" in rows and int(str(rows["clawker_connect4"]["instructions"])) > 100


def test_budgets_hold_and_outlive_a_route_change(pins: tuple[Path, int]) -> None:
    """What was set is in the switches, also after a bulk change of routes; nonsense is refused."""
    directory, agent = pins
    manager = Manager(directory)
    manager.load(next(one for one in find_cgroup2().rglob("agent") if one.stat().st_ino == agent).parent)
    try:
        manager.set_budgets(deny=7, allow=9)
        assert asked(directory, "status")[0]["budget"] == [7, 0, 9]
        with pytest.raises(InvalidInput, match="deny"):
            manager.set_budgets(deny=-1)
    finally:
        manager.close()
