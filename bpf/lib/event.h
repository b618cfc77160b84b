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
	__u8 task;  /* the current task is the one that asked: uid and pid mean something */
	__u8 quiet; /* counted and numbered, but not written: an equal record was just written */
	__u8 pad;
};

static __always_inline void count_error(__u32 site, long rc)
{
	__u32 row = site * CLAWKER_ERRNOS + (rc >= 0 ? 0 : rc > -CLAWKER_ERRNOS ? -rc : CLAWKER_ERRNOS - 1);
	__u64 *count = bpf_map_lookup_elem(&error_map, &row);

	if (count)
		__sync_fetch_and_add(count, 1);
}

/* The agent's running counters; those of nobody for a cgroup without a row of its own. */
static __always_inline struct clawker_state *state_of(__u64 *cgroup_id)
{
	struct clawker_state *state = bpf_map_lookup_elem(&state_map, cgroup_id);

	if (state)
		return state;
	*cgroup_id = 0;
	return bpf_map_lookup_elem(&state_map, cgroup_id);
}

/* Adds one to a row that is missing, making it. Negative errno when there is no room. */
static __always_inline long count_new(struct clawker_state *state, const struct clawker_metric_key *key)
{
	__u64 one = 1, *count;
	long rc = bpf_map_update_elem(&metrics_map, key, &one, BPF_NOEXIST);

	if (!rc) {
		__sync_fetch_and_add(&state->metric_rows, 1);
		return 0;
	}
	/* Another CPU may have made it meanwhile. */
	count = bpf_map_lookup_elem(&metrics_map, key);
	if (count)
		__sync_fetch_and_add(count, 1);
	return count ? 0 : rc;
}

static __always_inline void count_decision(struct clawker_state *state, __u64 cgroup_id, __u16 port,
					   const struct clawker_decision *d)
{
	struct clawker_metric_key key = {
		.cgroup_id = cgroup_id,
		.identity = d->identity,
		.port_bucket = port < CLAWKER_WELL_KNOWN_PORTS || d->proxy_port ? port : 0,
		.verdict = d->verdict,
		.reason = d->reason,
	};
	__u64 *count = bpf_map_lookup_elem(&metrics_map, &key);
	long rc;

	if (!count) {
		if (state->metric_rows < CLAWKER_METRIC_ROWS && !count_new(state, &key))
			return;
		key.identity = 0;
		key.port_bucket = 0;
		count = bpf_map_lookup_elem(&metrics_map, &key);
	}
	if (count) {
		/* Atomic although the value is this CPU's own: a softirq may interrupt. */
		__sync_fetch_and_add(count, 1);
		return;
	}
	rc = count_new(state, &key);
	if (rc) {
		__sync_fetch_and_add(&state->uncounted, 1);
		count_error(CLAWKER_S_METRIC, rc);
	}
}

static __always_inline __u32 budget_limit(__u32 budget)
{
	struct clawker_control *now = switches();
	__u32 limit = now && budget < CLAWKER_BUDGETS ? now->budget[budget] : 0;

	if (limit)
		return limit;
	return budget == CLAWKER_B_DENY	    ? CLAWKER_BUDGET_DENY
	       : budget == CLAWKER_B_BYPASS ? CLAWKER_BUDGET_BYPASS
					    : CLAWKER_BUDGET_ALLOW;
}

/* False when this second's budget for such records is spent. */
static __always_inline bool within_budget(struct clawker_state *state, __u32 budget, __u64 now_ns)
{
	if (budget >= CLAWKER_BUDGETS) /* for the verifier */
		return false;
	if (now_ns - state->window_ns[budget] > CLAWKER_SECOND_NS) {
		/* Two CPUs may both start a window: the budget is a rate limit, not an account. */
		state->window_ns[budget] = now_ns;
		state->used[budget] = 0;
	}
	return __sync_fetch_and_add(&state->used[budget], 1) < budget_limit(budget);
}

/*
 * `now_ns` is the coarse clock where the hook has it, which is all but setsockopt. It moves with the
 * timer's tick, a millisecond or four, for a tenth of the precise one's price, and is near enough for a
 * budget and a record's time; what orders an agent's records is their sequence.
 */
static __always_inline void record(const struct clawker_subject *s, const struct clawker_want *w,
				   const struct clawker_decision *d, __u64 now_ns)
{
	__u32 budget = d->verdict == CLAWKER_V_DENIED	  ? CLAWKER_B_DENY
		       : d->verdict == CLAWKER_V_BYPASSED ? CLAWKER_B_BYPASS
							  : CLAWKER_B_ALLOW;
	__u64 counted = s->cgroup_id, sequence;
	struct clawker_state *state = state_of(&counted);
	struct clawker_control *now = switches();
	struct clawker_event *event;

	if (!state) {
		count_error(CLAWKER_S_STATE, 0);
		return;
	}
	count_decision(state, counted, w->port, d);
	sequence = __sync_fetch_and_add(&state->sequence, 1) + 1;
	if (s->quiet || !within_budget(state, budget, now_ns)) {
		__sync_fetch_and_add(&state->suppressed[budget], 1);
		return;
	}
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		count_error(CLAWKER_S_RING, 0);
		return;
	}
	event->ktime_ns = now_ns;
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

/* Counts a decision that needs no record of its own. */
static __always_inline void count_only(__u64 cgroup_id, const struct clawker_want *w, const struct clawker_decision *d)
{
	struct clawker_state *state = state_of(&cgroup_id);

	if (state)
		count_decision(state, cgroup_id, w->port, d);
	else
		count_error(CLAWKER_S_STATE, 0);
}

#endif
