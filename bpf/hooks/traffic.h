/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * traffic.h - the packet backstop: every packet an agent's socket sends or gets, whatever made the
 * socket and whenever it was connected.
 *
 * No verdict is kept between packets: what a cached one would save (docs/bpf.md, "Costs") is not
 * worth a verdict that could outlive the row it came from.
 */
#ifndef CLAWKER_TRAFFIC_H
#define CLAWKER_TRAFFIC_H

#include "../lib/packet.h"
#include "../lib/socket.h"

static __always_inline int drop(struct __sk_buff *skb, struct clawker_subject *s, const struct clawker_packet *p,
				struct clawker_decision *d)
{
	struct clawker_want named = p->peer;

	d->verdict = CLAWKER_V_DENIED;
	if (s->hook == CLAWKER_H_INGRESS) {
		named.port = p->local_port;
		d->proxy_port = p->peer.port;
	}
	s->cookie = bpf_get_socket_cookie(skb);
	s->quiet = drop_was_recorded(skb, d->reason);
	record(s, &named, d, bpf_ktime_get_coarse_ns());
	return CLAWKER_REFUSE;
}

/*
 * A packet on the loopback interface whose receiving socket belongs to somebody else: the general
 * form of threat 33. No socket: nobody is listening, the kernel answers.
 */
static __always_inline bool leaves_by_loopback(struct __sk_buff *skb, const struct clawker_packet *p, __u64 cgroup_id)
{
	const __u32 *words = (const __u32 *)p->peer.addr, *own = (const __u32 *)p->local;
	struct bpf_sock_tuple tuple = {};
	__u32 size = p->family == AF_INET ? sizeof(tuple.ipv4) : sizeof(tuple.ipv6);
	struct bpf_sock *receiver;
	bool foreign;

	if (p->family == AF_INET) {
		tuple.ipv4.saddr = own[3];
		tuple.ipv4.daddr = words[3];
		tuple.ipv4.sport = bpf_htons(p->local_port);
		tuple.ipv4.dport = bpf_htons(p->peer.port);
	} else {
		__builtin_memcpy(tuple.ipv6.saddr, p->local, 16);
		__builtin_memcpy(tuple.ipv6.daddr, p->peer.addr, 16);
		tuple.ipv6.sport = bpf_htons(p->local_port);
		tuple.ipv6.dport = bpf_htons(p->peer.port);
	}
	if (p->l4 == IPPROTO_TCP)
		receiver = bpf_sk_lookup_tcp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	else
		receiver = bpf_sk_lookup_udp(skb, &tuple, size, BPF_F_CURRENT_NETNS, 0);
	if (!receiver)
		return false;
	foreign = bpf_sk_ancestor_cgroup_id(receiver, clawker_agent_level) != cgroup_id;
	bpf_sk_release(receiver);
	return foreign;
}

/* A connection to a port of the policy that its agent had when it was made, as long as that one has the port. */
static __always_inline bool keeps_port(struct __sk_buff *skb, const struct clawker_config *cfg,
				       const struct clawker_packet *p, const struct clawker_decision *d)
{
	struct clawker_control *now = switches();
	struct clawker_proxy_port_key key = {
		.generation = now ? now->generation : 0,
		.port = p->peer.port,
		.l4 = IPPROTO_TCP,
	};

	if (d->reason != CLAWKER_R_PROXY_PORT || p->l4 != IPPROTO_TCP)
		return false;
	key.policy = redirected_under(skb);
	return key.policy && key.policy != cfg->policy && bpf_map_lookup_elem(&proxy_port_map, &key);
}

/* What both directions begin with. `true`: `*verdict` is final. */
static __always_inline bool begin(struct __sk_buff *skb, struct clawker_subject *s, struct clawker_packet *p,
				  struct clawker_decision *d, const struct clawker_config **cfg, int *verdict)
{
	bool outgoing = s->hook == CLAWKER_H_EGRESS;

	s->cgroup_id = bpf_skb_ancestor_cgroup_id(skb, clawker_agent_level);
	*cfg = bpf_map_lookup_elem(&container_map, &s->cgroup_id);
	if (!*cfg && !enforced()) {
		*verdict = CLAWKER_PASS;
		return true;
	}
	d->reason = parse_packet(skb, p, outgoing);
	s->family = p->family;
	s->protocol = p->l4;
	s->type = p->l4 == IPPROTO_TCP ? SOCK_STREAM : p->l4 == IPPROTO_UDP ? SOCK_DGRAM : 0;
	s->policy = *cfg ? (*cfg)->policy : 0;
	if (!*cfg)
		d->reason = CLAWKER_R_NOT_ENROLLED;
	if (d->reason == CLAWKER_R_NONE)
		return false;
	*verdict = drop(skb, s, p, d);
	return true;
}

SEC("cgroup_skb/egress")
int clawker_egress(struct __sk_buff *skb)
{
	struct clawker_decision d = { .rule = CLAWKER_NO_RULE };
	struct clawker_subject s = { .hook = CLAWKER_H_EGRESS };
	const struct clawker_config *cfg;
	struct clawker_packet p = {};
	int verdict;
	long rc;

	if (begin(skb, &s, &p, &d, &cfg, &verdict))
		return verdict;
	if (!cfg) /* for the verifier: begin() has dropped it */
		return CLAWKER_REFUSE;
	if (skb->ifindex == LOOPBACK_IFINDEX) {
		if (!addr_is_engine_resolver(p.peer.addr) && !leaves_by_loopback(skb, &p, s.cgroup_id))
			return CLAWKER_PASS;
		d.reason = CLAWKER_R_ENGINE_RESOLVER;
		return drop(skb, &s, &p, &d);
	}
	decide_packet(&d, cfg, &p.peer);
	if (d.verdict != CLAWKER_V_DENIED || inbound(cfg, s.cgroup_id, &p, true, &rc) == CLAWKER_E_KNOWN ||
	    keeps_port(skb, cfg, &p, &d))
		return CLAWKER_PASS;
	return drop(skb, &s, &p, &d);
}

SEC("cgroup_skb/ingress")
int clawker_ingress(struct __sk_buff *skb)
{
	struct clawker_decision d = { .rule = CLAWKER_NO_RULE };
	struct clawker_subject s = { .hook = CLAWKER_H_INGRESS };
	const struct clawker_config *cfg;
	struct clawker_packet p = {};
	enum clawker_entry entry;
	int verdict;
	long rc;

	if (begin(skb, &s, &p, &d, &cfg, &verdict))
		return verdict;
	if (!cfg) /* for the verifier: begin() has dropped it */
		return CLAWKER_REFUSE;
	if (skb->ifindex == LOOPBACK_IFINDEX)
		return CLAWKER_PASS;
	/* A new connection only by admission; everything else also from where the agent may send. */
	if (!p.opens) {
		decide_packet(&d, cfg, &p.peer);
		if (d.verdict != CLAWKER_V_DENIED || keeps_port(skb, cfg, &p, &d))
			return CLAWKER_PASS;
	}
	entry = inbound(cfg, s.cgroup_id, &p, false, &rc);
	if (rc)
		count_error(CLAWKER_S_INBOUND_FLOW, rc);
	if (entry == CLAWKER_E_NEW) {
		struct clawker_want named = p.peer;

		named.port = p.local_port;
		d = (struct clawker_decision){
			.rule = CLAWKER_NO_RULE,
			.proxy_port = p.peer.port,
			.verdict = CLAWKER_V_ALLOWED,
			.reason = CLAWKER_R_INBOUND_REPLY,
		};
		s.cookie = bpf_get_socket_cookie(skb);
		record(&s, &named, &d, bpf_ktime_get_coarse_ns());
	}
	if (entry != CLAWKER_E_NO)
		return CLAWKER_PASS;
	decision(&d, CLAWKER_V_DENIED, rc ? CLAWKER_R_MAP_FULL : CLAWKER_R_INBOUND);
	return drop(skb, &s, &p, &d);
}

#endif
