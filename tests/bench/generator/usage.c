/* Who used the processors: the sidecars, all of ours, everybody. */
#include "load.h"

#include <sched.h>
#include <time.h>

enum { MOST_PIDS = 64 };

static int pids[MOST_PIDS], pid_count, sidecar_count;
static cpu_set_t allowed;

static double used_by(int pid);
static void read_processors(struct usage *usage);

void usage_of(int argc, char **argv) {
    bool sidecars = true;
    for (int i = 0; i < argc; i++) {
        if (strcmp(argv[i], "--") == 0)
            sidecars = false;
        else if (pid_count < MOST_PIDS)
            pids[pid_count++] = atoi(argv[i]);
        if (sidecars)
            sidecar_count = pid_count;
    }
    if (sched_getaffinity(0, sizeof allowed, &allowed) < 0)
        die("sched_getaffinity");
}

void usage_now(struct usage *usage) {
    *usage = (struct usage){.ours = used_by(0)};
    for (int i = 0; i < pid_count; i++) {
        double used = used_by(pids[i]);
        usage->ours += used;
        usage->sidecars += i < sidecar_count ? used : 0;
    }
    read_processors(usage);
    usage->at = now();
}

void noise_between(const struct usage *before, const struct usage *after, double *others, double *stolen) {
    double all = (after->at - before->at) * CPU_COUNT(&allowed);
    double busy = after->busy - before->busy - (after->ours - before->ours);
    *others = busy > 0 ? busy / all : 0;
    *stolen = (after->stolen - before->stolen) / all;
}

int show_noise(double seconds) {
    struct usage before, after;
    double others, stolen;
    usage_now(&before);
    usleep((useconds_t)(seconds * 1e6));
    usage_now(&after);
    noise_between(&before, &after, &others, &stolen);
    printf("{\"others\":%.4f,\"stolen\":%.4f}\n", others, stolen);
    return 0;
}

/* A process's clock has nanoseconds where proc(5), stat, has hundredths of a second. */
static double used_by(int pid) {
    clockid_t clock;
    struct timespec time;
    if (clock_getcpuclockid(pid, &clock) || clock_gettime(clock, &time) < 0) {
        fprintf(stderr, "process %d is gone\n", pid);
        exit(1);
    }
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

/* proc(5), stat. A process's clock includes the interrupts that came in its time (unless the kernel is built with
 * IRQ_TIME_ACCOUNTING: then the traffic's own interrupts pass for others' work).
 */
static void read_processors(struct usage *usage) {
    char line[512];
    FILE *file = fopen("/proc/stat", "re");
    if (!file)
        die("/proc/stat");
    while (fgets(line, sizeof line, file)) {
        int number;
        unsigned long long user, nice, system, hard, soft, stolen;
        if (sscanf(line, "cpu%d %llu %llu %llu %*u %*u %llu %llu %llu", &number, &user, &nice, &system, &hard, &soft,
                   &stolen) == 7 &&
            CPU_ISSET(number, &allowed)) {
            usage->busy += (double)(user + nice + system + hard + soft) / (double)sysconf(_SC_CLK_TCK);
            usage->stolen += (double)stolen / (double)sysconf(_SC_CLK_TCK);
        }
    }
    fclose(file);
}
