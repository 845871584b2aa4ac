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
INLINE vf vmax(vf a, vf b) { return pick(a > b, a, b); }
INLINE float sum_of(vf v) { float s = 0; for (int i = 0; i < VL; i++) s += v[i]; return s; }
INLINE float max_of(vf v) { float m = v[0]; for (int i = 1; i < VL; i++) m = v[i] > m ? v[i] : m; return m; }

/* ---- loading and storing VL numbers of any format as float32 ---- */

INLINE vf from_half(const void *p)
{
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(p));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(p));
#else
    vf v;
    for (int i = 0; i < VL; i++) v[i] = (float)((const _Float16 *)p)[i];
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
    for (int i = 0; i < VL; i++) ((_Float16 *)p)[i] = (_Float16)v[i];
#endif
}

INLINE vh to_bf16(vf v) /* round to nearest even; NaN stays NaN */
{
    vu u = (vu)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vi nan = v != v;
    u = (u & (vu)~nan) | (0x7fc0 & (vu)nan);
    return __builtin_convertvector(u, vh);
}

INLINE vf load(const void *p, long i, int f)
{
    if (f == F32) return *(const vf *)((const float *)p + i);
    if (f == BF16) return (vf)(__builtin_convertvector(*(const vh *)((const uint16_t *)p + i), vu) << 16);
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
    if (f == F16) return (float)((const _Float16 *)p)[i];
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

static void widen(float *dst, const void *src, long n, int f)
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

static void narrow(void *dst, const float *src, long n, int f)
{
    if (f == F32) narrow_(dst, src, n, F32);
    else if (f == BF16) narrow_(dst, src, n, BF16);
    else narrow_(dst, src, n, F16);
}

/* ---- elementary functions ---- */

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
    case RELU: return vmax(x, splat(0.0f));
    default: return x;
    }
}

/* ---- threads: a pool that spins between the calls of one step and sleeps between steps ---- */

typedef struct pool pool;
typedef void (*job)(pool *, void *, int);

struct pool {
    int threads;
    pthread_t *ids;
    job run;
    void *arg;
    atomic_long turn, claimed;
    atomic_int left, arrived, stopping, sleeping;
    atomic_long round;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    char *scratch; /* shared by the threads of one call */
    size_t scratch_size;
    char **own; /* one per thread */
    size_t own_size;
};

enum { SPINS = 6000, OWN = 1 << 20 };

static void relax(long *spins) /* whoever waits long lets others have the core */
{
    PAUSE();
    if (++*spins > 20000) sched_yield();
}

static void barrier(pool *p)
{
    if (p->threads == 1) { atomic_store(&p->claimed, 0); return; }
    long round = atomic_load(&p->round), spins = 0;
    if (atomic_fetch_add(&p->arrived, 1) + 1 == p->threads) {
        atomic_store(&p->arrived, 0);
        atomic_store(&p->claimed, 0);
        atomic_fetch_add(&p->round, 1);
    } else {
        while (atomic_load_explicit(&p->round, memory_order_acquire) == round) relax(&spins);
    }
}

/* The next unclaimed piece of work; claims start over after each barrier and at each call. */
static long claim(pool *p) { return atomic_fetch_add_explicit(&p->claimed, 1, memory_order_relaxed); }

static void nap(pool *p, long seen)
{
    pthread_mutex_lock(&p->lock);
    atomic_fetch_add(&p->sleeping, 1);
    while (atomic_load(&p->turn) == seen) pthread_cond_wait(&p->wake, &p->lock);
    atomic_fetch_sub(&p->sleeping, 1);
    pthread_mutex_unlock(&p->lock);
}

typedef struct { pool *p; int id; } seat;

static void *work(void *arg)
{
    seat s = *(seat *)arg;
    free(arg);
    for (long seen = 0;; seen++) {
        for (int i = 0; atomic_load_explicit(&s.p->turn, memory_order_acquire) == seen; i++) {
            if (i < SPINS) PAUSE();
            else nap(s.p, seen);
        }
        if (atomic_load(&s.p->stopping)) return NULL;
        s.p->run(s.p, s.p->arg, s.id);
        atomic_fetch_sub_explicit(&s.p->left, 1, memory_order_release);
    }
}

static void call(pool *p, job run, void *arg)
{
    atomic_store(&p->claimed, 0);
    if (p->threads > 1) {
        p->run = run;
        p->arg = arg;
        atomic_store(&p->left, p->threads - 1);
        atomic_fetch_add(&p->turn, 1);
        if (atomic_load(&p->sleeping)) {
            pthread_mutex_lock(&p->lock);
            pthread_cond_broadcast(&p->wake);
            pthread_mutex_unlock(&p->lock);
        }
    }
    run(p, arg, 0);
    long spins = 0;
    while (p->threads > 1 && atomic_load_explicit(&p->left, memory_order_acquire)) relax(&spins);
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
    p->own[0] = memory(OWN);
    for (; p->threads < threads; p->threads++) {
        seat *s = malloc(sizeof *s);
        *s = (seat){p, p->threads};
        p->own[p->threads] = memory(OWN);
        if (pthread_create(&p->ids[p->threads], NULL, work, s)) { free(s); break; }
    }
    return p;
}

/* Grow the shared scratch; called before threads start. 0 when there is no memory. */
static int reserve(pool *p, size_t bytes)
{
    if (bytes <= p->scratch_size) return 1;
    free(p->scratch);
    p->scratch = memory(bytes);
    p->scratch_size = p->scratch ? bytes : 0;
    return p->scratch != NULL;
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

/* Where a tile reads b: `count` stretches of `steps` words each; two vectors, `stride` bytes from word to word.
 * `soon` are the stretches that will be wanted next: the same place in them is prefetched. */
typedef struct {
    const char *const *left, *const *right, *const *soon_left, *const *soon_right;
    long count, steps, stride;
} columns;

INLINE void tile(const int f, const int mr, const int32_t *a, long ars, columns b, float *c, long ldc, int add)
{
    vf acc[MR][NV];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = add ? *(vf *)(c + i * ldc + j * VL) : (vf){0};
    for (long s = 0; s < b.count; s++) {
        const char *l = b.left[s], *r = b.right[s], *sl = b.soon_left[s], *sr = b.soon_right[s];
        for (long k = 0; k < b.steps; k++) {
            vi bl = f == F16 ? (vi)from_half(l) : *(const vi *)l, br = f == F16 ? (vi)from_half(r) : *(const vi *)r;
            __builtin_prefetch(sl, 0, 2);
            __builtin_prefetch(sr, 0, 2);
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                int32_t x = a[(i / 3) * (3 * ars) + (i % 3) * ars];
                acc[i][0] = dot(acc[i][0], bl, x, f);
                acc[i][1] = dot(acc[i][1], br, x, f);
            }
            a++;
            l += b.stride;
            r += b.stride;
            sl += b.stride;
            sr += b.stride;
        }
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) *(vf *)(c + i * ldc + j * VL) = acc[i][j];
}

typedef void (*tile_fn)(const int32_t *, long, columns, float *, long, int);
#define TILE(f, n) \
    static void tile_##f##_##n(const int32_t *a, long ars, columns b, float *c, long ldc, int add) \
    { tile(f, n <= MR ? n : MR, a, ars, b, c, ldc, add); }
#define TILES(f) TILE(f, 1) TILE(f, 2) TILE(f, 3) TILE(f, 4) TILE(f, 5) TILE(f, 6) \
    TILE(f, 7) TILE(f, 8) TILE(f, 9) TILE(f, 10) TILE(f, 11) TILE(f, 12)
#define TABLE(f) {0, tile_##f##_1, tile_##f##_2, tile_##f##_3, tile_##f##_4, tile_##f##_5, tile_##f##_6, \
    tile_##f##_7, tile_##f##_8, tile_##f##_9, tile_##f##_10, tile_##f##_11, tile_##f##_12}
TILES(F32) TILES(BF16) TILES(F16) TILES(I8)
static const tile_fn tiles[4][13] = {TABLE(F32), TABLE(BF16), TABLE(F16), TABLE(I8)};

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
    norm_job j = *(norm_job *)arg;
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

void ps_norm(pool *p, const norm *n, const void *x, long rows, void *out, int add)
{
    norm_job j = {n, x, out, rows, add};
    call(p, norm_run, &j);
}

/* ---- products with packed weights ---- */

enum { STORE, ADD, GATED };

/* y = act(norm(x) W^T + bias). GATED: a panel holds VL gate columns, then VL up columns, and y = act(gate) * up.
 * ADD: y += scale * (...). Weights are [panels][k words][NR], zero beyond n and k. int8: `scales` per column,
 * `offsets` = 128 * sum of the column, which the unsigned activations of one scale per row bring in. */
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
    char *a;             /* prepared rows, `stride` bytes each; a float per row (its scale) behind them */
    long stride;
    float *row_scales;
    int direct;
} linear_job;

INLINE long words(const linear *w) { return (w->k + per_word(w->format) - 1) / per_word(w->format); }

static void quantize_row(uint8_t *out, const float *x, long n, float *scale)
{
    vf top = splat(0.0f);
    float most = 0;
    long i = 0;
    for (; i + VL <= n; i += VL) top = vmax(top, (vf)(*(const vi *)(x + i) & 0x7fffffff));
    for (; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    most = fmaxf(most, max_of(top));
    float inverse = most > 0 ? 127.0f / most : 0.0f;
    *scale = most == most && most < INFINITY ? most / 127.0f : NAN; /* a row with NaN stays one */
    for (i = 0; i + VL <= n; i += VL) {
        vf v = *(const vf *)(x + i) * inverse + (12582912.0f + 128.0f);
        *(vb *)(out + i) = __builtin_convertvector((vi)v, vb);
    }
    for (; i < n; i++) out[i] = (uint8_t)(lrintf(x[i] * inverse) + 128);
}

static void prepare(const linear_job *j, long m, float *row)
{
    const linear *w = j->w;
    char *dst = j->a + m * j->stride;
    widen(row, j->x + m * j->ldx * SIZE[w->in_type], w->k, w->in_type);
    if (w->norm_kind) normalize(row, w->k, w->norm_kind, w->norm_weight, w->norm_bias, w->eps);
    if (w->format == I8) quantize_row((uint8_t *)dst, row, w->k, &j->row_scales[m]);
    else narrow(dst, row, w->k, w->format == BF16 ? BF16 : F32);
}

INLINE void finish_row(const linear_job *j, long m, long n, const float *c, const int act, const int out_type)
{
    const linear *w = j->w;
    vf v[NV];
    for (int i = 0; i < NV; i++) {
        v[i] = *(const vf *)(c + i * VL);
        if (w->format == I8) {
            vi sum = (vi)v[i] - *(const vi *)(w->offsets + n + i * VL);
            v[i] = __builtin_convertvector(sum, vf) * *(const vf *)(w->scales + n + i * VL) * j->row_scales[m];
        }
        if (w->bias) v[i] += *(const vf *)(w->bias + n + i * VL);
    }
    int many = NV;
    long end = w->n;
    if (w->mode == GATED) {
        v[0] = activate(v[0], act) * v[1];
        many = 1;
        n /= 2;
        end /= 2;
    } else if (act) {
        for (int i = 0; i < NV; i++) v[i] = activate(v[i], act);
    }
    char *out = j->out + m * j->ldo * SIZE[out_type];
    for (int i = 0; i < many; i++, n += VL) {
        if (n + VL <= end) {
            if (w->mode == ADD) v[i] = load(out, n, out_type) + w->scale * v[i];
            store(out, n, out_type, v[i]);
        } else {
            for (long x = n; x < end; x++)
                store1(out, x, out_type, w->mode == ADD ? load1(out, x, out_type) + w->scale * v[i][x - n] : v[i][x - n]);
        }
    }
}

static void finish(const linear_job *j, long m, long rows, long n, const float *c)
{
    int act = j->w->act, type = j->w->out_type;
    for (long i = 0; i < rows; i++, c += NR) {
        if (type == BF16 && act == IDENTITY) finish_row(j, m + i, n, c, IDENTITY, BF16);
        else if (type == BF16 && act == SILU) finish_row(j, m + i, n, c, SILU, BF16);
        else finish_row(j, m + i, n, c, act, type);
    }
}

static void linear_run(pool *p, void *arg, int id)
{
    linear_job j = *(linear_job *)arg;
    const linear *w = j.w;
    long k = words(w), size = k * NR * (w->format == F16 ? 2 : 4), panels = (w->n + NR - 1) / NR;
    long tiles_m = (j.rows + MR - 1) / MR, piece = panels / (8 * p->threads) + 1;
    float c[MR * NR];
    if (!j.direct) {
        for (long m; (m = claim(p)) < j.rows;) prepare(&j, m, (float *)p->own[id]);
        barrier(p);
    }
    for (long first; (first = claim(p) * piece) < panels;) {
        for (long q = first; q < first + piece && q < panels; q++) {
            for (long t = 0; t < tiles_m; t++) {
                long m = t * j.rows / tiles_m, mr = (t + 1) * j.rows / tiles_m - m;
                const char *b = w->weights + q * size, *right = b + size / k / 2;
                /* one tile streams its own panel; of several, the first two fetch the next panel */
                const char *soon = tiles_m == 1 ? b + 8192 : t == 0 ? b + size : b, *soon_right = soon + size / k / 2;
                columns cols = {&b, &right, &soon, &soon_right, 1, k, size / k};
                tiles[w->format][mr]((const int32_t *)(j.a + m * j.stride), j.stride / 4, cols, c, NR, 0);
                finish(&j, m, mr, q * NR, c);
            }
        }
    }
}

/* 0 when there is no memory for scratch. */
int ps_linear(pool *p, const linear *w, const void *x, long rows, long ldx, void *out, long ldo)
{
    long k = words(w), size = SIZE[w->in_type];
    linear_job j = {w, x, out, rows, ldx, ldo, (char *)x, ldx * size, NULL, 0};
    if (rows == 0) return 1;
    int same = w->format == w->in_type && w->k % per_word(w->format) == 0 && (ldx * size) % 4 == 0;
    j.direct = same && w->format != F16 && !w->norm_kind;
    if (!j.direct) {
        j.stride = k * 4 + 64;
        if (!reserve(p, rows * (j.stride + 4))) return 0;
        j.a = p->scratch;
        j.row_scales = (float *)(p->scratch + rows * j.stride);
        if (w->k % per_word(w->format)) memset(j.a, 0, rows * j.stride);
    }
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

/* Rows of an embedding that shares its packed weights with the output head. */
void ps_embed(const linear *w, const int64_t *ids, long rows, void *out, int type)
{
    long per = per_word(w->format), k = words(w), size = w->format == F16 ? 2 : 4;
    for (long m = 0; m < rows; m++) {
        long n = ids[m];
        const char *src = w->weights + (n / NR) * k * NR * size + (n % NR) * size;
        for (long i = 0; i < w->k; i++) {
            const char *word = src + i / per * NR * size;
            float x = w->format == I8 ? ((const int8_t *)word)[i % 4] * w->scales[n] : load1(word, i % per, w->format);
            store1(out, m * w->k + i, type, x);
        }
    }
}

/* ---- the paged cache ----
 *
 * One buffer per layer: [panels][kv heads][keys | values | scales]. A panel holds the LANES tokens of consecutive
 * slots, laid out as `tile` reads them: keys [key_dim / p][LANES][p] and values [LANES / p][value_dim][p], with p
 * numbers to a word. int8 keeps the order of bf16 with one byte a number, and a float per token for keys and values. */
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

static float amax(const float *x, long n)
{
    float most = 0;
    for (long i = 0; i < n; i++) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    return most;
}

INLINE void put(const cache *c, char *side, long at, float x)
{
    if (c->format == BF16) ((uint16_t *)side)[at] = (uint16_t)x; /* never taken: see write_side */
    else if (c->format == F32) ((float *)side)[at] = x;
    else if (c->format == F16) ((_Float16 *)side)[at] = (_Float16)x;
    else ((int8_t *)side)[at] = (int8_t)lrintf(x);
}

static void write_side(const cache *c, char *side, float *scale, long lane, const float *x, long dim, int keys)
{
    long p = per_word(c->compute);
    if (c->format == BF16) {
        uint16_t row[MAX_HEAD];
        narrow(row, x, dim, BF16);
        for (long d = 0; d < dim; d++)
            ((uint16_t *)side)[keys ? key_at(lane, d, 2) : value_at(lane, d, 2, dim)] = row[d];
        return;
    }
    float top = c->format == I8 ? amax(x, dim) : 0, inverse = c->format != I8 ? 1 : top > 0 ? 127 / top : 0;
    if (c->format == I8) scale[lane] = top / 127;
    for (long d = 0; d < dim; d++) put(c, side, keys ? key_at(lane, d, p) : value_at(lane, d, p, dim), x[d] * inverse);
}

static float read_side(const cache *c, const char *side, const float *scale, long lane, long d, long dim, int keys)
{
    long p = per_word(c->compute), at = keys ? key_at(lane, d, p) : value_at(lane, d, p, dim);
    return c->format == I8 ? ((const int8_t *)side)[at] * scale[lane] : load1(side, at, c->format);
}

static void write_head(const cache *c, long slot, long head, const float *key, float *value)
{
    char *at = head_of(c, slot / LANES, head);
    float *scales = c->format == I8 ? scales_of(c, at) : NULL;
    /* a hidden value is multiplied by 0, which an infinity would survive: broken rows must not reach others */
    for (long d = 0; d < c->value_dim; d++) value[d] = fabsf(value[d]) < INFINITY ? value[d] : 0;
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
        for (long d = 0; d < c->key_dim; d++) *keys++ = read_side(c, at, scales, lane, d, c->key_dim, 1);
        for (long d = 0; d < c->value_dim; d++) *values++ = read_side(c, side, scales + LANES, lane, d, c->value_dim, 0);
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
} attention;

static void rotate(const attention *a, long token, float *x, long dim, const float *weight)
{
    const rotary *r = a->r;
    float cosine[MAX_HEAD], sine[MAX_HEAD];
    long half = r->width / 2;
    if (r->norm == 1 && weight) normalize(x, dim, RMS, weight, NULL, r->eps);
    if (!half) return;
    widen(cosine, r->cos + token * r->width * SIZE[r->type], r->width, r->type);
    widen(sine, r->sin + token * r->width * SIZE[r->type], r->width, r->type);
    for (long i = 0; i < half; i++) {
        float lo = x[i], hi = x[i + half];
        x[i] = lo * cosine[i] - hi * sine[i];
        x[i + half] = hi * cosine[i + half] + lo * sine[i + half];
    }
}

/* Finish queries and key of one key/value head, and put key and value into the cache. */
static void place_head(const attention *a, long token, long head)
{
    long group = a->heads / a->c->heads, dim = a->c->key_dim, size = SIZE[a->type];
    float key[MAX_HEAD + VL], value[MAX_HEAD + VL];
    widen(key, a->key + (token * a->key_token + head * a->key_head) * size, dim, a->type);
    widen(value, a->value + (token * a->value_token + head * a->value_head) * size, a->c->value_dim, a->type);
    if (a->r) rotate(a, token, key, dim, a->r->key_norm);
    write_head(a->c, a->s->slots[token], head, key, value);
    for (long g = head * group; a->r && g < (head + 1) * group; g++) {
        char *q = a->query + (token * a->query_token + g * a->query_head) * size;
        widen(key, q, dim, a->type);
        rotate(a, token, key, dim, a->r->query_norm);
        narrow(q, key, dim, a->type);
    }
}

static void normalize_all(const attention *a, char *x, long n, const float *weight, float *row)
{
    widen(row, x, n, a->type);
    normalize(row, n, RMS, weight, NULL, a->r->eps);
    narrow(x, row, n, a->type);
}

static void place(pool *p, const attention *a, float *row)
{
    long heads = a->c->heads, whole = a->r && a->r->norm == 2, size = SIZE[a->type], dim = a->c->key_dim;
    long pieces = whole || a->s->tokens >= 4 * p->threads ? a->s->tokens : a->s->tokens * heads;
    for (long u; (u = claim(p)) < pieces;) {
        if (pieces != a->s->tokens) { place_head(a, u / heads, u % heads); continue; }
        if (whole) {
            normalize_all(a, a->query + u * a->query_token * size, a->heads * dim, a->r->query_norm, row);
            normalize_all(a, a->key + u * a->key_token * size, heads * dim, a->r->key_norm, row);
        }
        for (long h = 0; h < heads; h++) place_head(a, u, h);
    }
}

enum { Q_WORDS = MAX_HEAD, O_WIDTH = MAX_HEAD + NR };

/* One thread's workspace: up to MR queries that walk along their keys together. */
typedef struct {
    int32_t query[MR][Q_WORDS], weight[MR][KEYS];
    float out[MR][O_WIDTH], score[MR][KEYS], most[MR], total[MR], key_scale[KEYS], value_scale[KEYS];
    long position[MR], row[MR], token[MR], head[MR];
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
            store(k, i, BF16, __builtin_convertvector(*(const vb *)(at + i), vf));
        for (long i = 0; i < c->value_dim * LANES; i += VL)
            store(v, i, BF16, __builtin_convertvector(*(const vb *)(at + values + i), vf));
        memcpy(w->key_scale + j * LANES, scales_of(c, at), LANES * 4);
        memcpy(w->value_scale + j * LANES, scales_of(c, at) + LANES, LANES * 4);
    }
}

/* Scores of query i over n panels from key `from` on become weights; the running maximum, sum and output follow. */
INLINE void soften(const attention *a, bench *w, long i, long from, long n, int f)
{
    long position = w->position[i], low = a->window && position >= a->window ? position - a->window + 1 : 0;
    int open = from >= low && from + n * LANES - 1 <= position, scaled = a->c->format == I8;
    vi lane;
    for (int x = 0; x < VL; x++) lane[x] = x;
    vf s[KEYS / VL], top = splat(-INFINITY), sum = splat(0.0f);
    long vectors = n * LANES / VL;
    for (long j = 0; j < vectors; j++) {
        s[j] = *(vf *)(w->score[i] + j * VL) * a->scaling;
        if (scaled) s[j] *= *(vf *)(w->key_scale + j * VL);
        if (a->softcap > 0) s[j] = a->softcap * vtanh(s[j] / a->softcap);
        if (!open) {
            vi key = lane + (int32_t)(from + j * VL);
            s[j] = pick((key <= (int32_t)position) & (key >= (int32_t)low), s[j], splat(-INFINITY));
        }
        top = vmax(s[j], top);
    }
    float most = max_of(top);
    most = most > w->most[i] ? most : w->most[i];
    if (most == -INFINITY) { memset(w->weight[i], 0, sizeof w->weight[i]); return; }
    for (long j = 0; j < vectors; j++) {
        s[j] = vexp(s[j] - most);
        sum += s[j];
        if (scaled) s[j] = pick(s[j] > 0.0f, s[j] * *(vf *)(w->value_scale + j * VL), splat(0.0f));
        store(w->weight[i], j * VL, f == BF16 ? BF16 : F32, s[j]);
    }
    float shrink = vexp(splat(w->most[i] - most))[0];
    w->total[i] = w->total[i] * shrink + sum_of(sum);
    w->most[i] = most;
    if (shrink == 1.0f) return;
    for (long d = 0; d < a->c->value_dim; d += VL) *(vf *)(w->out[i] + d) *= shrink;
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
        for (long v = 0; v < n * LANES; v += NR) {
            long r = v + VL;
            const char *left = keys[v / LANES] + v % LANES * word, *right = keys[r / LANES] + r % LANES * word;
            const char *sl = keys[PANELS + v / LANES] + v % LANES * word, *sr = keys[PANELS + r / LANES] + r % LANES * word;
            columns b = {&left, &right, &sl, &sr, 1, c->key_dim / p, LANES * word};
            tiles[f][mr](w->query[i], Q_WORDS, b, w->score[i] + v, KEYS, 0);
        }
        for (long x = i; x < i + mr; x++) {
            if (f == BF16) soften(a, w, x, t, n, BF16);
            else soften(a, w, x, t, n, F32);
        }
        for (long d = 0; d < c->value_dim; d += NR) {
            const char *left[PANELS], *right[PANELS], *sl[PANELS], *sr[PANELS];
            for (long j = 0; j < n; j++) {
                left[j] = vals[j] + d * word;
                right[j] = left[j] + VL * word;
                sl[j] = vals[PANELS + j] + d * word;
                sr[j] = sl[j] + VL * word;
            }
            columns b = {left, right, sl, sr, n, LANES / p, c->value_dim * word};
            tiles[f][mr](w->weight[i], KEYS, b, w->out[i] + d, O_WIDTH, 1);
        }
    }
}

static void take_query(const attention *a, bench *w, long i, long row, long token, long position, long head)
{
    float x[MAX_HEAD];
    const long dim = a->c->key_dim;
    w->row[i] = row;
    w->token[i] = token;
    w->position[i] = position;
    w->head[i] = head;
    w->most[i] = -INFINITY;
    w->total[i] = 0;
    memset(w->out[i], 0, sizeof w->out[i]);
    widen(x, a->query + (token * a->query_token + head * a->query_head) * SIZE[a->type], dim, a->type);
    narrow(w->query[i], x, dim, a->c->compute == BF16 ? BF16 : F32);
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
    for (long d = 0; d < dim; d++) w->out[i][d] = w->out[i][d] * scale / total;
    narrow(a->out + (w->token[i] * a->heads + w->head[i]) * dim * SIZE[a->type], w->out[i], dim, a->type);
}

/* The first key tile that query i can see. */
static long first_key(const attention *a, const bench *w, long i)
{
    long low = a->window && w->position[i] >= a->window ? w->position[i] - a->window + 1 : 0;
    return low / KEYS * KEYS;
}

static void attend_tile(const attention *a, bench *w, long bundle, long head, long begin, long end)
{
    const step *s = a->s;
    const long group = a->heads / a->c->heads, row = s->row[bundle], many = s->rows[bundle] > 1;
    long from = 1L << 40;
    for (long q = begin; q < end; q++) {
        long r = many ? row + q / group : row, t = many ? 0 : s->begin[bundle] + q / group;
        take_query(a, w, q - begin, r, s->first[r] + t, s->start[r] + t, head * group + q % group);
        from = first_key(a, w, q - begin) < from ? first_key(a, w, q - begin) : from;
    }
    if (!many) walk(a, w, 0, end - begin, row, head, from, w->position[end - begin - 1] + 1);
    if (many) walk(a, w, 0, end - begin, row, head, from, s->shared[bundle]);
    for (long i = 0, n; many && i < end - begin; i += n) { /* then each row along its own keys */
        for (n = 1; i + n < end - begin && w->row[i + n] == w->row[i];) n++;
        from = first_key(a, w, i);
        walk(a, w, i, n, w->row[i], head, from > s->shared[bundle] ? from : s->shared[bundle], w->position[i] + 1);
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
    for (long u; (u = claim(p)) < s->bundles * heads;) {
        long bundle = u / heads, many = s->rows[bundle] > 1;
        long queries = group * (many ? s->rows[bundle] : s->end[bundle] - s->begin[bundle]);
        long most = many && group < MR ? MR / group * group : MR;
        for (long q = 0; q < queries; q += most)
            attend_tile(a, w, bundle, u % heads, q, q + most < queries ? q + most : queries);
    }
}

/* Write the step's keys and values, then attend: out [tokens][heads][value_dim]. */
void ps_attention(pool *p, const attention *a) { call(p, attention_run, (void *)a); }
long ps_workspace(void) { return sizeof(bench) <= OWN ? MAX_HEAD : 0; }
