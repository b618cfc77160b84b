/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * event.h - counting and recording decisions. Never changes one (I12): a full ring or map is
 * counted in `error_map` or the agent's state and shows as a gap in its sequence.
 */
#ifndef CLAWKER_EVENT_H
#define CLAWKER_EVENT_H

#include "decide.h"

#define CLAWKER_BUDGET_DENY 10000
#define CLAWKER_BUDGET_BYPASS 20000
#define CLAWKER_BUDGET_ALLOW 20000
#define CLAWKER_SECOND_NS 1000000000ull
#define CLAWKER_WELL_KNOWN_PORTS 1024

/* What a record says of the socket, filled in by the entry points. */
struct clawker_subject {
	__u64 cgroup_id;
	__u64 cookie;
	__u32 policy;
	__u8 hook;
	__u8 family;
	__u8 protocol;
	__u8 type;
	__u8 flags;
	__u8 task; /* the current task is the one that asked: uid and pid mean something */
	__u8 pad[2];
};

static __always_inline void count_error(__u32 site)
{
	__u64 *count = bpf_map_lookup_elem(&error_map, &site);

	if (count)
		(*count)++;
}

static __always_inline void count_decision(const struct clawker_subject *s, const struct clawker_want *w,
					   const struct clawker_decision *d)
{
	struct clawker_metric_key key = {
		.cgroup_id = s->cgroup_id,
		.identity = d->identity,
		.port_bucket = w->port < CLAWKER_WELL_KNOWN_PORTS || d->proxy_port ? w->port : 0,
		.verdict = d->verdict,
		.reason = d->reason,
	};
	__u64 one = 1, *count = bpf_map_lookup_elem(&metrics_map, &key);

	if (!count) {
		if (!bpf_map_update_elem(&metrics_map, &key, &one, BPF_NOEXIST))
			return;
		key.identity = 0;
		key.port_bucket = 0;
		count = bpf_map_lookup_elem(&metrics_map, &key);
		if (!count) {
			if (bpf_map_update_elem(&metrics_map, &key, &one, BPF_NOEXIST))
				count_error(CLAWKER_S_METRIC);
			return;
		}
	}
	(*count)++;
}

static __always_inline __u32 budget_limit(__u32 budget)
{
	struct clawker_control *now = switches();
	__u32 limit = now && budget < CLAWKER_BUDGETS ? now->budget[budget] : 0;

	if (limit)
		return limit;
	return budget == CLAWKER_B_DENY ? CLAWKER_BUDGET_DENY :
	       budget == CLAWKER_B_BYPASS ? CLAWKER_BUDGET_BYPASS : CLAWKER_BUDGET_ALLOW;
}

/* Takes a sequence number; false when this second's budget for such records is spent. */
static __always_inline bool take_number(__u64 cgroup_id, __u32 budget, __u64 now, __u64 *sequence)
{
	struct clawker_state *state = bpf_map_lookup_elem(&state_map, &cgroup_id);
	__u64 nobody = 0;

	if (!state)
		state = bpf_map_lookup_elem(&state_map, &nobody);
	if (!state || budget >= CLAWKER_BUDGETS) {
		count_error(CLAWKER_S_STATE);
		return false;
	}
	*sequence = __sync_fetch_and_add(&state->sequence, 1) + 1;
	if (now - state->window_ns[budget] > CLAWKER_SECOND_NS) {
		/* Two CPUs may both start a window: the budget is a rate limit, not an account. */
		state->window_ns[budget] = now;
		state->used[budget] = 0;
	}
	if (__sync_fetch_and_add(&state->used[budget], 1) < budget_limit(budget))
		return true;
	__sync_fetch_and_add(&state->suppressed[budget], 1);
	return false;
}

static __always_inline void record(const struct clawker_subject *s, const struct clawker_want *w,
				   const struct clawker_decision *d)
{
	__u32 budget = d->verdict == CLAWKER_V_DENIED ? CLAWKER_B_DENY :
		       d->verdict == CLAWKER_V_BYPASSED ? CLAWKER_B_BYPASS : CLAWKER_B_ALLOW;
	struct clawker_control *now = switches();
	struct clawker_event *event;
	__u64 sequence = 0, ktime_ns = bpf_ktime_get_ns();

	count_decision(s, w, d);
	if (!take_number(s->cgroup_id, budget, ktime_ns, &sequence))
		return;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		count_error(CLAWKER_S_RING);
		return;
	}
	event->ktime_ns = ktime_ns;
	event->cgroup_id = s->cgroup_id;
	event->sequence = sequence;
	event->cookie = s->cookie;
	__builtin_memcpy(event->addr, w->addr, 16);
	event->identity = d->identity;
	event->policy = s->policy;
	event->rule = d->rule;
	event->uid = s->task ? (__u32)bpf_get_current_uid_gid() : 0;
	event->pid = s->task ? (__u32)(bpf_get_current_pid_tgid() >> 32) : 0;
	event->port = w->port;
	event->proxy_port = d->proxy_port;
	event->verdict = d->verdict;
	event->reason = d->reason;
	event->hook = s->hook;
	event->family = s->family;
	event->protocol = s->protocol;
	event->type = s->type;
	event->flags = s->flags;
	__builtin_memset(event->pad, 0, sizeof(event->pad));
	bpf_ringbuf_submit(event, now && now->wakeup ? 0 : BPF_RB_NO_WAKEUP);
}

#endif
