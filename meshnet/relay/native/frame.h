/* The frames of meshnet/1 within a lease, taken apart in any pieces; meshnet/codec/frames.py says what they look
 * like.
 */
#ifndef MESHNET_FRAME_H
#define MESHNET_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_HEADER 4
#define FRAME_MAX_DATA (16384 - FRAME_HEADER)
#define FRAME_MAX_CONTROL 4096

enum frame_kind { FRAME_DATA, FRAME_OPEN, FRAME_OPENED, FRAME_REFUSED, FRAME_FIN, FRAME_RESET, FRAME_PING, FRAME_PONG,
                  FRAME_GOAWAY };

struct frame_reader {
    uint8_t header[FRAME_HEADER];
    uint8_t header_size;
    uint8_t kind;
    bool asking;      /* an OPEN of ours is not answered yet */
    uint32_t left;    /* payload bytes that are still to come */
    uint8_t *control; /* the payload of a RESET or a REFUSED, as far as it has come */
    uint32_t control_size;
};

/* What frame_next found. PIECE: payload of a DATA frame, a part of it perhaps. BROKEN: the peer must not say that. */
enum frame_found { FRAME_NOTHING, FRAME_PIECE, FRAME_WHOLE, FRAME_BROKEN, FRAME_NO_MEMORY };

/* Takes one thing off the front of `*data`, and moves `*data` and `*size` on. The payload of a whole RESET or
 * REFUSED is in `reader->control`. A piece is `*piece`, of `*piece_size` bytes, within the data.
 */
enum frame_found frame_next(struct frame_reader *reader, const uint8_t **data, size_t *size, const uint8_t **piece,
                            size_t *piece_size);
void frame_reader_free(struct frame_reader *reader);
void frame_header(uint8_t *header, enum frame_kind kind, size_t size);

#endif
