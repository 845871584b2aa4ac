/* Matrix products of a few rows with a few vectors of columns: c[mr][..] (+)= a[mr][k] b[k][..].
 *
 * All products of this library are made of these. Sums run over k in order.
 *
 * format I8: a is signed, b unsigned. 32-bit sums over BLOCK numbers along k are scaled by the scale of the row's block
 * and added up in float32, in c. */
enum { BLOCK_WORDS = BLOCK / 4 };

INLINE vf dot(vf acc, vi b, int32_t a, int f)
{
    if (f == I8) {
#if defined(__AVX512VNNI__)
        return (vf)_mm512_dpbusd_epi32((__m512i)(vi)acc, (__m512i)b, (__m512i)splati(a));
#elif defined(__AVXVNNI__) && defined(__AVX2__)
        return (vf)_mm256_dpbusd_avx_epi32((__m256i)(vi)acc, (__m256i)b, (__m256i)splati(a));
#else
        vi sum = (vi)acc;
        for (int j = 0; j < 4; j++) sum += ((b >> (8 * j)) & 255) * (int8_t)(a >> (8 * j));
        return (vf)sum;
#endif
    }
    if (f == BF16) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)splati(a), (__m512bh)b);
#else
        acc = multiply_add((vf)(b << 16), (vf)splati((int32_t)((uint32_t)a << 16)), acc);
        return multiply_add((vf)(b & (int32_t)0xffff0000), (vf)splati(a & (int32_t)0xffff0000), acc);
#endif
    }
    union { int32_t i; float f; } x = {a};
    return multiply_add((vf)b, splat(x.f), acc);
}

/* With at most WIDE_ROWS rows a kernel takes WIDE vectors of columns, so that enough sums are independent. */
enum { WIDE = 2 * NV, WIDE_ROWS = VL == 16 ? 6 : 2 };

INLINE long blocks_of(long words) { return (words + BLOCK_WORDS - 1) / BLOCK_WORDS; }

/* Add the sums over block g of k to those in c, scaled; `blocks` is the number of scales of a row. */
INLINE void add_block(const int mr, const int nv, vf (*acc)[WIDE], const float *scales, long blocks, long g, float *c, long ldc)
{
    _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++)
        _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) {
            vf *sum = (vf *)(c + i * ldc + j * VL);
            *sum = multiply_add(to_float((vi)acc[i][j]), splat(scales[i * blocks + g]), g ? *sum : splat(0.0f));
            acc[i][j] = (vf){0};
        }
}

/* Operand b of `rows_kernel`: `segments` of `steps` words along k each, `stride` bytes from word to word. Vector v of
 * segment s begins at at[v][s] + shift[v]; the same offset from ahead[v][s] is prefetched. */
typedef struct {
    const char *const *at[WIDE], *const *ahead[WIDE];
    long shift[WIDE], segments, steps, stride;
    const char *const *lines; /* cache lines of something else, prefetched at an even pace; or NULL */
    long num_lines;
} b_operand;

/* Rows of a lie `ars` words apart, and have `scales` for I8. `add`: c holds the sums to start from; not for I8. */
INLINE void rows_kernel(
    const int f, const int mr, const int nv, const int32_t *a, long ars, const float *scales, const b_operand *b, float *c, long ldc, int add)
{
    vf acc[MR][WIDE];
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) acc[i][j] = add ? *(vf *)(c + i * ldc + j * VL) : (vf){0};
    const long stride = b->stride, steps = b->steps;
    const char *const *lines = b->lines ? b->lines : b->at[0];
    const uint64_t pace = b->lines ? ((uint64_t)b->num_lines << 32) / (b->segments * steps) : 0; /* 2^32: a line for each word */
    uint64_t line = 0;
    for (long s = 0; s < b->segments; s++) {
        const char *at[WIDE], *ahead[WIDE];
        for (int j = 0; j < nv; j++) at[j] = b->at[j][s] + b->shift[j], ahead[j] = b->ahead[j][s] + b->shift[j];
        long offset = 0;
        for (long k = 0; k < steps; k++, offset += stride) {
            if (f == I8 && k && k % BLOCK_WORDS == 0) add_block(mr, nv, acc, scales, blocks_of(steps), k / BLOCK_WORDS - 1, c, ldc);
            vi x[WIDE];
            __builtin_prefetch(lines[line >> 32], 0, 2);
            line += pace;
            _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) {
                x[j] = f == F16 ? (vi)from_half(at[j] + offset) : *(const vi *)(at[j] + offset);
                __builtin_prefetch(ahead[j] + offset, 0, 2);
            }
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                int32_t y = a[(i / 3) * (3 * ars) + (i % 3) * ars];
                _Pragma("GCC unroll 4") for (int j = 0; j < nv; j++) acc[i][j] = dot(acc[i][j], x[j], y, f);
            }
            a++;
        }
        if (f == I8) { add_block(mr, nv, acc, scales, blocks_of(steps), (steps - 1) / BLOCK_WORDS, c, ldc); return; }
    }
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < nv; j++) *(vf *)(c + i * ldc + j * VL) = acc[i][j];
}

/* One panel of weights b[k][NR] and packed rows a[k][mr]; each step of k prefetches at `ahead`, which moves by `step`. */
INLINE void packed_kernel(
    const int f, const int mr, const int32_t *a, const float *scales, const char *b, long k, const char *ahead, long step, float *c)
{
    vf acc[MR][WIDE];
    const long half = f == F16 ? 2 * VL : 4 * VL, blocks = blocks_of(k);
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = (vf){0};
    for (long g = 0, end; k > 0; g++) {
        end = f == I8 && k > BLOCK_WORDS ? k - BLOCK_WORDS : 0;
        for (; k > end; k--) {
            vi bl = f == F16 ? (vi)from_half(b) : *(const vi *)b;
            vi br = f == F16 ? (vi)from_half(b + half) : *(const vi *)(b + half);
            __builtin_prefetch(ahead, 0, 2);
            _Pragma("GCC unroll 16") for (int i = 0; i < mr; i++) {
                acc[i][0] = dot(acc[i][0], bl, a[i], f);
                acc[i][1] = dot(acc[i][1], br, a[i], f);
            }
            a += mr;
            b += 2 * half;
            ahead += step;
        }
        if (f == I8) add_block(mr, NV, acc, scales, blocks, g, c, NR);
    }
    if (f == I8) return;
    for (int i = 0; i < mr; i++)
        for (int j = 0; j < NV; j++) *(vf *)(c + i * NR + j * VL) = acc[i][j];
}

typedef void (*rows_kernel_fn)(const int32_t *, long, const float *, const b_operand *, float *, long, int);
typedef void (*packed_kernel_fn)(const int32_t *, const float *, const char *, long, const char *, long, float *);
#define KERNELS_FOR(f, n) \
    static void rows_kernel_##f##_##n(const int32_t *a, long ars, const float *s, const b_operand *b, float *c, long ldc, int add) \
    { rows_kernel(f, n <= MR ? n : MR, NV, a, ars, s, b, c, ldc, add); } \
    static void wide_kernel_##f##_##n(const int32_t *a, long ars, const float *s, const b_operand *b, float *c, long ldc, int add) \
    { rows_kernel(f, n <= WIDE_ROWS ? n : WIDE_ROWS, WIDE, a, ars, s, b, c, ldc, add); } \
    static void packed_kernel_##f##_##n(const int32_t *a, const float *s, const char *b, long k, const char *ahead, long step, float *c) \
    { packed_kernel(f, n <= MR ? n : MR, a, s, b, k, ahead, step, c); }
#define KERNELS(f) \
    KERNELS_FOR(f, 1) KERNELS_FOR(f, 2) KERNELS_FOR(f, 3) KERNELS_FOR(f, 4) KERNELS_FOR(f, 5) KERNELS_FOR(f, 6) \
    KERNELS_FOR(f, 7) KERNELS_FOR(f, 8) KERNELS_FOR(f, 9) KERNELS_FOR(f, 10) KERNELS_FOR(f, 11) KERNELS_FOR(f, 12)
#define BY_ROWS(t, f) {0, t##_##f##_1, t##_##f##_2, t##_##f##_3, t##_##f##_4, t##_##f##_5, t##_##f##_6, \
    t##_##f##_7, t##_##f##_8, t##_##f##_9, t##_##f##_10, t##_##f##_11, t##_##f##_12}
#define BY_FORMAT(t) {BY_ROWS(t, F32), BY_ROWS(t, BF16), BY_ROWS(t, F16), BY_ROWS(t, I8)}
KERNELS(F32) KERNELS(BF16) KERNELS(F16) KERNELS(I8)
static const rows_kernel_fn rows_kernels[4][13] = BY_FORMAT(rows_kernel), wide_kernels[4][13] = BY_FORMAT(wide_kernel);
static const packed_kernel_fn packed_kernels[4][13] = BY_FORMAT(packed_kernel);
