/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * destination.h - hooks that see where a socket wants to go, and those that tell an application
 * where it went: connect, sendmsg, recvmsg, getpeername, for both families.
 */
#ifndef CLAWKER_DESTINATION_H
#define CLAWKER_DESTINATION_H

#include "../lib/socket.h"

/* TCP sockets speak 6, UDP sockets 17; anything else has no place here (0). */
static __always_inline __u8 transport(struct bpf_sock_addr *ctx)
{
	if (ctx->type == SOCK_STREAM && ctx->protocol == IPPROTO_TCP)
		return IPPROTO_TCP;
	if (ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP)
		return IPPROTO_UDP;
	return 0;
}

static __always_inline void want_from4(struct clawker_want *w, struct bpf_sock_addr *ctx, __u8 l4)
{
	addr_set4(w->addr, ctx->user_ip4);
	w->port = bpf_ntohs((__u16)ctx->user_port);
	w->l4 = l4;
}

/* Word by word, here and below: the verifier refuses wider access to a context's address. */
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

static __always_inline void write4(struct bpf_sock_addr *ctx, const __u8 *addr, __u16 port)
{
	ctx->user_ip4 = *(const __u32 *)(addr + 12);
	ctx->user_port = bpf_htons(port);
}

static __always_inline void write6(struct bpf_sock_addr *ctx, const __u8 *addr, __u16 port)
{
	const __u32 *words = (const __u32 *)addr;

	ctx->user_ip6[0] = words[0];
	ctx->user_ip6[1] = words[1];
	ctx->user_ip6[2] = words[2];
	ctx->user_ip6[3] = words[3];
	ctx->user_port = bpf_htons(port);
}

static __always_inline int refuse(__u8 reason)
{
	/* An address nobody serves is refused like one; what the policy forbids is not permitted. */
	bpf_set_retval(reason == CLAWKER_R_NO_ROUTE || reason == CLAWKER_R_IPV6_UNROUTED ? -ECONNREFUSED : -EACCES);
	return CLAWKER_REFUSE;
}

/*
 * Judge, remember, record. `target` is where the socket has to be sent instead, NULL = where it
 * asked to. A datagram to where the socket sent before, for the same reason, is only counted.
 */
static __always_inline int judge(struct bpf_sock_addr *ctx, const struct clawker_want *w, struct clawker_decision *d,
				 const __u8 **target, __u8 hook, __u8 family)
{
	bool connects = hook == CLAWKER_H_CONNECT4 || hook == CLAWKER_H_CONNECT6;
	enum clawker_memory memory = CLAWKER_M_NEW;
	struct clawker_subject s = {
		.cgroup_id = agent_of_address(ctx),
		.hook = hook,
		.family = family,
		.protocol = ctx->protocol > 255 ? 255 : (__u8)ctx->protocol,
		.type = (__u8)ctx->type,
		.flags = family == AF_INET6 && addr_is_v4(w->addr) ? CLAWKER_EF_V4_MAPPED : 0,
		.task = 1,
	};
	const struct clawker_config *cfg = bpf_map_lookup_elem(&container_map, &s.cgroup_id);

	*target = NULL;
	decide_flow(d, cfg, s.cgroup_id, w);
	if (d->reason == CLAWKER_R_NONE)
		return CLAWKER_PASS;
	s.policy = cfg ? cfg->policy : 0;
	if (cfg && d->proxy_port) {
		*target = redirect_target(cfg, d);
		memory = remember(ctx, w, *target, d->proxy_port, d->reason, connects, s.policy);
	} else if (connects) {
		forget_peer(ctx);
	} else if (d->verdict != CLAWKER_V_DENIED && d->reason != CLAWKER_R_LOOPBACK) {
		memory = remember(ctx, w, w->addr, w->port, d->reason, false, 0);
	}
	if (memory == CLAWKER_M_FAILED) {
		d->proxy_port = 0;
		decision(d, CLAWKER_V_DENIED, CLAWKER_R_MAP_FULL);
	}
	if (memory == CLAWKER_M_KNOWN && !connects) {
		count_only(s.cgroup_id, w, d);
	} else if (d->reason != CLAWKER_R_LOOPBACK) {
		s.cookie = bpf_get_socket_cookie(ctx);
		record(&s, w, d, bpf_ktime_get_coarse_ns());
	}
	return d->verdict == CLAWKER_V_DENIED ? refuse(d->reason) : CLAWKER_PASS;
}

static __always_inline int outgoing4(struct bpf_sock_addr *ctx, __u8 hook)
{
	struct clawker_decision d = {};
	struct clawker_want w = {};
	const __u8 *target;

	want_from4(&w, ctx, transport(ctx));
	if (hook == CLAWKER_H_SENDMSG4)
		as_connected(ctx, &w);
	if (judge(ctx, &w, &d, &target, hook, AF_INET) == CLAWKER_REFUSE)
		return CLAWKER_REFUSE;
	if (target)
		write4(ctx, target, d.proxy_port);
	return CLAWKER_PASS;
}

static __always_inline int outgoing6(struct bpf_sock_addr *ctx, __u8 hook)
{
	struct clawker_decision d = {};
	struct clawker_want w = {};
	const __u8 *target;

	want_from6(&w, ctx, transport(ctx));
	if (hook == CLAWKER_H_SENDMSG6)
		as_connected(ctx, &w);
	if (judge(ctx, &w, &d, &target, hook, AF_INET6) == CLAWKER_REFUSE)
		return CLAWKER_REFUSE;
	if (target)
		write6(ctx, target, d.proxy_port);
	return CLAWKER_PASS;
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

	want_from4(&from, ctx, IPPROTO_UDP);
	if (asked_for(ctx, &from, &asked))
		write4(ctx, asked.addr, asked.port);
	return CLAWKER_PASS;
}

SEC("cgroup/recvmsg6")
int clawker_recvmsg6(struct bpf_sock_addr *ctx)
{
	struct clawker_endpoint asked = {};
	struct clawker_want from = {};

	want_from6(&from, ctx, IPPROTO_UDP);
	if (asked_for(ctx, &from, &asked))
		write6(ctx, asked.addr, asked.port);
	return CLAWKER_PASS;
}

SEC("cgroup/getpeername4")
int clawker_getpeername4(struct bpf_sock_addr *ctx)
{
	struct clawker_endpoint peer = {};

	if (peer_of(ctx, &peer))
		write4(ctx, peer.addr, peer.port);
	return CLAWKER_PASS;
}

SEC("cgroup/getpeername6")
int clawker_getpeername6(struct bpf_sock_addr *ctx)
{
	struct clawker_endpoint peer = {};

	if (peer_of(ctx, &peer))
		write6(ctx, peer.addr, peer.port);
	return CLAWKER_PASS;
}

#endif
