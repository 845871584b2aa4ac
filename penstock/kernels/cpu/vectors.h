/* Vectors of VL float32 numbers: formats, conversions, transposition, reductions, elementary functions, activations.
 *
 * Type names: vf float32, vi int32, vu uint32, vh 16-bit words, vb int8; each holds VL numbers. */
#if defined(__AVX512F__) && defined(__AVX512BW__)
enum { VL = 16, MR = 12 };
#elif defined(__AVX2__) && defined(__FMA__)
enum { VL = 8, MR = 6 };
#else
enum { VL = 4, MR = 4 };
#endif
enum { NV = 2, NR = NV * VL };     /* columns of a panel of packed weights: NV vectors */
enum { LANES = 16, KEYS = 64 };    /* tokens of a cache panel; keys of an attention tile */
enum { PANELS = KEYS / LANES };
enum { MAX_HEAD = 512 };           /* largest head size that attention has scratch for */

typedef float vf __attribute__((vector_size(VL * 4), aligned(4)));
typedef int32_t vi __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4), aligned(4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2)));
typedef int8_t vb __attribute__((vector_size(VL), aligned(1)));
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 256 }; /* numbers along k that int8 quantization rotates and scales together */

/* Number formats. As operands of a product, a 32-bit word holds 1 F32, 2 BF16, or 4 I8 numbers along k. */
enum { F32, BF16, F16, I8 };
static const int ELEMENT_BYTES[] = {4, 2, 2, 1};
INLINE int per_word(int f) { return f == BF16 ? 2 : f == I8 ? 4 : 1; }

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vi splati(int32_t x) { return x - (vi){0}; }

/* a b + c, rounded once where the CPU can. This library is compiled with -ffp-contract=off: left to themselves, compilers
 * fuse an expression in one copy of a function and not in another, and two kernels give one row different bits. */
INLINE vf multiply_add(vf a, vf b, vf c)
{
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE vf blend(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
/* The maximum; b where either is NaN, as the x86 instructions define it. */
#if defined(__AVX512F__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
#else
INLINE vf vmax(vf a, vf b) { return blend(a > b, a, b); }
#endif
#if defined(__AVX512F__)
INLINE float reduce_add(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float reduce_max(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float reduce_add(vf v)
{
    for (int h = VL / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
}
INLINE float reduce_max(vf v)
{
    for (int h = VL / 2; h; h /= 2)
        for (int i = 0; i < h; i++) v[i] = v[i] > v[i + h] ? v[i] : v[i + h];
    return v[0];
}
#endif

/* ---- conversions between float32 and the other formats ---- */

#if defined(__FLT16_MAX__)
static inline float half_to_float(uint16_t h) { union { uint16_t u; _Float16 h; } x = {h}; return (float)x.h; }
static inline uint16_t float_to_half(float f) { union { _Float16 h; uint16_t u; } x = {(_Float16)f}; return x.u; }
#else /* gcc before 12 and clang before 15 lack the type on x86 */
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

INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

/* The low byte of each number. (gcc 12 takes vectors apart for this conversion.) */
INLINE void to_bytes(void *p, vi v)
{
#if defined(__AVX512F__)
    _mm_storeu_si128(p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
    const __m256i low = _mm256_shuffle_epi8((__m256i)v, _mm256_set1_epi32(0x0c080400));
    _mm_storel_epi64(p, _mm_unpacklo_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
    *(vb *)p = __builtin_convertvector(v, vb);
#endif
}

INLINE vu load_u16(const uint16_t *p)
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
    if (f == BF16) return (vf)(load_u16((const uint16_t *)p + i) << 16);
    return from_half((const uint16_t *)p + i);
}

INLINE void store(void *p, long i, int f, vf v)
{
    if (f == F32) *(vf *)((float *)p + i) = v;
    else if (f == BF16) *(vh *)((uint16_t *)p + i) = to_bf16(v);
    else to_half((uint16_t *)p + i, v);
}

static float load_scalar(const void *p, long i, int f)
{
    if (f == F32) return ((const float *)p)[i];
    if (f == F16) return half_to_float(((const uint16_t *)p)[i]);
    union { uint32_t u; float f; } x = {(uint32_t)((const uint16_t *)p)[i] << 16};
    return x.f;
}

static void store_scalar(void *p, long i, int f, float x)
{
    uint16_t out[VL];
    if (f == F32) { ((float *)p)[i] = x; return; }
    store(out, 0, f, splat(x));
    ((uint16_t *)p)[i] = out[0];
}

INLINE void widen_as(float *dst, const void *src, long n, int f)
{
    long i = 0;
    for (; i + VL <= n; i += VL) *(vf *)(dst + i) = load(src, i, f);
    for (; i < n; i++) dst[i] = load_scalar(src, i, f);
}

INLINE void widen(float *dst, const void *src, long n, int f)
{
    if (f == F32) widen_as(dst, src, n, F32);
    else if (f == BF16) widen_as(dst, src, n, BF16);
    else widen_as(dst, src, n, F16);
}

INLINE void narrow_as(void *dst, const float *src, long n, int f)
{
    long i = 0;
    for (; i + VL <= n; i += VL) store(dst, i, f, *(const vf *)(src + i));
    for (; i < n; i++) store_scalar(dst, i, f, src[i]);
}

INLINE void narrow(void *dst, const float *src, long n, int f)
{
    if (f == F32) narrow_as(dst, src, n, F32);
    else if (f == BF16) narrow_as(dst, src, n, BF16);
    else narrow_as(dst, src, n, F16);
}

/* a[0], b[0], a[1], b[1] and so on: the first half to a, the second to b. */
INLINE void interleave(vf *a, vf *b)
{
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 first = _mm512_permutex2var_ps((__m512)*a, low, (__m512)*b);
    *b = (vf)_mm512_permutex2var_ps((__m512)*a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), (__m512)*b);
    *a = (vf)first;
#elif defined(__AVX2__)
    const __m256 even = _mm256_unpacklo_ps((__m256)*a, (__m256)*b), odd = _mm256_unpackhi_ps((__m256)*a, (__m256)*b);
    *a = (vf)_mm256_permute2f128_ps(even, odd, 0x20);
    *b = (vf)_mm256_permute2f128_ps(even, odd, 0x31);
#else
    vf first, second;
    for (int i = 0; i < VL; i++) {
        first[i] = (i % 2 ? *b : *a)[i / 2];
        second[i] = (i % 2 ? *b : *a)[VL / 2 + i / 2];
    }
    *a = first;
    *b = second;
#endif
}

/* Number i of vector j becomes number j of vector i. */
INLINE void transpose_square(vf v[VL])
{
    _Pragma("GCC unroll 4") for (int round = 1; round < VL; round *= 2) {
        vf next[VL];
        _Pragma("GCC unroll 8") for (int i = 0; i < VL / 2; i++) {
            next[2 * i] = v[i];
            next[2 * i + 1] = v[i + VL / 2];
            interleave(next + 2 * i, next + 2 * i + 1);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < VL; i++) v[i] = next[i];
    }
}

/* Most of what a kernel reads was written by another thread and lies in that core's cache. */
INLINE void prefetch(const char *p, long bytes)
{
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

/* ---- elementary functions ---- */

INLINE vf exp_of_rest(vf x, vf n) /* exp(x - n log 2), n the nearest integer to x / log 2 */
{
    static const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    const vf r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    _Pragma("GCC unroll 5") for (int i = 0; i < 5; i++) p = multiply_add(p, r, splat(terms[i]));
    return multiply_add(p, r * r, r) + 1.0f;
}

#if defined(__AVX512F__)
INLINE vf vexp(vf x) /* Cephes expf; exactly 0 from -110 down */
{
    x = (vf)_mm512_min_ps((__m512)splat(88.0f), (__m512)vmax(splat(-110.0f), x)); /* NaN passes through both */
    vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
    return (vf)_mm512_scalef_ps((__m512)exp_of_rest(x, n), (__m512)n);
}
#else
INLINE vf vexp(vf x) /* Cephes expf; exactly 0 below -87 */
{
    vi small = x < splat(-87.0f);
    x = blend(x > splat(88.0f), splat(88.0f), x);
    x = blend(small, splat(0.0f), x);
    vf shifted = multiply_add(x, splat(1.44269504f), splat(12582912.0f)); /* adding 1.5 * 2^23 rounds to an integer */
    vf power = (vf)(((vi)shifted << 23) + (127 << 23)); /* the low bits of `shifted` are n */
    return blend(small, splat(0.0f), exp_of_rest(x, shifted - 12582912.0f) * power);
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
    case GELU_TANH: return x * multiply_add(splat(0.5f), vtanh(0.7978845608f * multiply_add(0.044715f * x * x, x, x)), splat(0.5f));
    case GELU_ERF: return x * (0.5f + 0.5f * verf(x * 0.7071067812f));
    case RELU: return vmax(splat(0.0f), x); /* NaN stays */
    default: return x;
    }
}
