# What of bpf/clawker_abi.h Cython reads and writes; layouts come from the header itself.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t


cdef extern from "clawker_abi.h" nogil:
    const unsigned int CLAWKER_ABI_VERSION
    const unsigned int CLAWKER_SPANS
    const unsigned int CLAWKER_CIDR_IPV6
    const unsigned int CLAWKER_SITES

    struct clawker_config:
        uint32_t policy, flags
        uint64_t bypass_until_ns
        uint8_t proxy_addr[16]
        uint8_t dns_addr[16]
        uint8_t cp_addr[16]
        uint8_t host_proxy_addr[16]
        uint16_t cp_agent_port, cp_token_port, cp_health_port, host_proxy_port
        uint8_t host_addr[16]

    struct clawker_name_key:
        uint64_t cgroup_id
        uint8_t addr[16]

    struct clawker_name_value:
        uint32_t identities[4]
        uint64_t expires_ns
        uint32_t source

    struct clawker_route_key:
        uint32_t generation, policy, identity
        uint16_t port
        uint8_t l4

    struct clawker_route_value:
        uint8_t action
        uint16_t proxy_port
        uint32_t rule
        uint64_t deadline_ns

    struct clawker_cidr_key:
        uint32_t prefixlen
        uint8_t generation_be[4]
        uint8_t policy_be[4]
        uint8_t l4
        uint8_t addr[16]

    struct clawker_span:
        uint16_t low, high
        uint8_t action
        uint16_t proxy_port
        uint32_t rule
        uint64_t deadline_ns

    struct clawker_cidr_value:
        clawker_span spans[16]

    struct clawker_proxy_port_key:
        uint32_t generation, policy
        uint16_t port
        uint8_t l4

    struct clawker_reserved_key:
        uint32_t prefixlen
        uint8_t addr[16]

    struct clawker_inbound_key:
        uint64_t cgroup_id
        uint16_t port

    struct clawker_state:
        uint64_t sequence
        uint64_t suppressed[3]
        uint64_t uncounted

    struct clawker_metric_key:
        uint64_t cgroup_id
        uint32_t identity
        uint16_t port_bucket
        uint8_t verdict, reason

    struct clawker_control:
        uint32_t abi, generation, enforce
        uint32_t budget[3]
        uint32_t wakeup

    struct clawker_event:
        uint64_t ktime_ns, cgroup_id, sequence, cookie
        uint8_t addr[16]
        uint32_t identity, policy, rule, uid, pid
        uint16_t port, proxy_port
        uint8_t verdict, reason, hook, family, protocol, type, flags
