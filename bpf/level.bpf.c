// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * level.bpf.c - where a cgroup really is, and whether somebody lives in it. In a container the
 * hierarchy is seen through a cgroup namespace, whose root may be anywhere, or not at all;
 * `clawker_agent_level` has to count from the real root.
 */
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define CLAWKER_LEVELS 32 /* deeper ones are not told; nobody nests agents like that */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct cgroup___populated {
	int nr_populated_csets;
	int nr_populated_domain_children;
	int nr_populated_threaded_children;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct task_struct {
	struct css_set *cgroups;
};

#pragma clang attribute pop

/* Written back to the caller. */
struct clawker_level_query {
	__u64 cgroup_id; /* 0: the caller's own */
	__u64 populated; /* processes live in it or below it */
	__u64 line[CLAWKER_LEVELS]; /* ids from the root down to itself */
};

/* Kernel 6.1 (commit fda01efc6160); both release and lookup are checked by the verifier. */
extern struct cgroup *bpf_cgroup_from_id(__u64 id) __ksym;
extern void bpf_cgroup_release(struct cgroup *cgroup) __ksym;

static __always_inline __u64 own_id(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
}

static __always_inline __u64 id_at(struct cgroup *cgroup, int level)
{
	struct cgroup *above = NULL;

	if (bpf_probe_read_kernel(&above, sizeof(above),
				  (void *)cgroup + bpf_core_field_offset(cgroup->ancestors) + level * sizeof(above)))
		return 0;
	return BPF_CORE_READ(above, kn, id);
}

/* Returns the level, -1 when there is no such cgroup or no longer. */
SEC("syscall")
int clawker_level(struct clawker_level_query *query)
{
	struct cgroup *cgroup = bpf_cgroup_from_id(query->cgroup_id ? query->cgroup_id : own_id());
	struct cgroup___populated *state = (void *)cgroup;
	int level;

	if (!cgroup)
		return -1;
	level = cgroup->level;
	query->populated = BPF_CORE_READ(state, nr_populated_csets) ||
			   BPF_CORE_READ(state, nr_populated_domain_children) ||
			   BPF_CORE_READ(state, nr_populated_threaded_children);
	/* Unrolled: a context is only written at places that are known beforehand. */
#pragma unroll
	for (int i = 0; i < CLAWKER_LEVELS; i++)
		query->line[i] = i <= level ? id_at(cgroup, i) : 0;
	bpf_cgroup_release(cgroup);
	return level;
}
