"""Tests of the generated files: what stands where, and what a change touches."""

from __future__ import annotations

from clawker_cp.firewall.envoy.resources import bootstrap
from clawker_cp.testing.plan_world import build, rule
from clawker_cp.testing.proxy_config import OPTIONS, resources_of


def test_every_policy_has_its_files() -> None:
    """LDS and CDS once; two RDS and two SDS files per policy, secrets marked as such."""
    resources = resources_of(build(rule("https://a.example.com"), rule("https://b.example.com", scope="agent:p/a")))

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
    before = resources_of(first)
    second = build(rule("https://a.example.com"), rule("https://b.example.com"), allocations=first.allocations)
    only_global = build(rule("https://a.example.com"), allocations=first.allocations)
    old, new = resources_of(only_global, before), resources_of(second, before)
    changed = {name for name in new.files if new.files[name].digest != old.files[name].digest}

    assert changed == {"rc_p1_tls.json"}


def test_equal_input_gives_equal_bytes() -> None:
    """Built twice, with and without what is remembered, the files are the same."""
    compiled = build(rule("https://a.example.com"), rule("tcp://b.example.com:22"), rule("https://192.0.2.1"))
    first = resources_of(compiled)

    assert resources_of(compiled, first).files == first.files == resources_of(compiled).files
    assert bootstrap(OPTIONS) == bootstrap(OPTIONS)
