"""
The kernel side of enforcement: loading, attaching, pinning, and the verbs on its maps.
"""

from clawker_cp.ebpf.config import AgentConfig, NameRow
from clawker_cp.ebpf.manager import LoadReport, Manager, SyncReport

__all__ = ["AgentConfig", "LoadReport", "Manager", "NameRow", "SyncReport"]
