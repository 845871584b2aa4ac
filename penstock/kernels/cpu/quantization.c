/* Quantization to 8 bits: an orthogonal rotation of the channels, then rounding with a scale.
 *
 * A few channels of activations, keys and values are far larger than the others, so that a scale per row would round
 * the others to zero. An orthogonal transform Q spreads each channel over many (QuaRot, Ashkboos et al. 2024, arXiv
 * 2404.00456): x Q is quantized, weights are packed as W Q, and (x Q)(W Q)^T = x W^T. Q flips fixed signs, then applies
 * a Walsh-Hadamard transform to at most BLOCK numbers; where n is no power of two, a second one overlaps the first.
 * Without the signs a mean that all channels share would end up in one number. */

INLINE long span_of(long n) /* the largest power of two up to n and BLOCK */
{
    long span = 1;
    while (2 * span <= n && span < BLOCK) span *= 2;
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
        x = multiply_add(x, sign, swapped(x, h));
    }
    return x;
}

/* Signs whose own transform is flat (a bent function, Rothaus 1976): minus at index i if an odd number of the bit pairs
 * (0, 1), (2, 3), ... of i have both bits set. As sign bits of numbers [i, i + VL). */
INLINE vi sign_bits(long i)
{
    enum { MINUS = INT32_MIN };
    static const int32_t sixteen[] = {0, 0, 0, MINUS, 0, 0, 0, MINUS, 0, 0, 0, MINUS, MINUS, MINUS, MINUS, 0};
    const long j = i / 16;
    return *(const vi *)(sixteen + i % 16) ^ (__builtin_parityl(j & j >> 1 & 0x55555555) ? MINUS : 0);
}

static void flip_signs(float *x, long n)
{
    for (long i = 0; i < n; i += VL) {
        vi signs = sign_bits(i);
        if (i + VL <= n) *(vi *)(x + i) ^= signs;
        else for (long k = i; k < n; k++) x[k] = signs[k - i] ? -x[k] : x[k];
    }
}

enum { REGISTERS = VL == 16 ? 16 : 8 }; /* vectors that a pass over memory transforms at a time */

/* The transform across `count` vectors, `stride` numbers apart. `first`: after the one within each vector, scaled, with
 * signs for numbers from `at` on if `flips`. */
INLINE void butterflies(float *x, const int count, long stride, const int first, const int flips, long at, float scale)
{
    vf v[REGISTERS];
    _Pragma("GCC unroll 16") for (int i = 0; i < count; i++) {
        v[i] = *(vf *)(x + i * stride);
        if (first) v[i] = hadamard_lanes(v[i] * (flips ? (vf)((vi)splat(scale) ^ sign_bits(at + i * VL)) : splat(scale)));
    }
    _Pragma("GCC unroll 4") for (int h = 1; h < count; h *= 2)
        _Pragma("GCC unroll 16") for (int i = 0; i < count; i++)
            if (!(i & h)) {
                vf a = v[i], b = v[i + h];
                v[i] = a + b, v[i + h] = a - b;
            }
    _Pragma("GCC unroll 16") for (int i = 0; i < count; i++) *(vf *)(x + i * stride) = v[i];
}

INLINE void transform(float *x, long count, long stride, const int first, const int flips, long at, float scale)
{
    if (count >= REGISTERS) butterflies(x, REGISTERS, stride, first, flips, at, scale);
    else if (count == 8) butterflies(x, REGISTERS == 16 ? 8 : 1, stride, first, flips, at, scale);
    else if (count == 4) butterflies(x, 4, stride, first, flips, at, scale);
    else if (count == 2) butterflies(x, 2, stride, first, flips, at, scale);
    else butterflies(x, 1, stride, first, flips, at, scale);
}

static void hadamard_small(float *x, long n) /* n < VL */
{
    for (long h = 1; h < n; h *= 2)
        for (long i = 0; i < n; i++)
            if (!(i & h)) {
                float a = x[i], b = x[i + h];
                x[i] = a + b, x[i + h] = a - b;
            }
    for (long i = 0; i < n; i++) x[i] /= sqrtf(n);
}

/* The orthogonal Walsh-Hadamard transform of n numbers, n a power of two, after the signs if `flips`. */
INLINE void hadamard(float *x, long n, const int flips)
{
    const float scale = 1 / sqrtf(n);
    const long count = n / VL;
    if (n < VL) {
        if (flips) flip_signs(x, n);
        hadamard_small(x, n);
        return;
    }
    for (long i = 0; i < count; i += REGISTERS) transform(x + i * VL, count, VL, 1, flips, i * VL, scale);
    for (long h = REGISTERS; h < count; h *= REGISTERS)
        for (long i = 0; i < count; i += REGISTERS * h)
            for (long j = i; j < i + h && j < count; j++) transform(x + j * VL, count / h, h * VL, 0, 0, 0, 1);
}

static void rotate_span(float *x, long n) { hadamard(x, n, 1); }
static void restore_span(float *x, long n) /* the transform is its own inverse */
{
    hadamard(x, n, 0);
    flip_signs(x, n);
}

static void rotate_channels(float *x, long n) /* x Q, in place */
{
    const long span = span_of(n);
    for (long i = 0; i <= n - span; i += span) rotate_span(x + i, span);
    if (n % span) rotate_span(x + n - span, span);
}

static void restore_channels(float *x, long n) /* its inverse */
{
    const long span = span_of(n);
    if (n % span) restore_span(x + n - span, span);
    for (long i = 0; i <= n - span; i += span) restore_span(x + i, span);
}

static void rotate_blocks(float *x, long n) /* each block of BLOCK channels by itself */
{
    for (long i = 0; i < n; i += BLOCK) rotate_channels(x + i, n - i < BLOCK ? n - i : BLOCK);
}

/* Round a block of at most BLOCK numbers to x / scale, the scale a 127th of the absolute maximum, or NaN if a number is
 * NaN or infinite. Returns scale * the sum of what was rounded. */
static float quantize_block(int8_t *out, const float *x, long n, float *scale)
{
    vf peaks = splat(0.0f), errors = splat(0.0f);
    vi sums = splati(0);
    float peak = 0, error = 0;
    long i = 0, sum = 0;
    for (; i + VL <= n; i += VL) {
        vf v = *(const vf *)(x + i);
        peaks = vmax(peaks, (vf)((vi)v & 0x7fffffff));
        errors = multiply_add(v, splat(0.0f), errors);
    }
    for (; i < n; i++) {
        peak = fabsf(x[i]) > peak ? fabsf(x[i]) : peak;
        error += x[i] * 0.0f;
    }
    peak = fmaxf(peak, reduce_max(peaks));
    const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    *scale = error + reduce_add(errors) == 0 ? peak / 127.0f : NAN;
    for (i = 0; i + VL <= n; i += VL) {
        vi q = (vi)multiply_add(*(const vf *)(x + i), splat(inverse), splat(12582912.0f)) - 0x4b400000; /* adding 1.5 * 2^23 rounds to an integer */
        to_bytes(out + i, q);
        sums += q;
    }
    for (; i < n; i++) sum += out[i] = (int8_t)lrintf(x[i] * inverse);
    for (int lane = 0; lane < VL; lane++) sum += sums[lane];
    return *scale * sum;
}

/* NaN if any of x is NaN or infinite. */
static float absolute_max(const float *x, long n)
{
    float peak = 0, error = 0;
    for (long i = 0; i < n; i++) {
        peak = fabsf(x[i]) > peak ? fabsf(x[i]) : peak;
        error += x[i] * 0.0f;
    }
    return peak + error;
}
