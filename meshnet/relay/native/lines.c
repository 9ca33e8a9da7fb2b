/* Lines of the access log: what those of one kind say alike comes from Python, in pieces; a row fills the holes. */
#define _GNU_SOURCE
#include "module.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define HOLES 10
#define LONGEST_HOLE 32 /* 2^64 in milliseconds, a moment of a year with five digits */

static char *put_number(char *at, uint64_t number)
{
    char digits[20];
    int count = 0;
    do {
        digits[count++] = (char)('0' + number % 10);
        number /= 10;
    } while (number);
    while (count)
        *at++ = digits[--count];
    return at;
}

static char *put_thousandths(char *at, unsigned rest)
{
    *at++ = '.';
    *at++ = (char)('0' + rest / 100);
    *at++ = (char)('0' + rest / 10 % 10);
    *at++ = (char)('0' + rest % 10);
    return at;
}

static char *put_milliseconds(char *at, uint32_t microseconds)
{
    return put_thousandths(put_number(at, microseconds / 1000), microseconds % 1000);
}

/* A busy second has many lines. */
struct second {
    time_t at;
    char text[LONGEST_HOLE];
    size_t size;
};

static char *put_moment(char *at, int64_t microseconds, struct second *second)
{
    uint64_t known = microseconds > 0 ? (uint64_t)microseconds : 0;
    time_t whole = (time_t)(known / 1000000);
    if (!second->size || second->at != whole) {
        struct tm parts;
        gmtime_r(&whole, &parts);
        second->at = whole;
        second->size = strftime(second->text, sizeof second->text, "%Y-%m-%dT%H:%M:%S", &parts);
    }
    memcpy(at, second->text, second->size);
    at = put_thousandths(at + second->size, (unsigned)(known / 1000 % 1000));
    *at++ = 'Z';
    return at;
}

static char *put_piece(char *at, PyObject *pieces, Py_ssize_t which)
{
    char *bytes;
    Py_ssize_t size;
    PyBytes_AsStringAndSize(PyTuple_GetItem(pieces, which), &bytes, &size); /* which `size_of` has tried */
    memcpy(at, bytes, (size_t)size);
    return at + size;
}

static char *put_line(char *at, const struct row *row, PyObject *pieces, struct second *second)
{
    size_t id_size = strnlen(row->id, sizeof row->id);
    for (Py_ssize_t hole = 0; hole < HOLES; hole++) {
        at = put_piece(at, pieces, hole);
        switch (hole) {
        case 0:
            memcpy(at, row->id, id_size);
            at += id_size;
            break;
        case 1:
            at = put_number(at, row->port);
            break;
        case 2:
        case 8:
            at = put_milliseconds(at, row->connected);
            break;
        case 3:
            at = put_number(at, row->sent);
            break;
        case 4:
            at = put_number(at, row->received);
            break;
        case 5:
            at = put_moment(at, row->opened, second);
            break;
        case 6:
            at = put_moment(at, row->opened + row->ended, second);
            break;
        case 7:
            at = put_milliseconds(at, row->ended);
            break;
        default:
            at = put_milliseconds(at, row->idle);
        }
    }
    return put_piece(at, pieces, HOLES);
}

/* What a line may take at most; 0 with an exception set. */
static size_t size_of(PyObject *pieces)
{
    size_t size = HOLES * LONGEST_HOLE;
    if (PyTuple_Size(pieces) != HOLES + 1) {
        PyErr_Format(PyExc_ValueError, "%d pieces make a line", HOLES + 1);
        return 0;
    }
    for (Py_ssize_t which = 0; which <= HOLES; which++) {
        char *bytes;
        Py_ssize_t piece;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(pieces, which), &bytes, &piece))
            return 0;
        size += (size_t)piece;
    }
    return size;
}

PyObject *lines(PyObject *module, PyObject *arguments)
{
    const char *rows;
    Py_ssize_t size;
    PyObject *pieces, *answer = NULL;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "y#O!", &rows, &size, &PyTuple_Type, &pieces))
        return NULL;
    size_t count = (size_t)size / sizeof(struct row), longest = size_of(pieces);
    if (!longest)
        return NULL;
    char *text = malloc(count * longest + 1), *end = text; /* of none, too */
    if (!text)
        return PyErr_NoMemory();
    struct second second = {0};
    for (size_t which = 0; which < count; which++) {
        struct row row; /* where they lie need not be a place for integers */
        memcpy(&row, rows + which * sizeof row, sizeof row);
        end = put_line(end, &row, pieces, &second);
    }
    answer = PyBytes_FromStringAndSize(text, end - text);
    free(text);
    return answer;
}
