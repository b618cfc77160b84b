// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * level.bpf.c - how deep a cgroup really is. In a container the hierarchy is seen through a cgroup
 * namespace, whose root may be anywhere; `clawker_agent_level` has to count from the real one.
 */
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

struct clawker_level_query {
	__u64 cgroup_id;
};

/* Kernel 6.1 (commit fda01efc6160); both release and lookup are checked by the verifier. */
extern struct cgroup *bpf_cgroup_from_id(__u64 id) __ksym;
extern void bpf_cgroup_release(struct cgroup *cgroup) __ksym;

/* Returns the level, -1 when there is no such cgroup. */
SEC("syscall")
int clawker_level(struct clawker_level_query *query)
{
	struct cgroup *cgroup = bpf_cgroup_from_id(query->cgroup_id);
	int level;

	if (!cgroup)
		return -1;
	level = cgroup->level;
	bpf_cgroup_release(cgroup);
	return level;
}
