/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * socket.h - whose socket this is, and what it asked for before it was redirected.
 *
 * The agent is the ancestor of the socket's own cgroup at `clawker_agent_level`; the current
 * task's cgroup would be wrong for a socket that was handed over. A container that is not below the
 * agents' parent brings programs of its own, attached to its cgroup and loaded with that cgroup's
 * level (ebpf/attachments.py): nothing here is different for it.
 */
#ifndef CLAWKER_SOCKET_H
#define CLAWKER_SOCKET_H

#include "event.h"

/* 0 = the socket is in the agents' parent itself: no agent, so nothing is enrolled. */
static __always_inline __u64 agent_of(struct sock *sk)
{
	struct cgroup *cgroup = sk->sk_cgrp_data.cgroup, *agent = NULL;
	int level = cgroup->level;
	long rc;

	if (level < (int)clawker_agent_level)
		return 0;
	if (level == (int)clawker_agent_level)
		return cgroup->kn->id;
	/* A cgroup inside the agent's. The verifier follows no pointer out of a flexible array: read it. */
	rc = bpf_probe_read_kernel(&agent, sizeof(agent),
				   (void *)cgroup + bpf_core_field_offset(cgroup->ancestors) +
					   clawker_agent_level * sizeof(agent));
	return rc ? 0 : BPF_CORE_READ(agent, kn, id);
}

static __always_inline __u64 agent_of_address(struct bpf_sock_addr *ctx)
{
	struct bpf_sock_addr_kern *kern = bpf_cast_to_kern_ctx(ctx);

	return agent_of(kern->sk);
}

static __always_inline __u64 agent_of_sock(struct bpf_sock *ctx)
{
	return agent_of(bpf_cast_to_kern_ctx(ctx));
}

static __always_inline __u64 agent_of_option(struct bpf_sockopt *ctx)
{
	struct bpf_sockopt_kern *kern = bpf_cast_to_kern_ctx(ctx);

	return agent_of(kern->sk);
}

enum clawker_memory {
	CLAWKER_M_NEW = 0, /* remembered */
	CLAWKER_M_KNOWN,   /* the same, for the same reason, was remembered before */
	CLAWKER_M_FAILED,  /* no memory: refuse rather than redirect without a way back */
};

static __always_inline bool same_endpoint(const struct clawker_endpoint *e, const __u8 *addr, __u16 port)
{
	return e->port == port && addr_equal(e->addr, addr);
}

/* Keeps, per datagram destination, what was asked, so that replies can be given back their source. */
static __always_inline enum clawker_memory remember_datagram(struct clawker_socket *storage,
							     const struct clawker_want *asked, const __u8 *real,
							     __u16 real_port, __u8 reason)
{
	__u32 slot = CLAWKER_NAT;
	struct clawker_nat *nat;

	for (__u32 i = 0; i < CLAWKER_NAT; i++) {
		if (same_endpoint(&storage->nat[i].real, real, real_port)) {
			slot = i;
			break;
		}
	}
	if (slot >= CLAWKER_NAT)
		slot = storage->next++ % CLAWKER_NAT;
	if (slot >= CLAWKER_NAT) /* for the verifier */
		return CLAWKER_M_FAILED;
	nat = &storage->nat[slot];
	if (same_endpoint(&nat->real, real, real_port) && same_endpoint(&nat->asked, asked->addr, asked->port) &&
	    nat->asked.reason == reason)
		return CLAWKER_M_KNOWN;
	__builtin_memcpy(nat->real.addr, real, 16);
	nat->real.port = real_port;
	__builtin_memcpy(nat->asked.addr, asked->addr, 16);
	nat->asked.port = asked->port;
	nat->asked.reason = reason;
	return CLAWKER_M_NEW;
}

/* Keeps what a redirected connect() asked for (getpeername), and for datagrams the way back. */
static __always_inline enum clawker_memory remember(struct bpf_sock_addr *ctx, const struct clawker_want *asked,
						    const __u8 *real, __u16 real_port, __u8 reason, bool connects,
						    __u32 policy)
{
	struct clawker_socket *storage = NULL;

	if (ctx->sk)
		storage = bpf_sk_storage_get(&flow_map, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!storage) {
		count_error(CLAWKER_S_STORAGE, 0);
		return CLAWKER_M_FAILED;
	}
	if (connects) {
		__builtin_memcpy(storage->peer.addr, asked->addr, 16);
		storage->peer.port = asked->port;
		storage->peer.policy = (__u16)policy;
	}
	if (asked->l4 != IPPROTO_UDP)
		return CLAWKER_M_NEW;
	return remember_datagram(storage, asked, real, real_port, reason);
}

/* A connect that was not redirected: an earlier redirect of the same socket no longer speaks for it. */
static __always_inline void forget_peer(struct bpf_sock_addr *ctx)
{
	struct clawker_socket *storage = ctx->sk ? bpf_sk_storage_get(&flow_map, ctx->sk, NULL, 0) : NULL;

	if (storage)
		storage->peer.port = 0;
}

static __always_inline bool asked_for(struct bpf_sock_addr *ctx, const struct clawker_want *from,
				      struct clawker_endpoint *asked)
{
	struct clawker_socket *storage = ctx->sk ? bpf_sk_storage_get(&flow_map, ctx->sk, NULL, 0) : NULL;

	if (!storage)
		return false;
	for (int i = 0; i < CLAWKER_NAT; i++) {
		if (same_endpoint(&storage->nat[i].real, from->addr, from->port)) {
			*asked = storage->nat[i].asked;
			return asked->port != 0;
		}
	}
	return false;
}

/*
 * A datagram sent on a connected IPv6 socket with a mapped peer passes the sendmsg hook with the
 * address that connect() was redirected to: judge what the application asked for then.
 */
static __always_inline void as_connected(struct bpf_sock_addr *ctx, struct clawker_want *w)
{
	struct clawker_socket *storage = ctx->sk ? bpf_sk_storage_get(&flow_map, ctx->sk, NULL, 0) : NULL;

	if (!storage || !storage->peer.port)
		return;
	for (int i = 0; i < CLAWKER_NAT; i++) {
		if (same_endpoint(&storage->nat[i].real, w->addr, w->port) &&
		    same_endpoint(&storage->nat[i].asked, storage->peer.addr, storage->peer.port)) {
			__builtin_memcpy(w->addr, storage->peer.addr, 16);
			w->port = storage->peer.port;
			return;
		}
	}
}

static __always_inline bool peer_of(struct bpf_sock_addr *ctx, struct clawker_endpoint *peer)
{
	struct clawker_socket *storage = ctx->sk ? bpf_sk_storage_get(&flow_map, ctx->sk, NULL, 0) : NULL;

	if (!storage || !storage->peer.port)
		return false;
	*peer = storage->peer;
	return true;
}

/*
 * Under which policy a connection was redirected, 0 for none. An agent that changes policy keeps the old
 * one's proxy ports for connections that exist (contract 7.6); what they no longer allow is cut (R13).
 */
static __always_inline __u32 redirected_under(struct __sk_buff *skb)
{
	struct clawker_socket *storage;
	struct bpf_sock *sk = skb->sk;

	if (!sk)
		return 0;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return 0;
	storage = bpf_sk_storage_get(&flow_map, sk, NULL, 0);
	return storage && storage->peer.port ? storage->peer.policy : 0;
}

/* Whether a record of this socket's packets being dropped for this reason was written within a second. */
static __always_inline bool drop_was_recorded(struct __sk_buff *skb, __u8 reason)
{
	struct bpf_sock *sk = skb->sk;
	struct clawker_socket *storage;
	__u32 bit = 1u << (reason & 31);
	__u64 now_ns = bpf_ktime_get_coarse_ns();

	if (!sk)
		return false;
	sk = bpf_sk_fullsock(sk);
	if (!sk)
		return false;
	storage = bpf_sk_storage_get(&flow_map, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!storage) {
		count_error(CLAWKER_S_STORAGE, 0);
		return false;
	}
	if (now_ns - storage->drops_ns > CLAWKER_SECOND_NS) {
		storage->drops_ns = now_ns;
		storage->drops = 0;
	}
	if (storage->drops & bit)
		return true;
	storage->drops |= bit;
	return false;
}

#endif
