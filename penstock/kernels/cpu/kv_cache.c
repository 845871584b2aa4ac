/* The paged K/V cache: layout, writing, reading, copying.
 *
 * One buffer per layer: [panels][kv heads][keys | values | scales]. A panel holds LANES consecutive slots, laid out as
 * `rows_kernel` reads its operand b: keys [key_dim / p][LANES][p] and values [LANES / p][value_dim][p], with p numbers to
 * a word. format I8 has the element order of bf16 at one byte each, and two scales per token, one for its key and one for
 * its value, which are rotated: scores are products of rotated queries and keys, and sums of rotated values are rotated
 * back. */
typedef struct {
    char *base;
    long heads, key_dim, value_dim;
    int32_t format, compute; /* of stored numbers; of products with them */
} kv_cache;

INLINE long region_bytes(const kv_cache *c, long dim) { return dim * LANES * ELEMENT_BYTES[c->format]; }
INLINE long head_bytes(const kv_cache *c)
{
    return region_bytes(c, c->key_dim + c->value_dim) + (c->format == I8 ? 2 * LANES * 4 : 0);
}
INLINE char *head_of(const kv_cache *c, long panel, long head) { return c->base + (panel * c->heads + head) * head_bytes(c); }
INLINE float *scales_of(const kv_cache *c, char *head) { return (float *)(head + region_bytes(c, c->key_dim + c->value_dim)); }
long ps_cache_bytes(const kv_cache *c, long panels) { return panels * c->heads * head_bytes(c) + 4096; }

/* Element index of (lane, d) among the keys or values of a panel. */
INLINE long key_at(long lane, long d, long p) { return (d / p * LANES + lane) * p + d % p; }
INLINE long value_at(long lane, long d, long p, long dim) { return (lane / p * dim + d) * p + lane % p; }

INLINE void store_element(const kv_cache *c, char *region, long at, float x)
{
    if (c->format == F32) ((float *)region)[at] = x;
    else if (c->format == F16) ((uint16_t *)region)[at] = float_to_half(x);
    else ((int8_t *)region)[at] = (int8_t)lrintf(x);
}

/* In 32-bit words: a key is one lane of each row of LANES words, a value the low or high halves of value_dim words. */
static void write_bf16(char *region, long lane, const float *x, long dim, int keys)
{
    uint16_t row[MAX_HEAD + VL] __attribute__((aligned(64)));
    int32_t *words = (int32_t *)region;
    long d = 0;
    narrow_as(row, x, dim, BF16);
    if (keys) {
        for (; d < dim / 2; d++) words[d * LANES + lane] = ((int32_t *)row)[d];
        return;
    }
#if defined(__AVX512BW__)
    const __mmask32 halves = lane % 2 ? 0xaaaaaaaa : 0x55555555; /* another thread may be writing the other halves */
    for (; d + VL <= dim; d += VL) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_load_si256((__m256i *)(row + d)));
        _mm512_mask_storeu_epi16(words + lane / 2 * dim + d, halves, lane % 2 ? _mm512_slli_epi32(wide, 16) : wide);
    }
#endif
    for (; d < dim; d++) ((uint16_t *)region)[value_at(lane, d, 2, dim)] = row[d];
}

static void write_vector(const kv_cache *c, char *region, float *scale, long lane, const float *x, long dim, int keys)
{
    long p = per_word(c->compute);
    if (c->format == BF16) { write_bf16(region, lane, x, dim, keys); return; }
    float peak = c->format == I8 ? absolute_max(x, dim) : 0, inverse = c->format != I8 ? 1 : peak > 0 ? 127 / peak : 0;
    if (c->format == I8) scale[lane] = peak / 127;
    for (long d = 0; d < dim; d++) store_element(c, region, keys ? key_at(lane, d, p) : value_at(lane, d, p, dim), x[d] * inverse);
}

static float read_element(const kv_cache *c, const char *region, const float *scale, long lane, long d, long dim, int keys)
{
    long p = per_word(c->compute), at = keys ? key_at(lane, d, p) : value_at(lane, d, p, dim);
    return c->format == I8 ? ((const int8_t *)region)[at] * scale[lane] : load_scalar(region, at, c->format);
}

/* Whether all of x is finite, also after rounding to the format it is stored in. */
static int is_finite(const float *x, long n, int f)
{
    const float limit = f == BF16 ? 0x1.ffp127f : f == F16 ? 65520.0f : INFINITY;
    int overflows = 0;
    for (long i = 0; i < n; i++) overflows |= !(fabsf(x[i]) < limit);
    return !overflows;
}

/* Attention multiplies masked values by 0, which NaN and infinity survive, so these are never stored. A token with any
 * gets a value of 0 and a key of NaN: queries that see the token become NaN, for others its score is masked. */
static void write_head(const kv_cache *c, long slot, long head, float *key, float *value)
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
    write_vector(c, at, scales, slot % LANES, key, c->key_dim, 1);
    write_vector(c, at + region_bytes(c, c->key_dim), scales ? scales + LANES : NULL, slot % LANES, value, c->value_dim, 0);
}

/* keys [n][heads][key_dim] and values [n][heads][value_dim] of n slots, as float32. */
void ps_read_slots(const kv_cache *c, const int64_t *slots, long n, float *keys, float *values)
{
    for (long i = 0; i < n * c->heads; i++) {
        long slot = slots[i / c->heads], lane = slot % LANES;
        char *at = head_of(c, slot / LANES, i % c->heads), *region = at + region_bytes(c, c->key_dim);
        float *scales = scales_of(c, at);
        for (long d = 0; d < c->key_dim; d++) keys[d] = read_element(c, at, scales, lane, d, c->key_dim, 1);
        for (long d = 0; d < c->value_dim; d++) values[d] = read_element(c, region, scales + LANES, lane, d, c->value_dim, 0);
        if (c->format == I8) {
            restore_channels(keys, c->key_dim);
            restore_channels(values, c->value_dim);
        }
        keys += c->key_dim, values += c->value_dim;
    }
}

/* From lane a of a panel to lane b of another. */
static void copy_vector(const kv_cache *c, const char *from, char *to, long a, long b, long dim, int keys)
{
    long p = per_word(c->compute), size = ELEMENT_BYTES[c->format];
    for (long d = 0; d < dim; d++) {
        long x = keys ? key_at(a, d, p) : value_at(a, d, p, dim), y = keys ? key_at(b, d, p) : value_at(b, d, p, dim);
        memcpy(to + y * size, from + x * size, size);
    }
}

void ps_copy_slots(const kv_cache *c, const int64_t *source, const int64_t *target, long n)
{
    long values = region_bytes(c, c->key_dim);
    for (long i = 0; i < n * c->heads; i++) {
        long s = source[i / c->heads], t = target[i / c->heads];
        char *from = head_of(c, s / LANES, i % c->heads), *to = head_of(c, t / LANES, i % c->heads);
        copy_vector(c, from, to, s % LANES, t % LANES, c->key_dim, 1);
        copy_vector(c, from + values, to + values, s % LANES, t % LANES, c->value_dim, 0);
        if (c->format != I8) continue;
        scales_of(c, to)[t % LANES] = scales_of(c, from)[s % LANES];
        scales_of(c, to)[LANES + t % LANES] = scales_of(c, from)[LANES + s % LANES];
    }
}
