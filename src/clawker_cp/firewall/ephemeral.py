"""
Rules that live as long as what brought them: those given to `run` (R26).

A layer beside the store, in memory only: never written, gone with the process. The reconciler
compiles the store's rules and these together.
"""

from __future__ import annotations

from collections.abc import Sequence

from clawker_cp.firewall.merge import Removed, remove_scope
from clawker_cp.firewall.rules import Rule


class EphemeralRules:
    """
    The in-memory layer. A proposed set is computed first and committed once it is live.

    Not thread-safe: belongs to the reconciler's task.
    """

    def __init__(self) -> None:
        self._rules: tuple[Rule, ...] = ()

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The committed rules, in order of arrival."""
        return self._rules

    def removing(self, scope: str) -> Removed:
        """Return what removing all of a scope would give; commits nothing."""
        return remove_scope(self._rules, scope)

    def commit(self, rules: Sequence[Rule]) -> None:
        """Make a proposed set the present one."""
        self._rules = tuple(rules)
