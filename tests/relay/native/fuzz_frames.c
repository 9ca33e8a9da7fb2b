/* What a peer may send within a lease, taken apart in pieces of any size: it must come to the same as in one piece.
 *
 * With clang it is a target of libFuzzer: `scripts/test --deep` (test_deep.py) runs it.
 *
 * With any other compiler, -DWITHOUT_LIBFUZZER makes it a program of its own that takes a seed and a number of rounds.
 */
#include "frame.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What came out: a digest, so that no memory is in the way of the sanitizers. */
struct trace {
    uint64_t digest;
    size_t data_size;
};

static void add(struct trace *trace, const uint8_t *bytes, size_t size)
{
    for (size_t at = 0; at < size; at++)
        trace->digest = (trace->digest ^ bytes[at]) * 0x100000001b3u;
}

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "%s\n", what);
        abort();
    }
}

/* `step`: the largest piece. `asking`: an OPEN is to be answered first. Returns how the stream ended. */
static struct trace take_apart(const uint8_t *input, size_t size, size_t step, bool asking)
{
    struct frame_reader reader = {.asking = asking};
    struct trace trace = {.digest = 0xcbf29ce484222325u};
    enum frame_found found = FRAME_NOTHING;
    while (size && found != FRAME_BROKEN) {
        size_t part = size < step ? size : step;
        uint8_t *copy = malloc(part); /* of its own, so that one byte too far is noticed */
        check(copy != NULL, "no memory");
        memcpy(copy, input, part);
        input += part;
        size -= part;
        const uint8_t *data = copy, *piece;
        size_t left = part, piece_size;
        while (left && found != FRAME_BROKEN) {
            size_t before = left;
            found = frame_next(&reader, &data, &left, &piece, &piece_size);
            check(left < before && data == copy + part - left, "nothing was taken");
            if (found == FRAME_PIECE) {
                check(piece >= copy && piece + piece_size == data && piece_size, "a piece from elsewhere");
                add(&trace, piece, piece_size);
                trace.data_size += piece_size;
            } else if (found == FRAME_WHOLE) {
                check(reader.control_size <= FRAME_MAX_CONTROL, "a frame too large");
                bool is_answer = reader.kind == FRAME_OPENED || reader.kind == FRAME_REFUSED;
                check(reader.asking || !is_answer, "an answer that nobody waits for");
                if (is_answer)
                    reader.asking = false; /* as lease.c has it */
                bool may_speak = reader.kind == FRAME_RESET || reader.kind == FRAME_REFUSED;
                check(may_speak || !reader.control_size, "a payload where none can be");
                add(&trace, &reader.kind, 1);
                if (reader.control_size)
                    add(&trace, reader.control, reader.control_size);
            } else if (found == FRAME_BROKEN) {
                add(&trace, (const uint8_t *)"broken", 6);
            }
        }
        free(copy);
    }
    frame_reader_free(&reader);
    return trace;
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t size)
{
    if (size < 2)
        return 0;
    size_t step = (size_t)(input[0] >> 1) + 1;
    bool asking = input[0] & 1;
    struct trace whole = take_apart(input + 1, size - 1, size, asking);
    struct trace parts = take_apart(input + 1, size - 1, step, asking);
    check(whole.digest == parts.digest && whole.data_size == parts.data_size, "it depends on the pieces");
    return 0;
}

#ifdef WITHOUT_LIBFUZZER
/* Half of what it makes is as a peer would say it, or every input would end at its first byte. */
static size_t invent(uint8_t *input, size_t room)
{
    static const uint8_t kinds[] = {FRAME_DATA, FRAME_DATA, FRAME_DATA, FRAME_FIN, FRAME_RESET, FRAME_PONG,
                                    FRAME_GOAWAY, FRAME_OPENED, FRAME_REFUSED};
    size_t size = 0;
    input[size++] = (uint8_t)rand();
    while (size < room && rand() % 40) {
        uint8_t kind = rand() % 30 ? kinds[(size_t)rand() % sizeof kinds] : (uint8_t)rand();
        size_t payload = rand() % 50 == 0;
        if (kind == FRAME_DATA)
            payload = (size_t)(rand() % 30 ? rand() % 300 : rand() % (FRAME_MAX_DATA + 2));
        else if (kind == FRAME_RESET || kind == FRAME_REFUSED)
            payload = (size_t)(rand() % (FRAME_MAX_CONTROL + 2));
        if (size + FRAME_HEADER + payload > room)
            break;
        frame_header(input + size, kind, payload);
        for (size_t at = 0; at < payload; at++)
            input[size + FRAME_HEADER + at] = (uint8_t)rand();
        size += FRAME_HEADER + payload;
    }
    return size > 1 && rand() % 2 ? size - (size_t)rand() % (size - 1) : size; /* cut off anywhere */
}

int main(int count, char **arguments)
{
    static uint8_t input[64 * 1024];
    check(count == 3, "usage: fuzz_frames SEED ROUNDS");
    srand((unsigned)atoi(arguments[1]));
    for (long rounds = atol(arguments[2]); rounds; rounds--)
        LLVMFuzzerTestOneInput(input, invent(input, sizeof input));
    return 0;
}
#endif
