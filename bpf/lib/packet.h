/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * packet.h - what the packet backstop reads of a packet, and inbound connections.
 *
 * Only plain TCP and UDP directly behind an option-free IPv4 or bare IPv6 header is judged;
 * whatever else leaves or reaches an agent's socket is dropped with its reason.
 */
#ifndef CLAWKER_PACKET_H
#define CLAWKER_PACKET_H

#include "decide.h"

#define TCP_FLAGS_OFFSET 13
#define TCP_SYN 0x02
#define TCP_ACK 0x10
#define IP_FRAGMENT_BITS 0x3fff /* more fragments, or an offset */

struct clawker_packet {
	struct clawker_want peer; /* the other side */
	__u8 local[16];		  /* this side */
	__u16 local_port;
	__u8 l4;
	__u8 family;
	__u8 opens; /* TCP SYN without ACK */
	__u8 pad[3];
};

struct clawker_ip4 {
	__u8 version_ihl;
	__u8 tos;
	__be16 length;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__be16 check;
	__u32 source;
	__u32 destination;
};

struct clawker_ip6 {
	__be32 version_class_flow;
	__be16 length;
	__u8 next;
	__u8 hops;
	__u8 source[16];
	__u8 destination[16];
};

/* Returns CLAWKER_R_NONE, or why the packet cannot be judged. */
static __always_inline __u8 parse_packet(struct __sk_buff *skb, struct clawker_packet *p, bool outgoing)
{
	__be16 ports[2] = {};
	__u32 offset;

	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct clawker_ip4 ip;

		p->family = AF_INET;
		if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
			return CLAWKER_R_MALFORMED;
		addr_set4(p->peer.addr, outgoing ? ip.destination : ip.source);
		addr_set4(p->local, outgoing ? ip.source : ip.destination);
		p->l4 = ip.protocol;
		if (ip.version_ihl != 0x45)
			return CLAWKER_R_IP_OPTIONS;
		if (ip.fragment & bpf_htons(IP_FRAGMENT_BITS))
			return CLAWKER_R_FRAGMENT;
		offset = sizeof(ip);
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct clawker_ip6 ip;

		p->family = AF_INET6;
		if (bpf_skb_load_bytes(skb, 0, &ip, sizeof(ip)))
			return CLAWKER_R_MALFORMED;
		__builtin_memcpy(p->peer.addr, outgoing ? ip.destination : ip.source, 16);
		__builtin_memcpy(p->local, outgoing ? ip.source : ip.destination, 16);
		p->l4 = ip.next;
		offset = sizeof(ip);
	} else {
		return CLAWKER_R_FAMILY;
	}
	if (p->l4 != IPPROTO_TCP && p->l4 != IPPROTO_UDP)
		return CLAWKER_R_PROTOCOL;
	if (bpf_skb_load_bytes(skb, offset, ports, sizeof(ports)))
		return CLAWKER_R_MALFORMED;
	p->peer.l4 = p->l4;
	p->peer.port = bpf_ntohs(outgoing ? ports[1] : ports[0]);
	p->local_port = bpf_ntohs(outgoing ? ports[0] : ports[1]);
	if (p->l4 == IPPROTO_TCP) {
		__u8 flags = 0;

		if (bpf_skb_load_bytes(skb, offset + TCP_FLAGS_OFFSET, &flags, 1))
			return CLAWKER_R_MALFORMED;
		p->opens = (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
	}
	return CLAWKER_R_NONE;
}

static __always_inline void flow_key(struct clawker_flow_key *key, __u64 cgroup_id, const struct clawker_packet *p)
{
	key->cgroup_id = cgroup_id;
	__builtin_memcpy(key->remote, p->peer.addr, 16);
	key->remote_port = p->peer.port;
	key->local_port = p->local_port;
	key->l4 = p->l4;
}

/* Whether `inbound_map` lets this remote address connect to this port of the agent. */
static __always_inline bool may_enter(const struct clawker_config *cfg, __u64 cgroup_id, const struct clawker_packet *p)
{
	struct clawker_inbound_key key = { .cgroup_id = cgroup_id, .port = p->local_port };
	__u32 *from;

	if (p->l4 != IPPROTO_TCP)
		return false;
	from = bpf_map_lookup_elem(&inbound_map, &key);
	if (!from)
		return false;
	if (*from == CLAWKER_IN_CP)
		return addr_equal(p->peer.addr, cfg->cp_addr);
	/* R16: quarantine closes what the owner published; the control plane still gets in. */
	if (cfg->flags & CLAWKER_F_QUARANTINE)
		return false;
	if (*from == CLAWKER_IN_HOST)
		return addr_equal(p->peer.addr, cfg->host_addr);
	return *from == CLAWKER_IN_ANY;
}

enum clawker_entry {
	CLAWKER_E_NO = 0,
	CLAWKER_E_NEW,	 /* a SYN that was just admitted: record it */
	CLAWKER_E_KNOWN, /* part of a connection whose SYN was admitted */
};

/*
 * Inbound connections, both directions. A connection is what an admitted ingress SYN created (R9),
 * for as long as its port stays published: an outgoing SYN never belongs to one.
 */
static __always_inline enum clawker_entry inbound(const struct clawker_config *cfg, __u64 cgroup_id,
						  const struct clawker_packet *p, bool outgoing, long *rc)
{
	struct clawker_flow_key flow = {};
	__u64 now = bpf_ktime_get_coarse_ns();

	*rc = 0;
	if ((outgoing && p->opens) || !may_enter(cfg, cgroup_id, p))
		return CLAWKER_E_NO;
	flow_key(&flow, cgroup_id, p);
	if (bpf_map_lookup_elem(&inbound_flow, &flow))
		return CLAWKER_E_KNOWN;
	if (!p->opens)
		return CLAWKER_E_NO;
	*rc = bpf_map_update_elem(&inbound_flow, &flow, &now, BPF_ANY);
	return *rc ? CLAWKER_E_NO : CLAWKER_E_NEW;
}

#endif
