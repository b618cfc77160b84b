"""What CoreDNS is told: one block a zone, one for the rest, and nothing that repeats for ever."""

from __future__ import annotations

from clawker_cp.dns.coredns import CoreDnsPlace, corefile


def test_a_block_for_each_zone_and_one_for_the_rest() -> None:
    """Zones go to their own servers; health, metrics and reload are told once, in the last block."""
    text = corefile(("198.51.100.53",), {"corp.example": ("10.0.0.53", "10.0.0.54:5353"), "b.example.": ("10.0.0.9",)})

    assert text.count("forward . ") == 3
    assert "b.example:9954 {" in text and "corp.example:9954 {" in text and "\n.:9954 {" in text
    assert "forward . 10.0.0.53 10.0.0.54:5353 {" in text
    assert (
        text.count("health 127.0.0.1:9955") == text.count("prometheus 127.0.0.1:9956") == text.count("reload 2s") == 1
    )
    assert text.rstrip().endswith("}") and text.index("reload") > text.index("\n.:9954")


def test_a_dead_forwarder_is_left_out_and_denials_are_not_kept() -> None:
    """Every block fails over after one failure and answers negative questions anew."""
    text = corefile(("198.51.100.53",), {"a.example": ("10.0.0.53",)})

    assert text.count("max_fails 1") == text.count("health_check 500ms") == text.count("disable denial") == 2


def test_answers_are_kept_as_long_as_they_say() -> None:
    """No least time: a name that moves every second is asked for every second."""
    text = corefile(("198.51.100.53",), {"a.example": ("10.0.0.53",)})

    assert text.count("success 10000 3600 0\n") == 2


def test_it_listens_where_it_is_told() -> None:
    """As a container it has an address of its own and the usual ports."""
    text = corefile(("198.51.100.53",), {}, CoreDnsPlace("10.231.96.201", 53, 18902, 9153))

    assert text.startswith(".:53 {\n    bind 10.231.96.201\n")
    assert "health 10.231.96.201:18902" in text and "prometheus 10.231.96.201:9153" in text
