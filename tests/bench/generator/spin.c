/* A virtual processor that halts costs a visit to the hypervisor, and is slow to wake. These loops keep it from
 * halting; being of idle priority they yield to everything else at once.
 */
#include "load.h"

#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>

static void become_a_light_group(void);
static _Noreturn void spin_on(int processor, pid_t parent);

_Noreturn void spin(void) {
    cpu_set_t allowed;
    pid_t parent = getpid();
    if (sched_getaffinity(0, sizeof allowed, &allowed) < 0)
        die("sched_getaffinity");
    become_a_light_group();
    for (int i = 0; i < CPU_SETSIZE; i++) {
        pid_t child = CPU_ISSET(i, &allowed) ? fork() : -1;
        if (child == 0)
            spin_on(i, parent);
        if (child > 0)
            printf("%d ", child);
    }
    printf("\n");
    fflush(stdout);
    while (read(STDIN_FILENO, chunk, CHUNK) > 0)
        continue;
    exit(0); /* and the loops with us */
}

/* With autogroups (sched(7)) idle priority counts within a session only: the session as a whole would take its full
 * turn, and everybody else wait milliseconds for it.
 */
static void become_a_light_group(void) {
    setsid();
    FILE *file = fopen("/proc/self/autogroup", "we");
    if (file && (fputs("19", file) < 0 || fclose(file) != 0))
        die("/proc/self/autogroup");
}

static _Noreturn void spin_on(int processor, pid_t parent) {
    struct sched_param none = {0};
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processor, &one);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0 || getppid() != parent)
        exit(1);
    setpriority(PRIO_PROCESS, 0, 19); /* so that proc(5), stat, calls it `nice` */
    if (sched_setaffinity(0, sizeof one, &one) < 0 || sched_setscheduler(0, SCHED_IDLE, &none) < 0)
        die("SCHED_IDLE");
    for (;;) {
#if defined(__x86_64__)
        __builtin_ia32_pause(); /* leaves the core to its other thread */
#elif defined(__aarch64__)
        __asm__ volatile("yield");
#else
        __asm__ volatile("");
#endif
    }
}
