/* The frame parser: no I/O, fuzzed by itself. */
#include "frame.h"

#include <stdlib.h>
#include <string.h>

static bool is_allowed(const struct frame_reader *reader)
{
    uint32_t size = reader->left;
    switch (reader->kind) {
    case FRAME_DATA:
        return size >= 1 && size <= FRAME_MAX_DATA;
    case FRAME_RESET:
        return size <= FRAME_MAX_CONTROL;
    case FRAME_REFUSED:
        return reader->asking && size <= FRAME_MAX_CONTROL;
    case FRAME_OPENED:
        return reader->asking && size == 0;
    case FRAME_FIN:
    case FRAME_PONG:
    case FRAME_GOAWAY:
        return size == 0;
    default:
        return false; /* OPEN and PING have no place within a lease */
    }
}

static size_t smaller(size_t one, size_t other)
{
    return one < other ? one : other;
}

static void skip(const uint8_t **data, size_t *size, size_t count)
{
    *data += count;
    *size -= count;
}

enum frame_found frame_next(struct frame_reader *reader, const uint8_t **data, size_t *size, const uint8_t **piece,
                            size_t *piece_size)
{
    if (!reader->left) {
        size_t missing = smaller((size_t)(FRAME_HEADER - reader->header_size), *size);
        memcpy(reader->header + reader->header_size, *data, missing);
        reader->header_size += (uint8_t)missing;
        skip(data, size, missing);
        if (reader->header_size < FRAME_HEADER)
            return FRAME_NOTHING;
        reader->header_size = 0;
        const uint8_t *header = reader->header;
        reader->kind = header[0];
        reader->left = (uint32_t)header[1] << 16 | (uint32_t)header[2] << 8 | header[3];
        if (!is_allowed(reader)) {
            reader->left = 0;
            return FRAME_BROKEN;
        }
        frame_reader_free(reader);
        if (!reader->left)
            return FRAME_WHOLE;
    }
    if (!*size)
        return FRAME_NOTHING;
    size_t count = smaller(reader->left, *size);
    if (reader->kind == FRAME_DATA) {
        *piece = *data;
        *piece_size = count;
        reader->left -= (uint32_t)count;
        skip(data, size, count);
        return FRAME_PIECE;
    }
    if (!reader->control && !(reader->control = malloc(reader->left)))
        return FRAME_NO_MEMORY;
    memcpy(reader->control + reader->control_size, *data, count);
    reader->control_size += (uint32_t)count;
    reader->left -= (uint32_t)count;
    skip(data, size, count);
    return reader->left ? FRAME_NOTHING : FRAME_WHOLE;
}

void frame_reader_free(struct frame_reader *reader)
{
    free(reader->control);
    reader->control = NULL;
    reader->control_size = 0;
}

void frame_header(uint8_t *header, enum frame_kind kind, size_t size)
{
    header[0] = (uint8_t)kind;
    header[1] = (uint8_t)(size >> 16);
    header[2] = (uint8_t)(size >> 8);
    header[3] = (uint8_t)size;
}
