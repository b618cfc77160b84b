/* SPDX-License-Identifier: MIT */
/*
 * bpf_shim.h - the little of libbpf that the control plane needs, with one error convention:
 * 0 (or a descriptor, or a count) or a negative errno. No function keeps a pointer of the caller.
 */
#ifndef CLAWKER_BPF_SHIM_H
#define CLAWKER_BPF_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include <linux/bpf.h>

#include "clawker_abi.h"

struct bpf_object;
struct ring_buffer;

struct shim_ring {
	struct ring_buffer *ring;
	struct clawker_event *into;
	size_t room;
	size_t count;
};

/* Verifier and loader messages of the calling thread's last open or load. */
const char *shim_log(void);
int shim_version(unsigned int *major, unsigned int *minor);

int shim_open(const char *path, struct bpf_object **object);
int shim_prepare(struct bpf_object *object, const char *pin_dir, uint32_t agent_level, const char *sized_map,
		 uint32_t max_entries);
int shim_load(struct bpf_object *object);
int shim_pin_maps(struct bpf_object *object);
void shim_close(struct bpf_object *object);
int shim_map_fd(struct bpf_object *object, const char *name);
int shim_program_fd(struct bpf_object *object, const char *name);

int shim_attach(int program_fd, int cgroup_fd, uint32_t type);
int shim_replace(int link_fd, int program_fd);
int shim_pin(int fd, const char *path);
int shim_get(const char *path);
/* Cgroup 0: it is gone and so is what held its programs, its last socket; or the link was detached. */
int shim_link_info(int link_fd, uint64_t *cgroup_id, uint32_t *program_id);
int shim_program_id(int program_fd, uint32_t *program_id);

int shim_update(int map, const void *key, const void *value, uint64_t flags);
int shim_lookup(int map, const void *key, void *value);
int shim_delete(int map, const void *key);
int shim_next_key(int map, const void *key, void *next);
/* Sets `done` to how many entries were written, also on failure. */
int shim_update_batch(int map, const void *keys, const void *values, uint32_t count, uint32_t *done);
int shim_delete_batch(int map, const void *keys, uint32_t count, size_t key_size, uint32_t *done);
int shim_possible_cpus(void);

int shim_ring_open(struct shim_ring *ring, int map);
int shim_ring_fd(const struct shim_ring *ring);
int shim_ring_drain(struct shim_ring *ring, struct clawker_event *into, size_t room);
void shim_ring_close(struct shim_ring *ring);

/* The program may write to `context`. */
int shim_run(int program_fd, void *context, uint32_t size, uint32_t *answer);

#endif
