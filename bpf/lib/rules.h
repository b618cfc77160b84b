/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * rules.h - what the compiled policy says of a destination: names first, then prefixes, then the
 * catch-all. Plain values in, one decision out; never sees a ctx.
 */
#ifndef CLAWKER_RULES_H
#define CLAWKER_RULES_H

#include "../maps.h"
#include "address.h"

#define CLAWKER_ADDR_BITS 128
#define CLAWKER_CIDR_HEAD_BITS 72 /* generation, policy, protocol */
#define CLAWKER_EGRESS_GLOBAL 10000
#define CLAWKER_EGRESS_FIRST 12000
#define CLAWKER_EGRESS_LAST 12999

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

static __always_inline struct clawker_control *switches(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline bool is_egress_port(__u16 port)
{
	return port == CLAWKER_EGRESS_GLOBAL || (port >= CLAWKER_EGRESS_FIRST && port <= CLAWKER_EGRESS_LAST);
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
	struct clawker_cidr_key key = {
		.prefixlen = CLAWKER_CIDR_HEAD_BITS + CLAWKER_ADDR_BITS,
		.l4 = addr_is_v4(w->addr) ? w->l4 : w->l4 | CLAWKER_CIDR_IPV6,
	};
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
	/* Lives are seconds: the coarse clock is near enough. */
	if (names->expires_ns && bpf_ktime_get_coarse_ns() > names->expires_ns)
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
		apply_action(d, route->action, route->proxy_port, route->rule, route->deadline_ns, CLAWKER_R_CATCH_ALL);
		return;
	}
	if (cfg->flags & CLAWKER_F_LEARN)
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_LEARN);
	else
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_NO_ROUTE);
}

#endif
