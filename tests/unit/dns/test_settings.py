"""
Defaults that the contract fixes.
"""

from __future__ import annotations

from clawker_cp.dns.settings import BudgetSettings, GateSettings


def test_defaults_are_the_contract() -> None:
    """Forwarders, tries, budgets, connection bounds and the proxy view's port are those of the contract."""
    settings = GateSettings()
    assert settings.forwarders == ("1.1.1.2", "1.0.0.2")
    assert (settings.try_s, settings.tries, settings.idle_s, settings.connections_per_client) == (2.0, 3, 10.0, 16)
    assert (settings.proxy_view_address, settings.proxy_view_port) == ("127.0.0.1", 9953)
    assert settings.internal_names == ("otel-collector", "prometheus")
    assert BudgetSettings() == BudgetSettings(names=500, name_bytes=65536, txt=100, window_s=60.0)
