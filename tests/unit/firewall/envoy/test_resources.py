"""Tests of the generated files: what stands in them, and what a change touches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson
import pytest

from clawker_cp.errors import Unsupported
from clawker_cp.firewall.compile import Compiled
from clawker_cp.firewall.envoy.files import ConfigDirectory, writing_order
from clawker_cp.firewall.envoy.options import EnvoyOptions, find_binary
from clawker_cp.firewall.envoy.resources import Resources, bootstrap, build_resources
from clawker_cp.firewall.envoy.stack import envoy_command
from clawker_cp.firewall.envoy.stems import assign_stems
from clawker_cp.firewall.inspection import Leaf
from clawker_cp.testing.plan_world import build, deny, rule

OPTIONS = EnvoyOptions(Path("/run/x"), "10.231.80.1", Path("/etc/ssl/certs/ca-certificates.crt"))
LEAVES: defaultdict[str, Leaf] = defaultdict(lambda: Leaf("CERT", "KEY", "mark", "/c.pem", "/k.pem"))


def _resources(compiled: Compiled, previous: Resources | None = None) -> Resources:
    return build_resources(compiled.plan, LEAVES, OPTIONS, previous)


def _json(resources: Resources, file: str) -> list[dict[str, Any]]:
    document = orjson.loads(resources.files[file].document(7))
    assert document["version_info"] == "7"
    found: list[dict[str, Any]] = document["resources"]
    return found


def _names(found: Iterable[dict[str, Any]]) -> set[str]:
    return {one["name"] for one in found}


def test_every_policy_has_its_files() -> None:
    """LDS and CDS once; two RDS and two SDS files per policy, secrets marked as such."""
    resources = _resources(build(rule("https://a.example.com"), rule("https://b.example.com", scope="agent:p/a")))

    assert set(resources.files) == {"lds.json", "cds.json"} | {
        name
        for k in (1, 2)
        for name in (f"rc_p{k}_tls.json", f"rc_p{k}_plain.json", f"sds-p{k}-0.json", f"sds-p{k}-1.json")
    }
    assert {name for name, file in resources.files.items() if file.secret} == {
        f"sds-p{k}-{s}.json" for k in (1, 2) for s in (0, 1)
    }


def test_an_ordinary_rule_changes_its_routes_only() -> None:
    """One more https name: the policy's TLS routes differ, listeners, clusters, other policies do not."""
    first = build(rule("https://a.example.com"), rule("https://z.example.com", scope="agent:p/a"))
    before = _resources(first)
    second = build(rule("https://a.example.com"), rule("https://b.example.com"), allocations=first.allocations)
    only_global = build(rule("https://a.example.com"), allocations=first.allocations)
    old, new = _resources(only_global, before), _resources(second, before)
    changed = {name for name in new.files if new.files[name].digest != old.files[name].digest}

    assert changed == {"rc_p1_tls.json"}


def test_listeners_are_named_and_bound_as_the_contract_says() -> None:
    """Egress and HTTP/3 listener per policy, dedicated ones per destination; all on the proxy address."""
    resources = _resources(
        build(rule("https://a.example.com"), rule("tcp://db.example.com:5432"), rule("udp://t.example:123"))
    )
    listeners = {one["name"]: one for one in _json(resources, "lds.json")}

    assert set(listeners) == {"egress_p1", "egress_quic_p1", "tcp_db_example_com_5432", "udp_t_example_123"}
    assert {one["address"]["socket_address"]["address"] for one in listeners.values()} == {"10.231.80.1"}
    egress = listeners["egress_p1"]
    assert egress["enable_reuse_port"] is False
    assert egress["listener_filters_timeout"] == "1s"
    assert egress["continue_on_listener_filters_timeout"] is False
    assert [chain["name"] for chain in egress["filter_chains"]] == ["inspect", "plain"]
    assert "default_filter_chain" not in egress
    assert _names(_json(resources, "cds.json")) >= {
        "http_dfp",
        "https_dfp",
        "https_dfp_insecure",
        "wss_dfp",
        "wss_dfp_insecure",
        "tcp_db_example_com_5432",
        "udp_t_example_123",
    }


def test_no_two_virtual_hosts_claim_one_domain() -> None:
    """Envoy refuses a whole route configuration for one duplicate, so there is none."""
    rules = (
        rule("https://example.com"),
        rule("https://*.example.com"),
        rule("https://*.example.com:8443"),
        rule("wss://example.com/chat"),
        deny("https://sub.example.com"),
        deny("https://*.sub2.example.com"),
        rule("http://example.com"),
        rule("http://example.com:8080"),
        rule("https://*.pass.example.org", tls="passthrough"),
        rule("https://x.pass.example.org/a"),
    )
    resources = _resources(build(*rules))
    for file in ("rc_p1_tls.json", "rc_p1_plain.json"):
        (config,) = _json(resources, file)
        domains = [domain for host in config["virtual_hosts"] for domain in host["domains"]]
        names = [host["name"] for host in config["virtual_hosts"]]
        assert len(domains) == len(set(domains))
        assert len(names) == len(set(names))
        assert names[-1] == "deny_all"


def test_every_route_says_what_it_means() -> None:
    """No route without action, reason and rule in its metadata, and forwards never time out."""
    rules = (rule("GET https://a.example.com/x"), rule("wss://b.example.com"), deny("https://c.example.com"))
    resources = _resources(build(rule("https://*.example.com"), *rules))
    for file in ("rc_p1_tls.json", "rc_p1_plain.json"):
        for host in _json(resources, file)[0]["virtual_hosts"]:
            for route in host["routes"]:
                said = route["metadata"]["filter_metadata"]["clawker"]
                assert set(said) == {"action", "reason", "rule"}
                assert (said["action"] == "allowed") == ("route" in route)
                assert route.get("route", {}).get("timeout", "0s") == "0s"


def test_every_tls_host_begins_with_the_server_name_check() -> None:
    """The first route of every TLS virtual host but the last resort compares Host and session."""
    resources = _resources(build(rule("https://*.example.com"), rule("https://a.org/x"), deny("https://c.example.com")))
    for host in _json(resources, "rc_p1_tls.json")[0]["virtual_hosts"][:-1]:
        first = host["routes"][0]
        assert first["direct_response"]["status"] == 421
        assert first["match"]["headers"][0]["name"] == "x-clawker-sni"


def test_stems_stay_with_their_holders() -> None:
    """A newcomer that looks like somebody else gets the suffix, whatever the order of the text."""
    alone = assign_stems(["b.a.com"])
    both = assign_stems(["b.a.com", "b-a.com"], alone)
    fresh = assign_stems(["b.a.com", "b-a.com"])

    assert both["b.a.com"] == "b_a_com"
    assert both["b-a.com"].startswith("b_a_com_")
    assert len(both["b-a.com"]) == len("b_a_com_") + 6
    assert set(fresh.values()) != {"b_a_com"}
    assert len(set(fresh.values())) == 2


def test_equal_input_gives_equal_bytes() -> None:
    """Built twice, with and without what is remembered, the files are the same."""
    compiled = build(rule("https://a.example.com"), rule("tcp://b.example.com:22"), rule("https://192.0.2.1"))
    first = _resources(compiled)

    assert _resources(compiled, first).files == first.files == _resources(compiled).files
    assert bootstrap(OPTIONS) == bootstrap(OPTIONS)


def test_files_are_replaced_whole_with_rising_versions(tmp_path: Path) -> None:
    """Only what differs is written; secrets are closed to others; unused files go."""
    resources = _resources(build(rule("https://a.example.com")))
    directory = ConfigDirectory(tmp_path, 100)
    for name in directory.changed(resources.files):
        directory.write(name, resources.files[name])

    assert directory.changed(resources.files) == []
    assert (tmp_path / "sds-p1-0.json").stat().st_mode & 0o777 == 0o600
    assert orjson.loads((tmp_path / "cds.json").read_bytes())["version_info"] == "101"
    assert directory.expected(["cds.json"]) == {"cluster_manager.cds.version_text": "101"}
    directory.forget(["lds.json", "cds.json"])
    assert {path.name for path in tmp_path.iterdir()} == {"lds.json", "cds.json"}
    assert writing_order(["lds.json", "rc_p1_tls.json", "sds-p1-0.json", "cds.json"]) == [
        "cds.json",
        "sds-p1-0.json",
        "rc_p1_tls.json",
        "lds.json",
    ]


def test_the_command_line_is_the_contracts() -> None:
    """No hot restart, immediate drain, two workers."""
    command = envoy_command("/usr/bin/envoy", OPTIONS, hide_hosts=False)

    assert command[0] == "/usr/bin/envoy"
    text = " ".join(command)
    assert "--disable-hot-restart --concurrency 2 --drain-time-s 1 --drain-strategy immediate" in text
    assert find_binary().name == "envoy"


def test_a_binary_that_is_not_there_is_named() -> None:
    """`envoy.binary` with a bad path is an error that quotes it."""
    with pytest.raises(Unsupported, match="/nonexistent/envoy"):
        find_binary("/nonexistent/envoy")
