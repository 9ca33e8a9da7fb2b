/* What Python hears of links under an order that came and went, and ended well: a row each, many at a time. */
#define _GNU_SOURCE
#include "module.h"

#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define LONGEST_NS 4000000000000u /* an hour, of what fits into a row: who hears so late of an end? */

static int64_t nanoseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void passed_begin(struct passed *passed, PyObject *waiters)
{
    *passed = (struct passed){.waiters = waiters, .last = &passed->orders};
    passed->epoch = nanoseconds(CLOCK_REALTIME) - nanoseconds(CLOCK_MONOTONIC);
}

static void tell(struct passed *passed, OrderObject *order)
{
    PyObject *about = Py_BuildValue("y#si", (const char *)order->rows.bytes, (Py_ssize_t)order->rows.size,
                                    order->cipher ? order->cipher : "", (int)order->ended_by);
    PyObject *said = module_told(order->waiter, HEARD_PASSED, about);
    if (!said || PyList_Append(passed->waiters, said))
        passed->error = -1;
    Py_XDECREF(said);
    unsigned count = (unsigned)(order->rows.size / sizeof(struct row));
    free(order->rows.bytes);
    order->rows = (struct backlog){0};
    doors_let_go(&order->order, count);
}

/* Halves round up. */
static uint32_t microseconds(uint64_t from, uint64_t until)
{
    return (uint32_t)((until - from + 500) / 1000);
}

static struct row row_of(const struct link *link, int64_t epoch)
{
    uint64_t opened = atomic_load(&link->opened_at), ended = atomic_load(&link->ended_at);
    struct row row = {.opened = ((int64_t)opened + epoch) / 1000,
                      .connected = microseconds(opened, atomic_load(&link->connected_at)),
                      .ended = microseconds(opened, ended),
                      .idle = microseconds(atomic_load(&link->moved_at), ended),
                      .sent = atomic_load(&link->sent),
                      .received = atomic_load(&link->received),
                      .port = ntohs(link->source.port)};
    memcpy(row.id, link->id, sizeof row.id);
    return row;
}

/* Whether that is all there is to say of it; then it is gone. If not, it is to be told by itself. */
bool passed_add(struct passed *passed, struct link *link)
{
    if (link->reason != REASON_OK || link->owes || link->handed_back || link->undone ||
        !atomic_load(&link->connected_at) ||
        atomic_load(&link->ended_at) - atomic_load(&link->opened_at) >= LONGEST_NS)
        return false;
    OrderObject *order = link->order->object;
    if (order->rows.size && (order->cipher != link->cipher_name || order->ended_by != link->ended_by))
        tell(passed, order);
    struct row row = row_of(link, passed->epoch);
    if (!backlog_append(&order->rows, &row, sizeof row))
        return false;
    order->cipher = link->cipher_name;
    order->ended_by = link->ended_by;
    if (!order->has_passed) {
        order->has_passed = true;
        Py_INCREF((PyObject *)order); /* the list's: its last link may be told by itself, and it is done then */
        order->next_passed = NULL;
        *passed->last = order;
        passed->last = &order->next_passed;
    }
    link_free(link);
    return true;
}

/* 0, or -1 with an exception set. */
int passed_tell(struct passed *passed)
{
    while (passed->orders) {
        OrderObject *order = passed->orders;
        passed->orders = order->next_passed;
        order->has_passed = false;
        if (order->rows.size)
            tell(passed, order);
        Py_DECREF((PyObject *)order);
    }
    return passed->error;
}
