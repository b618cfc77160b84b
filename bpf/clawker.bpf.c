// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * clawker.bpf.c - the entry points. Each reads its context, asks lib/decide.h, writes the answer
 * back and returns a named verdict. Attached with BPF_F_ALLOW_MULTI to the agents' parent cgroup,
 * so every socket they see belongs to an agent, enrolled or not.
 */
#include "lib/event.h"
#include "lib/packet.h"
#include "lib/socket.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

enum { REFUSE = 0, PASS = 1 };

#define FLAG_NO_DESTINATION (1 << 0)
#define FLAG_V4_MAPPED (1 << 1)

/* The address in a socket address context, as 16 bytes; IPv4 in its mapped form. */
static __always_inline void want_from4(struct clawker_want *w, __u32 ip4_be, __u32 port_be, __u8 l4)
{
	__u32 *words = (__u32 *)w->addr;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = ip4_be;
	w->port = bpf_ntohs((__u16)port_be);
	w->l4 = l4;
}

static __always_inline void want_from6(struct clawker_want *w, struct bpf_sock_addr *ctx, __u8 l4)
{
	__u32 *words = (__u32 *)w->addr;

	words[0] = ctx->user_ip6[0];
	words[1] = ctx->user_ip6[1];
	words[2] = ctx->user_ip6[2];
	words[3] = ctx->user_ip6[3];
	w->port = bpf_ntohs((__u16)ctx->user_port);
	w->l4 = l4;
}

/* TCP sockets speak 6, UDP sockets 17; anything else has no place here (0). */
static __always_inline __u8 transport(struct bpf_sock_addr *ctx)
{
	if (ctx->type == SOCK_STREAM && ctx->protocol == IPPROTO_TCP)
		return IPPROTO_TCP;
	if (ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP)
		return IPPROTO_UDP;
	return 0;
}

static __always_inline int refuse(__u8 reason)
{
	/* An address nobody serves is refused like one; what the policy forbids is not permitted. */
	bpf_set_retval(reason == CLAWKER_R_NO_ROUTE || reason == CLAWKER_R_IPV6_UNROUTED ? -ECONNREFUSED : -EACCES);
	return REFUSE;
}

/* Where a redirected flow goes, as 16 bytes. */
static __always_inline const __u8 *redirect_target(const struct clawker_config *cfg, const struct clawker_decision *d)
{
	return d->to_gate ? cfg->dns_addr : cfg->proxy_addr;
}

static __always_inline int judge(struct bpf_sock_addr *ctx, struct clawker_want *w, struct clawker_decision *d,
				 const struct clawker_config **cfg, __u8 hook, __u8 family, __u8 flags)
{
	struct clawker_subject s = {
		.cgroup_id = agent_of_address(ctx),
		.hook = hook,
		.family = family,
		.protocol = (__u8)ctx->protocol,
		.type = (__u8)ctx->type,
		.flags = flags,
		.task = 1,
	};

	*cfg = bpf_map_lookup_elem(&container_map, &s.cgroup_id);
	decide_flow(d, *cfg, s.cgroup_id, w);
	if (d->reason == CLAWKER_R_NONE)
		return PASS;
	s.policy = *cfg ? (*cfg)->policy : 0;
	s.cookie = bpf_get_socket_cookie(ctx);
	if (d->reason != CLAWKER_R_LOOPBACK)
		record(&s, w, d);
	return d->verdict == CLAWKER_V_DENIED ? refuse(d->reason) : PASS;
}

static __always_inline int outgoing4(struct bpf_sock_addr *ctx, __u8 hook)
{
	struct clawker_decision d = {};
	const struct clawker_config *cfg;
	struct clawker_want w = {};
	const __u8 *target;

	want_from4(&w, ctx->user_ip4, ctx->user_port, transport(ctx));
	if (judge(ctx, &w, &d, &cfg, hook, AF_INET, 0) == REFUSE)
		return REFUSE;
	if (!d.proxy_port || !cfg) {
		remember_direct(ctx);
		return PASS;
	}
	target = redirect_target(cfg, &d);
	if (!remember(ctx, &w, target, d.proxy_port, hook == CLAWKER_H_CONNECT4))
		return refuse(CLAWKER_R_MAP_FULL);
	ctx->user_ip4 = *(const __u32 *)(target + 12);
	ctx->user_port = bpf_htons(d.proxy_port);
	return PASS;
}

static __always_inline int outgoing6(struct bpf_sock_addr *ctx, __u8 hook)
{
	struct clawker_decision d = {};
	const struct clawker_config *cfg;
	struct clawker_want w = {};
	const __u32 *target;

	want_from6(&w, ctx, transport(ctx));
	if (judge(ctx, &w, &d, &cfg, hook, AF_INET6, addr_is_v4(w.addr) ? FLAG_V4_MAPPED : 0) == REFUSE)
		return REFUSE;
	if (!d.proxy_port || !cfg) {
		remember_direct(ctx);
		return PASS;
	}
	target = (const __u32 *)redirect_target(cfg, &d);
	/* A native IPv6 socket cannot be sent to an IPv4 proxy: no way in for what has no route. */
	if (!addr_is_v4(w.addr) && addr_is_v4((const __u8 *)target))
		return refuse(CLAWKER_R_IPV6_UNROUTED);
	if (!remember(ctx, &w, (const __u8 *)target, d.proxy_port, hook == CLAWKER_H_CONNECT6))
		return refuse(CLAWKER_R_MAP_FULL);
	ctx->user_ip6[0] = target[0];
	ctx->user_ip6[1] = target[1];
	ctx->user_ip6[2] = target[2];
	ctx->user_ip6[3] = target[3];
	ctx->user_port = bpf_htons(d.proxy_port);
	return PASS;
}

SEC("cgroup/connect4")
int clawker_connect4(struct bpf_sock_addr *ctx)
{
	return outgoing4(ctx, CLAWKER_H_CONNECT4);
}

SEC("cgroup/connect6")
int clawker_connect6(struct bpf_sock_addr *ctx)
{
	return outgoing6(ctx, CLAWKER_H_CONNECT6);
}

SEC("cgroup/sendmsg4")
int clawker_sendmsg4(struct bpf_sock_addr *ctx)
{
	return outgoing4(ctx, CLAWKER_H_SENDMSG4);
}

SEC("cgroup/sendmsg6")
int clawker_sendmsg6(struct bpf_sock_addr *ctx)
{
	return outgoing6(ctx, CLAWKER_H_SENDMSG6);
}

SEC("cgroup/recvmsg4")
int clawker_recvmsg4(struct bpf_sock_addr *ctx)
{
	struct clawker_endpoint asked = {};
	struct clawker_want from = {};

	want_from4(&from, ctx->user_ip4, ctx->user_port, IPPROTO_UDP);
	if (asked_for(ctx, &from, &asked)) {
		ctx->user_ip4 = *(__u32 *)(asked.addr + 12);
		ctx->user_port = bpf_htons(asked.port);
	}
	return PASS;
}

SEC("cgroup/recvmsg6")
int clawker_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct clawker_endpoint asked = {};
	struct clawker_want from = {};
	__u32 *words = (__u32 *)asked.addr;

	want_from6(&from, ctx, IPPROTO_UDP);
	if (asked_for(ctx, &from, &asked)) {
		ctx->user_ip6[0] = words[0];
		ctx->user_ip6[1] = words[1];
		ctx->user_ip6[2] = words[2];
		ctx->user_ip6[3] = words[3];
		ctx->user_port = bpf_htons(asked.port);
	}
	return PASS;
}

SEC("cgroup/getpeername4")
int clawker_getpeername4(struct bpf_sock_addr *ctx)
{
	struct clawker_endpoint peer = {};

	if (peer_of(ctx, &peer)) {
		ctx->user_ip4 = *(__u32 *)(peer.addr + 12);
		ctx->user_port = bpf_htons(peer.port);
	}
	return PASS;
}

SEC("cgroup/getpeername6")
int clawker_getpeername6(struct bpf_sock_addr *ctx)
{
	struct clawker_endpoint peer = {};
	__u32 *words = (__u32 *)peer.addr;

	if (peer_of(ctx, &peer)) {
		ctx->user_ip6[0] = words[0];
		ctx->user_ip6[1] = words[1];
		ctx->user_ip6[2] = words[2];
		ctx->user_ip6[3] = words[3];
		ctx->user_port = bpf_htons(peer.port);
	}
	return PASS;
}

/* Only plain TCP and UDP sockets are made at all: no raw, ICMP, SCTP, DCCP, UDP-Lite, L2TP, MPTCP. */
SEC("cgroup/sock_create")
int clawker_sock_create(struct bpf_sock *ctx)
{
	struct clawker_decision d = { .rule = CLAWKER_NO_RULE };
	struct clawker_want nowhere = {};
	struct clawker_subject s = {
		.hook = CLAWKER_H_SOCK_CREATE,
		.family = (__u8)ctx->family,
		.protocol = ctx->protocol > 255 ? 255 : (__u8)ctx->protocol,
		.type = (__u8)ctx->type,
		.flags = FLAG_NO_DESTINATION,
		.task = 1,
	};
	struct clawker_config *cfg;
	struct clawker_control *now = switches();

	if (ctx->family != AF_INET && ctx->family != AF_INET6)
		decision(&d, CLAWKER_V_DENIED, CLAWKER_R_FAMILY);
	else if (!(ctx->type == SOCK_STREAM && ctx->protocol == IPPROTO_TCP) &&
		 !(ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP))
		decision(&d, CLAWKER_V_DENIED, CLAWKER_R_PROTOCOL);
	else
		return PASS;
	s.cgroup_id = agent_of_sock(ctx);
	cfg = bpf_map_lookup_elem(&container_map, &s.cgroup_id);
	if (!cfg && now && now->abi && !now->enforce)
		return PASS;
	s.policy = cfg ? cfg->policy : 0;
	record(&s, &nowhere, &d);
	/* Programs that try MPTCP first fall back to TCP on this errno, and only on this one. */
	bpf_set_retval(ctx->protocol == IPPROTO_MPTCP ? -EPROTONOSUPPORT : -EACCES);
	return REFUSE;
}

/* Options that put headers into packets which routers obey and later checks would have to parse. */
static __always_inline bool forbidden_option(int level, int name)
{
	if (level == IPPROTO_IP)
		return name == 4; /* IP_OPTIONS */
	if (level == IPPROTO_IPV6)
		return name == 54 || name == 55 || name == 57 || name == 59 || /* HOPOPTS RTHDRDSTOPTS RTHDR DSTOPTS */
		       name == 3 || name == 4 || name == 5 || name == 6;	 /* their RFC 2292 forms, PKTOPTIONS */
	return false;
}

SEC("cgroup/setsockopt")
int clawker_setsockopt(struct bpf_sockopt *ctx)
{
	struct clawker_decision d = { .rule = CLAWKER_NO_RULE };
	struct clawker_want nowhere = {};
	struct clawker_subject s = {
		.hook = CLAWKER_H_SETSOCKOPT,
		.flags = FLAG_NO_DESTINATION,
		.task = 1,
	};
	struct clawker_config *cfg;
	struct clawker_control *now = switches();

	/* The value is not read: without this the kernel refuses options longer than a page. */
	if (!forbidden_option(ctx->level, ctx->optname)) {
		if (ctx->optlen > 4096)
			ctx->optlen = 0;
		return PASS;
	}
	s.cgroup_id = agent_of_option(ctx);
	cfg = bpf_map_lookup_elem(&container_map, &s.cgroup_id);
	if (!cfg && now && now->abi && !now->enforce)
		return PASS;
	s.policy = cfg ? cfg->policy : 0;
	decision(&d, CLAWKER_V_DENIED, CLAWKER_R_SOCKET_OPTION);
	record(&s, &nowhere, &d);
	bpf_set_retval(-EACCES);
	return REFUSE;
}

static __always_inline int drop(struct __sk_buff *skb, struct clawker_subject *s, const struct clawker_want *peer,
				struct clawker_decision *d)
{
	s->cookie = bpf_get_socket_cookie(skb);
	record(s, peer, d);
	return REFUSE;
}

SEC("cgroup_skb/egress")
int clawker_egress(struct __sk_buff *skb)
{
	struct clawker_decision d = { .rule = CLAWKER_NO_RULE };
	struct clawker_packet p = {};
	struct clawker_config *cfg;
	struct clawker_subject s = {
		.cgroup_id = bpf_skb_ancestor_cgroup_id(skb, clawker_agent_level),
		.hook = CLAWKER_H_EGRESS,
	};
	struct clawker_control *now = switches();

	cfg = bpf_map_lookup_elem(&container_map, &s.cgroup_id);
	if (!cfg && now && now->abi && !now->enforce)
		return PASS;
	d.reason = parse_packet(skb, &p, true);
	s.family = p.family;
	s.protocol = p.l4;
	s.policy = cfg ? cfg->policy : 0;
	if (d.reason == CLAWKER_R_NONE && !cfg)
		d.reason = CLAWKER_R_NOT_ENROLLED;
	if (d.reason != CLAWKER_R_NONE || !cfg) {
		d.verdict = CLAWKER_V_DENIED;
		return drop(skb, &s, &p.peer, &d);
	}
	if (skb->ifindex == LOOPBACK_IFINDEX) {
		if (!addr_is_engine_resolver(p.peer.addr))
			return PASS;
		decision(&d, CLAWKER_V_DENIED, CLAWKER_R_ENGINE_RESOLVER);
		return drop(skb, &s, &p.peer, &d);
	}
	decide_packet(&d, cfg, s.cgroup_id, &p.peer);
	if (d.verdict != CLAWKER_V_DENIED || is_inbound_reply(s.cgroup_id, &p))
		return PASS;
	return drop(skb, &s, &p.peer, &d);
}

SEC("cgroup_skb/ingress")
int clawker_ingress(struct __sk_buff *skb)
{
	struct clawker_decision d = { .rule = CLAWKER_NO_RULE };
	struct clawker_packet p = {};
	struct clawker_config *cfg;
	struct clawker_subject s = {
		.cgroup_id = bpf_skb_ancestor_cgroup_id(skb, clawker_agent_level),
		.hook = CLAWKER_H_INGRESS,
	};
	struct clawker_control *now = switches();

	cfg = bpf_map_lookup_elem(&container_map, &s.cgroup_id);
	if (!cfg && now && now->abi && !now->enforce)
		return PASS;
	d.reason = parse_packet(skb, &p, false);
	s.family = p.family;
	s.protocol = p.l4;
	s.policy = cfg ? cfg->policy : 0;
	if (d.reason == CLAWKER_R_NONE && !cfg)
		d.reason = CLAWKER_R_NOT_ENROLLED;
	if (d.reason != CLAWKER_R_NONE || !cfg) {
		d.verdict = CLAWKER_V_DENIED;
		return drop(skb, &s, &p.peer, &d);
	}
	if (skb->ifindex == LOOPBACK_IFINDEX)
		return PASS;
	if (is_inbound_reply(s.cgroup_id, &p) || admit_inbound(cfg, s.cgroup_id, &p))
		return PASS;
	/* A new connection only by admission; everything else only from where the agent may send. */
	if (!p.opens) {
		decide_packet(&d, cfg, s.cgroup_id, &p.peer);
		if (d.verdict != CLAWKER_V_DENIED)
			return PASS;
	}
	decision(&d, CLAWKER_V_DENIED, CLAWKER_R_INBOUND);
	return drop(skb, &s, &p.peer, &d);
}
