// SPDX-License-Identifier: GPL-2.0-only OR MIT
/*
 * clawker.bpf.c - the one object. Its programs are attached with BPF_F_ALLOW_MULTI to the agents'
 * parent cgroup, or to a container's own, so every socket they see belongs to an agent, enrolled or not.
 *
 * Entry points (hooks/) read their context, ask lib/, write the answer back and return a named
 * verdict. There is no bind hook: a bind decides nothing, what may come in is decided by SYN; and
 * none for sock_release: per-socket state is socket storage, which dies with the socket.
 */
#include "hooks/destination.h"
#include "hooks/creation.h"
#include "hooks/traffic.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";
