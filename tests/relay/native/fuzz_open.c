/* An OPEN as a peer may say it: whatever is taken is within its bounds, and what was taken is taken again from a copy.
 *
 * With clang as libFuzzer has it; with any other compiler, -DWITHOUT_LIBFUZZER makes it a program of its own that takes
 * a seed and a number of rounds.
 */
#define _GNU_SOURCE
#include "core.h"

#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

static void check_address(const struct address *address)
{
    static const uint8_t nothing[12];
    check(address->family == AF_INET || address->family == AF_INET6, "no family");
    check(address->port, "no port");
    check(address->family == AF_INET6 || !memcmp(address->host + 4, nothing, sizeof nothing), "more than an address");
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    struct address target, source;
    char id[MAX_ID + 1], said[512], host[2][INET6_ADDRSTRLEN];
    uint8_t *copy = malloc(size + !size); /* of its own, so that one byte too far is noticed */
    check(copy != NULL, "no memory");
    memcpy(copy, input, size);
    bool taken = open_parse(copy, size, &target, &source, id);
    free(copy);
    if (!taken)
        return 0;
    check_address(&target);
    check_address(&source);
    check(strnlen(id, sizeof id) <= MAX_ID && *id, "an id that is none");
    inet_ntop(target.family, target.host, host[0], sizeof host[0]);
    inet_ntop(source.family, source.host, host[1], sizeof host[1]);
    const char *form = "{\"host\":\"%s\",\"port\":%d,\"source\":\"[%s]:%d\",\"id\":\"%s\"}";
    int length = snprintf(said, sizeof said, form, host[0], ntohs(target.port), host[1], ntohs(source.port), id);
    struct address target_again, source_again;
    char id_again[MAX_ID + 1];
    check(open_parse((const uint8_t *)said, (size_t)length, &target_again, &source_again, id_again), said);
    check(!memcmp(&target, &target_again, sizeof target) && !memcmp(&source, &source_again, sizeof source) &&
              !strcmp(id, id_again),
          said);
    return 0;
}

#ifdef WITHOUT_LIBFUZZER
/* One that is right, with a few letters changed, doubled or left out. */
static size_t invent(uint8_t *input)
{
    static const char *const right[] = {
        "{\"host\":\"10.0.0.2\",\"port\":8080,\"service\":\"api:8080\",\"source\":\"10.0.0.1:40000\","
        "\"id\":\"8s0t4zfm\",\"deadline\":2000}",
        "{\"host\":\"fd00::2\",\"port\":1,\"source\":\"[fd00::1]:65535\",\"id\":\"x\"}",
    };
    const char *text = right[rand() % 2];
    size_t size = 0, changes = (size_t)rand() % 4;
    for (size_t at = 0; text[at]; at++) {
        bool change = changes && rand() % 40 == 0;
        changes -= change;
        if (!change || rand() % 3 == 0)
            input[size++] = (uint8_t)text[at];
        if (change && rand() % 3)
            input[size++] = rand() % 2 ? (uint8_t)rand() : (uint8_t)text[(size_t)rand() % strlen(text)];
    }
    return rand() % 8 ? size : (size_t)rand() % size;
}

int main(int count, char **arguments)
{
    uint8_t input[1024];
    check(count == 3, "usage: fuzz_open SEED ROUNDS");
    srand((unsigned)atoi(arguments[1]));
    for (long rounds = atol(arguments[2]); rounds; rounds--)
        LLVMFuzzerTestOneInput(input, invent(input));
    return 0;
}
#endif
