/* What the parts of the generator share; main.c says what it does. One process, one epoll, no threads. */
#ifndef LOAD_H
#define LOAD_H

#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MESSAGE = 256, CHUNK = 1 << 18, EVENTS = 256 };
enum { ECHO = 'E', DOWNLOAD = 'D', BOTH_WAYS = 'B' }; /* the first byte of a connection says which service it wants */

/* main.c */
extern int epoll;
extern char message[MESSAGE], chunk[CHUNK];
_Noreturn void die(const char *what);
void watch(int operation, int fd, uint32_t events, uint64_t tag);
void without_delay(int fd);
double now(void);

/* server.c, clients.c, spin.c */
_Noreturn void serve(int port);
int run_clients(int argc, char **argv);
_Noreturn void spin(void);

/* latency.c */
void count_latency(double seconds);
double percentile_us(double part);

/* usage.c */
struct usage {
    double at;       /* CLOCK_MONOTONIC; the rest is seconds of processor time */
    double sidecars; /* user and system, all threads */
    double ours;     /* sidecars, server, spinners, and this process */
    double busy;     /* everybody's, on the processors that we may use */
    double stolen;   /* what the hypervisor gave to others meanwhile */
};
/* PIDs: the sidecars', then after `--` others of ours (server, spinners). */
void usage_of(int argc, char **argv);
void usage_now(struct usage *usage);
/* The parts, of 0 to 1, of our processors that others used, and that were stolen. */
void noise_between(const struct usage *before, const struct usage *after, double *others, double *stolen);
int show_noise(double seconds);

#endif
