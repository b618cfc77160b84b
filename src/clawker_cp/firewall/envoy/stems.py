"""
Names of generated resources: a destination as a word, distinct for distinct destinations.

A resource that changes its name is replaced, and its connections with it; so who has a stem
keeps it, and the newcomer gets the suffix when two destinations look alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

_SAME = str.maketrans(".-:/", "____")


def plain_stem(dst: str) -> str:
    """Return the stem of a destination that nothing else is mistaken for."""
    return dst.strip(".").translate(_SAME)


def assign_stems(destinations: Iterable[str], previous: Mapping[str, str] | None = None) -> dict[str, str]:
    """
    Return a distinct stem for every destination.

    `previous` are stems in use: their holders keep them. Without it the first in text order
    gets the plain stem.
    """
    previous = previous or {}
    wanted = sorted(set(destinations))
    stems = {dst: previous[dst] for dst in wanted if dst in previous}
    taken = set(stems.values())
    for dst in wanted:
        if dst in stems:
            continue
        stem = plain_stem(dst)
        if stem in taken:
            stem = f"{stem}_{hashlib.sha256(dst.encode()).hexdigest()[:6]}"
        stems[dst] = stem
        taken.add(stem)
    return stems
