"""
The compiled policy: plain frozen values that the kernel, the DNS gate and Envoy are driven from.

`compile.py` makes a `Plan` out of rules; `reconcile.py` diffs two plans and applies the
difference. Nothing here does I/O, and equal inputs give equal plans.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field

# Route identities below 256 are shared with bpf/clawker_abi.h (enum clawker_identity).
IDENTITY_NONE = 0
IDENTITY_CATCH_ALL = 1
IDENTITY_HTTP = 2
IDENTITY_BYPASS = 3
IDENTITY_HTTP_TCP = 4  # like IDENTITY_HTTP, for names without HTTP/3 (plain http, passthrough, denied https)
IDENTITY_FIRST = 256

TCP = 6
UDP = 17

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Bounds of contract 7.8 and 8.6; whoever materialises names counts against them.
MAX_CONCRETE_NAMES = 64  # live names of one opaque wildcard rule
MAX_DEEP_SANS = 256  # deeper `*.` certificate names of one inspected wildcard rule


@dataclass(frozen=True, slots=True)
class Topology:
    """
    What the compile has to know of this host; made once by the composition root.

    `reserved` is R12's carve: the agents' subnet, the host's interface addresses and every
    address of contract 1.3. `busy` are proxy ports somebody else holds (R4: free = unallocated
    and bindable).
    """

    reserved: tuple[IPNetwork, ...] = ()
    ipv6: bool = False
    http3: bool = True
    max_policies: int = 1001
    tls_minimal: bool = False  # firewall.tls_auto: minimal
    busy: frozenset[tuple[int, int]] = frozenset()  # (l4, port)


@dataclass(frozen=True, slots=True)
class Materialised:
    """What answers of the gate have called into being for one policy: concrete names, deeper `*.` SANs."""

    names: frozenset[str] = frozenset()
    sans: frozenset[str] = frozenset()


class RouteAction(enum.IntEnum):
    """What a kernel route or span does; equals enum clawker_action."""

    DENY = 0
    PROXY = 1
    PASS = 2


@dataclass(frozen=True, slots=True)
class RouteRow:
    """One row of `route_map` for one policy; `rule` is an index into `Plan.rule_ids`, -1 = none."""

    policy: int
    identity: int
    port: int
    l4: int
    action: RouteAction
    proxy_port: int = 0
    rule: int = -1
    expires_at: float = 0.0  # Unix seconds, 0 = never


@dataclass(frozen=True, slots=True)
class Span:
    """Inclusive destination port range of an address rule."""

    low: int
    high: int
    action: RouteAction
    proxy_port: int = 0
    rule: int = -1
    expires_at: float = 0.0


@dataclass(frozen=True, slots=True)
class CidrRow:
    """One row of `cidr_map`: what every covering prefix says of this one, flattened (R9). At most 16 spans."""

    policy: int
    l4: int
    prefix: IPNetwork
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class ProxyPort:
    """A proxy port that packets of the policy may go to."""

    policy: int
    l4: int
    port: int


@dataclass(frozen=True, slots=True)
class PathEntry:
    """One path rule; `pattern` is a literal prefix or `~` and an RE2 (full match); no methods = all."""

    pattern: str
    allow: bool
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PathPolicy:
    """
    Path entries in the order they are tried (contract 7.7) and what holds when none matches.

    `denied`: the rule is a deny of this kind of request only (reason `rule_deny`); it has no
    entries and `default_allow` is False.
    """

    rule_id: str
    entries: tuple[PathEntry, ...]
    default_allow: bool
    denied: bool = False
    insecure: bool = False  # any issuer is accepted from the origin for this kind of request

    @property
    def reads_paths(self) -> bool:
        """Whether the path has to be looked at (and must be canonical) at all."""
        return bool(self.entries) or not self.default_allow


@dataclass(frozen=True, slots=True)
class HttpOrigin:
    """
    One (name, port) that HTTP-family rules speak for: one virtual host.

    A wildcard means the base and its subtree, except what a more specific entry (origin, denied
    host or passthrough of the same port and `tls`) takes: the exact entry of the base, if there
    is one, owns the apex. `http` judges ordinary requests, `ws` upgrades; None = no such rule (then the other one
    judges ordinary requests, and upgrades are refused, contract 7.7).
    """

    base: str  # lower case, no dots at its ends; or an address as text
    wildcard: bool  # base and its whole subtree
    port: int
    tls: bool  # https, wss
    http: PathPolicy | None
    ws: PathPolicy | None
    insecure: bool = False
    is_address: bool = False
    listen: int = 0  # address rules: own listener; names: 0 = the policy's egress listener


@dataclass(frozen=True, slots=True)
class DeniedHost:
    """
    403 `rule_deny` for a name (`wildcard`: and its subtree) on `ports`; port 0 = every port.

    `tls` says which side: True inspected and passed-through TLS, False plain HTTP, None both. An
    exact entry of the base and the same port and side owns the apex, deeper entries own
    theirs. Below a wildcard passthrough it needs its SNI kept off the passthrough chain.
    """

    base: str
    wildcard: bool
    ports: tuple[int, ...]
    rule_id: str
    tls: bool | None = None


@dataclass(frozen=True, slots=True)
class Passthrough:
    """
    TLS passed on by SNI, unread.

    Origins and denied hosts (`tls` not False) below a wildcard passthrough are more specific:
    their server names must not reach its chain.
    """

    base: str
    wildcard: bool
    port: int
    rule_id: str


@dataclass(frozen=True, slots=True)
class OpaqueTarget:
    """A dedicated listener: bytes to (dst, port). `dst` is a concrete name or an address."""

    dst: str
    l4: int
    port: int
    listen: int
    rule_id: str
    is_address: bool = False


@dataclass(frozen=True, slots=True)
class NameVerdict:
    """
    What the DNS gate does with one question of one policy.

    `identity` is what the kernel rows of the answer carry. `concrete` is set when the name is
    below an opaque wildcard and has no listener yet: `Reconciler.materialise` has to be awaited
    before the answer leaves. `san` likewise asks for an inspection leaf that covers the name.
    `zone` is the wildcard base the name was allowed by ("" = exact): budgets are per wildcard.
    """

    allowed: bool
    reason: str = "answered"
    rule_id: str = ""
    identity: int = IDENTITY_NONE
    allow_private: bool = False
    zone: str = ""
    concrete: bool = False
    san: str = ""


@dataclass(frozen=True, slots=True)
class NameClass:
    """
    What all names of one kind have in common for the gate: an exact base, or everything below a base.

    `wildcard_opaque`: an opaque wildcard speaks for a port of it, so every name needs listeners of
    its own. `inspected`: TLS of it is ended here, so the leaf must cover the name.
    """

    allowed: bool
    reason: str = "answered"
    rule_id: str = ""
    identity: int = IDENTITY_NONE
    allow_private: bool = False
    zone: str = ""
    wildcard_opaque: bool = False
    inspected: bool = False


@dataclass(frozen=True, slots=True)
class Policy:
    """Everything compiled for one policy number. `names` answers for the DNS gate."""

    id: int
    key: str  # scope that names it: "global", "project:p", "agent:p/a"
    learn: bool = False
    egress_port: int = 0  # TCP; the QUIC listener has the same number on UDP
    origins: tuple[HttpOrigin, ...] = ()
    denied_hosts: tuple[DeniedHost, ...] = ()
    passthrough: tuple[Passthrough, ...] = ()
    opaque: tuple[OpaqueTarget, ...] = ()
    sans: tuple[str, ...] = ()  # DNS names (exact and `*.`) that inspection leaves must hold
    http_ports: frozenset[int] = frozenset()
    rule_ids: tuple[str, ...] = ()  # effective rules, most specific first
    exact: Mapping[str, NameClass] = field(default_factory=dict, hash=False)  # input of names.NameTable
    below: Mapping[str, NameClass] = field(default_factory=dict, hash=False)  # base -> its subtree, apex excluded
    concrete: Mapping[str, int] = field(default_factory=dict, hash=False)  # live name -> identity


@dataclass(frozen=True, slots=True)
class Plan:
    """
    The whole policy of this host.

    `agents` maps an agent scope key ("agent:p/a") to its policy number; an agent without an
    entry has policy 1 (global rules only). `rules` are the rule ids that kernel rows index.
    """

    policies: Mapping[int, Policy]
    agents: Mapping[str, int]
    routes: frozenset[RouteRow]
    cidrs: Mapping[tuple[int, int, IPNetwork], CidrRow]
    proxy_ports: frozenset[ProxyPort]
    rule_ids: tuple[str, ...]
    warnings: tuple[str, ...] = ()
