/* SPDX-License-Identifier: MIT */
#include "bpf_shim.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <bpf/bpf.h>
#include <bpf/libbpf.h>

#define LOG_BYTES 65536

static __thread char log_text[LOG_BYTES];
static __thread size_t log_used;

static int keep_log(enum libbpf_print_level level, const char *format, va_list arguments)
{
	int written;

	if (level == LIBBPF_DEBUG || log_used >= LOG_BYTES - 1)
		return 0;
	written = vsnprintf(log_text + log_used, LOG_BYTES - log_used, format, arguments);
	if (written > 0)
		log_used += (size_t)written < LOG_BYTES - log_used ? (size_t)written : LOG_BYTES - log_used - 1;
	return written;
}

const char *shim_log(void)
{
	return log_text;
}

int shim_version(unsigned int *major, unsigned int *minor)
{
	*major = libbpf_major_version();
	*minor = libbpf_minor_version();
	return 0;
}

int shim_open(const char *path, struct bpf_object **object)
{
	log_used = 0;
	log_text[0] = '\0';
	libbpf_set_print(keep_log);
	*object = bpf_object__open_file(path, NULL);
	if (!*object)
		return -errno;
	return 0;
}

int shim_prepare(struct bpf_object *object, const char *pin_dir, uint32_t agent_level, const char *sized_map,
		 uint32_t max_entries)
{
	struct bpf_map *map;
	char path[512];
	int rc;

	bpf_object__for_each_map(map, object) {
		const char *name = bpf_map__name(map);

		if (bpf_map__is_internal(map)) {
			if (strstr(name, "level")) {
				rc = bpf_map__set_initial_value(map, &agent_level, sizeof(agent_level));
				if (rc)
					return rc;
			}
			continue;
		}
		if (strcmp(name, sized_map) == 0) {
			rc = bpf_map__set_max_entries(map, max_entries);
			if (rc)
				return rc;
		}
		if (pin_dir) {
			if (snprintf(path, sizeof(path), "%s/%s", pin_dir, name) >= (int)sizeof(path))
				return -ENAMETOOLONG;
			rc = bpf_map__set_pin_path(map, path);
			if (rc)
				return rc;
		}
	}
	return 0;
}

int shim_load(struct bpf_object *object)
{
	log_used = 0;
	log_text[0] = '\0';
	return bpf_object__load(object);
}

int shim_pin_maps(struct bpf_object *object)
{
	return bpf_object__pin_maps(object, NULL);
}

void shim_close(struct bpf_object *object)
{
	bpf_object__close(object);
}

int shim_map_fd(struct bpf_object *object, const char *name)
{
	return bpf_object__find_map_fd_by_name(object, name);
}

int shim_program_fd(struct bpf_object *object, const char *name)
{
	struct bpf_program *program = bpf_object__find_program_by_name(object, name);

	return program ? bpf_program__fd(program) : -ENOENT;
}

int shim_attach(int program_fd, int cgroup_fd, uint32_t type)
{
	/* A link always allows several programs at the hook (BPF_F_ALLOW_MULTI). */
	return bpf_link_create(program_fd, cgroup_fd, (enum bpf_attach_type)type, NULL);
}

int shim_replace(int link_fd, int program_fd)
{
	return bpf_link_update(link_fd, program_fd, NULL);
}

int shim_pin(int fd, const char *path)
{
	return bpf_obj_pin(fd, path);
}

int shim_get(const char *path)
{
	return bpf_obj_get(path);
}

int shim_link_info(int link_fd, uint64_t *cgroup_id, uint32_t *program_id)
{
	struct bpf_link_info info = { 0 };
	uint32_t size = sizeof(info);
	int rc = bpf_obj_get_info_by_fd(link_fd, &info, &size);

	*cgroup_id = info.cgroup.cgroup_id;
	*program_id = info.prog_id;
	return rc;
}

int shim_program_id(int program_fd, uint32_t *program_id)
{
	struct bpf_prog_info info = { 0 };
	uint32_t size = sizeof(info);
	int rc = bpf_obj_get_info_by_fd(program_fd, &info, &size);

	*program_id = info.id;
	return rc;
}

int shim_update(int map, const void *key, const void *value, uint64_t flags)
{
	return bpf_map_update_elem(map, key, value, flags);
}

int shim_lookup(int map, const void *key, void *value)
{
	return bpf_map_lookup_elem(map, key, value);
}

int shim_delete(int map, const void *key)
{
	return bpf_map_delete_elem(map, key);
}

int shim_next_key(int map, const void *key, void *next)
{
	return bpf_map_get_next_key(map, key, next);
}

int shim_update_batch(int map, const void *keys, const void *values, uint32_t count, uint32_t *done)
{
	DECLARE_LIBBPF_OPTS(bpf_map_batch_opts, options, .elem_flags = BPF_ANY);
	uint32_t n = count;
	int rc = bpf_map_update_batch(map, keys, values, &n, &options);

	*done = rc ? n : count;
	return rc;
}

int shim_delete_batch(int map, const void *keys, uint32_t count, size_t key_size, uint32_t *done)
{
	const char *at = keys;
	uint32_t left = count;

	/* The kernel stops at the first key that is not there: that is no failure here. */
	*done = 0;
	while (left) {
		DECLARE_LIBBPF_OPTS(bpf_map_batch_opts, options);
		uint32_t n = left;
		int rc = bpf_map_delete_batch(map, at, &n, &options);

		if (rc && rc != -ENOENT)
			return rc;
		if (rc == 0)
			n = left;
		*done += n;
		if (rc == -ENOENT)
			n++;
		if (n > left)
			n = left;
		at += n * key_size;
		left -= n;
	}
	return 0;
}

int shim_possible_cpus(void)
{
	return libbpf_num_possible_cpus();
}

static int take_record(void *context, void *data, size_t size)
{
	struct shim_ring *ring = context;

	if (size != sizeof(struct clawker_event))
		return 0;
	memcpy(&ring->into[ring->count++], data, size);
	/* libbpf has already stepped past this record: stopping here loses nothing. */
	return ring->count < ring->room ? 0 : -ENOSPC;
}

int shim_ring_open(struct shim_ring *ring, int map)
{
	ring->ring = ring_buffer__new(map, take_record, ring, NULL);
	return ring->ring ? 0 : -errno;
}

int shim_ring_fd(const struct shim_ring *ring)
{
	return ring_buffer__epoll_fd(ring->ring);
}

int shim_ring_drain(struct shim_ring *ring, struct clawker_event *into, size_t room)
{
	int rc;

	ring->into = into;
	ring->room = room;
	ring->count = 0;
	rc = ring_buffer__consume(ring->ring);
	if (rc < 0 && rc != -ENOSPC)
		return rc;
	return (int)ring->count;
}

void shim_ring_close(struct shim_ring *ring)
{
	ring_buffer__free(ring->ring);
	ring->ring = NULL;
}

int shim_run(int program_fd, void *context, uint32_t size, uint32_t *answer)
{
	DECLARE_LIBBPF_OPTS(bpf_test_run_opts, options, .ctx_in = context, .ctx_size_in = size);
	int rc = bpf_prog_test_run_opts(program_fd, &options);

	*answer = options.retval;
	return rc;
}
