/* A pool of threads that spins between the calls of a step and sleeps between steps; scratch memory.
 *
 * A kernel is one call: all its threads run the same function, claim pieces of work, and meet at barriers. */

typedef struct pool pool;
typedef void (*kernel_fn)(pool *, void *, int);

struct pool {
    int threads, active; /* a call runs on threads [0, active) */
    pthread_t *handles;
    kernel_fn run;
    void *arg;
    atomic_long generation; /* number of calls * MAX_THREADS + active threads of the latest one */
    atomic_long next_claim, barrier_round, stalled_ns;
    atomic_int pending, arrived, stopping, sleeping;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    char *scratch; /* shared by the threads of a call */
    size_t scratch_size;
    char **thread_scratch; /* [threads] */
    size_t thread_scratch_size;
    long window_ns, reduced_until_ns; /* see `adjust_active` */
};

enum { SPINS_BEFORE_SLEEP = 40000, SPINS_BEFORE_YIELD = 20000, MAX_THREADS = 1 << 16 };

static long nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* One iteration of a wait for another thread. After SPINS_BEFORE_YIELD of them the thread yields its core. */
static void spin(long *spins, long *yield_start_ns)
{
    PAUSE();
    if (++*spins < SPINS_BEFORE_YIELD) return;
    if (*spins == SPINS_BEFORE_YIELD) *yield_start_ns = nanoseconds();
    sched_yield();
}

static void add_stall(pool *p, long yield_start_ns)
{
    if (yield_start_ns) atomic_fetch_add(&p->stalled_ns, nanoseconds() - yield_start_ns);
}

static void barrier(pool *p)
{
    if (p->active == 1) { atomic_store(&p->next_claim, 0); return; }
    long barrier_round = atomic_load(&p->barrier_round), spins = 0, yield_start_ns = 0;
    if (atomic_fetch_add(&p->arrived, 1) + 1 == p->active) {
        atomic_store(&p->arrived, 0);
        atomic_store(&p->next_claim, 0);
        atomic_fetch_add(&p->barrier_round, 1);
        return;
    }
    while (atomic_load_explicit(&p->barrier_round, memory_order_acquire) == barrier_round) spin(&spins, &yield_start_ns);
    add_stall(p, yield_start_ns);
}

/* The next piece of work, counted from 0 after each barrier and at the start of each call. */
static long claim(pool *p) { return atomic_fetch_add_explicit(&p->next_claim, 1, memory_order_relaxed); }

/* Whether thread `id` takes part in a call newer than `generation_seen`. A call ends when all its threads are done, so
 * none of them can miss one. */
static int has_call(pool *p, long generation_seen, int id)
{
    long generation = atomic_load_explicit(&p->generation, memory_order_acquire);
    return generation != generation_seen && (id < generation % MAX_THREADS || atomic_load(&p->stopping));
}

static void wait_for_call(pool *p, long generation_seen, int id)
{
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleeping, 1);
    while (!has_call(p, generation_seen, id)) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleeping, 1);
    pthread_mutex_unlock(&p->lock);
}

typedef struct { pool *p; int id; } thread_start;

static void *thread_main(void *arg)
{
    thread_start s = *(thread_start *)arg;
    free(arg);
    for (long generation_seen = 0;;) {
        for (int i = 0; !has_call(s.p, generation_seen, s.id); i++) {
            if (i < SPINS_BEFORE_SLEEP) PAUSE();
            else wait_for_call(s.p, generation_seen, s.id);
        }
        if (atomic_load(&s.p->stopping)) return NULL;
        generation_seen = atomic_load(&s.p->generation); /* read before `pending` drops: then the next call may start */
        s.p->run(s.p, s.p->arg, s.id);
        atomic_fetch_sub_explicit(&s.p->pending, 1, memory_order_release);
    }
}

/* When other programs occupy cores, threads of a call wait for each other's time slices. When these waits cost more of
 * WINDOW_NS than having one thread less would, a quarter of the threads is left out; after RETRY_NS all run again. */
static void adjust_active(pool *p, long now_ns, long elapsed_ns)
{
    enum { WINDOW_NS = 50000000, RETRY_NS = 1000000000 };
    if ((p->window_ns += elapsed_ns) < WINDOW_NS) return;
    long stalled_ns = atomic_exchange(&p->stalled_ns, 0) / (p->active - 1); /* all threads but one wait at the same time */
    if (stalled_ns > p->window_ns / p->active) {
        p->active -= (p->active + 3) / 4;
        p->reduced_until_ns = now_ns + RETRY_NS;
    }
    p->window_ns = 0;
}

static void run_on_pool(pool *p, kernel_fn run, void *arg)
{
    long start_ns = p->threads > 1 ? nanoseconds() : 0, spins = 0, yield_start_ns = 0;
    if (start_ns > p->reduced_until_ns) p->active = p->threads;
    atomic_store(&p->next_claim, 0);
    if (p->active > 1) {
        p->run = run;
        p->arg = arg;
        atomic_store(&p->pending, p->active - 1);
        atomic_store(&p->generation, (atomic_load(&p->generation) / MAX_THREADS + 1) * MAX_THREADS + p->active);
        if (atomic_load(&p->sleeping)) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_broadcast(&p->wake);
            pthread_mutex_unlock(&p->lock);
        }
    }
    run(p, arg, 0);
    if (p->active == 1) return;
    while (atomic_load_explicit(&p->pending, memory_order_acquire)) spin(&spins, &yield_start_ns);
    add_stall(p, yield_start_ns);
    long now_ns = nanoseconds();
    adjust_active(p, now_ns, now_ns - start_ns);
}

/* Run a call on the calling thread alone: if there is little to do, the others would come too late. */
static void run_alone(pool *p, kernel_fn run, void *arg)
{
    const int active = p->active;
    p->active = 1;
    atomic_store(&p->next_claim, 0);
    run(p, arg, 0);
    p->active = active;
}

static void *allocate(size_t bytes)
{
    void *block = NULL;
    return posix_memalign(&block, 4096, bytes) ? NULL : block;
}

void ps_pool_free(pool *p)
{
    atomic_store(&p->stopping, 1);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->generation, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->threads; i++) pthread_join(p->handles[i], NULL);
    for (int i = 0; i < p->threads; i++) free(p->thread_scratch[i]);
    free(p->thread_scratch);
    free(p->handles);
    free(p->scratch);
    free(p);
}

pool *ps_pool_new(int threads)
{
    pool *p = calloc(1, sizeof *p);
    p->handles = calloc(threads, sizeof *p->handles);
    p->thread_scratch = calloc(threads, sizeof *p->thread_scratch);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->threads = 1;
    for (; p->threads < threads; p->threads++) {
        thread_start *s = malloc(sizeof *s);
        *s = (thread_start){p, p->threads};
        if (pthread_create(&p->handles[p->threads], NULL, thread_main, s)) { free(s); break; }
    }
    p->active = p->threads;
    return p;
}

/* Threads of the next call; see `adjust_active`. */
int ps_pool_active(const pool *p) { return p->active; }

typedef struct { size_t shared, per_thread; } scratch_bytes;

/* Grow the shared scratch and each thread's own, before a call. Returns 0 when memory runs out. */
static int reserve_scratch(pool *p, size_t shared, size_t per_thread)
{
    if (shared > p->scratch_size) {
        free(p->scratch);
        p->scratch = allocate(shared);
        p->scratch_size = p->scratch ? shared : 0;
    }
    if (per_thread > p->thread_scratch_size) {
        p->thread_scratch_size = per_thread;
        for (int i = 0; i < p->threads; i++) {
            free(p->thread_scratch[i]);
            if (!(p->thread_scratch[i] = allocate(per_thread))) p->thread_scratch_size = 0;
        }
    }
    return shared <= p->scratch_size && per_thread <= p->thread_scratch_size;
}

typedef struct { char *address; long bytes; } memory_region;

static void touch_run(pool *p, void *arg, int id)
{
    const memory_region *r = arg;
    const long piece = 1 << 21;
    (void)id;
    for (long u; (u = claim(p) * piece) < r->bytes;)
        for (long i = u; i < u + piece && i < r->bytes; i += 4096) ((volatile char *)r->address)[i] = 0;
}

/* Let the system allocate the pages of a zeroed region now. */
void ps_touch(pool *p, void *address, long bytes)
{
    memory_region r = {address, bytes};
    run_on_pool(p, touch_run, &r);
}
