"""
The DNS gate: which names an agent may resolve, and to what.

It knows agents by their address, asks the compiled policy, resolves through forwarders and writes
every address into the kernel before the answer leaves (I7). It compiles no policy.
"""

from clawker_cp.dns.gate import Gate, GateStatistics
from clawker_cp.dns.ports import AgentView, DnsRecord, NameRow, Verdict
from clawker_cp.dns.settings import BudgetSettings, GateSettings

__all__ = [
    "AgentView",
    "BudgetSettings",
    "DnsRecord",
    "Gate",
    "GateSettings",
    "GateStatistics",
    "NameRow",
    "Verdict",
]
