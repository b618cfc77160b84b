/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * kernel.h - the few kernel structures the programs look into, relocated at load (CO-RE).
 *
 * Only fields that are read are declared; the loader matches them with the running kernel's BTF,
 * so no generated vmlinux.h is needed.
 */
#ifndef CLAWKER_KERNEL_H
#define CLAWKER_KERNEL_H

#include <linux/bpf.h>
#include <linux/types.h>
#include <stdbool.h>
#include <stddef.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>

/* What every hook returns. */
enum clawker_return { CLAWKER_REFUSE = 0, CLAWKER_PASS = 1 };

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define SOL_SOCKET 1
#define SO_MARK 36
#define IPPROTO_IP 0
#define IP_OPTIONS 4
#define IP_TRANSPARENT 19
#define IPV6_2292HOPOPTS 3
#define IPV6_2292PKTOPTIONS 6
#define IPV6_HOPOPTS 54
#define IPV6_RTHDRDSTOPTS 55
#define IPV6_RTHDR 57
#define IPV6_DSTOPTS 59
#define IPV6_TRANSPARENT 75
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_IPV6 41
#define IPPROTO_MPTCP 262
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD
#define EACCES 13
#define ECONNREFUSED 111
#define EPROTONOSUPPORT 93
#define LOOPBACK_IFINDEX 1 /* in every network namespace */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct kernfs_node {
	__u64 id;
};

struct cgroup {
	int level;
	struct kernfs_node *kn;
	struct cgroup *ancestors[];
};

struct sock_cgroup_data {
	struct cgroup *cgroup;
};

struct sock {
	struct sock_cgroup_data sk_cgrp_data;
};

struct bpf_sock_addr_kern {
	struct sock *sk;
};

struct bpf_sockopt_kern {
	struct sock *sk;
};

#pragma clang attribute pop

/* Gives the kernel's own view of a program's context (kernel 6.2, commit fd264ca02094). */
extern void *bpf_cast_to_kern_ctx(void *obj) __ksym;

#endif
