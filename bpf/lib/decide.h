/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * decide.h - may this agent open this flow? Plain values in, one decision out; never sees a ctx.
 *
 * The order is the policy (docs/bpf.md, "Decision order"). Everything unknown ends in a denial
 * with a reason (I1); addresses in `reserved_map` are out of reach of rules, bypass and learning
 * (R12) and are therefore judged before any of them.
 */
#ifndef CLAWKER_DECIDE_H
#define CLAWKER_DECIDE_H

#include "../maps.h"

#define CLAWKER_ADDR_BITS 128
#define CLAWKER_CIDR_HEAD_BITS 72 /* generation, policy, protocol */
#define CLAWKER_EGRESS_GLOBAL 10000
#define CLAWKER_EGRESS_FIRST 12000
#define CLAWKER_EGRESS_LAST 12999
#define CLAWKER_DNS_PORT 53

struct clawker_want {
	__u8 addr[16]; /* network order, IPv4 mapped */
	__u16 port;
	__u8 l4;
	__u8 pad[5];
};

struct clawker_decision {
	__u32 identity;
	__u32 rule;
	__u16 proxy_port; /* not 0: redirect there */
	__u8 verdict;
	__u8 reason;
	__u8 to_gate; /* the redirect goes to the DNS gate, not to the proxy */
	__u8 pad[3];
};

static __always_inline bool addr_equal(const __u8 *a, const __u8 *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

static __always_inline bool addr_is_v4(const __u8 *a)
{
	const __u32 *w = (const __u32 *)a;

	return w[0] == 0 && w[1] == 0 && w[2] == bpf_htonl(0xffff);
}

/* 127.0.0.0/8, 0.0.0.0 and ::1, :: (which Linux delivers locally). */
static __always_inline bool addr_is_loopback(const __u8 *a)
{
	const __u32 *w = (const __u32 *)a;

	if (addr_is_v4(a))
		return a[12] == 127 || w[3] == 0;
	return w[0] == 0 && w[1] == 0 && w[2] == 0 && (w[3] == bpf_htonl(1) || w[3] == 0);
}

/* 127.0.0.11: the engine's resolver, whose other end is not the agent's (threats.md 33). */
static __always_inline bool addr_is_engine_resolver(const __u8 *a)
{
	const __u32 *w = (const __u32 *)a;

	return addr_is_v4(a) && w[3] == bpf_htonl(0x7f00000b);
}

static __always_inline bool is_egress_port(__u16 port)
{
	return port == CLAWKER_EGRESS_GLOBAL || (port >= CLAWKER_EGRESS_FIRST && port <= CLAWKER_EGRESS_LAST);
}

static __always_inline struct clawker_control *switches(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline bool is_reserved(const __u8 *addr)
{
	struct clawker_reserved_key key = { .prefixlen = CLAWKER_ADDR_BITS };

	__builtin_memcpy(key.addr, addr, 16);
	return bpf_map_lookup_elem(&reserved_map, &key) != NULL;
}

static __always_inline bool is_infrastructure(const struct clawker_config *cfg, const struct clawker_want *w)
{
	if (w->l4 != IPPROTO_TCP)
		return false;
	if (addr_equal(w->addr, cfg->cp_addr))
		return w->port != 0 && (w->port == cfg->cp_agent_port || w->port == cfg->cp_token_port ||
					w->port == cfg->cp_health_port);
	return false;
}

static __always_inline bool is_host_proxy(const struct clawker_config *cfg, const struct clawker_want *w)
{
	return (cfg->flags & CLAWKER_F_HOST_PROXY) && w->l4 == IPPROTO_TCP && w->port == cfg->host_proxy_port &&
	       addr_equal(w->addr, cfg->host_proxy_addr);
}

static __always_inline bool bypass_holds(const struct clawker_config *cfg)
{
	/* The precise clock only where a deadline is set: it costs twenty times the coarse one. */
	return cfg->bypass_until_ns && bpf_ktime_get_ns() < cfg->bypass_until_ns;
}

static __always_inline void decision(struct clawker_decision *d, __u8 verdict, __u8 reason)
{
	d->verdict = verdict;
	d->reason = reason;
}

static __always_inline struct clawker_route_value *find_route(__u32 generation, __u32 policy, __u32 identity,
							      const struct clawker_want *w)
{
	struct clawker_route_key key = {
		.generation = generation,
		.policy = policy,
		.identity = identity,
		.port = w->port,
		.l4 = w->l4,
	};

	return bpf_map_lookup_elem(&route_map, &key);
}

static __always_inline struct clawker_cidr_value *find_prefix(__u32 generation, __u32 policy,
							      const struct clawker_want *w)
{
	struct clawker_cidr_key key = { .prefixlen = CLAWKER_CIDR_HEAD_BITS + CLAWKER_ADDR_BITS, .l4 = w->l4 };
	__u32 generation_be = bpf_htonl(generation), policy_be = bpf_htonl(policy);

	__builtin_memcpy(key.generation_be, &generation_be, 4);
	__builtin_memcpy(key.policy_be, &policy_be, 4);
	__builtin_memcpy(key.addr, w->addr, 16);
	return bpf_map_lookup_elem(&cidr_map, &key);
}

static __always_inline struct clawker_span *find_span(struct clawker_cidr_value *value, __u16 port)
{
	for (int i = 0; i < CLAWKER_SPANS; i++) {
		struct clawker_span *span = &value->spans[i];

		if (span->low > span->high)
			return NULL;
		if (port >= span->low && port <= span->high)
			return span;
	}
	return NULL;
}

static __always_inline void apply_action(struct clawker_decision *d, __u8 action, __u16 proxy_port, __u32 rule,
					 __u64 deadline_ns, __u8 reason)
{
	d->rule = rule;
	if (deadline_ns && bpf_ktime_get_ns() >= deadline_ns) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_ROUTE_EXPIRED);
	} else if (action == CLAWKER_ACT_PROXY && proxy_port) {
		d->proxy_port = proxy_port;
		decision(d, CLAWKER_V_REDIRECTED, reason);
	} else if (action == CLAWKER_ACT_PASS) {
		decision(d, CLAWKER_V_ALLOWED, reason);
	} else {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_RULE_DENY);
	}
}

/*
 * Several names may share one address. A port that any of them has as HTTP family goes to the
 * egress listener (which reads the name), else a denial of any of them wins, else the dedicated
 * listener of the name that was answered last (contract 7.8). True when a row was found.
 */
static __always_inline bool decide_by_name(struct clawker_decision *d, const struct clawker_config *cfg,
					   __u64 cgroup_id, __u32 generation, const struct clawker_want *w)
{
	struct clawker_name_key key = { .cgroup_id = cgroup_id };
	struct clawker_route_value *found = NULL;
	struct clawker_name_value *names;
	__u32 identity = 0;

	__builtin_memcpy(key.addr, w->addr, 16);
	names = bpf_map_lookup_elem(&dns_cache, &key);
	if (!names)
		return false;
	d->identity = names->identities[0];
	if (names->expires_ns && bpf_ktime_get_ns() > names->expires_ns)
		return false;
	for (int i = 0; i < 4; i++) {
		struct clawker_route_value *route;

		if (!names->identities[i])
			break;
		route = find_route(generation, cfg->policy, names->identities[i], w);
		if (!route)
			continue;
		if (route->action == CLAWKER_ACT_PROXY && is_egress_port(route->proxy_port)) {
			found = route;
			identity = names->identities[i];
			break;
		}
		if (!found || (route->action == CLAWKER_ACT_DENY && found->action != CLAWKER_ACT_DENY)) {
			found = route;
			identity = names->identities[i];
		}
	}
	if (!found)
		return false;
	d->identity = identity;
	apply_action(d, found->action, found->proxy_port, found->rule, found->deadline_ns, CLAWKER_R_NAME_ROUTE);
	return true;
}

/* What the rules say of a destination that is none of ours. */
static __always_inline void decide_by_rule(struct clawker_decision *d, const struct clawker_config *cfg,
					   __u64 cgroup_id, const struct clawker_want *w)
{
	struct clawker_control *now = switches();
	struct clawker_cidr_value *prefix;
	struct clawker_route_value *route;
	struct clawker_span *span = NULL;
	__u32 generation = now ? now->generation : 0;

	if (decide_by_name(d, cfg, cgroup_id, generation, w))
		return;
	prefix = find_prefix(generation, cfg->policy, w);
	if (prefix)
		span = find_span(prefix, w->port);
	if (span) {
		apply_action(d, span->action, span->proxy_port, span->rule, span->deadline_ns, CLAWKER_R_ADDRESS_RULE);
		return;
	}
	route = find_route(generation, cfg->policy, CLAWKER_ID_CATCH_ALL, w);
	if (route) {
		apply_action(d, route->action, route->proxy_port, route->rule, route->deadline_ns,
			     CLAWKER_R_CATCH_ALL);
		return;
	}
	if (cfg->flags & CLAWKER_F_LEARN)
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_LEARN);
	else
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_NO_ROUTE);
}

/*
 * The decision for a connect() or a datagram's first packet. `cfg` NULL: the cgroup is below the
 * agents' parent and nobody enrolled it.
 */
static __always_inline void decide_flow(struct clawker_decision *d, const struct clawker_config *cfg,
					__u64 cgroup_id, const struct clawker_want *w)
{
	struct clawker_control *now = switches();

	d->rule = CLAWKER_NO_RULE;
	if (!cfg) {
		if (now && now->abi && !now->enforce)
			decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_NONE);
		else
			decision(d, CLAWKER_V_DENIED, CLAWKER_R_NOT_ENROLLED);
		return;
	}
	if (w->l4 != IPPROTO_TCP && w->l4 != IPPROTO_UDP) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_PROTOCOL);
		return;
	}
	if (w->port == CLAWKER_DNS_PORT) {
		d->proxy_port = CLAWKER_DNS_PORT;
		d->to_gate = 1;
		decision(d, CLAWKER_V_REDIRECTED, CLAWKER_R_DNS);
		return;
	}
	if (addr_is_loopback(w->addr)) {
		if (addr_is_engine_resolver(w->addr))
			decision(d, CLAWKER_V_DENIED, CLAWKER_R_ENGINE_RESOLVER);
		else
			decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_LOOPBACK);
		return;
	}
	if (is_infrastructure(cfg, w)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_INFRASTRUCTURE);
		return;
	}
	if (cfg->flags & CLAWKER_F_QUARANTINE) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_QUARANTINED);
		return;
	}
	if (is_host_proxy(cfg, w)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_INFRASTRUCTURE);
		return;
	}
	if (!addr_is_v4(w->addr) && !(cfg->flags & CLAWKER_F_IPV6)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_IPV6_UNROUTED);
		return;
	}
	if (is_reserved(w->addr)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_NO_ROUTE);
		return;
	}
	if (bypass_holds(cfg)) {
		decision(d, CLAWKER_V_BYPASSED, CLAWKER_R_BYPASS);
		return;
	}
	decide_by_rule(d, cfg, cgroup_id, w);
}

/* Whether a packet between this agent and `peer` may pass: the backstop behind the socket hooks. */
static __always_inline void decide_packet(struct clawker_decision *d, const struct clawker_config *cfg,
					  __u64 cgroup_id, const struct clawker_want *peer)
{
	struct clawker_control *now = switches();
	struct clawker_cidr_value *prefix;
	struct clawker_proxy_port_key key = {
		.generation = now ? now->generation : 0,
		.policy = cfg->policy,
		.port = peer->port,
		.l4 = peer->l4,
	};
	struct clawker_span *span;

	d->rule = CLAWKER_NO_RULE;
	if (peer->port == CLAWKER_DNS_PORT && addr_equal(peer->addr, cfg->dns_addr)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_DNS);
		return;
	}
	if (is_infrastructure(cfg, peer)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_INFRASTRUCTURE);
		return;
	}
	if (cfg->flags & CLAWKER_F_QUARANTINE) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_QUARANTINED);
		return;
	}
	if (is_host_proxy(cfg, peer)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_INFRASTRUCTURE);
		return;
	}
	if (addr_equal(peer->addr, cfg->proxy_addr)) {
		if (bpf_map_lookup_elem(&proxy_port_map, &key))
			decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_NAME_ROUTE);
		else
			decision(d, CLAWKER_V_DENIED, CLAWKER_R_PROXY_PORT);
		return;
	}
	if (!addr_is_v4(peer->addr) && !(cfg->flags & CLAWKER_F_IPV6)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_IPV6_UNROUTED);
		return;
	}
	if (is_reserved(peer->addr)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_NO_ROUTE);
		return;
	}
	if (bypass_holds(cfg)) {
		decision(d, CLAWKER_V_BYPASSED, CLAWKER_R_BYPASS);
		return;
	}
	prefix = find_prefix(key.generation, cfg->policy, peer);
	span = prefix ? find_span(prefix, peer->port) : NULL;
	if (span && (span->action == CLAWKER_ACT_PASS || span->action == CLAWKER_ACT_DENY)) {
		apply_action(d, span->action, 0, span->rule, span->deadline_ns, CLAWKER_R_ADDRESS_RULE);
		return;
	}
	if (cfg->flags & CLAWKER_F_LEARN)
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_LEARN);
	else
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_NO_ROUTE);
}

#endif
