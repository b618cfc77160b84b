"""
The record of a question.
"""

from __future__ import annotations

import ipaddress

from clawker_cp.dns.ports import DnsRecord, NameRow


def test_event_id() -> None:
    """The id is `d-<start time hex>-<n>`, as `explain` takes it."""
    record = DnsRecord("18f", 7, 0, "", 0, "", 0, "", 1, 0, "allowed", "answered", "", ".", (), 0, 0, False)
    assert record.event_id == "d-18f-7"


def test_row_is_a_plain_tuple() -> None:
    """Rows are what the map bridge packs: address, identity, expiry."""
    assert NameRow(ipaddress.ip_address("::1").packed, 2, 3) == (bytes(15) + b"\1", 2, 3)
