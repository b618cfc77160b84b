"""
Bounds on what can leave as questions below an allowed wildcard (contract 8.1, threat 22).

Counted per agent, registered domain and window. Pure but for the log; time is passed in.
"""

from __future__ import annotations

from functools import lru_cache

import structlog
from publicsuffixlist import PublicSuffixList

from clawker_cp.dns.settings import BudgetSettings

log = structlog.get_logger()

UNLIMITED_REMEMBERED = 4096  # names kept to tell repeats, where their number has no limit
_COUNTED_TYPES = frozenset({10, 16})  # NULL, TXT: the roomiest ways back


class _Window:
    __slots__ = ("ends_ns", "exceeded", "name_bytes", "names", "txt", "warned")

    def __init__(self, ends_ns: int) -> None:
        self.ends_ns = ends_ns
        self.names: set[str] = set()
        self.name_bytes = 0
        self.txt = 0
        self.warned = False
        self.exceeded = False


class Budgets:
    """
    Count questions of wildcard zones.

    Repeats of a name in a window cost nothing while the cache answers them: nothing leaves then.
    """

    def __init__(self, settings: BudgetSettings) -> None:
        self._settings = settings
        self._window_ns = int(settings.window_s * 1e9)
        self._off = not (settings.names or settings.name_bytes or settings.txt)
        self._agents: dict[int, dict[str, _Window]] = {}
        self._domains: dict[str, str] = {}
        self.exceeded = 0

    def spend(
        self, agent: int, zone: str, name: str, qtype: int, now_ns: int, *, key: str, leaves: bool, again: bool = False
    ) -> bool:
        """
        Count one question for a name allowed by the wildcard `zone`; False = over budget, deny.

        `leaves`: the cache cannot answer it. `again`: it is counted already, only say whether it may go on.
        `key` names the agent in the log.
        """
        if self._off:
            return True
        domain = self._domains.get(zone)
        if not domain:
            domain = self._domain_of(zone, name)
        windows = self._agents.get(agent)
        if windows is None:
            windows = self._agents[agent] = {}
        window = windows.get(domain)
        if window is None or now_ns >= window.ends_ns:
            window = self._open(windows, domain, now_ns)
            if window is None:
                return False
        if window.exceeded:
            return False
        if again:
            return True
        new = name not in window.names
        if new or leaves or qtype in _COUNTED_TYPES:
            self._count(window, name, qtype, new=new, leaves=leaves)
            if self._judge(window, key, domain):
                return False
        return True

    def forget(self, agent: int) -> None:
        """Drop what was counted for an agent that is gone."""
        self._agents.pop(agent, None)

    def statistics(self) -> dict[str, int]:
        """Return sizes, for health and tests."""
        return {"agents": len(self._agents), "windows": sum(map(len, self._agents.values())), "exceeded": self.exceeded}

    def _count(self, window: _Window, name: str, qtype: int, *, new: bool, leaves: bool) -> None:
        if new and len(window.names) <= (self._settings.names or UNLIMITED_REMEMBERED):
            window.names.add(name)
        if new or leaves:
            window.name_bytes += len(name)
        if qtype in _COUNTED_TYPES:
            window.txt += 1

    def _judge(self, window: _Window, key: str, domain: str) -> bool:
        used = 0.0
        for spent, limit in (
            (len(window.names), self._settings.names),
            (window.name_bytes, self._settings.name_bytes),
            (window.txt, self._settings.txt),
        ):
            if limit:
                used = max(used, spent / limit)
        if used > 1:
            window.exceeded = True
            window.names.clear()
            self.exceeded += 1
            log.warning("dns_budget_exceeded", agent=key, domain=domain)
        elif used > 0.5 and not window.warned:
            window.warned = True
            log.warning("dns_budget_warning", agent=key, domain=domain, used_percent=round(100 * used))
        return window.exceeded

    def _open(self, windows: dict[str, _Window], domain: str, now_ns: int) -> _Window | None:
        """Begin a window; None if the agent has too many domains open."""
        windows.pop(domain, None)
        if len(windows) >= self._settings.domains_per_agent:
            for ended in [found for found, window in windows.items() if now_ns >= window.ends_ns]:
                del windows[ended]
            if len(windows) >= self._settings.domains_per_agent:
                self.exceeded += 1
                return None
        window = windows[domain] = _Window(now_ns + self._window_ns)
        return window

    def _domain_of(self, zone: str, name: str) -> str:
        """Return the registered domain; remembered per zone unless the zone is above registered domains."""
        if zone not in self._domains:
            if len(self._domains) >= 4096:
                self._domains.clear()
            self._domains[zone] = registered_domain(zone)
        return self._domains[zone] or registered_domain(name) or zone


@lru_cache(maxsize=1)
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()


@lru_cache(maxsize=4096)
def registered_domain(name: str) -> str:
    """Return the part of a name that somebody registered, "" if the name is a public suffix itself."""
    return _suffixes().privatesuffix(name) or ""
