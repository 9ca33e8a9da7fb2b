/* A depot: tunnels to one peer, between leases, that the core may lease by itself.
 *
 * Python parks them here and takes them back; core->lock is between. One whose lease under an order has ended stands
 * here again, unless Python wants it back or has to look at it: then it hears of that.
 */
#define _GNU_SOURCE
#include "core.h"

#include <stddef.h>

/* With the lock. */
static void push(struct depot *depot, struct tunnel *tunnel)
{
    tunnel->next_parked = depot->parked;
    depot->parked = tunnel;
    depot->count++;
}

static struct tunnel *pop(struct depot *depot)
{
    struct tunnel *tunnel = depot->parked;
    depot->parked = tunnel->next_parked;
    depot->count--;
    return tunnel;
}

/* From Python, which has seen all that has come before. */
void depot_park(struct depot *depot, struct tunnel *tunnel)
{
    pthread_mutex_lock(&depot->core->lock);
    tunnel->depot = depot;
    tunnel->recalls = depot->recalls;
    tunnel->leases = 0;
    push(depot, tunnel);
    pthread_mutex_unlock(&depot->core->lock);
}

/* From Python: the one that was used last, or NULL. */
struct tunnel *depot_take(struct depot *depot)
{
    pthread_mutex_lock(&depot->core->lock);
    struct tunnel *tunnel = depot->parked ? pop(depot) : NULL;
    pthread_mutex_unlock(&depot->core->lock);
    return tunnel;
}

/* From Python: those that are leased now are told back when their leases end. */
void depot_recall(struct depot *depot)
{
    pthread_mutex_lock(&depot->core->lock);
    depot->recalls++;
    depot->most = depot->leased;
    pthread_mutex_unlock(&depot->core->lock);
}

/* With the lock: one for a lease, or NULL. Those before it that are of no use are in `*spent` then. */
struct tunnel *depot_lease(struct depot *depot, struct tunnel **spent)
{
    while (depot->parked) {
        struct tunnel *tunnel = pop(depot);
        if (!tunnel->lost && !tunnel->closed && !tunnel->inbox.size) {
            tunnel->leases++;
            if (++depot->leased > depot->most)
                depot->most = depot->leased;
            return tunnel;
        }
        tunnel->next_parked = *spent;
        *spent = tunnel;
    }
    return NULL;
}

void depot_tell(struct tunnel *spent)
{
    while (spent) {
        struct tunnel *tunnel = spent;
        spent = tunnel->next_parked;
        core_tell(tunnel->core, &tunnel->back);
    }
}

/* Its lease under an order is over. */
void depot_return(struct tunnel *tunnel, bool reusable)
{
    struct depot *depot = tunnel->depot;
    struct core *core = tunnel->core;
    pthread_mutex_lock(&core->lock);
    depot->leased--;
    tunnel->last_sent = tunnel->sent_end;
    tunnel->last_received = tunnel->received_end;
    tunnel->idle_since = core->now;
    bool stays = reusable && !tunnel->inbox.size && tunnel->recalls == depot->recalls;
    if (stays)
        push(depot, tunnel);
    pthread_mutex_unlock(&core->lock);
    if (!stays)
        core_tell(core, &tunnel->back);
    core_read_on(core, tunnel);
}
