/* Latencies, counted in buckets that are at most 1/128 wide: p99.9 is off by less than one per cent. */
#include "load.h"

enum { FINE_BITS = 7, FINE = 1 << FINE_BITS, BUCKETS = 64 * FINE };

static uint64_t latency[BUCKETS];

void count_latency(double seconds) {
    uint64_t nanoseconds = (uint64_t)(seconds * 1e9) | FINE;
    int shift = 63 - __builtin_clzll(nanoseconds) - FINE_BITS;
    latency[(uint64_t)shift * FINE + (nanoseconds >> shift)]++;
}

double percentile_us(double part) {
    uint64_t total = 0, seen = 0;
    for (int i = 0; i < BUCKETS; i++)
        total += latency[i];
    for (int i = 0; i < BUCKETS; i++)
        if ((seen += latency[i]) && (double)seen >= part * (double)total) {
            int shift = i < 2 * FINE ? 0 : i / FINE - 1;
            return ((double)(i - shift * FINE) + 0.5) * (double)(1ULL << shift) / 1e3;
        }
    return 0;
}
