# cython: language_level=3str
"""
Rows of the maps as bytes, and back: `pack_*` and `unpack_*` take the layout from the ABI header.

Nothing is laid out in Python. Addresses are 16 bytes in network order, IPv4 mapped; ports are in host order.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from clawker_cp._fast cimport abi

ABI_VERSION = abi.CLAWKER_ABI_VERSION
SPANS = abi.CLAWKER_SPANS
MAPPED = bytes(10) + b"\xff\xff"  # how a mapped IPv4 address begins
EVENT_BYTES = sizeof(abi.clawker_event)


cdef int copy16(uint8_t *to, bytes source) except -1:
    if len(source) != 16:
        raise ValueError("an address has 16 bytes")
    memcpy(to, PyBytes_AS_STRING(source), 16)
    return 0


SIZES = {
    "container_map": (8, sizeof(abi.clawker_config)),
    "dns_cache": (sizeof(abi.clawker_name_key), sizeof(abi.clawker_name_value)),
    "route_map": (sizeof(abi.clawker_route_key), sizeof(abi.clawker_route_value)),
    "cidr_map": (sizeof(abi.clawker_cidr_key), sizeof(abi.clawker_cidr_value)),
    "proxy_port_map": (sizeof(abi.clawker_proxy_port_key), 4),
    "reserved_map": (sizeof(abi.clawker_reserved_key), 4),
    "inbound_map": (sizeof(abi.clawker_inbound_key), 4),
    "state_map": (8, sizeof(abi.clawker_state)),
    "metrics_map": (sizeof(abi.clawker_metric_key), 8),
    "error_map": (4, 8),
    "control": (4, sizeof(abi.clawker_control)),
    "events": (0, 0),
}


def pack_config(unsigned int policy, unsigned int flags, unsigned long long bypass_until_ns, bytes proxy, bytes dns,
                bytes cp, bytes host_proxy, unsigned short cp_agent_port, unsigned short cp_token_port,
                unsigned short cp_health_port, unsigned short host_proxy_port, bytes host) -> bytes:
    cdef abi.clawker_config c
    memset(&c, 0, sizeof(c))
    c.policy, c.flags, c.bypass_until_ns = policy, flags, bypass_until_ns
    copy16(c.proxy_addr, proxy)
    copy16(c.dns_addr, dns)
    copy16(c.cp_addr, cp)
    copy16(c.host_proxy_addr, host_proxy)
    copy16(c.host_addr, host)
    c.cp_agent_port, c.cp_token_port, c.cp_health_port = cp_agent_port, cp_token_port, cp_health_port
    c.host_proxy_port = host_proxy_port
    return PyBytes_FromStringAndSize(<char *>&c, sizeof(c))


def unpack_config(bytes row) -> dict:
    cdef abi.clawker_config c
    if len(row) != sizeof(c):
        raise ValueError("container_map: wrong size")
    memcpy(&c, PyBytes_AS_STRING(row), sizeof(c))
    return {
        "policy": c.policy, "flags": c.flags, "bypass_until_ns": c.bypass_until_ns,
        "proxy_addr": <bytes>c.proxy_addr[:16], "dns_addr": <bytes>c.dns_addr[:16], "cp_addr": <bytes>c.cp_addr[:16],
        "host_proxy_addr": <bytes>c.host_proxy_addr[:16], "host_addr": <bytes>c.host_addr[:16],
        "cp_agent_port": c.cp_agent_port, "cp_token_port": c.cp_token_port, "cp_health_port": c.cp_health_port,
        "host_proxy_port": c.host_proxy_port,
    }


def pack_name(unsigned long long cgroup_id, bytes addr, tuple identities, unsigned long long expires_ns,
              unsigned int source) -> tuple:
    cdef abi.clawker_name_key k
    cdef abi.clawker_name_value v
    cdef int i
    memset(&k, 0, sizeof(k))
    memset(&v, 0, sizeof(v))
    k.cgroup_id = cgroup_id
    copy16(k.addr, addr)
    for i in range(min(4, len(identities))):
        v.identities[i] = identities[i]
    v.expires_ns, v.source = expires_ns, source
    return PyBytes_FromStringAndSize(<char *>&k, sizeof(k)), PyBytes_FromStringAndSize(<char *>&v, sizeof(v))


def unpack_name(bytes key, bytes value) -> tuple:
    """(cgroup id, address, identities, expires_ns, source)"""
    cdef abi.clawker_name_key k
    cdef abi.clawker_name_value v
    if len(key) != sizeof(k) or len(value) != sizeof(v):
        raise ValueError("dns_cache: wrong size")
    memcpy(&k, PyBytes_AS_STRING(key), sizeof(k))
    memcpy(&v, PyBytes_AS_STRING(value), sizeof(v))
    return k.cgroup_id, <bytes>k.addr[:16], tuple([v.identities[i] for i in range(4) if v.identities[i]]), v.expires_ns, v.source


def pack_route_key(unsigned int generation, unsigned int policy, unsigned int identity, unsigned short port,
                   unsigned char l4) -> bytes:
    cdef abi.clawker_route_key k
    memset(&k, 0, sizeof(k))
    k.generation, k.policy, k.identity, k.port, k.l4 = generation, policy, identity, port, l4
    return PyBytes_FromStringAndSize(<char *>&k, sizeof(k))


def unpack_route_key(bytes key) -> tuple:
    cdef abi.clawker_route_key k
    memcpy(&k, PyBytes_AS_STRING(key), sizeof(k))
    return k.generation, k.policy, k.identity, k.port, k.l4


def pack_route_value(unsigned char action, unsigned short proxy_port, unsigned int rule,
                     unsigned long long deadline_ns) -> bytes:
    cdef abi.clawker_route_value v
    memset(&v, 0, sizeof(v))
    v.action, v.proxy_port, v.rule, v.deadline_ns = action, proxy_port, rule, deadline_ns
    return PyBytes_FromStringAndSize(<char *>&v, sizeof(v))


def unpack_route_value(bytes value) -> tuple:
    cdef abi.clawker_route_value v
    memcpy(&v, PyBytes_AS_STRING(value), sizeof(v))
    return v.action, v.proxy_port, v.rule, v.deadline_ns


def pack_cidr_key(unsigned int generation, unsigned int policy, unsigned char l4, bytes addr,
                  unsigned int prefixlen) -> bytes:
    """`prefixlen` counts the bits of the 16-byte address; a prefix of IPv6 never covers mapped IPv4."""
    cdef abi.clawker_cidr_key k
    cdef bint ipv4 = prefixlen >= 96 and addr[:12] == MAPPED
    memset(&k, 0, sizeof(k))
    k.prefixlen = 72 + prefixlen
    memcpy(k.generation_be, PyBytes_AS_STRING(generation.to_bytes(4, "big")), 4)
    memcpy(k.policy_be, PyBytes_AS_STRING(policy.to_bytes(4, "big")), 4)
    k.l4 = l4 if ipv4 else l4 | abi.CLAWKER_CIDR_IPV6
    copy16(k.addr, addr)
    return PyBytes_FromStringAndSize(<char *>&k, sizeof(k))


def pack_spans(list spans) -> bytes:
    """Spans of (low, high, action, proxy_port, rule, deadline_ns), at most SPANS."""
    cdef abi.clawker_cidr_value v
    cdef int i
    if len(spans) > 16:
        raise ValueError("cidr_map: more than 16 spans")
    memset(&v, 0, sizeof(v))
    for i in range(16):
        v.spans[i].low = 1
    for i, span in enumerate(spans):
        v.spans[i].low, v.spans[i].high, v.spans[i].action = span[0], span[1], span[2]
        v.spans[i].proxy_port, v.spans[i].rule, v.spans[i].deadline_ns = span[3], span[4], span[5]
    return PyBytes_FromStringAndSize(<char *>&v, sizeof(v))


def pack_proxy_port(unsigned int generation, unsigned int policy, unsigned short port, unsigned char l4) -> bytes:
    cdef abi.clawker_proxy_port_key k
    memset(&k, 0, sizeof(k))
    k.generation, k.policy, k.port, k.l4 = generation, policy, port, l4
    return PyBytes_FromStringAndSize(<char *>&k, sizeof(k))


def pack_reserved(bytes addr, unsigned int prefixlen) -> bytes:
    cdef abi.clawker_reserved_key k
    memset(&k, 0, sizeof(k))
    k.prefixlen = prefixlen
    copy16(k.addr, addr)
    return PyBytes_FromStringAndSize(<char *>&k, sizeof(k))


def pack_inbound(unsigned long long cgroup_id, unsigned short port) -> bytes:
    cdef abi.clawker_inbound_key k
    memset(&k, 0, sizeof(k))
    k.cgroup_id, k.port = cgroup_id, port
    return PyBytes_FromStringAndSize(<char *>&k, sizeof(k))


def unpack_inbound(bytes key) -> tuple:
    cdef abi.clawker_inbound_key k
    memcpy(&k, PyBytes_AS_STRING(key), sizeof(k))
    return k.cgroup_id, k.port


def pack_control(unsigned int generation, unsigned int enforce, tuple budget, unsigned int wakeup) -> bytes:
    cdef abi.clawker_control c
    memset(&c, 0, sizeof(c))
    c.abi, c.generation, c.enforce, c.wakeup = abi.CLAWKER_ABI_VERSION, generation, enforce, wakeup
    for i in range(3):
        c.budget[i] = budget[i]
    return PyBytes_FromStringAndSize(<char *>&c, sizeof(c))


def unpack_control(bytes row) -> dict:
    cdef abi.clawker_control c
    memcpy(&c, PyBytes_AS_STRING(row), sizeof(c))
    return {"abi": c.abi, "generation": c.generation, "enforce": c.enforce, "wakeup": c.wakeup,
            "budget": (c.budget[0], c.budget[1], c.budget[2])}


def empty_state() -> bytes:
    return bytes(sizeof(abi.clawker_state))


def unpack_state(bytes row) -> dict:
    cdef abi.clawker_state s
    memcpy(&s, PyBytes_AS_STRING(row), sizeof(s))
    suppressed = s.suppressed[0] + s.suppressed[1] + s.suppressed[2]
    return {"sequence": s.sequence, "suppressed": suppressed, "uncounted": s.uncounted}


def unpack_metric_key(bytes key) -> tuple:
    cdef abi.clawker_metric_key k
    memcpy(&k, PyBytes_AS_STRING(key), sizeof(k))
    return k.cgroup_id, k.identity, k.port_bucket, k.verdict, k.reason
