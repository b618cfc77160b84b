/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * socket.h - whose socket this is, and what it asked for before it was redirected.
 *
 * The agent is the ancestor of the socket's own cgroup at `clawker_agent_level`; the current
 * task's cgroup would be wrong for a socket that was handed over.
 */
#ifndef CLAWKER_SOCKET_H
#define CLAWKER_SOCKET_H

#include "decide.h"

/* 0 = the socket is in the agents' parent itself: no agent, so nothing is enrolled. */
static __always_inline __u64 agent_of(struct sock *sk)
{
	struct cgroup *cgroup, *agent;
	struct kernfs_node *node;
	int level;

	cgroup = BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	if (!cgroup)
		return 0;
	level = BPF_CORE_READ(cgroup, level);
	if (level < (int)clawker_agent_level)
		return 0;
	if (bpf_probe_read_kernel(&agent, sizeof(agent),
				  (void *)cgroup + bpf_core_field_offset(cgroup->ancestors) +
					  clawker_agent_level * sizeof(agent)))
		return 0;
	node = BPF_CORE_READ(agent, kn);
	return BPF_CORE_READ(node, id);
}

static __always_inline __u64 agent_of_address(struct bpf_sock_addr *ctx)
{
	struct bpf_sock_addr_kern *kern = bpf_cast_to_kern_ctx(ctx);

	return agent_of(BPF_CORE_READ(kern, sk));
}

static __always_inline __u64 agent_of_sock(struct bpf_sock *ctx)
{
	return agent_of(bpf_cast_to_kern_ctx(ctx));
}

static __always_inline __u64 agent_of_option(struct bpf_sockopt *ctx)
{
	struct bpf_sockopt_kern *kern = bpf_cast_to_kern_ctx(ctx);

	return agent_of(BPF_CORE_READ(kern, sk));
}

/*
 * Keep what was asked for. `connected`: the socket gets a peer. False when there is no memory:
 * the flow is then refused rather than redirected without a way back.
 */
static __always_inline bool remember(struct bpf_sock_addr *ctx, const struct clawker_want *asked, const __u8 *real,
				     __u16 real_port, bool connected)
{
	struct clawker_socket *storage;
	__u32 slot = CLAWKER_NAT;

	if (!ctx->sk)
		return false;
	storage = bpf_sk_storage_get(&flow_map, ctx->sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!storage)
		return false;
	if (connected) {
		__builtin_memcpy(storage->peer.addr, asked->addr, 16);
		storage->peer.port = asked->port;
	}
	if (asked->l4 != IPPROTO_UDP)
		return true;
	for (__u32 i = 0; i < CLAWKER_NAT; i++) {
		if (storage->nat[i].real.port == real_port && addr_equal(storage->nat[i].real.addr, real)) {
			slot = i;
			break;
		}
	}
	if (slot >= CLAWKER_NAT)
		slot = storage->next++ % CLAWKER_NAT;
	if (slot >= CLAWKER_NAT) /* for the verifier */
		return false;
	__builtin_memcpy(storage->nat[slot].real.addr, real, 16);
	storage->nat[slot].real.port = real_port;
	__builtin_memcpy(storage->nat[slot].asked.addr, asked->addr, 16);
	storage->nat[slot].asked.port = asked->port;
	return true;
}

/* A connect that was not redirected: an earlier redirect of the same socket no longer speaks for it. */
static __always_inline void remember_direct(struct bpf_sock_addr *ctx)
{
	struct clawker_socket *storage;

	if (!ctx->sk)
		return;
	storage = bpf_sk_storage_get(&flow_map, ctx->sk, NULL, 0);
	if (storage)
		storage->peer.port = 0;
}

static __always_inline bool asked_for(struct bpf_sock_addr *ctx, const struct clawker_want *from,
				      struct clawker_endpoint *asked)
{
	struct clawker_socket *storage;

	if (!ctx->sk)
		return false;
	storage = bpf_sk_storage_get(&flow_map, ctx->sk, NULL, 0);
	if (!storage)
		return false;
	for (int i = 0; i < CLAWKER_NAT; i++) {
		if (storage->nat[i].real.port == from->port && addr_equal(storage->nat[i].real.addr, from->addr)) {
			*asked = storage->nat[i].asked;
			return asked->port != 0;
		}
	}
	return false;
}

static __always_inline bool peer_of(struct bpf_sock_addr *ctx, struct clawker_endpoint *peer)
{
	struct clawker_socket *storage;

	if (!ctx->sk)
		return false;
	storage = bpf_sk_storage_get(&flow_map, ctx->sk, NULL, 0);
	if (!storage || !storage->peer.port)
		return false;
	*peer = storage->peer;
	return true;
}

#endif
