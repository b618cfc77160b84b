"""Both twins of the token cache: what is kept, for how long, for whom, and never more than its bounds."""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from clawker_cp._fast.tokencache import TokenCache as Fast
from clawker_cp._pure.tokencache import BINDINGS
from clawker_cp._pure.tokencache import TokenCache as Pure
from clawker_cp.accel import Granted

CERTIFICATE, OTHER = b"\x01" * 32, b"\x02" * 32
GRANT = Granted("clawker-cli", "admin", 1000)


@pytest.fixture(params=[Pure, Fast], ids=["pure", "fast"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def store(cache: Any, token: bytes, grant: Granted = GRANT, *, at: float = 0.0, ttl: float = 10.0) -> bytes:
    key: bytes = cache.key(CERTIFICATE, token)
    cache.store(key, digest(token), grant, at, at, ttl, cache.generation)
    return key


def test_the_key_binds_token_and_certificate(kind: Any) -> None:
    """It is the digest of the contract; another certificate or token has another key."""
    assert kind.key(CERTIFICATE, b"t") == hashlib.sha256(b"\x01" + CERTIFICATE + b"t").digest()
    assert len({kind.key(CERTIFICATE, b"t"), kind.key(OTHER, b"t"), kind.key(CERTIFICATE, b"u")}) == 3


def test_what_is_presented_is_found_by_its_key(kind: Any) -> None:
    """`find` is `lookup` of the key: a grant, nothing for another certificate, an error for what is no text."""
    cache = kind()
    token = "a.b-c" * 200
    store(cache, token.encode())
    assert cache.find(CERTIFICATE, token, 0.0, 0.0) is GRANT
    assert cache.find(OTHER, token, 0.0, 0.0) is True and cache.find(CERTIFICATE, token + "x", 0.0, 0.0) is True
    with pytest.raises(UnicodeEncodeError):
        cache.find(CERTIFICATE, "\ud800", 0.0, 0.0)


def test_a_grant_is_found_until_its_time_is_over(kind: Any) -> None:
    """The entry's end counts on the monotonic clock and the token's on the wall clock, at every hit."""
    cache = kind()
    key = store(cache, b"t", ttl=10.0)
    assert cache.lookup(key, 0.0, 9.9) is GRANT
    assert cache.lookup(key, 0.0, 10.0) is True
    key = store(cache, b"t")
    assert cache.lookup(key, 999.9, 1.0) is GRANT
    assert cache.lookup(key, 1000.0, 1.0) is True
    assert cache.lookup(key, 0.0, 1.0) is True  # a wall clock set back does not revive it


def test_owners_are_bounded_and_the_one_that_ends_first_goes(kind: Any) -> None:
    """Ten thousand tokens later the table is full, the last ones have owners, and ended ones are given away."""
    cache = kind()
    for number in range(10_000):
        assert cache.bind(digest(b"%d" % number), CERTIFICATE, 1000 + number, 0.0)
    assert cache.statistics()["bindings"] == 4096
    assert cache.owns(digest(b"5000"), OTHER, 0.0)
    assert not cache.owns(digest(b"5904"), OTHER, 0.0) and not cache.bind(digest(b"9999"), OTHER, 9, 0.0)
    assert cache.bind(digest(b"9999"), OTHER, 30_000, 10_999.0)
    assert not cache.owns(digest(b"9999"), CERTIFICATE, 10_999.0)


def test_an_owner_of_a_renewed_token_keeps_it_for_the_new_time(kind: Any) -> None:
    """The end that a token had with an earlier owner counts for nothing when the table is full."""
    cache = kind()
    cache.bind(digest(b"renewed"), CERTIFICATE, 10, 0.0)
    cache.bind(digest(b"renewed"), OTHER, 10_000, 11.0)
    for number in range(BINDINGS):
        cache.bind(digest(b"%d" % number), CERTIFICATE, 1000 + number, 11.0)
    assert not cache.owns(digest(b"renewed"), CERTIFICATE, 12.0)
    assert cache.owns(digest(b"0"), OTHER, 12.0) and not cache.owns(digest(b"1"), OTHER, 12.0)


def test_owners_that_come_and_go_leave_nothing_behind(kind: Any) -> None:
    """The same few tokens bound again and again after their end take no more room."""
    cache = kind()
    for number in range(30_000):
        assert cache.bind(digest(b"%d" % (number % 5)), CERTIFICATE, number + 1, float(number))
    assert cache.statistics()["bindings"] == 5


def test_no_grant_outlives_its_token(kind: Any) -> None:
    """The rest of the token's life bounds the entry; one without a rest is not kept."""
    cache = kind()
    key = cache.key(CERTIFICATE, b"t")
    assert cache.store(key, digest(b"t"), GRANT, 997.0, 0.0, 10.0, cache.generation)
    assert cache.lookup(key, 998.0, 2.9) is GRANT
    assert cache.lookup(key, 998.0, 3.0) is True
    assert not cache.store(key, digest(b"t"), GRANT, 1000.0, 0.0, 10.0, cache.generation)
    assert not cache.store(key, digest(b"t"), GRANT, 0.0, 0.0, 0.0, cache.generation)


def test_an_inactive_token_is_refused_for_its_time(kind: Any) -> None:
    """A negative answer ends by itself, and a grant replaces it."""
    cache = kind()
    key = cache.key(CERTIFICATE, b"bad")
    assert cache.store_inactive(key, 0.0, 1.0, cache.generation)
    assert cache.lookup(key, 0.0, 0.9) is False
    assert cache.lookup(key, 0.0, 1.0) is True
    cache.store_inactive(key, 1.0, 1.0, cache.generation)
    store(cache, b"bad")
    assert cache.lookup(key, 0.0, 1.5) is GRANT


def test_the_entry_closest_to_its_end_goes_first(kind: Any) -> None:
    """A full cache evicts by end, not by age."""
    cache = kind(2, 2)
    long, short = store(cache, b"long", ttl=100.0), store(cache, b"short", ttl=1.0)
    third = store(cache, b"third", ttl=50.0)
    assert cache.lookup(long, 0.0, 0.5) is GRANT and cache.lookup(third, 0.0, 0.5) is GRANT
    assert cache.lookup(short, 0.0, 0.5) is True
    assert cache.statistics()["evictions"] == 1


def test_an_entry_stored_again_counts_by_its_new_end(kind: Any) -> None:
    """The end that an entry had before it was stored anew makes nobody go."""
    cache = kind(capacity=2)
    first = store(cache, b"first", ttl=1.0)
    store(cache, b"first", ttl=9.0)
    second = store(cache, b"second", ttl=5.0)
    third = store(cache, b"third", ttl=7.0)
    assert [cache.lookup(key, 0.0, 0.5) for key in (first, second, third)] == [GRANT, True, GRANT]


def test_thousands_of_bad_tokens_do_not_grow_it(kind: Any) -> None:
    """Negative results have a table of their own with a bound, and push no grant out."""
    cache = kind()
    good = store(cache, b"good", ttl=100.0)
    for number in range(10_000):
        key = cache.key(CERTIFICATE, str(number).encode())
        assert cache.lookup(key, 0.0, 0.0) is True
        cache.store_inactive(key, 0.0, 1.0, cache.generation)
    assert cache.statistics()["negative"] == 1024
    assert cache.lookup(good, 0.0, 0.0) is GRANT


def test_storing_again_does_not_grow_the_queue_of_ends(kind: Any) -> None:
    """Ten thousand refreshes of one token keep one entry, and eviction still finds the right one."""
    cache = kind(2, 2)
    other = store(cache, b"other", ttl=5.0)
    for number in range(10_000):
        key = store(cache, b"one", ttl=10.0 + number % 7)
    store(cache, b"two", ttl=50.0)
    assert cache.statistics()["entries"] == 2
    assert cache.lookup(other, 0.0, 0.0) is True and cache.lookup(key, 0.0, 0.0) is GRANT


def test_a_token_belongs_to_the_first_certificate(kind: Any) -> None:
    """Another certificate is refused until the token's end; then the token is anybody's."""
    cache = kind()
    token = digest(b"t")
    assert cache.owns(token, OTHER, 0.0)
    assert cache.bind(token, CERTIFICATE, 1000, 0.0) and cache.bind(token, CERTIFICATE, 1000, 1.0)
    assert not cache.bind(token, OTHER, 1000, 1.0) and not cache.owns(token, OTHER, 999.0)
    assert cache.owns(token, CERTIFICATE, 1.0)
    assert cache.bind(token, OTHER, 2000, 1000.0)


def test_bindings_are_bounded(kind: Any) -> None:
    """Beyond 4,096 the one that ends first goes."""
    cache = kind()
    for number in range(4097):
        cache.bind(digest(str(number).encode()), CERTIFICATE, 10_000 - number, 0.0)
    assert cache.statistics()["bindings"] == 4096
    assert cache.owns(digest(b"4095"), OTHER, 0.0)
    assert not cache.owns(digest(b"0"), OTHER, 0.0)


def test_revoking_drops_what_it_names_and_what_is_on_its_way(kind: Any) -> None:
    """By token, by client, all; an answer asked for before the revocation is not stored after it."""
    cache = kind()
    asked = cache.generation
    keys = [store(cache, b"a"), store(cache, b"b"), store(cache, b"c", Granted("clawker-agent", "x", 1000))]
    assert cache.drop(token_digest=digest(b"a")) == 1
    assert [cache.lookup(key, 0.0, 0.0) is True for key in keys] == [True, False, False]
    assert cache.drop(client_id="clawker-agent") == 1
    assert cache.drop(client_id="nobody") == 0
    assert not cache.store(keys[0], digest(b"a"), GRANT, 0.0, 0.0, 10.0, asked)
    assert not cache.store_inactive(keys[0], 0.0, 10.0, asked)
    assert cache.drop(everything=True) == 1
    assert cache.statistics()["entries"] == 0


def test_no_token_is_kept(kind: Any) -> None:
    """Neither the token nor its certificate is reachable from the cache."""
    cache = kind()
    token = b"a-very-secret-token-0123456789"
    store(cache, token)
    cache.bind(digest(token), CERTIFICATE, 1000, 0.0)
    reachable = [cache]
    seen = set()
    while reachable:
        item = reachable.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        assert not (isinstance(item, bytes) and token in item)
        reachable += gc.get_referents(item) if not hasattr(item, "__globals__") else []


class Twins(RuleBasedStateMachine):
    """The compiled cache and its twin, told the same things."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.pure = Fast(3, 2), Pure(3, 2)
        self.now = 0.0

    tokens = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])

    @rule(token=tokens, ttl=st.integers(0, 5), exp=st.integers(0, 20), client=st.sampled_from(["x", "y"]))
    def keep(self, token: bytes, ttl: int, exp: int, client: str) -> None:
        grant = Granted(client, "s", exp)
        arguments = (self.fast.key(CERTIFICATE, token), digest(token), grant, self.now, self.now, float(ttl))
        assert self.fast.store(*arguments, self.fast.generation) == self.pure.store(*arguments, self.pure.generation)

    @rule(token=tokens, ttl=st.integers(0, 5))
    def keep_inactive(self, token: bytes, ttl: int) -> None:
        key = self.fast.key(CERTIFICATE, token)
        fast = self.fast.store_inactive(key, self.now, float(ttl), self.fast.generation)
        assert fast == self.pure.store_inactive(key, self.now, float(ttl), self.pure.generation)

    @rule(token=tokens)
    def look(self, token: bytes) -> None:
        key = self.fast.key(CERTIFICATE, token)
        assert self.fast.lookup(key, self.now, self.now) == self.pure.lookup(key, self.now, self.now)
        presented = (CERTIFICATE, token.decode(), self.now, self.now)
        assert self.fast.find(*presented) == self.pure.find(*presented)

    @rule(token=tokens, certificate=st.sampled_from([CERTIFICATE, OTHER]), exp=st.integers(0, 20))
    def bind(self, token: bytes, certificate: bytes, exp: int) -> None:
        arguments = (digest(token), certificate, exp, self.now)
        assert self.fast.bind(*arguments) == self.pure.bind(*arguments)
        assert self.fast.owns(digest(token), OTHER, self.now) == self.pure.owns(digest(token), OTHER, self.now)

    @rule(token=tokens, client=st.sampled_from(["", "x"]))
    def revoke(self, token: bytes, client: str) -> None:
        what: dict[str, Any] = {"client_id": client} if client else {"token_digest": digest(token)}
        assert self.fast.drop(**what) == self.pure.drop(**what)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def compare(self) -> None:
        assert self.fast.statistics() == self.pure.statistics()
        assert self.fast.generation == self.pure.generation


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
