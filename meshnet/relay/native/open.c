/* An OPEN, taken apart and put together: no I/O, fuzzed by itself.
 *
 * It is JSON, and only the one form that meshnet/codec/frames.py writes is read here; every other is for Python.
 */
#define _GNU_SOURCE
#include "core.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>

#define MAX_HOST 46 /* INET6_ADDRSTRLEN */
#define LEAST_DEADLINE_MS 1500

struct text {
    const char *at, *end;
};

static bool take_literal(struct text *text, const char *literal)
{
    size_t size = strlen(literal);
    if ((size_t)(text->end - text->at) < size || memcmp(text->at, literal, size))
        return false;
    text->at += size;
    return true;
}

/* Up to a quotation mark, which is left; at most `room` bytes with the zero. Nothing that JSON would escape. */
static bool take_string(struct text *text, char *taken, size_t room)
{
    size_t size = 0;
    while (text->at < text->end && *text->at != '"') {
        char letter = *text->at++;
        if (letter <= ' ' || letter > '~' || letter == '\\' || size + 1 >= room)
            return false;
        taken[size++] = letter;
    }
    taken[size] = 0;
    return size > 0;
}

static bool take_number(struct text *text, unsigned long most, unsigned long *number)
{
    const char *begin = text->at;
    *number = 0;
    while (text->at < text->end && *text->at >= '0' && *text->at <= '9') {
        *number = *number * 10 + (unsigned long)(*text->at++ - '0');
        if (*number > most)
            return false;
    }
    return text->at > begin && (*begin != '0' || text->at == begin + 1);
}

static bool to_address(const char *host, unsigned long port, struct address *address)
{
    *address = (struct address){.family = AF_INET, .port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, address->host) == 1)
        return true;
    address->family = AF_INET6;
    return inet_pton(AF_INET6, host, address->host) == 1;
}

/* `HOST:PORT`, or `[HOST]:PORT`. Spoils `text`. */
static bool to_source(char *text, struct address *address)
{
    char *colon = strrchr(text, ':');
    unsigned long port;
    if (!colon)
        return false;
    struct text digits = {.at = colon + 1, .end = colon + strlen(colon)};
    if (!take_number(&digits, 65535, &port) || digits.at != digits.end || !port)
        return false;
    *colon = 0;
    if (*text == '[' && colon[-1] == ']') {
        colon[-1] = 0;
        text++;
    }
    return to_address(text, port, address);
}

/* False: it is for Python. `id`: MAX_ID + 1 bytes. */
bool open_parse(const uint8_t *payload, size_t size, struct address *target, struct address *source, char *id)
{
    struct text text = {.at = (const char *)payload, .end = (const char *)payload + size};
    char host[MAX_HOST], service[FRAME_MAX_CONTROL], asker[MAX_HOST + 8];
    unsigned long port, deadline;
    if (!take_literal(&text, "{\"host\":\"") || !take_string(&text, host, sizeof host) ||
        !take_literal(&text, "\",\"port\":") || !take_number(&text, 65535, &port) || !port)
        return false;
    if (take_literal(&text, ",\"service\":\"") &&
        (!take_string(&text, service, sizeof service) || !take_literal(&text, "\"")))
        return false;
    if (!take_literal(&text, ",\"source\":\"") || !take_string(&text, asker, sizeof asker) ||
        !take_literal(&text, "\",\"id\":\"") || !take_string(&text, id, MAX_ID + 1) || !take_literal(&text, "\""))
        return false;
    /* Who is in a hurry is for Python, which tells the time; for the others two tries are soon enough. */
    if (take_literal(&text, ",\"deadline\":") &&
        (!take_number(&text, INT32_MAX, &deadline) || deadline < LEAST_DEADLINE_MS))
        return false;
    return take_literal(&text, "}") && text.at == text.end && to_address(host, port, target) &&
           to_source(asker, source);
}

/* What `order` says, with the source's port (in network order) and the id; there is room for FRAME_MAX_CONTROL bytes.
 */
size_t open_write(uint8_t *payload, const struct order *order, uint16_t port, const char *id)
{
    char number[sizeof "65535"];
    const struct backlog *parts = order->opening;
    size_t digits = (size_t)snprintf(number, sizeof number, "%u", ntohs(port));
    const struct backlog source = {(uint8_t *)number, digits}, own = {(uint8_t *)id, strlen(id)};
    const struct backlog pieces[] = {parts[0], source, parts[1], own, parts[2]};
    size_t size = 0;
    for (size_t which = 0; which < sizeof pieces / sizeof *pieces; which++) {
        memcpy(payload + size, pieces[which].bytes, pieces[which].size);
        size += pieces[which].size;
    }
    return size;
}
