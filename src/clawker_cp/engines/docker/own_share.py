"""
How many connections to the control plane one agent may hold at once, where we are a container beside the agents.

What agents send to us is bridged then: the ring around the bridge sees frames, which belong to no connection. So the
limit is a table of our own network namespace, with the number that the rings have where the control plane is a host's
own. It is gone with us; who was counted by an earlier one has lost that connection anyway.
"""

from __future__ import annotations

import os

from clawker_cp.engines.base import AgentNetwork
from clawker_cp.engines.host.commands import in_host, run
from clawker_cp.engines.host.ring import DEFAULT_GROUP, NOT_TOO_MANY, SERVED_EACH, SERVED_TCP
from clawker_cp.engines.host.tables import PREFIX

TABLE = f"inet {PREFIX}share"


class OwnShare:
    """
    Owns one table in the network namespace of a process, by default our own. Not counted is what the engine passes
    on from the host's loopback, where operators are: it comes from the gateway.
    """

    def __init__(self, network: AgentNetwork, *, group: int = DEFAULT_GROUP, pid: int = 0) -> None:
        self._network = network
        self.group = group
        self._pid = pid or os.getpid()

    async def install(self) -> None:
        """
        Make the table, or replace it. Raises `Unavailable` where we may not.
        """
        await run(*in_host(self._pid), "nft", "-f", "-", text=self.script())

    async def remove(self) -> None:
        """
        Take the table away; fine when it is not there.
        """
        await run(*in_host(self._pid), "nft", "delete", "table", *TABLE.split(), check=False)

    def script(self) -> str:
        """
        The transaction that `install` applies.
        """
        noise = "type ipv4_addr; flags dynamic,timeout; timeout 1m; size 8192;"
        report = f'log prefix "no_route" group {self.group} snaplen 128'
        return f"""
add table {TABLE}
delete table {TABLE}
table {TABLE} {{
  set served {{ {SERVED_EACH} }}
  set noise {{ {noise} }}
  chain refuse {{
    update @noise {{ ip saddr limit rate 20/second burst 40 packets }} {report}
    counter drop
  }}
  chain input {{
    type filter hook input priority -10; policy accept;
    ip saddr != {self._network.subnet} accept
    ip saddr {self._network.gateway} accept
    tcp dport {{ {SERVED_TCP} }} {NOT_TOO_MANY}
  }}
}}
"""
