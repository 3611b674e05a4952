/* Rows shared out over torch's own OpenMP threads. */
#pragma once

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* Fewer floats than this are done before a second thread has woken up. */
#define PARALLEL_FLOATS 65536

typedef void (*row_work)(const void *arguments, int64_t begin, int64_t end);

/* A team has `threads` threads or one: teams of another size would make OpenMP end threads of the pool. */
static inline void over_rows(row_work work, const void *arguments, int64_t rows, int64_t width, int threads) {
#ifdef _OPENMP
    if (threads > 1 && rows > 1 && rows * width >= PARALLEL_FLOATS) {
#pragma omp parallel num_threads(threads)
        {
            int64_t own = omp_get_thread_num(), team = omp_get_num_threads();
            work(arguments, rows * own / team, rows * (own + 1) / team);
        }
        return;
    }
#endif
    work(arguments, 0, rows);
}
