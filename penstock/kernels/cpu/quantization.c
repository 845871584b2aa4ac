/* Quantization to int8: an orthogonal rotation of the channels, then rounding with a scale.
 *
 * A few channels of activations, keys and values are far larger than the others, so that a scale per row would round
 * the others to zero. An orthogonal transform Q spreads each channel over many (QuaRot, Ashkboos et al. 2024, arXiv
 * 2404.00456): x Q is quantized, weights are packed as W Q, and (x Q)(W Q)^T = x W^T. Q flips fixed signs, then applies
 * Walsh-Hadamard transforms to blocks of at most MAX_BLOCK numbers; the last block may overlap the one before it.
 * Without the signs a mean that all channels share would end up in one number. */
enum { MAX_BLOCK = 1024 };

INLINE long block_of(long n) /* the largest power of two up to n and MAX_BLOCK */
{
    long block = 1;
    while (2 * block <= n && block < MAX_BLOCK) block *= 2;
    return block;
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

/* The transform across `count` vectors, `stride` numbers apart, and within each vector if `lanes`. */
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

/* The orthogonal Walsh-Hadamard transform of n numbers, n a power of two; its own inverse. Each pass over memory does
 * three stages, on eight vectors in registers. */
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

/* Signs whose own transform is flat (a bent function, Rothaus 1976): minus at index i if an odd number of the bit pairs
 * (0, 1), (2, 3), ... of i have both bits set. */
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

/* The overlapping block flips signs again: otherwise it would undo the transform of the block before it. */
static void rotate_channels(float *x, long n) /* x Q, in place */
{
    const long block = block_of(n), last = n - block;
    flip_signs(x, n);
    for (long i = 0; i <= last; i += block) hadamard(x + i, block);
    if (n % block == 0) return;
    flip_signs(x + last, block);
    hadamard(x + last, block);
}

static void restore_channels(float *x, long n) /* its inverse */
{
    const long block = block_of(n), last = n - block;
    if (n % block) {
        hadamard(x + last, block);
        flip_signs(x + last, block);
    }
    for (long i = 0; i <= last; i += block) hadamard(x + i, block);
    flip_signs(x, n);
}

/* out = round(x / scale) + 128, scale = absolute maximum / 127. A row with NaN or infinity gets a scale of NaN. */
static void quantize_row(uint8_t *out, const float *x, long n, float *scale)
{
    vf peaks = splat(0.0f), errors = splat(0.0f);
    float peak = 0, error = 0;
    long i = 0;
    for (; i + VL <= n; i += VL) {
        peaks = vmax(peaks, (vf)(*(const vi *)(x + i) & 0x7fffffff));
        errors += *(const vf *)(x + i) * 0.0f;
    }
    for (; i < n; i++) {
        peak = fabsf(x[i]) > peak ? fabsf(x[i]) : peak;
        error += x[i] * 0.0f;
    }
    peak = fmaxf(peak, reduce_max(peaks));
    float inverse = peak > 0 ? 127.0f / peak : 0.0f;
    *scale = error + reduce_add(errors) == 0 ? peak / 127.0f : NAN;
    for (i = 0; i + VL <= n; i += VL) {
        vf v = *(const vf *)(x + i) * inverse + (12582912.0f + 128.0f); /* adding 1.5 * 2^23 rounds to an integer */
        *(vb *)(out + i) = __builtin_convertvector((vi)v, vb);
    }
    for (; i < n; i++) out[i] = (uint8_t)(lrintf(x[i] * inverse) + 128);
}
