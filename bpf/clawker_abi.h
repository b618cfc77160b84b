/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * clawker_abi.h - every structure and number shared by the BPF programs, the C shim and Cython.
 *
 * Included by the BPF sources (after the kernel types), by src/clawker_cp/_fast/bpf_shim.c and, through
 * `cdef extern`, by the Cython modules. No other file repeats a layout. Addresses are 16 bytes in
 * network order, IPv4 in its mapped form (::ffff:a.b.c.d), so that one map serves both families.
 * Ports are host order unless the name says `_be`. Times are CLOCK_MONOTONIC nanoseconds.
 *
 * Examples: 203.0.113.7 is 00*10 ff ff cb 00 71 07; "policy 3, identity 257, port 22, tcp" is
 * {gen, 3, 257, 22, 6, 0}.
 */
#ifndef CLAWKER_ABI_H
#define CLAWKER_ABI_H

#ifndef CLAWKER_BPF /* userspace: the kernel's own fixed-width types */
#include <linux/types.h>
#include <assert.h>
#endif

#define CLAWKER_ABI_VERSION 1

#define CLAWKER_ASSERT_SIZE(t, n) _Static_assert(sizeof(t) == (n), #t " layout changed")

/* Route identities: what a destination name is called in the kernel. 256 and up: allocated. */
enum clawker_identity {
	CLAWKER_ID_NONE = 0,	  /* no name known */
	CLAWKER_ID_CATCH_ALL = 1, /* route rows: any address, port named by an HTTP-family rule (R11) */
	CLAWKER_ID_HTTP = 2,	  /* every name that only has HTTP-family rules (R8) */
	CLAWKER_ID_BYPASS = 3,	  /* a name answered only because a bypass or learning was on */
	CLAWKER_ID_HTTP_TCP = 4,  /* like 2, for names that have no HTTP/3: TCP rows only */
	CLAWKER_ID_FIRST = 256,
};

/* container_map.flags */
enum clawker_config_flag {
	CLAWKER_F_QUARANTINE = 1u << 0, /* only own loopback, the gate, the agent-side tuples (R16) */
	CLAWKER_F_LEARN = 1u << 1,	/* let pass and record, R12 still holds (R38) */
	CLAWKER_F_IPV6 = 1u << 2,	/* the agents' network routes IPv6 */
	CLAWKER_F_HOST_PROXY = 1u << 3, /* host proxy tuple is valid */
};

/* What a route or span does. */
enum clawker_action {
	CLAWKER_ACT_DENY = 0,  /* rule_deny */
	CLAWKER_ACT_PROXY = 1, /* redirect to proxy_port on the proxy address */
	CLAWKER_ACT_PASS = 2,  /* straight through (CIDR rules) */
};

enum clawker_verdict {
	CLAWKER_V_NONE = 0,
	CLAWKER_V_ALLOWED = 1,
	CLAWKER_V_DENIED = 2,
	CLAWKER_V_BYPASSED = 3,
	CLAWKER_V_REDIRECTED = 4,
};

/* Why. Append-only; the names (lower case, without the prefix) are the wire contract's reasons. */
enum clawker_reason {
	CLAWKER_R_NONE = 0,
	/* denied */
	CLAWKER_R_NOT_ENROLLED = 1,
	CLAWKER_R_QUARANTINED = 2,
	CLAWKER_R_ENGINE_RESOLVER = 3,
	CLAWKER_R_NO_ROUTE = 4,
	CLAWKER_R_RULE_DENY = 5,
	CLAWKER_R_ROUTE_EXPIRED = 6,
	CLAWKER_R_FAMILY = 7,
	CLAWKER_R_PROTOCOL = 8,
	CLAWKER_R_IPV6_UNROUTED = 9,
	CLAWKER_R_IP_OPTIONS = 10,
	CLAWKER_R_SOCKET_OPTION = 11,
	CLAWKER_R_FRAGMENT = 12,
	CLAWKER_R_INBOUND = 13,
	CLAWKER_R_PROXY_PORT = 14,
	CLAWKER_R_MAP_FULL = 15,
	CLAWKER_R_CONFIG_MISSING = 16, /* not produced: a missing row is not_enrolled */
	CLAWKER_R_MALFORMED = 17,
	/* let through */
	CLAWKER_R_BYPASS = 64,
	CLAWKER_R_DNS = 65,
	CLAWKER_R_LOOPBACK = 66,
	CLAWKER_R_INFRASTRUCTURE = 67,
	CLAWKER_R_ADDRESS_RULE = 68,
	CLAWKER_R_NAME_ROUTE = 69,
	CLAWKER_R_CATCH_ALL = 70,
	CLAWKER_R_LEARN = 71,
	CLAWKER_R_INBOUND_REPLY = 72, /* a connection to a published port, recorded when its SYN came */
};

enum clawker_hook {
	CLAWKER_H_NONE = 0,
	CLAWKER_H_CONNECT4 = 1,
	CLAWKER_H_CONNECT6 = 2,
	CLAWKER_H_SENDMSG4 = 3,
	CLAWKER_H_SENDMSG6 = 4,
	CLAWKER_H_SOCK_CREATE = 5,
	CLAWKER_H_SETSOCKOPT = 6,
	CLAWKER_H_BIND4 = 7, /* unused: a bind decides nothing */
	CLAWKER_H_BIND6 = 8, /* unused */
	CLAWKER_H_EGRESS = 9,
	CLAWKER_H_INGRESS = 10,
};

/* container_map: cgroup id (__u64) -> how its sockets are judged. Written by the manager only. */
struct clawker_config {
	__u32 policy;	       /* policy number, 1.. */
	__u32 flags;	       /* enum clawker_config_flag */
	__u64 bypass_until_ns; /* 0 = none; compared with bpf_ktime_get_ns() */
	__u8 proxy_addr[16];   /* Envoy's listeners */
	__u8 dns_addr[16];     /* DNS gate, port 53 */
	__u8 cp_addr[16];      /* control plane, agent side */
	__u8 host_proxy_addr[16];
	__u16 cp_agent_port;   /* 7444 */
	__u16 cp_token_port;   /* 4444 */
	__u16 cp_health_port;  /* 7080 */
	__u16 host_proxy_port; /* 18374 */
	__u8 host_addr[16];    /* who may reach ports published as `host` (contract 1.3) */
};
CLAWKER_ASSERT_SIZE(struct clawker_config, 104);

/* dns_cache: which names an agent learnt for an address. Plain hash; quota by the gate (R8). */
struct clawker_name_key {
	__u64 cgroup_id;
	__u8 addr[16];
};
CLAWKER_ASSERT_SIZE(struct clawker_name_key, 24);

struct clawker_name_value {
	__u32 identities[4]; /* newest first, 0 = unused */
	__u64 expires_ns;    /* for new flows */
	__u32 source;	     /* 1 = rule seed (outranks), 2 = DNS */
	__u32 pad;
};
CLAWKER_ASSERT_SIZE(struct clawker_name_value, 32);

/* route_map */
struct clawker_route_key {
	__u32 generation;
	__u32 policy;
	__u32 identity;
	__u16 port;
	__u8 l4; /* IPPROTO_TCP 6, IPPROTO_UDP 17 */
	__u8 pad;
};
CLAWKER_ASSERT_SIZE(struct clawker_route_key, 16);

struct clawker_route_value {
	__u8 action; /* enum clawker_action */
	__u8 pad;
	__u16 proxy_port;
	__u32 rule;	   /* index of the rule in the plan's rule list, for the record */
	__u64 deadline_ns; /* 0 = none; later: route_expired */
};
CLAWKER_ASSERT_SIZE(struct clawker_route_value, 16);

/*
 * cidr_map: LPM trie; `prefixlen` counts from generation on: 72 + mapped prefix length. The family
 * is part of the key: ::/0 is a prefix of every mapped IPv4 address, and must not speak for them.
 */
#define CLAWKER_CIDR_IPV6 0x80 /* added to `l4` for IPv6 */
struct clawker_cidr_key {
	__u32 prefixlen;
	__u8 generation_be[4];
	__u8 policy_be[4];
	__u8 l4;
	__u8 addr[16];
	__u8 pad[3];
};
CLAWKER_ASSERT_SIZE(struct clawker_cidr_key, 32);

#define CLAWKER_SPANS 16
struct clawker_span {
	__u16 low; /* low > high: unused, ends the list */
	__u16 high;
	__u8 action;
	__u8 pad;
	__u16 proxy_port;
	__u32 rule;
	__u32 pad2;
	__u64 deadline_ns;
};
CLAWKER_ASSERT_SIZE(struct clawker_span, 24);

struct clawker_cidr_value {
	struct clawker_span spans[CLAWKER_SPANS];
};
CLAWKER_ASSERT_SIZE(struct clawker_cidr_value, 384);

/* proxy_port_map: proxy ports that a policy's packets may go to (packet backstop). Value: __u32 1. */
struct clawker_proxy_port_key {
	__u32 generation;
	__u32 policy;
	__u16 port;
	__u8 l4;
	__u8 pad;
};
CLAWKER_ASSERT_SIZE(struct clawker_proxy_port_key, 12);

/* reserved_map: LPM trie over addresses that no rule, bypass or learning opens (R12). Value __u32. */
struct clawker_reserved_key {
	__u32 prefixlen; /* of the 16-byte form: 96 + n for IPv4 */
	__u8 addr[16];
};
CLAWKER_ASSERT_SIZE(struct clawker_reserved_key, 20);

/* inbound_map: published ports. Value: enum clawker_inbound_from as __u32. */
struct clawker_inbound_key {
	__u64 cgroup_id;
	__u16 port;
	__u8 pad[6];
};
CLAWKER_ASSERT_SIZE(struct clawker_inbound_key, 16);

enum clawker_inbound_from {
	CLAWKER_IN_NONE = 0,
	CLAWKER_IN_HOST = 1, /* config.host_addr only */
	CLAWKER_IN_ANY = 2,
	CLAWKER_IN_CP = 3, /* config.cp_addr only (agent daemon, 7700) */
};

/* inbound_flow: LRU; created by an admitted ingress SYN, consulted by egress (R9). Value: ktime ns. */
struct clawker_flow_key {
	__u64 cgroup_id;
	__u8 remote[16];
	__u16 remote_port;
	__u16 local_port;
	__u8 l4;
	__u8 pad[3];
};
CLAWKER_ASSERT_SIZE(struct clawker_flow_key, 32);

/*
 * flow_map: per-socket storage of what the application asked for. `peer` is the destination of a
 * redirected connect(), for getpeername. `nat` translates the source of UDP replies back; a socket
 * that talks to more than CLAWKER_NAT redirected destinations at once forgets the oldest.
 */
#define CLAWKER_NAT 8
struct clawker_endpoint {
	__u8 addr[16];
	__u16 port;  /* 0 = unused */
	__u8 reason; /* in `asked`: why datagrams there may go, so that only the first is recorded */
	__u8 pad;
	__u16 policy; /* in `peer`: the policy that redirected the connection, 0 = none did */
	__u8 pad2[2];
};
CLAWKER_ASSERT_SIZE(struct clawker_endpoint, 24);

struct clawker_nat {
	struct clawker_endpoint real;  /* where the packet goes */
	struct clawker_endpoint asked; /* what the application named */
};
CLAWKER_ASSERT_SIZE(struct clawker_nat, 48);

struct clawker_socket {
	struct clawker_endpoint peer;
	struct clawker_nat nat[CLAWKER_NAT];
	__u32 next;
	__u32 drops;	/* bit per denied reason below 32 that was recorded since `drops_ns` */
	__u64 drops_ns; /* the packet backstop records a reason once a second and socket */
};
CLAWKER_ASSERT_SIZE(struct clawker_socket, 424);

/*
 * error_map: where a helper failed, by errno: row = site * CLAWKER_ERRNOS + errno (0 = the helper
 * gives none, 159 = a larger one). Append-only.
 */
#define CLAWKER_ERRNOS 160
enum clawker_site {
	CLAWKER_S_RING = 0,	    /* no room for a record: a gap in the agent's sequence */
	CLAWKER_S_METRIC = 1,	    /* no room for a counter, not even the overflow row */
	CLAWKER_S_STORAGE = 2,	    /* no memory for a socket's storage: refused `map_full` */
	CLAWKER_S_INBOUND_FLOW = 3, /* an admitted SYN could not be remembered: dropped */
	CLAWKER_S_STATE = 4,	    /* no state row, not even that of nobody */
	CLAWKER_S_PACKET = 5,	    /* unused */
	CLAWKER_SITES = 8,
};
#define CLAWKER_ERROR_ROWS (CLAWKER_SITES * CLAWKER_ERRNOS)

/* state_map: cgroup id -> running counters of an agent. Created by the manager, written by programs. */
enum clawker_budget { CLAWKER_B_DENY = 0, CLAWKER_B_BYPASS = 1, CLAWKER_B_ALLOW = 2, CLAWKER_BUDGETS = 3 };
struct clawker_state {
	__u64 sequence;			   /* last number given, recorded or suppressed */
	__u64 window_ns[CLAWKER_BUDGETS];  /* start of the current one-second window */
	__u64 used[CLAWKER_BUDGETS];	   /* records in the window */
	__u64 suppressed[CLAWKER_BUDGETS]; /* in all: counted, not recorded */
	__u64 metric_rows;		   /* rows of metrics_map this agent has made */
	__u64 uncounted;		   /* decisions no row of metrics_map had room for */
};
CLAWKER_ASSERT_SIZE(struct clawker_state, 96);

/*
 * metrics_map: per-CPU hash, value __u64 decisions. An agent makes at most CLAWKER_METRIC_ROWS rows;
 * what would need another is counted in {cgroup, 0, 0, verdict, reason}. Cgroup 0: the not enrolled.
 */
#define CLAWKER_METRIC_ROWS 256
struct clawker_metric_key {
	__u64 cgroup_id;
	__u32 identity;
	__u16 port_bucket; /* the port if below 1024 or routed, else 0 */
	__u8 verdict;
	__u8 reason;
};
CLAWKER_ASSERT_SIZE(struct clawker_metric_key, 16);

/* control: array of one. */
struct clawker_control {
	__u32 abi;		       /* CLAWKER_ABI_VERSION */
	__u32 generation;	       /* of route_map, cidr_map, proxy_port_map */
	__u32 enforce;		       /* 1 = agents' parent cgroup denies what is not enrolled */
	__u32 budget[CLAWKER_BUDGETS]; /* records a second and agent; 0 = default */
	__u32 wakeup;		       /* 0 = no wake-up (poller), 1 = adaptive */
	__u32 pad;
};
CLAWKER_ASSERT_SIZE(struct clawker_control, 32);

/* event.flags */
enum clawker_event_flag {
	CLAWKER_EF_NO_DESTINATION = 1u << 0,
	CLAWKER_EF_V4_MAPPED = 1u << 1, /* an IPv6 socket that named an IPv4 address */
};

/* Ring buffer record. */
struct clawker_event {
	__u64 ktime_ns;
	__u64 cgroup_id;
	__u64 sequence; /* of this agent, from 1; a gap is records suppressed or lost */
	__u64 cookie;	/* socket cookie, 0 = not available */
	__u8 addr[16];	/* destination as the application gave it; inbound: the remote address */
	__u32 identity;
	__u32 policy;
	__u32 rule; /* index, 0xffffffff = none */
	__u32 uid;
	__u32 pid;
	__u16 port;	  /* of the destination; inbound: the agent's; setsockopt: the option's name */
	__u16 proxy_port; /* 0 = not redirected; inbound: the remote port; setsockopt: the option's level */
	__u8 verdict;
	__u8 reason;
	__u8 hook;
	__u8 family;   /* AF_INET, AF_INET6, ... as the application gave it */
	__u8 protocol; /* IPPROTO_*, 255 = other */
	__u8 type;     /* SOCK_STREAM 1, SOCK_DGRAM 2, SOCK_RAW 3 */
	__u8 flags;    /* enum clawker_event_flag */
	__u8 pad[9];
};
CLAWKER_ASSERT_SIZE(struct clawker_event, 88);

#define CLAWKER_NO_RULE 0xffffffffu

#endif
