/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * creation.h - which sockets are made at all, and which options they may be given.
 *
 * Families other than IPv4 and IPv6 (AF_PACKET, AF_VSOCK, AF_ALG, ...) never reach these hooks:
 * the engine's seccomp filter refuses them and the host ring drops what they would send.
 */
#ifndef CLAWKER_CREATION_H
#define CLAWKER_CREATION_H

#include "../lib/socket.h"

/* Denied, unless nobody enrolled the cgroup and enforcement is switched off. */
static __always_inline int deny_socket(struct clawker_subject *s, const struct clawker_want *what,
				       struct clawker_decision *d, int error)
{
	const struct clawker_config *cfg = bpf_map_lookup_elem(&container_map, &s->cgroup_id);

	if (!cfg && !enforced())
		return CLAWKER_PASS;
	s->policy = cfg ? cfg->policy : 0;
	s->flags = CLAWKER_EF_NO_DESTINATION;
	s->task = 1;
	record(s, what, d, bpf_ktime_get_ns());
	bpf_set_retval(-error);
	return CLAWKER_REFUSE;
}

/* Only plain TCP and UDP: no raw, ICMP, SCTP, DCCP, UDP-Lite, L2TP, SMC, MPTCP. */
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
	};

	if (ctx->family != AF_INET && ctx->family != AF_INET6)
		decision(&d, CLAWKER_V_DENIED, CLAWKER_R_FAMILY);
	else if (!(ctx->type == SOCK_STREAM && ctx->protocol == IPPROTO_TCP) &&
		 !(ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP))
		decision(&d, CLAWKER_V_DENIED, CLAWKER_R_PROTOCOL);
	else
		return CLAWKER_PASS;
	s.cgroup_id = agent_of_sock(ctx);
	/* Programs that try MPTCP first fall back to TCP on this errno, and only on this one. */
	return deny_socket(&s, &nowhere, &d, ctx->protocol == IPPROTO_MPTCP ? EPROTONOSUPPORT : EACCES);
}

/*
 * Options that put headers into packets which routers obey (source routes, routing headers), that
 * lend a socket somebody else's address, or that pretend to be trusted. SO_BINDTODEVICE is not
 * among them: where a packet leaves is judged packet by packet.
 */
static __always_inline bool forbidden_option(int level, int name)
{
	switch (level) {
	case SOL_SOCKET:
		return name == SO_MARK;
	case IPPROTO_IP:
		return name == IP_OPTIONS || name == IP_TRANSPARENT;
	case IPPROTO_IPV6:
		return name == IPV6_HOPOPTS || name == IPV6_RTHDRDSTOPTS || name == IPV6_RTHDR ||
		       name == IPV6_DSTOPTS || name == IPV6_TRANSPARENT ||
		       (name >= IPV6_2292HOPOPTS && name <= IPV6_2292PKTOPTIONS);
	}
	return false;
}

SEC("cgroup/setsockopt")
int clawker_setsockopt(struct bpf_sockopt *ctx)
{
	struct clawker_decision d = { .rule = CLAWKER_NO_RULE };
	struct clawker_want option = {};
	struct clawker_subject s = { .hook = CLAWKER_H_SETSOCKOPT };
	struct bpf_sock *sk = ctx->sk;

	if (!forbidden_option(ctx->level, ctx->optname)) {
		/* The value is not read: without this the kernel refuses options longer than a page. */
		if (ctx->optlen > 4096)
			ctx->optlen = 0;
		return CLAWKER_PASS;
	}
	s.cgroup_id = agent_of_option(ctx);
	if (sk) {
		s.family = (__u8)sk->family;
		s.type = (__u8)sk->type;
		s.protocol = sk->protocol > 255 ? 255 : (__u8)sk->protocol;
	}
	option.port = (__u16)ctx->optname;
	d.proxy_port = (__u16)ctx->level;
	decision(&d, CLAWKER_V_DENIED, CLAWKER_R_SOCKET_OPTION);
	return deny_socket(&s, &option, &d, EACCES);
}

#endif
