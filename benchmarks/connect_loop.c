/* SPDX-License-Identifier: MIT */
/*
 * connect_loop.c - connects in a tight loop and says how long a call took, for test_bench_connect_hook.py.
 *
 * Reads lines "udp|tcp ADDRESS PORT TIMES PER_SECOND"; answers each with nanoseconds a call and how many failed. "udp" connects one datagram
 * socket again and again; "tcp" listens on the address once and then connects, accepts and closes both ends.
 * A rate of 0 is as fast as it goes. Refused connects count like any other: the hook was paid for.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 64

struct place {
	int kind;
	char address[64];
	int port;
	int handle;
	struct sockaddr_storage to;
	socklen_t size;
};

static struct place places[MOST];
static int known;

static long long now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static struct place *find(int kind, const char *address, int port)
{
	struct place *p;
	int on = 1;

	for (int i = 0; i < known; i++)
		if (places[i].kind == kind && places[i].port == port && !strcmp(places[i].address, address))
			return &places[i];
	if (known == MOST)
		return NULL;
	p = &places[known++];
	p->kind = kind;
	p->port = port;
	snprintf(p->address, sizeof(p->address), "%s", address);
	if (strchr(address, ':')) {
		struct sockaddr_in6 *six = (struct sockaddr_in6 *)&p->to;

		six->sin6_family = AF_INET6;
		six->sin6_port = htons((unsigned short)port);
		inet_pton(AF_INET6, address, &six->sin6_addr);
		p->size = sizeof(*six);
	} else {
		struct sockaddr_in *four = (struct sockaddr_in *)&p->to;

		four->sin_family = AF_INET;
		four->sin_port = htons((unsigned short)port);
		inet_pton(AF_INET, address, &four->sin_addr);
		p->size = sizeof(*four);
	}
	p->handle = socket(p->to.ss_family, kind, 0);
	if (kind == SOCK_STREAM) {
		setsockopt(p->handle, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
		if (bind(p->handle, (struct sockaddr *)&p->to, p->size) || listen(p->handle, 16))
			return NULL;
	}
	return p;
}

static int one_tcp(const struct place *p)
{
	struct linger hard = { .l_onoff = 1 }; /* no TIME_WAIT: the next round finds the ports free */
	int out = socket(p->to.ss_family, SOCK_STREAM, 0), in;

	if (connect(out, (const struct sockaddr *)&p->to, p->size)) {
		close(out);
		return -1;
	}
	in = accept(p->handle, NULL, NULL);
	setsockopt(out, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
	close(out);
	close(in);
	return 0;
}

int main(void)
{
	char line[256], kind[8], address[64];
	int port, times, per_second;

	while (fgets(line, sizeof(line), stdin)) {
		struct place *p;
		long long began;
		int failed = 0;

		if (sscanf(line, "%7s %63s %d %d %d", kind, address, &port, &times, &per_second) != 5)
			return 2;
		p = find(strcmp(kind, "tcp") ? SOCK_DGRAM : SOCK_STREAM, address, port);
		if (!p)
			return 3;
		began = now_ns();
		for (int i = 0; i < times; i++) {
			while (per_second && now_ns() - began < i * 1000000000ll / per_second)
				;
			if (p->kind == SOCK_STREAM)
				failed += one_tcp(p) != 0;
			else
				failed += connect(p->handle, (struct sockaddr *)&p->to, p->size) != 0;
		}
		printf("%.1f %d\n", (double)(now_ns() - began) / times, failed);
		fflush(stdout);
	}
	return 0;
}
