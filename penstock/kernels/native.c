/* The hot operations of a forward pass on a CPU: products with packed weights, norms, rotary positions, paged attention.
 *
 * Owns a pool of threads and per-pool scratch, nothing else: every tensor is the caller's. Compiled on first use by
 * `build.py`, called through `native.py`; `reference.py` is the oracle. GNU C (gcc or clang); the instruction set is
 * what the compiler was told to target.
 *
 * Invariant, the whole reason for deterministic outputs: every output row depends on its own inputs alone, and is
 * summed in one order, whatever other rows, chunks, tiles or threads are there. Products run over k in sequence;
 * attention runs over keys in tiles of KEYS that begin at multiples of KEYS, fully hidden tiles being exact no-ops.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
enum { VL = 16, MR = 12 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { VL = 8, MR = 6 };
#else
enum { VL = 4, MR = 4 };
#endif
enum { NV = 2, NR = NV * VL };     /* a panel of packed weights: NV vectors wide */
enum { LANES = 16, KEYS = 64 };    /* tokens of a cache panel, keys of an attention tile */
enum { PANELS = KEYS / LANES };
enum { MAX_HEAD = 512 };           /* largest head size that attention keeps in registers and scratch */

typedef float vf __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2)));
typedef int8_t vb __attribute__((vector_size(VL), aligned(1)));
#define INLINE static inline __attribute__((always_inline))

/* Number formats. As operands of a product, a 32-bit word holds 1 F32, 2 BF16, or 4 I8 numbers along k. */
enum { F32, BF16, F16, I8 };
static const int SIZE[] = {4, 2, 2, 1};
INLINE int per_word(int f) { return f == BF16 ? 2 : f == I8 ? 4 : 1; }

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splati(int32_t x) { return x - (vi){0}; }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
/* The greater, or b where either is no number. */
#if defined(__AVX512F__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }
#endif
#if defined(__AVX512F__)
INLINE float sum_of(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float max_of(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float sum_of(vf v)
{
    for (int h = VL / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
}
INLINE float max_of(vf v)
{
    for (int h = VL / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] = v[i] > v[i + h] ? v[i] : v[i + h];
    return v[0];
}
#endif

/* ---- loading and storing VL numbers of any format as float32 ---- */

#if defined(__FLT16_MAX__)
static inline float half_to_float(uint16_t h) { union { uint16_t u; _Float16 h; } x = {h}; return (float)x.h; }
static inline uint16_t float_to_half(float f) { union { _Float16 h; uint16_t u; } x = {(_Float16)f}; return x.u; }
#else /* compilers without the type (gcc before 12, clang before 15, on x86) */
typedef union { float f; uint32_t u; } bits;
static inline float half_to_float(uint16_t h)
{
    bits x = {.u = (uint32_t)(h & 0x7fff) << 13};
    x.f *= 0x1p112f;
    if ((h & 0x7c00) == 0x7c00) x.u |= 0x7f800000;
    x.u |= (uint32_t)(h & 0x8000) << 16;
    return x.f;
}
static inline uint16_t float_to_half(float f) /* to nearest even */
{
    bits x = {f};
    uint16_t sign = x.u >> 16 & 0x8000;
    x.u &= 0x7fffffff;
    if (x.u >= 0x47800000) return sign | (x.u > 0x7f800000 ? 0x7e00 : 0x7c00);
    if (x.u < 0x38800000) { x.f += 0.5f; return sign | (uint16_t)(x.u - 0x3f000000); } /* subnormal: the sum rounds */
    return sign | (uint16_t)((x.u + 0xc8000fff + (x.u >> 13 & 1)) >> 13);
}
#endif

INLINE vf from_half(const void *p)
{
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p));
#else
    vf v;
    for (int i = 0; i < VL; i++) v[i] = half_to_float(((const uint16_t *)p)[i]);
    return v;
#endif
}

INLINE void to_half(void *p, vf v)
{
#if defined(__AVX512F__)
    _mm256_storeu_si256(p, _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(p, _mm256_cvtps_ph((__m256)v, 0));
#else
    for (int i = 0; i < VL; i++) ((uint16_t *)p)[i] = float_to_half(v[i]);
#endif
}

INLINE vh to_bf16(vf v) /* round to nearest even; NaN stays NaN */
{
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    vu u = (vu)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vi nan = v != v;
    u = (u & (vu)~nan) | (0x7fc0 & (vu)nan);
    return __builtin_convertvector(u, vh);
#endif
}

INLINE vf from_bytes(const void *p)
{
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p)));
#else
    return __builtin_convertvector(*(const vb *)p, vf);
#endif
}

INLINE vu widened(const uint16_t *p)
{
#if defined(__AVX512F__)
    return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#else
    return __builtin_convertvector(*(const vh *)p, vu);
#endif
}

INLINE vf load(const void *p, long i, int f)
{
    if (f == F32) return *(const vf *)((const float *)p + i);
    if (f == BF16) return (vf)(widened((const uint16_t *)p + i) << 16);
    return from_half((const uint16_t *)p + i);
}

INLINE void store(void *p, long i, int f, vf v)
{
    if (f == F32) *(vf *)((float *)p + i) = v;
    else if (f == BF16) *(vh *)((uint16_t *)p + i) = to_bf16(v);
    else to_half((uint16_t *)p + i, v);
}

static float load1(const void *p, long i, int f)
{
    if (f == F32) return ((const float *)p)[i];
    if (f == F16) return half_to_float(((const uint16_t *)p)[i]);
    union { uint32_t u; float f; } x = {(uint32_t)((const uint16_t *)p)[i] << 16};
    return x.f;
}

static void store1(void *p, long i, int f, float x)
{
    uint16_t out[VL];
    if (f == F32) { ((float *)p)[i] = x; return; }
    store(out, 0, f, splat(x));
    ((uint16_t *)p)[i] = out[0];
}

INLINE void widen_(float *dst, const void *src, long n, int f)
{
    long i = 0;
    for (; i + VL <= n; i += VL) *(vf *)(dst + i) = load(src, i, f);
    for (; i < n; i++) dst[i] = load1(src, i, f);
}

INLINE void widen(float *dst, const void *src, long n, int f)
{
    if (f == F32) widen_(dst, src, n, F32);
    else if (f == BF16) widen_(dst, src, n, BF16);
    else widen_(dst, src, n, F16);
}

INLINE void narrow_(void *dst, const float *src, long n, int f)
{
    long i = 0;
    for (; i + VL <= n; i += VL) store(dst, i, f, *(const vf *)(src + i));
    for (; i < n; i++) store1(dst, i, f, src[i]);
}

INLINE void narrow(void *dst, const float *src, long n, int f)
{
    if (f == F32) narrow_(dst, src, n, F32);
    else if (f == BF16) narrow_(dst, src, n, BF16);
    else narrow_(dst, src, n, F16);
}

/* Ask for memory that is wanted soon: most of it was written by another thread, and lies in that one's cache. */
INLINE void fetch(const char *p, long bytes)
{
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* ---- elementary functions ---- */

#if defined(__AVX512F__)
INLINE vf vexp(vf x) /* Cephes expf; exactly 0 from -110 down */
{
    x = (vf)_mm512_min_ps((__m512)splat(88.0f), (__m512)vmax(splat(-110.0f), x)); /* NaN passes both */
    __m512 n = _mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
    vf r = x - (vf)n * 0.693359375f + (vf)n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, n);
}
#else
INLINE vf vexp(vf x) /* Cephes expf; exactly 0 below -87 */
{
    vi small = x < splat(-87.0f);
    x = pick(x > splat(88.0f), splat(88.0f), x);
    x = pick(small, splat(0.0f), x);
    vf shifted = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
    vf n = shifted - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    vf power = (vf)(((vi)shifted << 23) + (127 << 23)); /* the low bits of `shifted` are n */
    return pick(small, splat(0.0f), p * power);
}
#endif

INLINE vf vtanh(vf x) { return 1.0f - 2.0f / (vexp(x + x) + 1.0f); }

INLINE vf verf(vf x) /* Abramowitz and Stegun 7.1.26 would be too coarse; libm's, lane by lane */
{
    for (int i = 0; i < VL; i++) x[i] = erff(x[i]);
    return x;
}

enum { IDENTITY, SILU, GELU_TANH, GELU_ERF, RELU };

INLINE vf activate(vf x, int act)
{
    switch (act) {
    case SILU: return x / (1.0f + vexp(-x));
    case GELU_TANH: return x * (0.5f + 0.5f * vtanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    case GELU_ERF: return x * (0.5f + 0.5f * verf(x * 0.7071067812f));
    case RELU: return vmax(splat(0.0f), x); /* NaN stays */
    default: return x;
    }
}

/* ---- threads: a pool that spins between the calls of one step and sleeps between steps ---- */

typedef struct pool pool;
typedef void (*job)(pool *, void *, int);

struct pool {
    int threads, active; /* those there are, and how many of them share a call: the first ones */
    pthread_t *ids;
    job run;
    void *arg;
    atomic_long turn; /* calls so far times MEMBERS, plus how many share the last one */
    atomic_long claimed, round, stalled;
    atomic_int left, arrived, stopping, sleeping;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    char *scratch; /* shared by the threads of one call */
    size_t scratch_size;
    char **own; /* one per thread */
    size_t own_size;
    long watched, fewer_until; /* nanoseconds, see `judge` */
};

enum { SPINS = 40000, PATIENCE = 20000, MEMBERS = 1 << 16 };

static long nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* One more look at what another thread is to change. Whoever waits long lets others have the core, from `since` on. */
static void relax(long *looks, long *since)
{
    PAUSE();
    if (++*looks < PATIENCE) return;
    if (*looks == PATIENCE) *since = nanoseconds();
    sched_yield();
}

static void complain(pool *p, long since)
{
    if (since) atomic_fetch_add(&p->stalled, nanoseconds() - since);
}

static void barrier(pool *p)
{
    if (p->active == 1) { atomic_store(&p->claimed, 0); return; }
    long round = atomic_load(&p->round), looks = 0, since = 0;
    if (atomic_fetch_add(&p->arrived, 1) + 1 == p->active) {
        atomic_store(&p->arrived, 0);
        atomic_store(&p->claimed, 0);
        atomic_fetch_add(&p->round, 1);
        return;
    }
    while (atomic_load_explicit(&p->round, memory_order_acquire) == round) relax(&looks, &since);
    complain(p, since);
}

/* The next unclaimed piece of work; claims start over after each barrier and at each call. */
static long claim(pool *p) { return atomic_fetch_add_explicit(&p->claimed, 1, memory_order_relaxed); }

/* Is there a call after `seen` that thread `id` shares? Those that share one are waited for, so they miss none. */
static int called(pool *p, long seen, int id)
{
    long turn = atomic_load_explicit(&p->turn, memory_order_acquire);
    return turn != seen && (id < turn % MEMBERS || atomic_load(&p->stopping));
}

static void nap(pool *p, long seen, int id)
{
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleeping, 1);
    while (!called(p, seen, id)) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleeping, 1);
    pthread_mutex_unlock(&p->lock);
}

typedef struct { pool *p; int id; } seat;

static void *work(void *arg)
{
    seat s = *(seat *)arg;
    free(arg);
    for (long seen = 0;;) {
        for (int i = 0; !called(s.p, seen, s.id); i++) {
            if (i < SPINS) PAUSE();
            else nap(s.p, seen, s.id);
        }
        if (atomic_load(&s.p->stopping)) return NULL;
        seen = atomic_load(&s.p->turn); /* once `left` is 0, the next call may begin at any moment */
        s.p->run(s.p, s.p->arg, s.id);
        atomic_fetch_sub_explicit(&s.p->left, 1, memory_order_release);
    }
}

/* Where other programs hold cores, the threads of a call wait for one another's time slices. Once such waits took more
 * of WATCH than one thread less would, a quarter of them sits out; after REST all are tried again. */
static void judge(pool *p, long now, long took)
{
    enum { WATCH = 50000000, REST = 1000000000 };
    if ((p->watched += took) < WATCH) return;
    long stalled = atomic_exchange(&p->stalled, 0) / (p->active - 1); /* all but one wait at a time */
    if (stalled > p->watched / p->active) {
        p->active -= (p->active + 3) / 4;
        p->fewer_until = now + REST;
    }
    p->watched = 0;
}

static void call(pool *p, job run, void *arg)
{
    long began = p->threads > 1 ? nanoseconds() : 0, looks = 0, since = 0;
    if (began > p->fewer_until) p->active = p->threads;
    atomic_store(&p->claimed, 0);
    if (p->active > 1) {
        p->run = run;
        p->arg = arg;
        atomic_store(&p->left, p->active - 1);
        atomic_store(&p->turn, (atomic_load(&p->turn) / MEMBERS + 1) * MEMBERS + p->active);
        if (atomic_load(&p->sleeping)) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_broadcast(&p->wake);
            pthread_mutex_unlock(&p->lock);
        }
    }
    run(p, arg, 0);
    if (p->active == 1) return;
    while (atomic_load_explicit(&p->left, memory_order_acquire)) relax(&looks, &since);
    complain(p, since);
    long now = nanoseconds();
    judge(p, now, now - began);
}

static void *memory(size_t bytes)
{
    void *found = NULL;
    return posix_memalign(&found, 4096, bytes) ? NULL : found;
}

void ps_pool_free(pool *p)
{
    atomic_store(&p->stopping, 1);
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->turn, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->threads; i++) pthread_join(p->ids[i], NULL);
    for (int i = 0; i < p->threads; i++) free(p->own[i]);
    free(p->own);
    free(p->ids);
    free(p->scratch);
    free(p);
}

pool *ps_pool_new(int threads)
{
    pool *p = calloc(1, sizeof *p);
    p->ids = calloc(threads, sizeof *p->ids);
    p->own = calloc(threads, sizeof *p->own);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->threads = 1;
    for (; p->threads < threads; p->threads++) {
        seat *s = malloc(sizeof *s);
        *s = (seat){p, p->threads};
        if (pthread_create(&p->ids[p->threads], NULL, work, s)) { free(s); break; }
    }
    p->active = p->threads;
    return p;
}

/* How many threads would share the next call; see `judge`. */
int ps_pool_active(const pool *p) { return p->active; }

/* Grow the shared scratch and each thread's own; called before threads start. 0 when there is no memory. */
static int reserve(pool *p, size_t shared, size_t own)
{
    if (shared > p->scratch_size) {
        free(p->scratch);
        p->scratch = memory(shared);
        p->scratch_size = p->scratch ? shared : 0;
    }
    if (own > p->own_size) {
        p->own_size = own;
        for (int i = 0; i < p->threads; i++) {
            free(p->own[i]);
            if (!(p->own[i] = memory(own))) p->own_size = 0;
        }
    }
    return shared <= p->scratch_size && own <= p->own_size;
}

/* ---- the tile: c[mr][NR] (+)= a[mr][k] b[k][NR], the one product everything here is made of ---- */

INLINE vf dot(vf acc, vi b, int32_t a, int f)
{
    if (f == I8) { /* unsigned bytes of a, signed bytes of b, 32-bit sums */
#if defined(__AVX512VNNI__)
        return (vf)_mm512_dpbusd_epi32((__m512i)(vi)acc, (__m512i)splati(a), (__m512i)b);
#elif defined(__AVXVNNI__) && defined(__AVX2__)
        return (vf)_mm256_dpbusd_avx_epi32((__m256i)(vi)acc, (__m256i)splati(a), (__m256i)b);
#else
        vi sum = (vi)acc;
        for (int j = 0; j < 4; j++) sum += ((b << (24 - 8 * j)) >> 24) * ((a >> (8 * j)) & 255);
        return (vf)sum;
#endif
    }
    if (f == BF16) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)splati(a), (__m512bh)b);
#else
        acc += (vf)(b << 16) * (vf)splati((int32_t)((uint32_t)a << 16));
        return acc + (vf)(b & (int32_t)0xffff0000) * (vf)splati(a & (int32_t)0xffff0000);
#endif
    }
    union { int32_t i; float f; } x = {a};
    return acc + (vf)b * x.f;
}

/* Where a tile reads b: `count` stretches of `steps` words each, `stride` bytes from word to word; vector v of stretch
 * s begins at at[v][s] + shift[v]. `soon` are the stretches that will be wanted next: the same place in them is prefetched. */
enum { WIDE = 2 * NV, WIDE_ROWS = VL == 16 ? 6 : 2 }; /* few rows take twice the columns, to keep the units busy */
typedef struct {
    const char *const *at[WIDE], *const *soon[WIDE];
    long shift[WIDE], count, steps, stride;
} columns;

INLINE void tile(const int f, const int mr, const int nv, const int32_t *a, long ars, const columns *b, float *c, long ldc, int add)
{
    vf acc[MR][WIDE];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) acc[i][j] = add ? *(vf *)(c + i * ldc + j * VL) : (vf){0};
    const long stride = b->stride, steps = b->steps;
    for (long s = 0; s < b->count; s++) {
        const char *at[WIDE], *soon[WIDE];
        for (int j = 0; j < nv; j++) at[j] = b->at[j][s] + b->shift[j], soon[j] = b->soon[j][s] + b->shift[j];
        long offset = 0;
        for (long k = 0; k < steps; k++, offset += stride) {
            vi x[WIDE];
            _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) {
                x[j] = f == F16 ? (vi)from_half(at[j] + offset) : *(const vi *)(at[j] + offset);
                __builtin_prefetch(soon[j] + offset, 0, 2);
            }
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                int32_t y = a[(i / 3) * (3 * ars) + (i % 3) * ars];
                _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) acc[i][j] = dot(acc[i][j], x[j], y, f);
            }
            a++;
        }
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) *(vf *)(c + i * ldc + j * VL) = acc[i][j];
}

/* The same for one panel of weights and rows that lie interleaved, a[k][mr]; fetches `step` bytes from `soon` per k. */
INLINE void product(const int f, const int mr, const int32_t *a, const char *b, long k, const char *soon, long step, float *c)
{
    vf acc[MR][NV];
    const long half = f == F16 ? 2 * VL : 4 * VL;
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = (vf){0};
    for (; k > 0; k--) {
        vi bl = f == F16 ? (vi)from_half(b) : *(const vi *)b;
        vi br = f == F16 ? (vi)from_half(b + half) : *(const vi *)(b + half);
        __builtin_prefetch(soon, 0, 2);
        _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
            acc[i][0] = dot(acc[i][0], bl, a[i], f);
            acc[i][1] = dot(acc[i][1], br, a[i], f);
        }
        a += mr;
        b += 2 * half;
        soon += step;
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) *(vf *)(c + i * NR + j * VL) = acc[i][j];
}

typedef void (*tile_fn)(const int32_t *, long, const columns *, float *, long, int);
typedef void (*product_fn)(const int32_t *, const char *, long, const char *, long, float *);
#define TILE(f, n) \
    static void tile_##f##_##n(const int32_t *a, long ars, const columns *b, float *c, long ldc, int add) \
    { tile(f, n <= MR ? n : MR, NV, a, ars, b, c, ldc, add); } \
    static void wide_##f##_##n(const int32_t *a, long ars, const columns *b, float *c, long ldc, int add) \
    { tile(f, n <= WIDE_ROWS ? n : WIDE_ROWS, WIDE, a, ars, b, c, ldc, add); } \
    static void product_##f##_##n(const int32_t *a, const char *b, long k, const char *soon, long step, float *c) \
    { product(f, n <= MR ? n : MR, a, b, k, soon, step, c); }
#define TILES(f) TILE(f, 1) TILE(f, 2) TILE(f, 3) TILE(f, 4) TILE(f, 5) TILE(f, 6) \
    TILE(f, 7) TILE(f, 8) TILE(f, 9) TILE(f, 10) TILE(f, 11) TILE(f, 12)
#define TABLE(t, f) {0, t##_##f##_1, t##_##f##_2, t##_##f##_3, t##_##f##_4, t##_##f##_5, t##_##f##_6, \
    t##_##f##_7, t##_##f##_8, t##_##f##_9, t##_##f##_10, t##_##f##_11, t##_##f##_12}
TILES(F32) TILES(BF16) TILES(F16) TILES(I8)
static const tile_fn tiles[4][13] = {TABLE(tile, F32), TABLE(tile, BF16), TABLE(tile, F16), TABLE(tile, I8)};
static const tile_fn wides[4][13] = {TABLE(wide, F32), TABLE(wide, BF16), TABLE(wide, F16), TABLE(wide, I8)};
static const product_fn products[4][13] = {
    TABLE(product, F32), TABLE(product, BF16), TABLE(product, F16), TABLE(product, I8)};

/* ---- norms ---- */

enum { NO_NORM, RMS, LAYER };

static void normalize(float *x, long n, int kind, const float *weight, const float *bias, float eps)
{
    vf total = splat(0.0f), squares = splat(0.0f);
    float mean = 0, tail = 0;
    long i;
    if (kind == LAYER) {
        for (i = 0; i + VL <= n; i += VL) total += *(vf *)(x + i);
        for (; i < n; i++) tail += x[i];
        mean = (sum_of(total) + tail) / n;
    }
    for (i = 0, tail = 0; i + VL <= n; i += VL) {
        vf v = *(vf *)(x + i) - mean;
        squares += v * v;
    }
    for (; i < n; i++) tail += (x[i] - mean) * (x[i] - mean);
    float r = 1.0f / sqrtf((sum_of(squares) + tail) / n + eps);
    for (i = 0; i + VL <= n; i += VL) {
        vf v = (*(vf *)(x + i) - mean) * r * *(const vf *)(weight + i);
        *(vf *)(x + i) = bias ? v + *(const vf *)(bias + i) : v;
    }
    for (; i < n; i++) x[i] = (x[i] - mean) * r * weight[i] + (bias ? bias[i] : 0);
}

/* out = norm(x), or out += scale * norm(x) when `add`. */
typedef struct {
    long n;
    int32_t kind, dtype;
    float eps, scale;
    const float *weight, *bias;
} norm;

typedef struct { const norm *n; const char *x; char *out; long rows; int add; } norm_job;

static void norm_run(pool *p, void *arg, int id)
{
    const norm_job j = *(norm_job *)arg;
    int f = j.n->dtype, size = SIZE[f];
    float *row = (float *)p->own[id];
    for (long m; (m = claim(p)) < j.rows;) {
        char *out = j.out + m * j.n->n * size;
        widen(row, j.x + m * j.n->n * size, j.n->n, f);
        normalize(row, j.n->n, j.n->kind, j.n->weight, j.n->bias, j.n->eps);
        if (j.add)
            for (long i = 0; i < j.n->n; i++) row[i] = load1(out, i, f) + j.n->scale * row[i];
        narrow(out, row, j.n->n, f);
    }
}

/* 0 when there is no memory for scratch, here and below. */
static size_t norm_row(const norm *n) { return (n->n + VL) * 4; }

int ps_norm(pool *p, const norm *n, const void *x, long rows, void *out, int add)
{
    norm_job j = {n, x, out, rows, add};
    if (!reserve(p, 0, norm_row(n))) return 0;
    call(p, norm_run, &j);
    return 1;
}

/* ---- the rotation before quantization ----
 *
 * Few channels of activations, keys and values are far larger than the others, and one scale for a row then rounds the
 * others away. An orthogonal transform Q spreads every channel over many (QuaRot, Ashkboos et al. 2024, arXiv
 * 2404.00456): x Q is quantized, weights are packed as W Q, and (x Q)(W Q)^T = x W^T. Q is a fixed sign for each
 * channel, then Walsh-Hadamard transforms of blocks of SPAN numbers at most, the last of which may overlap the one
 * before it. The signs keep a mean that channels share from ending up in a single number. */
enum { SPAN = 1024 };

INLINE long span_of(long n) /* the largest power of two that fits */
{
    long span = 1;
    while (2 * span <= n && span < SPAN) span *= 2;
    return span;
}

INLINE vf swapped(vf x, const int h) /* lane i gets lane i ^ h */
{
#if defined(__AVX512F__)
    if (h == 1) return (vf)_mm512_permute_ps((__m512)x, 0xb1);
    if (h == 2) return (vf)_mm512_permute_ps((__m512)x, 0x4e);
    if (h == 4) return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xb1);
    return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4e);
#else
    vf y;
    for (int i = 0; i < VL; i++) y[i] = x[i ^ h];
    return y;
#endif
}

INLINE vf hadamard_lanes(vf x)
{
    _Pragma("GCC unroll 4") for (int h = 1; h < VL; h *= 2) {
        vf sign;
        for (int i = 0; i < VL; i++) sign[i] = i & h ? -1 : 1;
        x = swapped(x, h) + x * sign;
    }
    return x;
}

/* `count` vectors that lie `stride` numbers apart: the transform across them, and within each if `lanes`. */
INLINE void butterflies(float *x, const int count, long stride, const int lanes, float scale)
{
    vf v[8];
    _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) {
        v[i] = *(vf *)(x + i * stride) * scale;
        if (lanes) v[i] = hadamard_lanes(v[i]);
    }
    _Pragma("GCC unroll 3") for (int h = 1; h < count; h *= 2)
        _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
            if (!(i & h)) {
                vf a = v[i], b = v[i + h];
                v[i] = a + b, v[i + h] = a - b;
            }
    _Pragma("GCC unroll 8") for (int i = 0; i < count; i++) *(vf *)(x + i * stride) = v[i];
}

static void transform(float *x, long count, long stride, int lanes, float scale)
{
    if (count >= 8 && lanes) butterflies(x, 8, stride, 1, scale);
    else if (count >= 8) butterflies(x, 8, stride, 0, scale);
    else if (count == 4) butterflies(x, 4, stride, lanes, scale);
    else if (count == 2) butterflies(x, 2, stride, lanes, scale);
    else butterflies(x, 1, stride, lanes, scale);
}

/* The orthogonal transform of n numbers, n a power of two; its own inverse. Eight vectors at a time stay in registers. */
static void hadamard(float *x, long n)
{
    const float scale = 1 / sqrtf(n);
    const long count = n / VL;
    for (long h = 1; n < VL && h < n; h *= 2)
        for (long i = 0; i < n; i++)
            if (!(i & h)) {
                float a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
    for (long i = 0; n < VL && i < n; i++) x[i] *= scale;
    for (long i = 0; i < count; i += 8) transform(x + i * VL, count, VL, 1, scale);
    for (long h = 8; h < count; h *= 8)
        for (long i = 0; i < count; i += 8 * h)
            for (long j = i; j < i + h && j < count; j++) transform(x + j * VL, count / h, h * VL, 0, 1);
}

/* Signs whose own transform is flat (a bent function, Rothaus 1976): minus where an odd number of the pairs of bits
 * (0, 1), (2, 3), ... of a place are both set. */
static void flip_signs(float *x, long n)
{
    enum { MINUS = INT32_MIN };
    static const int32_t sixteen[] = {0, 0, 0, MINUS, 0, 0, 0, MINUS, 0, 0, 0, MINUS, MINUS, MINUS, MINUS, 0};
    for (long i = 0; i < n; i += VL) {
        long j = i / 16;
        vi signs = *(const vi *)(sixteen + i % 16) ^ (__builtin_parityl(j & j >> 1 & 0x55555555) ? MINUS : 0);
        if (i + VL <= n) *(vi *)(x + i) ^= signs;
        else for (long k = i; k < n; k++) x[k] = signs[k - i] ? -x[k] : x[k];
    }
}

/* The block that overlaps gets signs of its own, or it would gather what the one before it has spread. */
static void rotate_channels(float *x, long n) /* x Q, in place */
{
    const long span = span_of(n), rest = n - span;
    flip_signs(x, n);
    for (long i = 0; i <= rest; i += span) hadamard(x + i, span);
    if (n % span == 0) return;
    flip_signs(x + rest, span);
    hadamard(x + rest, span);
}

static void restore_channels(float *x, long n) /* its inverse */
{
    const long span = span_of(n), rest = n - span;
    if (n % span) {
        hadamard(x + rest, span);
        flip_signs(x + rest, span);
    }
    for (long i = 0; i <= rest; i += span) hadamard(x + i, span);
    flip_signs(x, n);
}

/* ---- products with packed weights ---- */

enum { STORE, ADD, GATED };

/* y = act(norm(x) W^T + bias). GATED: a panel holds VL gate columns, then VL up columns, and y = act(gate) * up.
 * ADD: y += scale * (...). Weights are [panels][k words][NR], zero beyond n and k. int8: rows of x and W are rotated;
 * `scales` per column, `offsets` = 128 * sum of the column, which the unsigned activations of one scale per row bring
 * in. */
typedef struct {
    long n, k;
    int32_t format, mode, act, in_type, out_type, norm_kind;
    float scale, eps;
    const char *weights;
    const float *bias, *scales;
    const int32_t *offsets;
    const float *norm_weight, *norm_bias;
} linear;

typedef struct {
    const linear *w;
    const char *x;
    char *out;
    long rows, ldx, ldo; /* in elements */
    char *rows_at;       /* prepared rows, `stride` bytes each, */
    char *a;             /* and interleaved, tile after tile, unless one tile holds them all */
    long stride;
    float *row_scales;
    size_t plain; /* bytes of scratch before `a` */
    int direct;
} linear_job;

INLINE long words(const linear *w) { return (w->k + per_word(w->format) - 1) / per_word(w->format); }

static void quantize_row(uint8_t *out, const float *x, long n, float *scale)
{
    vf top = splat(0.0f), broken = splat(0.0f);
    float most = 0, sick = 0;
    long i = 0;
    for (; i + VL <= n; i += VL) {
        top = vmax(top, (vf)(*(const vi *)(x + i) & 0x7fffffff));
        broken += *(const vf *)(x + i) * 0.0f;
    }
    for (; i < n; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        sick += x[i] * 0.0f;
    }
    most = fmaxf(most, max_of(top));
    float inverse = most > 0 ? 127.0f / most : 0.0f;
    *scale = sick + sum_of(broken) == 0 ? most / 127.0f : NAN; /* a row with NaN or infinity is NaN altogether */
    for (i = 0; i + VL <= n; i += VL) {
        vf v = *(const vf *)(x + i) * inverse + (12582912.0f + 128.0f);
        *(vb *)(out + i) = __builtin_convertvector((vi)v, vb);
    }
    for (; i < n; i++) out[i] = (uint8_t)(lrintf(x[i] * inverse) + 128);
}

static void prepare(const linear_job *j, long m, char *dst, float *row)
{
    const linear *w = j->w;
    ((int32_t *)dst)[words(w) - 1] = 0; /* k may end within a word */
    widen(row, j->x + m * j->ldx * SIZE[w->in_type], w->k, w->in_type);
    if (w->norm_kind) normalize(row, w->k, w->norm_kind, w->norm_weight, w->norm_bias, w->eps);
    if (w->format == I8) {
        rotate_channels(row, w->k);
        quantize_row((uint8_t *)dst, row, w->k, &j->row_scales[m]);
    } else narrow(dst, row, w->k, w->format == BF16 ? BF16 : F32);
}

/* Where row m lies once it is prepared: in its place if one tile holds all rows, else to be interleaved from there. */
INLINE char *prepared(const linear_job *j, long m)
{
    return j->direct ? (char *)j->x + m * j->stride : j->rows_at + m * j->stride;
}

#if defined(__AVX512F__)
/* Sixteen words of twelve rows: four rows at a time are transposed within each quarter of a vector. */
INLINE void interleave_12(const int32_t *const *from, long at, int32_t *to)
{
    for (int r = 0; r < 12; r += 4) {
        __m512i a = _mm512_loadu_si512(from[r] + at), b = _mm512_loadu_si512(from[r + 1] + at);
        __m512i c = _mm512_loadu_si512(from[r + 2] + at), d = _mm512_loadu_si512(from[r + 3] + at);
        __m512i ab[] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)};
        __m512i cd[] = {_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)};
        for (int i = 0; i < 2; i++) {
            __m512i even = _mm512_unpacklo_epi64(ab[i], cd[i]), odd = _mm512_unpackhi_epi64(ab[i], cd[i]);
#define QUARTER(q) \
            _mm_storeu_si128((__m128i *)(to + (4 * q + 2 * i) * 12 + r), _mm512_extracti32x4_epi32(even, q)); \
            _mm_storeu_si128((__m128i *)(to + (4 * q + 2 * i + 1) * 12 + r), _mm512_extracti32x4_epi32(odd, q));
            QUARTER(0) QUARTER(1) QUARTER(2) QUARTER(3)
#undef QUARTER
        }
    }
}
#endif

/* Words [begin, end) of the rows [m, m + mr) of a tile become a[k][mr]. */
static void interleave(const linear_job *j, long m, long mr, long begin, long end)
{
    const int32_t *from[MR];
    int32_t *to = (int32_t *)j->a + m * words(j->w) + begin * mr;
    for (long i = 0; i < mr; i++) from[i] = (const int32_t *)prepared(j, m + i);
#if defined(__AVX512F__)
    for (; mr == 12 && begin + 16 <= end; begin += 16, to += 16 * 12) interleave_12(from, begin, to);
#endif
    for (long x = begin; x < end; x++)
        for (long i = 0; i < mr; i++) *to++ = from[i][x];
}

/* Finish `rows` rows of a panel's sums c and store them. */
INLINE void finish_rows(const linear_job *j, long m, long rows, long n, const float *c, long ldc, const int act, const int type, const int mode)
{
    const linear *w = j->w;
    const int many = mode == GATED ? 1 : NV, quantized = w->format == I8;
    const long at = mode == GATED ? n / 2 : n, end = mode == GATED ? w->n / 2 : w->n;
    vf bias[NV], scale[NV];
    vi offset[NV];
    for (int i = 0; i < NV; i++) {
        bias[i] = w->bias ? *(const vf *)(w->bias + n + i * VL) : splat(0.0f);
        scale[i] = quantized ? *(const vf *)(w->scales + n + i * VL) : splat(1.0f);
        offset[i] = quantized ? *(const vi *)(w->offsets + n + i * VL) : splati(0);
    }
    for (long x = 0; x < rows; x++, c += ldc) {
        char *out = j->out + (m + x) * j->ldo * SIZE[type];
        vf v[NV];
        for (int i = 0; i < NV; i++) {
            v[i] = *(const vf *)(c + i * VL);
            if (quantized) v[i] = __builtin_convertvector((vi)v[i] - offset[i], vf) * scale[i] * j->row_scales[m + x];
            v[i] += bias[i];
        }
        if (mode == GATED) v[0] = activate(v[0], act) * v[1];
        else if (act)
            for (int i = 0; i < NV; i++) v[i] = activate(v[i], act);
        for (int i = 0; i < many; i++) {
            long to = at + i * VL;
            if (to + VL <= end) {
                store(out, to, type, mode == ADD ? load(out, to, type) + w->scale * v[i] : v[i]);
                continue;
            }
            for (long e = to; e < end; e++)
                store1(out, e, type, mode == ADD ? load1(out, e, type) + w->scale * v[i][e - to] : v[i][e - to]);
        }
    }
}

static void finish(const linear_job *j, long m, long rows, long n, const float *c, long ldc)
{
    int act = j->w->act, type = j->w->out_type, mode = j->w->mode;
    if (type == BF16 && mode == GATED && act == SILU) finish_rows(j, m, rows, n, c, ldc, SILU, BF16, GATED);
    else if (type == BF16 && mode == STORE && !act) finish_rows(j, m, rows, n, c, ldc, IDENTITY, BF16, STORE);
    else if (type == BF16 && mode == ADD && !act) finish_rows(j, m, rows, n, c, ldc, IDENTITY, BF16, ADD);
    else if (type == F32 && mode == STORE && !act) finish_rows(j, m, rows, n, c, ldc, IDENTITY, F32, STORE);
    else finish_rows(j, m, rows, n, c, ldc, act, type, mode);
}

enum { WORDS_PER_CLAIM = 512 };

static void prepare_rows(pool *p, const linear_job *j, long tiles_m, int id)
{
    for (long m = j->direct ? j->rows : claim(p), next; m < j->rows; m = next) {
        next = claim(p);
        fetch(j->x + next * j->ldx * SIZE[j->w->in_type], j->w->k * SIZE[j->w->in_type]);
        prepare(j, m, prepared(j, m), (float *)p->own[id]);
    }
    barrier(p);
    if (tiles_m == 1) return;
    long k = words(j->w), parts = (k + WORDS_PER_CLAIM - 1) / WORDS_PER_CLAIM;
    for (long u; (u = claim(p)) < tiles_m * parts;) {
        long t = u / parts, begin = u % parts * WORDS_PER_CLAIM, m = t * j->rows / tiles_m;
        interleave(j, m, (t + 1) * j->rows / tiles_m - m, begin, begin + WORDS_PER_CLAIM < k ? begin + WORDS_PER_CLAIM : k);
    }
    barrier(p);
}

INLINE long panel_bytes(const linear *w) { return words(w) * NR * (w->format == F16 ? 2 : 4); }

/* Panel q for the rows of a single tile, and the one after it if they are few enough: how many panels that was. */
static long multiply_one_tile(const linear_job *j, long q, long last)
{
    const linear *w = j->w;
    const long size = panel_bytes(w), k = words(w), word = size / k, pair = j->rows <= WIDE_ROWS && q + 1 < last;
    const char *at[WIDE], *soon[WIDE];
    columns b = {.count = 1, .steps = k, .stride = word};
    float c[MR * WIDE * VL];
    for (int x = 0; x < WIDE; x++) {
        at[x] = w->weights + (q + x / NV) * size + x % NV * (word / NV);
        soon[x] = at[x] + 2048;
        b.at[x] = &at[x], b.soon[x] = &soon[x];
    }
    (pair ? wides : tiles)[w->format][j->rows]((const int32_t *)prepared(j, 0), j->stride / 4, &b, c, WIDE * VL, 0);
    finish(j, 0, j->rows, q * NR, c, WIDE * VL);
    if (pair) finish(j, 0, j->rows, (q + 1) * NR, c + NR, WIDE * VL);
    return 1 + pair;
}

/* Tiles [begin, end) of `tiles_m` of panel q; `next` is the panel that this thread takes afterwards. */
static void multiply_panel(const linear_job *j, long q, long next, long begin, long end, long tiles_m)
{
    const linear *w = j->w;
    const long k = words(w), size = panel_bytes(w);
    const char *b = w->weights + q * size, *ahead = w->weights + next * size;
    float c[MR * NR];
    for (long t = begin; t < end; t++) { /* the first two tiles fetch half of the next panel each */
        long m = t * j->rows / tiles_m, mr = (t + 1) * j->rows / tiles_m - m, fetches = t - begin < 2 && next != q;
        const char *soon = fetches ? ahead + (t - begin) * (size / 2) : b;
        for (long i = m; w->mode == ADD && i < m + mr; i++)
            fetch(j->out + (i * j->ldo + q * NR) * SIZE[w->out_type], NR * SIZE[w->out_type]);
        products[w->format][mr]((const int32_t *)j->a + m * k, b, k, soon, fetches ? size / k / 2 : 0, c);
        finish(j, m, mr, q * NR, c, NR);
    }
}

/* Work is claimed in pieces of several panels, or of one panel's tiles, small enough that no thread waits long. */
static void linear_run(pool *p, void *arg, int id)
{
    linear_job j = *(linear_job *)arg;
    const long panels = (j.w->n + NR - 1) / NR, tiles_m = (j.rows + MR - 1) / MR;
    const long pieces = (tiles_m > 1 ? 128 : 32) * p->active;
    const long several = panels >= pieces ? panels / pieces : 1, wanted = panels >= pieces ? 1 : pieces / panels;
    const long parts = tiles_m < 8 ? 1 : wanted < tiles_m ? wanted : tiles_m, units = (panels + several - 1) / several * parts;
    if (!j.direct || tiles_m > 1) prepare_rows(p, &j, tiles_m, id);
    for (long u = claim(p), next; u < units; u = next) {
        next = claim(p); /* known early, so that its weights can be fetched */
        long first = u / parts * several, last = first + several < panels ? first + several : panels, part = u % parts;
        for (long q = first; tiles_m == 1 && q < last;) q += multiply_one_tile(&j, q, last);
        for (long q = first; tiles_m > 1 && q < last; q++) {
            long after = q + 1 < last ? q + 1 : next < units ? next / parts * several : q;
            multiply_panel(&j, q, after, part * tiles_m / parts, (part + 1) * tiles_m / parts, tiles_m);
        }
    }
}

typedef struct { size_t shared, own; } room;

/* The job of applying w to rows of x, and how much scratch it wants. */
static room plan_linear(linear_job *j, const linear *w, const void *x, long rows, long ldx, void *out, long ldo)
{
    long k = words(w), size = SIZE[w->in_type];
    *j = (linear_job){.w = w, .x = x, .out = out, .rows = rows, .ldx = ldx, .ldo = ldo, .stride = ldx * size};
    int same = w->format == w->in_type && w->k % per_word(w->format) == 0 && (ldx * size) % 4 == 0;
    j->direct = same && w->format != F16 && !w->norm_kind;
    if (!j->direct) j->stride = k * 4 + 64;
    j->plain = j->direct ? 0 : rows * (j->stride + 4);
    return (room){j->plain + (rows > MR ? rows * k * 4 : 0), (w->k + VL) * 4};
}

static void place_linear(linear_job *j, pool *p)
{
    j->row_scales = (float *)p->scratch;
    j->rows_at = p->scratch + (j->direct ? 0 : j->rows * 4);
    j->a = p->scratch + j->plain;
}

int ps_linear(pool *p, const linear *w, const void *x, long rows, long ldx, void *out, long ldo)
{
    linear_job j;
    if (rows == 0) return 1;
    room r = plan_linear(&j, w, x, rows, ldx, out, ldo);
    if (!reserve(p, r.shared, r.own)) return 0;
    place_linear(&j, p);
    call(p, linear_run, &j);
    return 1;
}

/* ---- packing ---- */

typedef struct {
    const char *const *rows; /* one source row per packed column; NULL is a column of zeros */
    long n, k;
    int32_t type, format;
    char *weights;
    float *scales;
    int32_t *offsets;
} packing;

static void pack_column(const packing *g, long n, float *row, uint8_t *bytes)
{
    long per = per_word(g->format), k = (g->k + per - 1) / per, size = g->format == F16 ? 2 : 4;
    char *dst = g->weights + (n / NR) * k * NR * size + (n % NR) * size;
    memset(row, 0, (g->k + 8) * sizeof *row);
    if (g->rows[n]) widen(row, g->rows[n], g->k, g->type);
    if (g->format == I8) {
        long sum = 0;
        memset(bytes, 128, g->k + 8);
        rotate_channels(row, g->k);
        quantize_row(bytes, row, g->k, &g->scales[n]);
        for (long i = 0; i < k * 4; i++) sum += (bytes[i] ^= 128, (int8_t)bytes[i]);
        g->offsets[n] = (int32_t)(128 * sum);
        for (long i = 0; i < k; i++) memcpy(dst + i * NR * 4, bytes + 4 * i, 4);
        return;
    }
    if (g->format != F32) narrow(bytes, row, g->k + 1, g->format);
    const char *src = g->format == F32 ? (char *)row : (char *)bytes;
    for (long i = 0; i < k; i++) memcpy(dst + i * NR * size, src + i * size, size);
}

static void pack_run(pool *p, void *arg, int id)
{
    const packing *g = arg;
    (void)id;
    float *row = malloc((g->k + 16) * 8);
    uint8_t *bytes = (uint8_t *)(row + g->k + 16);
    for (long q; (q = claim(p)) < (g->n + NR - 1) / NR;)
        for (long n = q * NR; n < (q + 1) * NR; n++) pack_column(g, n, row, bytes);
    free(row);
}

/* `rows`, `scales` and `offsets` have ps_columns(n) entries. */
void ps_pack(pool *p, const packing *g) { call(p, pack_run, (void *)g); }
long ps_columns(long n) { return (n + NR - 1) / NR * NR; }
long ps_lanes(void) { return VL; }

/* ---- the paged cache ----
 *
 * One buffer per layer: [panels][kv heads][keys | values | scales]. A panel holds the LANES tokens of consecutive
 * slots, laid out as `tile` reads them: keys [key_dim / p][LANES][p] and values [LANES / p][value_dim][p], with p
 * numbers to a word. int8 keeps the order of bf16 with one byte a number, and a float per token for keys and values,
 * both rotated: scores are products of rotated queries and keys, and the sum over rotated values is turned back. */
typedef struct {
    char *base;
    long heads, key_dim, value_dim;
    int32_t format, compute; /* how numbers are stored, and the format of the products over them */
} cache;

INLINE long side_bytes(const cache *c, long dim) { return dim * LANES * SIZE[c->format]; }
INLINE long head_bytes(const cache *c)
{
    return side_bytes(c, c->key_dim + c->value_dim) + (c->format == I8 ? 2 * LANES * 4 : 0);
}
INLINE char *head_of(const cache *c, long panel, long head) { return c->base + (panel * c->heads + head) * head_bytes(c); }
INLINE float *scales_of(const cache *c, char *head) { return (float *)(head + side_bytes(c, c->key_dim + c->value_dim)); }
long ps_cache_bytes(const cache *c, long panels) { return panels * c->heads * head_bytes(c) + 4096; }

/* Element index of (lane, d) among the keys or values of a panel. */
INLINE long key_at(long lane, long d, long p) { return (d / p * LANES + lane) * p + d % p; }
INLINE long value_at(long lane, long d, long p, long dim) { return (lane / p * dim + d) * p + lane % p; }

static float amax(const float *x, long n) /* NaN when one of them is no number, or infinite */
{
    float most = 0, sick = 0;
    for (long i = 0; i < n; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        sick += x[i] * 0.0f;
    }
    return most + sick;
}

INLINE void put(const cache *c, char *side, long at, float x)
{
    if (c->format == F32) ((float *)side)[at] = x;
    else if (c->format == F16) ((uint16_t *)side)[at] = float_to_half(x);
    else ((int8_t *)side)[at] = (int8_t)lrintf(x);
}

/* Words of 32 bits: a token's keys are one lane of every line, its values every other half word of their lines. */
static void write_bf16(char *side, long lane, const float *x, long dim, int keys)
{
    uint16_t row[MAX_HEAD + VL] __attribute__((aligned(64)));
    int32_t *words = (int32_t *)side;
    long d = 0;
    narrow_(row, x, dim, BF16);
    if (keys) {
        for (; d < dim / 2; d++) words[d * LANES + lane] = ((int32_t *)row)[d];
        return;
    }
#if defined(__AVX512BW__)
    const __mmask32 halves = lane % 2 ? 0xaaaaaaaa : 0x55555555; /* the other halves may be being written too */
    for (; d + VL <= dim; d += VL) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_load_si256((__m256i *)(row + d)));
        _mm512_mask_storeu_epi16(words + lane / 2 * dim + d, halves, lane % 2 ? _mm512_slli_epi32(wide, 16) : wide);
    }
#endif
    for (; d < dim; d++) ((uint16_t *)side)[value_at(lane, d, 2, dim)] = row[d];
}

static void write_side(const cache *c, char *side, float *scale, long lane, const float *x, long dim, int keys)
{
    long p = per_word(c->compute);
    if (c->format == BF16) { write_bf16(side, lane, x, dim, keys); return; }
    float top = c->format == I8 ? amax(x, dim) : 0, inverse = c->format != I8 ? 1 : top > 0 ? 127 / top : 0;
    if (c->format == I8) scale[lane] = top / 127;
    for (long d = 0; d < dim; d++) put(c, side, keys ? key_at(lane, d, p) : value_at(lane, d, p, dim), x[d] * inverse);
}

static float read_side(const cache *c, const char *side, const float *scale, long lane, long d, long dim, int keys)
{
    long p = per_word(c->compute), at = keys ? key_at(lane, d, p) : value_at(lane, d, p, dim);
    return c->format == I8 ? ((const int8_t *)side)[at] * scale[lane] : load1(side, at, c->format);
}

/* Whether all of x is finite, and stays so when rounded to the format that it is stored in. */
static int is_finite(const float *x, long n, int f)
{
    const float limit = f == BF16 ? 0x1.ffp127f : f == F16 ? 65520.0f : INFINITY;
    int broken = 0;
    for (long i = 0; i < n; i++) broken |= !(fabsf(x[i]) < limit);
    return !broken;
}

/* Hidden values are multiplied by 0, which NaN and infinity would survive. So they are never stored: a token with any
 * gets values of 0 and a key of NaN, which gives NaN to whoever sees the token and is masked for everybody else. */
static void write_head(const cache *c, long slot, long head, float *key, float *value)
{
    char *at = head_of(c, slot / LANES, head);
    float *scales = c->format == I8 ? scales_of(c, at) : NULL;
    if (!is_finite(key, c->key_dim, c->format) || !is_finite(value, c->value_dim, c->format)) {
        for (long d = 0; d < c->key_dim; d++) key[d] = NAN;
        memset(value, 0, c->value_dim * sizeof *value);
    }
    if (c->format == I8) {
        rotate_channels(key, c->key_dim);
        rotate_channels(value, c->value_dim);
    }
    write_side(c, at, scales, slot % LANES, key, c->key_dim, 1);
    write_side(c, at + side_bytes(c, c->key_dim), scales ? scales + LANES : NULL, slot % LANES, value, c->value_dim, 0);
}

/* Keys [n][heads][key_dim] and values of slots, as float32. */
void ps_read_slots(const cache *c, const int64_t *slots, long n, float *keys, float *values)
{
    for (long i = 0; i < n * c->heads; i++) {
        long slot = slots[i / c->heads], lane = slot % LANES;
        char *at = head_of(c, slot / LANES, i % c->heads), *side = at + side_bytes(c, c->key_dim);
        float *scales = scales_of(c, at);
        for (long d = 0; d < c->key_dim; d++) keys[d] = read_side(c, at, scales, lane, d, c->key_dim, 1);
        for (long d = 0; d < c->value_dim; d++) values[d] = read_side(c, side, scales + LANES, lane, d, c->value_dim, 0);
        if (c->format == I8) {
            restore_channels(keys, c->key_dim);
            restore_channels(values, c->value_dim);
        }
        keys += c->key_dim, values += c->value_dim;
    }
}

static void copy_side(const cache *c, const char *from, char *to, long a, long b, long dim, int keys)
{
    long p = per_word(c->compute), size = SIZE[c->format];
    for (long d = 0; d < dim; d++) {
        long x = keys ? key_at(a, d, p) : value_at(a, d, p, dim), y = keys ? key_at(b, d, p) : value_at(b, d, p, dim);
        memcpy(to + y * size, from + x * size, size);
    }
}

void ps_copy_slots(const cache *c, const int64_t *source, const int64_t *target, long n)
{
    long values = side_bytes(c, c->key_dim);
    for (long i = 0; i < n * c->heads; i++) {
        long s = source[i / c->heads], t = target[i / c->heads];
        char *from = head_of(c, s / LANES, i % c->heads), *to = head_of(c, t / LANES, i % c->heads);
        copy_side(c, from, to, s % LANES, t % LANES, c->key_dim, 1);
        copy_side(c, from + values, to + values, s % LANES, t % LANES, c->value_dim, 0);
        if (c->format != I8) continue;
        scales_of(c, to)[t % LANES] = scales_of(c, from)[s % LANES];
        scales_of(c, to)[LANES + t % LANES] = scales_of(c, from)[LANES + s % LANES];
    }
}

/* ---- attention ---- */

/* The rows of a step: `count` tokens from token `first` of the step on, at positions from `start` on, whose context
 * lies in tables[table...]: panels if `whole`, single slots otherwise. A bundle is tokens [begin, end) of one row, or
 * several rows of one token each whose first `shared` keys (a multiple of KEYS) are the same slots. */
typedef struct {
    long tokens, bundles, whole;
    const int64_t *slots; /* where each token's key and value go */
    const int32_t *first, *start, *table, *tables;
    const int32_t *row, *rows, *begin, *end, *shared; /* per bundle */
} step;

/* Norm of queries and keys (0 none, 1 per head, 2 over all heads) and rotary positions, in place, before the write. */
typedef struct {
    int32_t norm, type; /* type of cos and sin */
    long width;         /* rotated numbers of a head: the two halves of the first `width`; 0 rotates nothing */
    float eps;
    const float *query_norm, *key_norm;
    const char *cos, *sin; /* [tokens][width] */
} rotary;

typedef struct {
    const cache *c;
    const step *s;
    const rotary *r; /* NULL: queries and keys come finished */
    char *query, *key, *value, *out;
    long query_token, query_head, key_token, key_head, value_token, value_head; /* strides in elements */
    long heads;
    int32_t type;
    float scaling, softcap;
    long window;
    const float *sinks;
    long layer; /* its place among the caches of a program */
} attention;

typedef struct { float cosine[MAX_HEAD], sine[MAX_HEAD]; } angles;

static void angles_of(const rotary *r, long token, angles *g)
{
    widen(g->cosine, r->cos + token * r->width * SIZE[r->type], r->width, r->type);
    widen(g->sine, r->sin + token * r->width * SIZE[r->type], r->width, r->type);
}

static void rotate(const rotary *r, const angles *g, float *restrict x, long dim, const float *weight)
{
    const float *restrict cosine = g->cosine, *restrict sine = g->sine;
    long half = r->width / 2;
    if (r->norm == 1 && weight) normalize(x, dim, RMS, weight, NULL, r->eps);
    for (long i = 0; i < half; i++) {
        float lo = x[i], hi = x[i + half];
        x[i] = lo * cosine[i] - hi * sine[i];
        x[i + half] = hi * cosine[i + half] + lo * sine[i + half];
    }
}

/* The same for a head that is rotated as a whole, from and to any format, without a detour over memory. */
INLINE void turn(const rotary *r, const angles *g, const void *from, const int f, void *to, const int t, const float *weight, const long vectors)
{
    const long half = vectors / 2;
    vf x[MAX_HEAD / VL], squares = splat(0.0f);
    for (long i = 0; i < vectors; i++) {
        x[i] = load(from, i * VL, f);
        squares += x[i] * x[i];
    }
    float scale = r->norm == 1 ? 1.0f / sqrtf(sum_of(squares) / (vectors * VL) + r->eps) : 1;
    for (long i = 0; r->norm == 1 && i < vectors; i++) x[i] = x[i] * scale * *(const vf *)(weight + i * VL);
    for (long i = 0; i < half; i++) {
        const float *c = g->cosine + i * VL, *s = g->sine + i * VL;
        vf lo = x[i], hi = x[i + half];
        store(to, i * VL, t, lo * *(const vf *)c - hi * *(const vf *)s);
        store(to, (i + half) * VL, t, hi * *(const vf *)(c + half * VL) + lo * *(const vf *)(s + half * VL));
    }
}

/* A query or key, finished: norm and rotary position as `r` has them. */
static void finish_head(const attention *a, const angles *g, const char *from, void *to, const int t, const float *weight)
{
    const long dim = a->c->key_dim, common = a->type == BF16 && a->r->width == dim;
    float x[MAX_HEAD + VL];
    if (common && dim == 128 && t == BF16) turn(a->r, g, from, BF16, to, BF16, weight, 128 / VL);
    else if (common && dim == 128) turn(a->r, g, from, BF16, to, F32, weight, 128 / VL);
    else if (common && dim == 64 && t == BF16) turn(a->r, g, from, BF16, to, BF16, weight, 64 / VL);
    else if (common && dim == 64) turn(a->r, g, from, BF16, to, F32, weight, 64 / VL);
    else {
        widen(x, from, dim, a->type);
        rotate(a->r, g, x, dim, weight);
        narrow(to, x, dim, t);
    }
}

/* Finish queries and key of one key/value head, and put key and value into the cache. */
static void place_head(const attention *a, long token, long head, const angles *g)
{
    const long group = a->heads / a->c->heads, dim = a->c->key_dim, size = SIZE[a->type];
    const char *k = a->key + (token * a->key_token + head * a->key_head) * size;
    const char *v = a->value + (token * a->value_token + head * a->value_head) * size;
    float key[MAX_HEAD + VL], value[MAX_HEAD + VL];
    fetch(k + a->key_token * size, dim * size);
    fetch(v + a->value_token * size, a->c->value_dim * size);
    if (a->r) finish_head(a, g, k, key, F32, a->r->key_norm);
    else widen(key, k, dim, a->type);
    widen(value, v, a->c->value_dim, a->type);
    write_head(a->c, a->s->slots[token], head, key, value);
    for (long h = head * group; a->r && h < (head + 1) * group; h++) {
        char *q = a->query + (token * a->query_token + h * a->query_head) * size;
        fetch(q + a->query_token * size, dim * size);
        finish_head(a, g, q, q, a->type, a->r->query_norm);
    }
}

static void normalize_all(const attention *a, char *x, long n, const float *weight, float *row)
{
    widen(row, x, n, a->type);
    normalize(row, n, RMS, weight, NULL, a->r->eps);
    narrow(x, row, n, a->type);
}

static void place_token(const attention *a, long token, float *row)
{
    const long heads = a->c->heads, size = SIZE[a->type], dim = a->c->key_dim;
    angles g;
    if (a->r && a->r->width) angles_of(a->r, token, &g);
    if (a->r && a->r->norm == 2) {
        normalize_all(a, a->query + token * a->query_token * size, a->heads * dim, a->r->query_norm, row);
        normalize_all(a, a->key + token * a->key_token * size, heads * dim, a->r->key_norm, row);
    }
    for (long h = 0; h < heads; h++) place_head(a, token, h, &g);
}

/* Few tokens are shared out head by head, many by as many as a panel has: two threads must not write to one line. */
static void place(pool *p, const attention *a, float *row)
{
    const long tokens = a->s->tokens, heads = a->c->heads, whole = a->r && a->r->norm == 2;
    const long many = tokens >= 4 * LANES * p->active ? LANES : 1, by_head = !whole && tokens < 4 * p->active;
    angles g;
    for (long u; by_head && (u = claim(p)) < tokens * heads;) {
        if (a->r && a->r->width) angles_of(a->r, u / heads, &g);
        place_head(a, u / heads, u % heads, &g);
    }
    for (long u; !by_head && (u = claim(p) * many) < tokens;)
        for (long t = u; t < u + many && t < tokens; t++) place_token(a, t, row);
}

enum { Q_WORDS = MAX_HEAD + 16, /* rows begin in different sets of the cache */
     O_WIDTH = MAX_HEAD + WIDE * VL };

/* One thread's workspace: up to MR queries that walk along their keys together. */
typedef struct {
    int32_t query[MR][Q_WORDS], weight[MR][KEYS];
    float out[MR][O_WIDTH], score[MR][KEYS], most[MR], total[MR], key_scale[KEYS], value_scale[KEYS];
    long position[MR], row[MR], token[MR], head[MR];
    const char *after[PANELS]; /* where the keys of the next walk begin, */
    long afters;               /* that many panels; their values lie behind them */
    char keys[KEYS * MAX_HEAD * 4 + 4096], values[KEYS * MAX_HEAD * 4 + 4096];
} bench;

/* Copy scattered slots, or unpack int8, into panels that `tile` can read. */
static void assemble(const attention *a, bench *w, const int32_t *table, long n, long head)
{
    const cache *c = a->c;
    long size = SIZE[c->compute], values = side_bytes(c, c->key_dim);
    for (long i = 0; i < n * LANES && c->format != I8; i++) {
        long slot = table[i], lane = slot % LANES;
        char *at = head_of(c, slot / LANES, head);
        copy_side(c, at, w->keys + i / LANES * c->key_dim * LANES * size, lane, i % LANES, c->key_dim, 1);
        copy_side(c, at + values, w->values + i / LANES * c->value_dim * LANES * size, lane, i % LANES, c->value_dim, 0);
    }
    for (long j = 0; j < n && c->format == I8; j++) {
        char *at = head_of(c, table[j], head);
        uint16_t *k = (uint16_t *)w->keys + j * c->key_dim * LANES, *v = (uint16_t *)w->values + j * c->value_dim * LANES;
        for (long i = 0; i < c->key_dim * LANES; i += VL)
            store(k, i, BF16, from_bytes(at + i));
        for (long i = 0; i < c->value_dim * LANES; i += VL)
            store(v, i, BF16, from_bytes(at + values + i));
        memcpy(w->key_scale + j * LANES, scales_of(c, at), LANES * 4);
        memcpy(w->value_scale + j * LANES, scales_of(c, at) + LANES, LANES * 4);
    }
}

/* Scores of query i over n panels from key `from` on become weights; the running maximum, sum and output follow.
 * `plain`: all keys are visible, and scores are only scaled. */
INLINE void soften_(const attention *a, bench *w, long i, long from, const long n, const int f, const int plain)
{
    const long position = w->position[i], low = a->window && position >= a->window ? position - a->window + 1 : 0;
    const int scaled = !plain && a->c->format == I8;
    vf s[KEYS / VL], top = splat(-INFINITY), sum = splat(0.0f), scaling = splat(a->scaling);
    vi lane;
    for (int x = 0; x < VL; x++) lane[x] = x;
    _Pragma("GCC unroll 16") for (long j = 0; j < n * LANES / VL; j++) {
        s[j] = *(vf *)(w->score[i] + j * VL) * scaling;
        if (scaled) s[j] *= *(vf *)(w->key_scale + j * VL);
        if (!plain && a->softcap > 0) s[j] = a->softcap * vtanh(s[j] / a->softcap);
        if (!plain) {
            vi key = lane + (int32_t)(from + j * VL);
            s[j] = pick((key <= (int32_t)position) & (key >= (int32_t)low), s[j], splat(-INFINITY));
        }
        top = vmax(s[j], top);
    }
    float most = max_of(top), before = w->most[i];
    most = most > before ? most : before;
    if (most == -INFINITY) { /* all hidden, or no number */
        for (long j = 0; j < n * LANES / VL; j++) sum += pick(s[j] != s[j], s[j], splat(0.0f));
        w->total[i] += sum_of(sum);
        memset(w->weight[i], 0, sizeof w->weight[i]);
        return;
    }
    _Pragma("GCC unroll 16") for (long j = 0; j < n * LANES / VL; j++) {
        s[j] = vexp(s[j] - most);
        sum += s[j];
        if (scaled) s[j] = pick(s[j] > 0.0f, s[j] * *(vf *)(w->value_scale + j * VL), splat(0.0f));
        store(w->weight[i], j * VL, f == BF16 ? BF16 : F32, s[j]);
    }
    if (most == before) { w->total[i] += sum_of(sum); return; }
    float shrink = vexp(splat(before - most))[0];
    w->total[i] = w->total[i] * shrink + sum_of(sum);
    w->most[i] = most;
    for (long d = 0; d < a->c->value_dim; d += VL) *(vf *)(w->out[i] + d) *= shrink;
}

INLINE void soften(const attention *a, bench *w, long i, long from, long n, const int f)
{
    const long position = w->position[i];
    const int visible = from + n * LANES - 1 <= position && (!a->window || from > position - a->window);
    if (n == PANELS && visible && a->softcap <= 0 && a->c->format != I8) soften_(a, w, i, from, PANELS, f, 1);
    else soften_(a, w, i, from, n, f, 0);
}

/* The next walk will be along keys [from, to) of a row: its first tile is fetched while the present one ends. */
static void aim(const attention *a, bench *w, long row, long head, long from, long to)
{
    const int32_t *table = a->s->tables + a->s->table[row] + from / LANES;
    w->afters = 0;
    for (long j = 0; a->s->whole && a->c->format != I8 && j < PANELS && from + j * LANES < to; j++)
        w->after[w->afters++] = head_of(a->c, table[j], head);
}

/* Queries [i, i + mr) see keys [from, to) of a row; `from` is a multiple of KEYS. */
static void walk(const attention *a, bench *w, long i, long mr, long row, long head, long from, long to)
{
    const cache *c = a->c;
    const int f = c->compute, loose = c->format == I8 || !a->s->whole;
    const long word = f == F16 ? 2 : 4, p = per_word(f), values = side_bytes(c, c->key_dim);
    const int32_t *table = a->s->tables + a->s->table[row];
    const char *keys[2 * PANELS + 1], *vals[2 * PANELS + 1];
    for (long t = from; t < to; t += KEYS) {
        long n = (to - t + LANES - 1) / LANES, known = n;
        if (n > PANELS) n = PANELS;
        if (known > 2 * PANELS) known = 2 * PANELS;
        const int32_t *here = table + (a->s->whole ? t / LANES : t);
        if (loose) {
            long tokens = to - t < KEYS ? to - t : KEYS;
            int32_t padded[KEYS];
            for (long j = 0; j < KEYS; j++) padded[j] = here[a->s->whole ? (j < n ? j : n - 1) : (j < tokens ? j : tokens - 1)];
            assemble(a, w, padded, n, head);
        }
        for (long j = 0; j <= 2 * PANELS; j++) { /* beyond the end, the last panel again: hidden or only prefetched */
            long at = j < known ? j : j < PANELS ? n - 1 : known - 1;
            if (loose) at = at < n ? at : n - 1;
            char *panel = loose ? NULL : head_of(c, here[at], head);
            keys[j] = loose ? w->keys + at * c->key_dim * LANES * SIZE[f] : panel;
            vals[j] = loose ? w->values + at * c->value_dim * LANES * SIZE[f] : panel + values;
        }
        for (long j = 0; known <= PANELS && j < w->afters; j++) {
            keys[PANELS + j] = w->after[j];
            vals[PANELS + j] = w->after[j] + values;
            if (j >= n) fetch(w->after[j], values + side_bytes(c, c->value_dim));
        }
        const int wide = mr <= WIDE_ROWS, nv = wide ? WIDE : NV;
        const tile_fn run = (wide ? wides : tiles)[f][mr];
        for (long v = 0; v < n * LANES; v += nv * VL) {
            columns b = {.count = 1, .steps = c->key_dim / p, .stride = LANES * word};
            for (int x = 0; x < nv; x++) {
                long lane = v + x * VL;
                b.at[x] = &keys[lane / LANES], b.soon[x] = &keys[PANELS + lane / LANES];
                b.shift[x] = lane % LANES * word;
            }
            run(w->query[i], Q_WORDS, &b, w->score[i] + v, KEYS, 0);
        }
        for (long x = i; x < i + mr; x++) {
            if (f == BF16) soften(a, w, x, t, n, BF16);
            else soften(a, w, x, t, n, F32);
        }
        columns b = {.count = n, .steps = LANES / p, .stride = c->value_dim * word};
        for (int x = 0; x < nv; x++) b.at[x] = vals, b.soon[x] = vals + PANELS;
        for (long d = 0; d < c->value_dim; d += nv * VL) {
            for (int x = 0; x < nv; x++) b.shift[x] = (d + x * VL) * word;
            run(w->weight[i], KEYS, &b, w->out[i] + d, O_WIDTH, 1);
        }
    }
}

/* `ahead` tokens further is a query of the next tile. */
static void take_query(const attention *a, bench *w, long i, long row, long token, long position, long head, long ahead)
{
    float x[MAX_HEAD + VL];
    const long dim = a->c->key_dim, size = SIZE[a->type];
    const int wanted = a->c->compute == BF16 ? BF16 : F32;
    const char *query = a->query + (token * a->query_token + head * a->query_head) * size;
    fetch(query + ahead * a->query_token * size, dim * size);
    w->row[i] = row;
    w->token[i] = token;
    w->position[i] = position;
    w->head[i] = head;
    w->most[i] = -INFINITY;
    w->total[i] = 0;
    memset(w->out[i], 0, (dim + WIDE * VL) * sizeof(float));
    if (a->type == wanted && a->c->format != I8) { memcpy(w->query[i], query, dim * size); return; }
    widen(x, query, dim, a->type);
    if (a->c->format == I8) rotate_channels(x, dim);
    narrow(w->query[i], x, dim, wanted);
}

static void give_out(const attention *a, bench *w, long i)
{
    const long dim = a->c->value_dim;
    float total = w->total[i], scale = 1;
    if (a->sinks) {
        float sink = a->sinks[w->head[i]], most = fmaxf(sink, w->most[i]);
        scale = expf(w->most[i] - most);
        total = total * scale + expf(sink - most);
    }
    scale /= total;
    for (long d = 0; d < dim; d++) w->out[i][d] *= scale;
    if (a->c->format == I8) restore_channels(w->out[i], dim);
    narrow(a->out + (w->token[i] * a->heads + w->head[i]) * dim * SIZE[a->type], w->out[i], dim, a->type);
}

/* The first key tile that query i can see. */
static long first_key(const attention *a, const bench *w, long i)
{
    long low = a->window && w->position[i] >= a->window ? w->position[i] - a->window + 1 : 0;
    return low / KEYS * KEYS;
}

/* Aim at the first keys of a task; a task beyond the last is none. */
static void aim_at(const attention *a, bench *w, long task)
{
    const step *s = a->s;
    long bundle = task / a->c->heads;
    w->afters = 0;
    if (bundle >= s->bundles) return;
    long row = s->row[bundle], position = s->start[row] + (s->rows[bundle] > 1 ? 0 : s->begin[bundle]);
    long low = a->window && position >= a->window ? position - a->window + 1 : 0;
    aim(a, w, row, task % a->c->heads, low / KEYS * KEYS, position + 1);
}

/* Queries [begin, end) of a task; `next` is the task that this thread takes afterwards. */
static void attend_tile(const attention *a, bench *w, long bundle, long head, long begin, long end, long next)
{
    const step *s = a->s;
    const long group = a->heads / a->c->heads, row = s->row[bundle], many = s->rows[bundle] > 1;
    long from = 1L << 40;
    for (long q = begin; q < end; q++) {
        long r = many ? row + q / group : row, t = many ? 0 : s->begin[bundle] + q / group;
        take_query(a, w, q - begin, r, s->first[r] + t, s->start[r] + t, head * group + q % group, (end - begin) / group);
        from = first_key(a, w, q - begin) < from ? first_key(a, w, q - begin) : from;
    }
    const long shared = s->shared[bundle];
    if (!many) {
        aim_at(a, w, next);
        walk(a, w, 0, end - begin, row, head, from, w->position[end - begin - 1] + 1);
    } else {
        aim(a, w, row, head, shared, w->position[0] + 1);
        walk(a, w, 0, end - begin, row, head, from, shared);
    }
    for (long i = 0, n; many && i < end - begin; i += n) { /* then each row along its own keys */
        for (n = 1; i + n < end - begin && w->row[i + n] == w->row[i];) n++;
        from = first_key(a, w, i);
        if (i + n == end - begin) aim_at(a, w, next);
        else aim(a, w, w->row[i + n], head, shared, w->position[i + n] + 1);
        walk(a, w, i, n, w->row[i], head, from > shared ? from : shared, w->position[i] + 1);
    }
    for (long i = 0; i < end - begin; i++) give_out(a, w, i);
}

static void attention_run(pool *p, void *arg, int id)
{
    const attention *a = arg;
    const step *s = a->s;
    const long group = a->heads / a->c->heads, heads = a->c->heads;
    bench *w = (bench *)p->own[id];
    place(p, a, (float *)p->own[id]);
    barrier(p);
    for (long u = claim(p), next; u < s->bundles * heads; u = next) {
        next = claim(p);
        long bundle = u / heads, many = s->rows[bundle] > 1;
        long queries = group * (many ? s->rows[bundle] : s->end[bundle] - s->begin[bundle]);
        long most = many && group < MR ? MR / group * group : MR;
        for (long q = 0; q < queries; q += most)
            attend_tile(a, w, bundle, u % heads, q, q + most < queries ? q + most : queries, next);
    }
}

static size_t attention_row(const attention *a, long key_dim)
{
    size_t rows = (a->heads * key_dim + VL) * 4;
    return rows > sizeof(bench) ? rows : sizeof(bench);
}

/* Write the step's keys and values, then attend: out [tokens][heads][value_dim]. */
int ps_attention(pool *p, const attention *a)
{
    if (!reserve(p, 0, attention_row(a, a->c->key_dim))) return 0;
    call(p, attention_run, (void *)a);
    return 1;
}

/* ---- programs: the kernels of many layers in one call, so that no caller is waited for in between ---- */

enum { LINEAR, ADD_NORM, ATTENTION };

/* What reads rows from register `in` and writes rows to register `out`, side by side in memory. An attention reads
 * (H D | K D | K V) of each row; its cache, step and angles are the program's. */
typedef struct {
    int32_t kind, in, out, unused;
    const void *what;
} op;

typedef struct {
    const op *ops;
    long count, rows;
    char *const *at; /* the registers */
    const cache *const *caches;
    const step *s;
    const char *cos, *sin; /* [rows][width]; width 0 rotates nothing */
    long width;
    int32_t type;
} program;

static room plan_op(const program *g, const op *o, linear_job *j)
{
    if (o->kind == LINEAR) {
        const linear *w = o->what;
        return plan_linear(j, w, g->at[o->in], g->rows, w->k, g->at[o->out], w->mode == GATED ? w->n / 2 : w->n);
    }
    if (o->kind == ADD_NORM) return (room){0, norm_row(o->what)};
    const attention *a = o->what;
    return (room){0, attention_row(a, g->caches[a->layer]->key_dim)};
}

static void run_attention(pool *p, const program *g, const op *o, int id)
{
    attention a = *(const attention *)o->what;
    rotary r = *a.r;
    a.c = g->caches[a.layer], a.s = g->s, a.r = &r;
    r.cos = g->cos, r.sin = g->sin, r.type = g->type;
    if (r.width) r.width = g->width;
    a.query = g->at[o->in];
    a.key = a.query + a.heads * a.c->key_dim * SIZE[a.type];
    a.value = a.key + a.c->heads * a.c->key_dim * SIZE[a.type];
    a.out = g->at[o->out];
    attention_run(p, &a, id);
}

static void run_op(pool *p, const program *g, const op *o, int id)
{
    linear_job j;
    plan_op(g, o, &j);
    if (o->kind == LINEAR) {
        place_linear(&j, p);
        linear_run(p, &j, id);
    } else if (o->kind == ADD_NORM) {
        norm_job n = {o->what, g->at[o->in], g->at[o->out], g->rows, 1};
        norm_run(p, &n, id);
    } else run_attention(p, g, o, id);
}

static void program_run(pool *p, void *arg, int id)
{
    const program *g = arg;
    for (long i = 0; i < g->count; i++) {
        run_op(p, g, g->ops + i, id);
        barrier(p);
    }
}

int ps_program(pool *p, const program *g)
{
    size_t shared = 0, own = 0;
    if (g->rows == 0) return 1;
    for (long i = 0; i < g->count; i++) {
        linear_job j;
        room r = plan_op(g, g->ops + i, &j);
        shared = r.shared > shared ? r.shared : shared;
        own = r.own > own ? r.own : own;
    }
    if (!reserve(p, shared, own)) return 0;
    call(p, program_run, (void *)g);
    return 1;
}

/* ---- memory ---- */

typedef struct { char *at; long bytes; } region;

static void touch_run(pool *p, void *arg, int id)
{
    region *r = arg;
    const long piece = 1 << 21;
    (void)id;
    for (long u; (u = claim(p) * piece) < r->bytes;)
        for (long i = u; i < u + piece && i < r->bytes; i += 4096) ((volatile char *)r->at)[i] = 0;
}

/* Have the system find the pages of a zeroed region now. */
void ps_touch(pool *p, void *at, long bytes)
{
    region r = {at, bytes};
    call(p, touch_run, &r);
}

/* ---- logits ---- */

enum { STRETCH = 8192 }; /* logits that are seen twice while they are near */

typedef struct {
    const float *logits; /* [rows][width]; width is a multiple of block, block one of LANES that divides STRETCH */
    long rows, width, block;
    float *peaks;     /* [rows][width / block] */
    float *greatest;  /* [rows]; NaN where a row has one */
    double *totals;   /* [rows]: sum of exp(logit - greatest) */
    int64_t *tokens;  /* [rows]: the first of the greatest */
} survey;

typedef struct { double total; float most; } stretch; /* total: sum of exp(logit - most) */

static stretch survey_stretch(const survey *s, const float *x, float *peaks, long n)
{
    stretch found = {0, -INFINITY};
    for (long b = 0; b < n; b += s->block) {
        vf top = *(const vf *)(x + b);
        for (long i = VL; i < s->block; i += VL) top = vmax(top, *(const vf *)(x + b + i));
        *peaks = max_of(top);
        found.most = *peaks > found.most ? *peaks : found.most;
        peaks++;
    }
    const float base = found.most > -INFINITY ? found.most : 0;
    for (long b = 0; b < n; b += s->block) {
        vf sum = splat(0.0f);
        for (long i = 0; i < s->block; i += VL) sum += vexp(*(const vf *)(x + b + i) - base);
        found.total += sum_of(sum);
    }
    return found;
}

static void survey_row(const survey *s, long m, const stretch *found, long count)
{
    const float *x = s->logits + m * s->width, *peaks = s->peaks + m * (s->width / s->block);
    float most = -INFINITY;
    double total = 0;
    long block = 0, token = 0;
    for (long i = 0; i < count; i++) most = found[i].most > most ? found[i].most : most;
    for (long i = 0; i < count; i++) total += found[i].total * exp((double)found[i].most - most);
    while (block + 1 < s->width / s->block && peaks[block] != most) block++;
    while (token + 1 < s->block && x[block * s->block + token] != most) token++;
    s->totals[m] = total;
    s->tokens[m] = block * s->block + token;
    s->greatest[m] = total == total ? most : NAN;
}

static void survey_run(pool *p, void *arg, int id)
{
    const survey *s = arg;
    const long count = (s->width + STRETCH - 1) / STRETCH;
    stretch *found = (stretch *)p->scratch;
    (void)id;
    for (long u; (u = claim(p)) < s->rows * count;) {
        long at = u / count * s->width + u % count * STRETCH, rest = s->width - u % count * STRETCH;
        found[u] = survey_stretch(s, s->logits + at, s->peaks + at / s->block, rest < STRETCH ? rest : STRETCH);
    }
    barrier(p);
    for (long m; (m = claim(p)) < s->rows;) survey_row(s, m, found + m * count, count);
}

int ps_survey(pool *p, survey *s)
{
    if (!reserve(p, s->rows * ((s->width + STRETCH - 1) / STRETCH) * sizeof(stretch), 0)) return 0;
    call(p, survey_run, s);
    return 1;
}

/* ---- what mirrors the structures ---- */

/* Bytes of a structure, which its mirror in Python must agree with; 0 for one that is not known. */
long ps_size_of(const char *name)
{
#define KNOWN(type) if (!strcmp(name, #type)) return sizeof(type);
    KNOWN(norm) KNOWN(linear) KNOWN(packing) KNOWN(cache) KNOWN(step) KNOWN(attention) KNOWN(rotary)
    KNOWN(op) KNOWN(program) KNOWN(survey)
#undef KNOWN
    return 0;
}
