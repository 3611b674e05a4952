/* A team: the threads of one OpenMP region that go through a whole pass together.

   A region of its own for every layer's every product would cost more than the small ones take, so the team stays and
   meets at barriers. A thread that waits spins for a while, as most waits are shorter than a system call; then it
   sleeps, so that one whose partner was descheduled does not burn its time. All is correct for any number of threads,
   each of which may stop anywhere for any time.

   Shared work comes in phases, each of which ends with a barrier. In a phase every thread has its own range of units,
   from front to back, so that weights stream in order; who is done early takes units of others. */
#pragma once

#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef __linux__
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include "vec.h"

#define TEAM_LINE 64        /* bytes that two threads should not share */
#define TEAM_SPIN 200000ull /* ticks of the time stamp counter before a thread sleeps, some 70 us */
#define TEAM_SETS 3         /* counters of this phase, and of the ones before and after it */

typedef struct {
    _Alignas(TEAM_LINE) atomic_llong taken; /* units of one thread's range that somebody has taken */
} TeamRange;

/* One pass; `ranges` has room for TEAM_SETS of `most` threads. Zeroed by `team_reset`. */
typedef struct {
    TeamRange *ranges;
    int most;
    _Alignas(TEAM_LINE) atomic_int arrived;
    _Alignas(TEAM_LINE) atomic_int round; /* barriers that all have passed; what sleepers wait for */
    atomic_int asleep;
} Team;

/* One thread's place in its team. */
typedef struct {
    Team *team;
    int thread, size, phase;
} Member;

INLINE int64_t team_bytes(int threads) { return (int64_t)sizeof(TeamRange) * TEAM_SETS * threads; }

/* Before the region: for at most `threads` threads, with `team_bytes(threads)` of room, aligned to TEAM_LINE. */
INLINE void team_reset(Team *team, int threads, void *room) {
    team->ranges = room;
    team->most = threads;
    for (int i = 0; i < TEAM_SETS * threads; i++) atomic_init(&team->ranges[i].taken, 0);
    atomic_init(&team->arrived, 0);
    atomic_init(&team->round, 0);
    atomic_init(&team->asleep, 0);
}

INLINE void team_sleep(Team *team, int round) {
#ifdef __linux__
    atomic_fetch_add(&team->asleep, 1);
    while (atomic_load(&team->round) == round)
        syscall(SYS_futex, &team->round, FUTEX_WAIT_PRIVATE, round, (void *)0, (void *)0, 0);
    atomic_fetch_sub(&team->asleep, 1);
#else
    while (atomic_load(&team->round) == round) sched_yield();
#endif
}

/* Nobody returns before all have come; what any of them wrote before, all see after. */
static inline void team_wait(const Member *self) {
    Team *team = self->team;
    if (self->size == 1) return;
    int round = atomic_load(&team->round);
    if (atomic_fetch_add(&team->arrived, 1) + 1 == self->size) {
        atomic_store(&team->arrived, 0);
        atomic_fetch_add(&team->round, 1);
#ifdef __linux__
        if (atomic_load(&team->asleep)) syscall(SYS_futex, &team->round, FUTEX_WAKE_PRIVATE, INT_MAX);
#endif
        return;
    }
    uint64_t since = __rdtsc();
    while (atomic_load_explicit(&team->round, memory_order_acquire) == round) {
        _mm_pause();
        if (__rdtsc() - since > TEAM_SPIN) {
            team_sleep(team, round);
            return;
        }
    }
}

/* A thread's way through the units of one phase. */
typedef struct {
    TeamRange *ranges;
    int64_t units, grain;
    int owner, left, size;
} Turn;

/* Begin the next shared phase, of `units` units, which are taken `grain` at a time. */
INLINE Turn team_turn(Member *self, int64_t units, int64_t grain) {
    TeamRange *sets = self->team->ranges;
    int most = self->team->most, phase = self->phase++;
    /* All have passed the barrier of the phase before this one, so nobody looks at the one before that any more; and
       nobody gets to the one after this before this thread does. They use the same counters. */
    atomic_store_explicit(&sets[(phase + 2) % TEAM_SETS * most + self->thread].taken, 0, memory_order_relaxed);
    return (Turn){sets + phase % TEAM_SETS * most, units, grain, self->thread, self->size, self->size};
}

/* The next units [begin, end) for this thread; 0 when there are none left. */
INLINE int team_take(Turn *turn, int64_t *begin, int64_t *end) {
    for (; turn->left; turn->left--, turn->owner = turn->owner + 1 == turn->size ? 0 : turn->owner + 1) {
        int64_t low = turn->units * turn->owner / turn->size, high = turn->units * (turn->owner + 1) / turn->size;
        atomic_llong *taken = &turn->ranges[turn->owner].taken;
        if (low + atomic_load_explicit(taken, memory_order_relaxed) >= high) continue;
        int64_t at = low + atomic_fetch_add_explicit(taken, turn->grain, memory_order_relaxed);
        if (at >= high) continue;
        *begin = at;
        *end = at + turn->grain < high ? at + turn->grain : high;
        return 1;
    }
    return 0;
}
