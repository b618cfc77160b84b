/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * decide.h - may this agent open this flow? Plain values in, one decision out; never sees a ctx.
 *
 * The order is the policy (docs/bpf.md, "Decision order"). Everything unknown ends in a denial
 * with a reason (I1); addresses that are ours or the host's are out of reach of rules, bypass and
 * learning (R12) and are therefore judged before any of them.
 */
#ifndef CLAWKER_DECIDE_H
#define CLAWKER_DECIDE_H

#include "rules.h"

#define CLAWKER_BANDS_FIRST 10000 /* every number a proxy listener may have (contract 1.1) */
#define CLAWKER_BANDS_LAST 31999
#define CLAWKER_DNS_PORT 53

static __always_inline bool is_reserved(const __u8 *addr)
{
	struct clawker_reserved_key key = { .prefixlen = CLAWKER_ADDR_BITS };

	__builtin_memcpy(key.addr, addr, 16);
	return bpf_map_lookup_elem(&reserved_map, &key) != NULL;
}

/* Out of reach of every rule, of bypass and of learning (R12), whatever `reserved_map` says. */
static __always_inline bool is_off_limits(const struct clawker_config *cfg, const __u8 *addr)
{
	__u8 carried[16] __attribute__((aligned(8)));

	if (addr_is_group(addr) || addr_equal(addr, cfg->proxy_addr) || addr_equal(addr, cfg->dns_addr) ||
	    addr_equal(addr, cfg->cp_addr) || addr_equal(addr, cfg->host_addr))
		return true;
	if ((cfg->flags & CLAWKER_F_HOST_PROXY) && addr_equal(addr, cfg->host_proxy_addr))
		return true;
	if (is_reserved(addr))
		return true;
	return !addr_is_v4(addr) && addr_carried4(addr, carried) && (addr_is_loopback(carried) || is_reserved(carried));
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

/* What an agent that is enrolled may do with a destination, before it is known where it is sent. */
static __always_inline void decide_enrolled(struct clawker_decision *d, const struct clawker_config *cfg,
					    __u64 cgroup_id, const struct clawker_want *w)
{
	if (w->l4 != IPPROTO_TCP && w->l4 != IPPROTO_UDP) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_PROTOCOL);
	} else if (w->port == CLAWKER_DNS_PORT) {
		/* Also while quarantined (R16) and bypassed (R15): the gate knows, and records. */
		d->proxy_port = CLAWKER_DNS_PORT;
		d->to_gate = 1;
		decision(d, CLAWKER_V_REDIRECTED, CLAWKER_R_DNS);
	} else if (addr_is_engine_resolver(w->addr)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_ENGINE_RESOLVER);
	} else if (addr_is_loopback(w->addr)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_LOOPBACK);
	} else if (is_infrastructure(cfg, w)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_INFRASTRUCTURE);
	} else if (cfg->flags & CLAWKER_F_QUARANTINE) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_QUARANTINED);
	} else if (is_host_proxy(cfg, w)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_INFRASTRUCTURE);
	} else if (!addr_is_v4(w->addr) && !(cfg->flags & CLAWKER_F_IPV6)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_IPV6_UNROUTED);
	} else if (is_off_limits(cfg, w->addr)) {
		/* Threat 20: whoever dials a listener directly chose it; name that. */
		if (addr_equal(w->addr, cfg->proxy_addr) && w->port >= CLAWKER_BANDS_FIRST &&
		    w->port <= CLAWKER_BANDS_LAST)
			decision(d, CLAWKER_V_DENIED, CLAWKER_R_PROXY_PORT);
		else
			decision(d, CLAWKER_V_DENIED, CLAWKER_R_NO_ROUTE);
	} else if (bypass_holds(cfg)) {
		decision(d, CLAWKER_V_BYPASSED, CLAWKER_R_BYPASS);
	} else {
		decide_by_rule(d, cfg, cgroup_id, w);
	}
}

/*
 * What holds for a cgroup below the agents' parent that nobody enrolled: denied (I1, I4), unless
 * an operator has switched enforcement off, which `abi` 0 (a map never written) does not count as.
 */
static __always_inline bool enforced(void)
{
	struct clawker_control *now = switches();

	return !now || !now->abi || now->enforce;
}

static __always_inline const __u8 *redirect_target(const struct clawker_config *cfg, const struct clawker_decision *d)
{
	return d->to_gate ? cfg->dns_addr : cfg->proxy_addr;
}

/*
 * The decision for a connect() or a datagram. `cfg` NULL: nobody enrolled the cgroup; reason NONE
 * then means that nothing is enforced.
 */
static __always_inline void decide_flow(struct clawker_decision *d, const struct clawker_config *cfg, __u64 cgroup_id,
					const struct clawker_want *w)
{
	d->rule = CLAWKER_NO_RULE;
	if (!cfg) {
		if (enforced())
			decision(d, CLAWKER_V_DENIED, CLAWKER_R_NOT_ENROLLED);
		else
			decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_NONE);
		return;
	}
	decide_enrolled(d, cfg, cgroup_id, w);
	/* A native IPv6 socket cannot be sent to an IPv4 listener. */
	if (d->proxy_port && !addr_is_v4(w->addr) && addr_is_v4(redirect_target(cfg, d))) {
		d->proxy_port = 0;
		d->to_gate = 0;
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_IPV6_UNROUTED);
	}
}

/*
 * Whether a packet that does not stay on the loopback interface may pass between this agent and
 * `peer`: the backstop behind the socket hooks. It knows no names, only where they lead.
 */
static __always_inline void decide_packet(struct clawker_decision *d, const struct clawker_config *cfg,
					  const struct clawker_want *peer)
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
	if (addr_equal(peer->addr, cfg->proxy_addr) && bpf_map_lookup_elem(&proxy_port_map, &key)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_NAME_ROUTE);
		return;
	}
	if (is_host_proxy(cfg, peer)) {
		decision(d, CLAWKER_V_ALLOWED, CLAWKER_R_INFRASTRUCTURE);
		return;
	}
	if (addr_equal(peer->addr, cfg->proxy_addr)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_PROXY_PORT);
		return;
	}
	if (!addr_is_v4(peer->addr) && !(cfg->flags & CLAWKER_F_IPV6)) {
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_IPV6_UNROUTED);
		return;
	}
	/* Loopback is what the interface says it is (threats 3 and 15): here it is a way out. */
	if (addr_is_loopback(peer->addr) || is_off_limits(cfg, peer->addr)) {
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
