/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * address.h - questions about 16-byte addresses (network order, IPv4 mapped) that need no map.
 */
#ifndef CLAWKER_ADDRESS_H
#define CLAWKER_ADDRESS_H

#include "../kernel.h"

static __always_inline bool addr_equal(const __u8 *a, const __u8 *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
}

static __always_inline void addr_set4(__u8 *a, __u32 ip4_be)
{
	__u32 *words = (__u32 *)a;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = ip4_be;
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

/* 127.0.0.11: the engine's resolver, whose other end is not the agent's (threat 33). */
static __always_inline bool addr_is_engine_resolver(const __u8 *a)
{
	const __u32 *w = (const __u32 *)a;

	return addr_is_v4(a) && w[3] == bpf_htonl(0x7f00000b);
}

/* Multicast and the limited broadcast: one packet, many receivers, none of them named by a rule. */
static __always_inline bool addr_is_group(const __u8 *a)
{
	const __u32 *w = (const __u32 *)a;

	if (addr_is_v4(a))
		return (a[12] & 0xf0) == 0xe0 || w[3] == 0xffffffff;
	return a[0] == 0xff;
}

/*
 * The IPv4 address inside a NAT64 (64:ff9b::/96) or 6to4 (2002::/16) one: a translator on the way
 * would deliver to it, so it is judged too (R12). False for every other address.
 */
static __always_inline bool addr_carried4(const __u8 *a, __u8 *carried)
{
	const __u32 *w = (const __u32 *)a;

	if (w[0] == bpf_htonl(0x0064ff9b) && w[1] == 0 && w[2] == 0) {
		addr_set4(carried, w[3]);
		return true;
	}
	if (a[0] == 0x20 && a[1] == 0x02) {
		addr_set4(carried, ((__u32)a[2] | (__u32)a[3] << 8 | (__u32)a[4] << 16 | (__u32)a[5] << 24));
		return true;
	}
	return false;
}

#endif
