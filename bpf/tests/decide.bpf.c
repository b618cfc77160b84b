// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * decide.bpf.c - the decisions of lib/ as test runs with plain values: a case comes in as the bytes
 * of a packet and goes out the same way. Same headers, same maps, no hook. Never part of a wheel.
 *
 * SEC("tc") and not SEC("syscall"): syscall programs may sleep, and sleeping programs may not look
 * into an LPM trie (Linux 6.18).
 */
#include "../lib/event.h"
#include "../lib/packet.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* Input and output of every wrapper; tests/bpf/decisions.py lays it out, a test compares. */
struct clawker_case {
	__u8 link_header[16]; /* zero: no protocol the kernel would look into */
	__u64 cgroup_id;
	struct clawker_config config;
	struct clawker_want want; /* where to, or a packet's other side */
	__u16 local_port;
	__u8 enrolled; /* 0: there is no config */
	__u8 outgoing; /* a packet leaves */
	__u8 opens;    /* a packet is a SYN */
	__u8 quiet;
	__u8 pad[2];
	struct clawker_decision decision; /* in for `record`, else out */
	__u32 entry;			  /* out of `inbound`: enum clawker_entry */
	__u32 pad2;
};
CLAWKER_ASSERT_SIZE(struct clawker_case, 184);

/* BTF describes what a variable or a map refers to: tests read these layouts from it. */
const struct clawker_case *described_case __attribute__((unused));
const struct clawker_event *described_event __attribute__((unused));

enum { OK = 0, FAILED = 1 };

static __always_inline bool take(struct __sk_buff *skb, struct clawker_case *c)
{
	return bpf_skb_load_bytes(skb, 0, c, sizeof(*c)) == 0;
}

static __always_inline int give(struct __sk_buff *skb, const struct clawker_case *c)
{
	return bpf_skb_store_bytes(skb, 0, c, sizeof(*c), 0) ? FAILED : OK;
}

SEC("tc")
int clawker_flow(struct __sk_buff *skb)
{
	struct clawker_case c;

	if (!take(skb, &c))
		return FAILED;
	__builtin_memset(&c.decision, 0, sizeof(c.decision));
	decide_flow(&c.decision, c.enrolled ? &c.config : NULL, c.cgroup_id, &c.want);
	return give(skb, &c);
}

SEC("tc")
int clawker_packet(struct __sk_buff *skb)
{
	struct clawker_case c;

	if (!take(skb, &c))
		return FAILED;
	__builtin_memset(&c.decision, 0, sizeof(c.decision));
	decide_packet(&c.decision, &c.config, &c.want);
	return give(skb, &c);
}

SEC("tc")
int clawker_inbound(struct __sk_buff *skb)
{
	struct clawker_packet p = {};
	struct clawker_case c;
	long rc;

	if (!take(skb, &c))
		return FAILED;
	p.peer = c.want;
	p.local_port = c.local_port;
	p.l4 = c.want.l4;
	p.opens = c.opens;
	c.entry = inbound(&c.config, c.cgroup_id, &p, c.outgoing, &rc);
	return give(skb, &c);
}

SEC("tc")
int clawker_record(struct __sk_buff *skb)
{
	struct clawker_subject s = {};
	struct clawker_case c;

	if (!take(skb, &c))
		return FAILED;
	s.cgroup_id = c.cgroup_id;
	s.policy = c.config.policy;
	s.quiet = c.quiet;
	record(&s, &c.want, &c.decision, bpf_ktime_get_coarse_ns());
	return OK;
}
