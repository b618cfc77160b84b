// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * empty.bpf.c - programs that decide nothing, for benchmarks: what any program at the hook costs.
 */
#include "../kernel.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

SEC("cgroup/connect4")
int empty_connect4(struct bpf_sock_addr *ctx)
{
	return CLAWKER_PASS;
}

SEC("cgroup/connect6")
int empty_connect6(struct bpf_sock_addr *ctx)
{
	return CLAWKER_PASS;
}
