/* The listening socket: everyone is accepted once, also at the end and after a shortage of files; nobody is reset. */
#include "server/listener.h"
#include "server/log.h"
#include "server/watchdog.h"

#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 64 };

static struct listener *listener;
static atomic_int n_accepted;
static struct accepted {
    int fd;
    struct sockaddr_in address;
    socklen_t length;
} accepted[MOST]; // [n_accepted], as far as they go
static atomic_bool gate_closed; // on_accept waits

static void on_accept(void *context, int fd, const struct sockaddr *address, socklen_t length)
{
    ck_assert_ptr_eq(context, accepted);
    int n = atomic_load(&n_accepted);
    ck_assert_int_lt(n, MOST);
    accepted[n] = (struct accepted){.fd = fd, .length = length};
    memcpy(&accepted[n].address, address, sizeof accepted[n].address);
    atomic_store(&n_accepted, n + 1);
    while (atomic_load(&gate_closed)) usleep(1000);
}

static void setup(void)
{
    struct error e;
    atomic_store(&n_accepted, 0);
    ck_assert_int_eq(listener_create(&listener, 0, "127.0.0.1", 0, on_accept, accepted, &e), 0);
    ck_assert_int_ne(listener_port(listener), 0);
}

static void teardown(void)
{
    listener_destroy(listener);
    for (int i = 0; i < atomic_load(&n_accepted); i++) close(accepted[i].fd);
}

static void start(void)
{
    struct error e;
    ck_assert_int_eq(listener_start(listener, &e), 0);
}

static int new_client(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct timeval patience = {.tv_usec = 100000}; // also with a handshake that nobody answers
    ck_assert_int_ge(fd, 0);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return fd;
}

// 0 or errno.
static int connect_to(int fd, uint16_t port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    return connect(fd, (struct sockaddr *)&address, sizeof address) ? errno : 0;
}

static int client(void)
{
    int fd = new_client();
    ck_assert_int_eq(connect_to(fd, listener_port(listener)), 0);
    return fd;
}

static bool wait_accepted(int n)
{
    for (double end = watchdog_now() + 10; watchdog_now() < end; usleep(1000))
        if (atomic_load(&n_accepted) >= n) return true;
    return false;
}

static void check_refused(void)
{
    int fd = new_client();
    ck_assert_int_eq(connect_to(fd, listener_port(listener)), ECONNREFUSED);
    close(fd);
}

START_TEST(connections_are_handed_over)
{
    start();
    int fd = client();
    ck_assert(wait_accepted(1));
    struct sockaddr_in own;
    socklen_t length = sizeof own;
    ck_assert_int_eq(getsockname(fd, (struct sockaddr *)&own, &length), 0);
    ck_assert_int_eq(accepted[0].length, length);
    ck_assert_int_eq(accepted[0].address.sin_family, AF_INET);
    ck_assert_int_eq(accepted[0].address.sin_port, own.sin_port);
    ck_assert(fcntl(accepted[0].fd, F_GETFL) & O_NONBLOCK);
    ck_assert(fcntl(accepted[0].fd, F_GETFD) & FD_CLOEXEC);
    char byte = 0;
    ck_assert_int_eq(write(accepted[0].fd, "x", 1), 1);
    ck_assert_int_eq(read(fd, &byte, 1), 1);
    ck_assert_int_eq(byte, 'x');
    close(fd);
}
END_TEST

START_TEST(clients_wait_for_the_start)
{
    int early = client();
    usleep(50000);
    ck_assert_int_eq(atomic_load(&n_accepted), 0);
    start();
    ck_assert(wait_accepted(1));
    close(early);
}
END_TEST

START_TEST(never_started)
{
    listener_stop(listener);
    check_refused();
}
END_TEST

static void *stop(void *unused)
{
    listener_stop(listener);
    return unused;
}

// Those who are connected when it is told to stop are accepted, and keep their connections; then it has ended for everyone who
// stopped it.
START_TEST(stop_accepts_who_is_connected)
{
    enum { N = 50 };
    int fds[N];
    pthread_t threads[2];
    atomic_store(&gate_closed, true);
    start();
    fds[0] = client();
    ck_assert(wait_accepted(1)); // on_accept is being called: the others queue up
    for (int i = 1; i < N; i++) fds[i] = client();
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], NULL, stop, NULL);
    usleep(20000);
    ck_assert_int_eq(atomic_load(&n_accepted), 1);
    atomic_store(&gate_closed, false);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    ck_assert_int_eq(atomic_load(&n_accepted), N);
    check_refused();
    listener_stop(listener);
    for (int i = 0; i < N; i++) {
        char byte = 0;
        ck_assert_int_eq(write(accepted[i].fd, "x", 1), 1);
        ck_assert_int_eq(read(fds[i], &byte, 1), 1); // the backlog is in order
        close(fds[i]);
    }
}
END_TEST

// ---- the end amid clients ----

struct crowd {
    pthread_t thread;
    uint16_t port;
    int n_answered, n_reset;
};

static void answer(void *context, int fd, const struct sockaddr *address, socklen_t length)
{
    (void)context;
    (void)address;
    (void)length;
    if (write(fd, "x", 1) != 1) abort();
    close(fd);
}

static void *connect_until_refused(void *arg)
{
    struct crowd *c = arg;
    for (bool connected = true; connected;) {
        int fd = new_client();
        char byte;
        connected = connect_to(fd, c->port) == 0;
        if (connected) *(read(fd, &byte, 1) == 1 ? &c->n_answered : &c->n_reset) += 1;
        close(fd);
    }
    return NULL;
}

START_TEST(nobody_is_reset)
{
    enum { ROUNDS = 10, CLIENTS = 3 };
    for (int round = 0; round < ROUNDS; round++) {
        struct listener *l;
        struct error e;
        struct crowd crowd[CLIENTS] = {0};
        ck_assert_int_eq(listener_create(&l, 0, "127.0.0.1", 0, answer, NULL, &e), 0);
        ck_assert_int_eq(listener_start(l, &e), 0);
        for (int i = 0; i < CLIENTS; i++) {
            crowd[i].port = listener_port(l);
            pthread_create(&crowd[i].thread, NULL, connect_until_refused, &crowd[i]);
        }
        usleep(10000);
        listener_stop(l);
        for (int i = 0; i < CLIENTS; i++) {
            pthread_join(crowd[i].thread, NULL);
            ck_assert_int_eq(crowd[i].n_reset, 0);
        }
        listener_destroy(l);
    }
}
END_TEST

// ---- no room ----

static double cpu_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// The process may open no further file until the limit is set back.
static struct rlimit use_up_files(void)
{
    struct rlimit limit, none;
    ck_assert_int_eq(getrlimit(RLIMIT_NOFILE, &limit), 0);
    none = limit;
    int next = dup(0);
    close(next);
    none.rlim_cur = (rlim_t)next;
    ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &none), 0);
    return limit;
}

static int count_lines(int fd, const char *with)
{
    static char text[1 << 16];
    ssize_t length = read(fd, text, sizeof text - 1);
    int n = 0;
    text[length < 0 ? 0 : length] = '\0';
    for (const char *at = text; (at = strstr(at, with)); at++) n++;
    return n;
}

START_TEST(no_room_for_a_while)
{
    int log[2];
    ck_assert_int_eq(pipe2(log, O_NONBLOCK | O_CLOEXEC), 0);
    log_init(log[1], LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    start();
    for (int episode = 0; episode < 2; episode++) {
        int fd = new_client();
        struct rlimit limit = use_up_files();
        double used = cpu_seconds();
        ck_assert_int_eq(connect_to(fd, listener_port(listener)), 0);
        usleep(500000);
        ck_assert_double_lt(cpu_seconds() - used, 0.1);
        ck_assert_int_eq(atomic_load(&n_accepted), episode);
        ck_assert_int_eq(count_lines(log[0], "Too many open files"), episode == 0); // the second comes too soon after the first
        ck_assert_int_eq(setrlimit(RLIMIT_NOFILE, &limit), 0);
        ck_assert(wait_accepted(episode + 1));
        close(fd);
    }

    // The end does not wait for room.
    int fd = new_client();
    struct rlimit limit = use_up_files();
    ck_assert_int_eq(connect_to(fd, listener_port(listener)), 0);
    usleep(50000);
    double began = watchdog_now();
    listener_stop(listener);
    ck_assert_double_lt(watchdog_now() - began, 1);
    setrlimit(RLIMIT_NOFILE, &limit);
    close(fd);
    log_init(STDERR_FILENO, LOG_FORMAT_TEXT, LOG_LEVEL_INFO);
    close(log[0]);
    close(log[1]);
}
END_TEST

// ---- what cannot be bound ----

START_TEST(port_in_use)
{
    struct listener *second;
    struct error e;
    char port[8];
    snprintf(port, sizeof port, "%u", listener_port(listener));
    ck_assert_int_eq(listener_create(&second, 0, "127.0.0.1", listener_port(listener), on_accept, accepted, &e), ERR_IO);
    ck_assert_ptr_nonnull(strstr(e.message, port));
    ck_assert_ptr_nonnull(strstr(e.message, "in use"));
}
END_TEST

START_TEST(bad_host)
{
    struct listener *l;
    struct error e;
    ck_assert_int_eq(listener_create(&l, 0, "no..host", 0, on_accept, accepted, &e), ERR_INVALID);
    ck_assert_ptr_nonnull(strstr(e.message, "no..host"));
    ck_assert_int_eq(listener_create(&l, 0, "203.0.113.7", 0, on_accept, accepted, &e), ERR_IO); // not this machine's
    ck_assert_ptr_nonnull(strstr(e.message, "203.0.113.7"));
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("listener");
    TCase *tc = tcase_create("socket");
    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_test(tc, connections_are_handed_over);
    tcase_add_test(tc, clients_wait_for_the_start);
    tcase_add_test(tc, never_started);
    tcase_add_test(tc, stop_accepts_who_is_connected);
    tcase_add_test(tc, nobody_is_reset);
    tcase_add_test(tc, no_room_for_a_while);
    tcase_add_test(tc, port_in_use);
    tcase_add_test(tc, bad_host);
    tcase_set_timeout(tc, 60);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed != 0;
}
