"""
What introspection said of a token, for a few seconds (contract 3.7). Never holds a token.

Keys are SHA-256(0x01 || SHA-256(client certificate DER) || token); beside them stands which certificate
owns a token, keyed by SHA-256(token). Used on one thread; everything is bounded.
"""

from __future__ import annotations

from hashlib import sha256
from heapq import heapify, heappop, heappush
from typing import Protocol

CAPACITY = 4096
NEGATIVE_CAPACITY = 1024
BINDINGS = 4096


class Granted(Protocol):
    """An active token as it is kept: `accel.Granted`."""

    @property
    def client_id(self) -> str: ...
    @property
    def exp(self) -> int: ...


class _Entry:
    __slots__ = ("end", "granted", "token_digest")

    def __init__(self, granted: Granted, token_digest: bytes, end: float) -> None:
        self.granted = granted
        self.token_digest = token_digest
        self.end = end


class TokenCache:
    """
    Positive and negative results, and who owns a token.

    `generation` rises with every revocation: what was asked before is not stored after. When full the
    entry closest to its end goes.
    """

    def __init__(self, capacity: int = CAPACITY, negative_capacity: int = NEGATIVE_CAPACITY) -> None:
        self.generation = 0
        self._capacity = capacity
        self._negative_capacity = negative_capacity
        self._entries: dict[bytes, _Entry] = {}
        self._ends: list[tuple[float, bytes]] = []
        self._negative: dict[bytes, float] = {}
        self._owners: dict[bytes, tuple[bytes, int]] = {}
        self._owner_ends: list[tuple[int, bytes]] = []
        self._hits = self._negative_hits = self._misses = self._evictions = 0

    @staticmethod
    def key(certificate: bytes, token: bytes) -> bytes:
        """The key of a token presented with a certificate, given as SHA-256 of its DER."""
        return sha256(b"\x01" + certificate + token).digest()

    def find(self, certificate: bytes, token: str, wall: float, monotonic: float) -> Granted | bool:
        """`lookup` by what was presented, in one call."""
        return self.lookup(self.key(certificate, token.encode()), wall, monotonic)

    def lookup(self, key: bytes, wall: float, monotonic: float) -> Granted | bool:
        """
        The grant, False for a token known to be inactive, True for "ask".

        Every hit re-checks the token's own end against the wall clock and the entry's against the
        monotonic one.
        """
        entry = self._entries.get(key)
        if entry is not None:
            if monotonic < entry.end and wall < entry.granted.exp:
                self._hits += 1
                return entry.granted
            del self._entries[key]
        end = self._negative.get(key)
        if end is not None:
            if monotonic < end:
                self._negative_hits += 1
                return False
            del self._negative[key]
        self._misses += 1
        return True

    def store(
        self, key: bytes, token_digest: bytes, granted: Granted, wall: float, monotonic: float, ttl_s: float,
        generation: int,
    ) -> bool:  # fmt: skip
        """
        Keep a grant for min(its rest, ttl); False if it was revoked meanwhile or has no rest.
        """
        rest = min(granted.exp - wall, ttl_s)
        if generation != self.generation or rest <= 0:
            return False
        if key not in self._entries and len(self._entries) >= self._capacity:
            self._evict()
        end = monotonic + rest
        self._entries[key] = _Entry(granted, token_digest, end)
        self._negative.pop(key, None)
        heappush(self._ends, (end, key))
        if len(self._ends) > 2 * self._capacity + 16:
            self._ends = [(entry.end, one) for one, entry in self._entries.items()]
            heapify(self._ends)
        return True

    def store_inactive(self, key: bytes, monotonic: float, ttl_s: float, generation: int) -> bool:
        """
        Remember for `ttl_s` that a token is inactive; False if nothing was kept.
        """
        if generation != self.generation or ttl_s <= 0:
            return False
        if key not in self._negative and len(self._negative) >= self._negative_capacity:
            # All live equally long, so the oldest ends first.
            del self._negative[next(iter(self._negative))]
        self._negative.pop(key, None)
        self._negative[key] = monotonic + ttl_s
        return True

    def owns(self, token_digest: bytes, certificate: bytes, wall: float) -> bool:
        """
        Whether a token may be used with a certificate: True for its owner and for a token nobody owns.
        """
        owner = self._owners.get(token_digest)
        return owner is None or wall >= owner[1] or owner[0] == certificate

    def bind(self, token_digest: bytes, certificate: bytes, exp: int, wall: float) -> bool:
        """
        Make the certificate the token's owner until `exp`, if it has none; returns `owns`. When the table is full, the
        token that ends first loses its owner.
        """
        owner = self._owners.get(token_digest)
        if owner is not None and wall < owner[1]:
            return owner[0] == certificate
        self._owners.pop(token_digest, None)
        if len(self._owners) >= BINDINGS:
            self._unbind()
        self._owners[token_digest] = (certificate, exp)
        heappush(self._owner_ends, (exp, token_digest))
        if len(self._owner_ends) > 2 * BINDINGS + 16:
            self._owner_ends = [(held[1], one) for one, held in self._owners.items()]
            heapify(self._owner_ends)
        return True

    def drop(self, *, token_digest: bytes = b"", client_id: str = "", everything: bool = False) -> int:
        """
        Forget grants by token, by client, or all; returns how many. Raises the generation.
        """
        self.generation += 1
        doomed = [
            key
            for key, entry in self._entries.items()
            if everything
            or (token_digest and entry.token_digest == token_digest)
            or (client_id and entry.granted.client_id == client_id)
        ]
        for key in doomed:
            del self._entries[key]
        return len(doomed)

    def statistics(self) -> dict[str, int]:
        """Counts since the start, and sizes now."""
        return {
            "entries": len(self._entries), "negative": len(self._negative), "bindings": len(self._owners),
            "hits": self._hits, "negative_hits": self._negative_hits, "misses": self._misses,
            "evictions": self._evictions,
        }  # fmt: skip

    def _evict(self) -> None:
        # Every entry has its end in the queue, so the queue is never empty before one is found.
        while True:
            end, key = heappop(self._ends)
            entry = self._entries.get(key)
            if entry is not None and entry.end == end:
                del self._entries[key]
                self._evictions += 1
                return

    def _unbind(self) -> None:
        while True:
            exp, token_digest = heappop(self._owner_ends)
            owner = self._owners.get(token_digest)
            if owner is not None and owner[1] == exp:
                del self._owners[token_digest]
                return
