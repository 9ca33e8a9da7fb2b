/* Links under an order that have just begun. Most are over before anybody has to know of them: Python hears of a link
 * when it has lived for a while, or when it asks for all.
 */
#define _GNU_SOURCE
#include "core.h"

static void take_out(struct link *link)
{
    *link->young_place = link->next_young;
    if (link->next_young)
        link->next_young->young_place = link->young_place;
    else
        link->core->last_young = link->young_place;
    link->young_place = NULL;
}

void young_add(struct link *link)
{
    struct core *core = link->core;
    pthread_mutex_lock(&core->lock);
    link->young_until = core->now + YOUNG_NS;
    link->next_young = NULL;
    link->young_place = core->last_young;
    *core->last_young = link;
    core->last_young = &link->next_young;
    pthread_mutex_unlock(&core->lock);
    if (!core->young_due)
        core->young_due = link->young_until;
}

/* It is over. */
void young_forget(struct link *link)
{
    pthread_mutex_lock(&link->core->lock);
    if (link->young_place)
        take_out(link);
    pthread_mutex_unlock(&link->core->lock);
}

/* Its endpoint is up, which Python hears if it knows of the link. */
void young_connected(struct link *link)
{
    pthread_mutex_lock(&link->core->lock);
    bool known = link->known;
    pthread_mutex_unlock(&link->core->lock);
    if (known)
        core_tell(link->core, &link->begun);
}

/* The first of them, if it has lived long enough: it is none of them any more. `known`: Python has heard of it. */
static struct link *next_grown(struct core *core, bool *known)
{
    pthread_mutex_lock(&core->lock);
    struct link *link = core->young;
    bool grown = link && link->young_until <= core->now;
    core->young_due = link ? link->young_until : 0;
    if (grown) {
        take_out(link);
        *known = link->known;
        link->known = true;
    }
    pthread_mutex_unlock(&core->lock);
    return grown ? link : NULL;
}

void young_grow(struct core *core)
{
    if (!core->young_due || core->now < core->young_due)
        return;
    bool known;
    for (struct link *link; (link = next_grown(core, &known));) {
        if (!known)
            core_tell(core, &link->begun);
        dial_settle(link);
    }
}

/* From Python, with the lock: what there is to tell of those it has not heard of goes behind `last`. */
void young_tell(struct core *core, struct news **last)
{
    for (struct link *link = core->young; link; link = link->next_young) {
        if (link->known)
            continue;
        link->known = link->begun.told = true;
        link->begun.next = NULL;
        *last = &link->begun;
        last = &link->begun.next;
    }
}
