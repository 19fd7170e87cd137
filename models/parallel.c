#include "models/parallel.h"

#include <pthread.h>
#include <unistd.h>

enum { MAX_THREADS = 16 };

size_t parallel_width(size_t n)
{
    long n_cores = sysconf(_SC_NPROCESSORS_ONLN);
    size_t width = n_cores < 1 ? 1 : n_cores > MAX_THREADS ? MAX_THREADS : (size_t)n_cores;
    return n < 1 ? 1 : n < width ? n : width;
}

void parallel_run(size_t width, void *(*work)(void *), void *arg)
{
    pthread_t threads[MAX_THREADS];
    size_t n = 0;
    while (n + 1 < width && pthread_create(&threads[n], NULL, work, arg) == 0) n++;
    work(arg);
    for (size_t i = 0; i < n; i++) pthread_join(threads[i], NULL);
}
