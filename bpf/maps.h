/* SPDX-License-Identifier: GPL-2.0-only OR MIT */
/*
 * maps.h - every map. Pinned ones live in the pin directory under their own name; the manager
 * removes them in `flush`. docs/bpf.md is the same table, and a test compares the names.
 */
#ifndef CLAWKER_MAPS_H
#define CLAWKER_MAPS_H

#include "kernel.h"
#include "clawker_abi.h"

/* One level below the agents' parent cgroup, or a container's own level; set by the loader before load. */
SEC(".rodata.level") const volatile __u32 clawker_agent_level = 1;

/* cgroup id -> config. Written by the manager, read by every program, removed on death. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct clawker_config);
} container_map SEC(".maps");

/* (agent, address) -> names. Written by the gate before it answers (I7), read by socket hooks. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct clawker_name_key);
	__type(value, struct clawker_name_value);
} dns_cache SEC(".maps");

/*
 * (generation, policy, identity, port, protocol) -> what to do. Written by the manager. The rows'
 * memory (25 MiB) is there from the start: fetching it row by row made a new generation of 10,000
 * take 10 ms instead of 3. A deleted row may be given out again at once, as it may without (6.1).
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 262144);
	__type(key, struct clawker_route_key);
	__type(value, struct clawker_route_value);
} route_map SEC(".maps");

/* (generation, policy, protocol, prefix) -> spans. Written by the manager. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct clawker_cidr_key);
	__type(value, struct clawker_cidr_value);
} cidr_map SEC(".maps");

/* Proxy ports a policy's packets may go to. Written by the manager, read by the packet backstop. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct clawker_proxy_port_key);
	__type(value, __u32);
} proxy_port_map SEC(".maps");

/* Addresses no rule opens (R12). Written by the manager at start and when interfaces change. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, 4096);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct clawker_reserved_key);
	__type(value, __u32);
} reserved_map SEC(".maps");

/* Published ports. Written by the manager on enrolment. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct clawker_inbound_key);
	__type(value, __u32);
} inbound_map SEC(".maps");

/* Connections an admitted SYN opened; the kernel evicts the oldest. Value: ktime ns. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct clawker_flow_key);
	__type(value, __u64);
} inbound_flow SEC(".maps");

/* Sequence numbers and budgets of an agent. Row made by the manager; row 0 is for the not enrolled. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, struct clawker_state);
} state_map SEC(".maps");

/* Exact decision counters. Full: the agent's overflow row counts, then `error_map`. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct clawker_metric_key);
	__type(value, __u64);
} metrics_map SEC(".maps");

/* Failures of helpers by site and errno (clawker_abi.h). */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CLAWKER_ERROR_ROWS);
	__type(key, __u32);
	__type(value, __u64);
} error_map SEC(".maps");

/* Switches: one row. Written by the manager. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct clawker_control);
} control SEC(".maps");

/* What a socket asked for before it was redirected; goes with the socket, so no quota is needed. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct clawker_socket);
} flow_map SEC(".maps");

/* Decision records, 4 MiB. Pinned so that a restarted manager loses none. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4 * 1024 * 1024);
} events SEC(".maps");

#endif
