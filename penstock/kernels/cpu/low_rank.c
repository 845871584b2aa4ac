/* Low-rank products: what adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) add to the outputs of a linear layer.
 *
 * Each row of a step has an adapter or none, so a batch may mix them. `shrink` is t = A x in float32, taken where a row
 * was normed; `expand` is B t, which is added to the sums of a product before its activation. Both depend on one row. */

/* What an adapter has for a vector of packed columns: rows of b from `begin` to the `begin` of the next vector, one for
 * each rank from `first` on. Side by side, because the caches hold neither when a product reaches them. */
typedef struct { int32_t begin, first; } rank_range;

/* One adapter at one linear layer. Ranks are those of all its matrices there, one after another, rounded up to whole
 * vectors. a is [rank / VL][k][VL]. b has rows of VL numbers for each vector of packed columns, `ranges` says which;
 * other ranks add nothing to these columns. The scaling is part of b. */
typedef struct {
    long rank;
    int32_t type, unused;
    const char *a, *b;
    const rank_range *ranges; /* one more than vectors */
} low_rank;

/* The adapters of the rows of a job: `table` by slot, and the slot of each row, -1 for none. An adapter whose slot is not
 * in the table does not change this layer. `inner` has t of each row. */
typedef struct {
    const low_rank *const *table;
    const int32_t *slots; /* NULL: no row has one */
    float *inner;
    long stride, num_slots, vectors; /* `vectors` of packed columns */
} row_adapters;

INLINE const low_rank *adapter_of(const row_adapters *r, long m)
{
    const long slot = r->slots ? r->slots[m] : -1;
    return slot >= 0 && slot < r->num_slots ? r->table[slot] : NULL;
}

INLINE void shrink_as(const low_rank *w, const float *x, long k, float *t, const int type)
{
    for (long v = 0; v < w->rank / VL; v++) {
        const char *a = w->a + v * k * VL * ELEMENT_BYTES[type];
        vf sum[4] = {0};
        long i = 0;
        for (; i + 4 <= k; i += 4)
            _Pragma("GCC unroll 4") for (int u = 0; u < 4; u++)
                sum[u] = multiply_add(load(a, (i + u) * VL, type), splat(x[i + u]), sum[u]);
        for (; i < k; i++) sum[0] = multiply_add(load(a, i * VL, type), splat(x[i]), sum[0]);
        *(vf *)(t + v * VL) = sum[0] + sum[1] + (sum[2] + sum[3]);
    }
}

static void shrink(const low_rank *w, const float *x, long k, float *t)
{
    if (w->type == BF16) shrink_as(w, x, k, t, BF16);
    else if (w->type == F32) shrink_as(w, x, k, t, F32);
    else shrink_as(w, x, k, t, F16);
}

/* `rows` rows of t, `stride` numbers apart, with vectors v and following of the columns of a panel: d[rows][NR]. */
INLINE void expand_as(const low_rank *w, const int rows, long v, const float *t, long stride, float *d, const int type)
{
    for (int j = 0; j < NV; j++, v++) {
        const float *from = t + w->ranges[v].first;
        vf sum[4] = {0};
        for (long b = w->ranges[v].begin; b < w->ranges[v + 1].begin; b++, from++) {
            vf row = load(w->b, b * VL, type);
            _Pragma("GCC unroll 4") for (int i = 0; i < rows; i++) sum[i] = multiply_add(row, splat(from[i * stride]), sum[i]);
        }
        for (int i = 0; i < rows; i++) *(vf *)(d + i * NR + j * VL) = sum[i];
    }
}

INLINE void expand_rows(const low_rank *w, const int rows, long v, const float *t, long stride, float *d)
{
    if (w->type == BF16) expand_as(w, rows, v, t, stride, d, BF16);
    else if (w->type == F32) expand_as(w, rows, v, t, stride, d, F32);
    else expand_as(w, rows, v, t, stride, d, F16);
}

/* What the adapters of rows [m, m + rows) add to the panel that begins at packed column n: d[rows][NR]. A row without one
 * gets -0.0f, which changes no number that it is added to. */
static void expand(const row_adapters *r, long m, long rows, long n, float *d)
{
    for (long i = 0, same; i < rows; i += same, d += same * NR) {
        const low_rank *w = adapter_of(r, m + i);
        const float *t = r->inner + (m + i) * r->stride;
        for (same = 1; same < 4 && i + same < rows && adapter_of(r, m + i + same) == w;) same++;
        if (same < 4) same = 1;
        if (w && same == 4) expand_rows(w, 4, n / VL, t, r->stride, d);
        else if (w) expand_rows(w, 1, n / VL, t, r->stride, d);
        else for (long x = 0; x < same * NR; x++) d[x] = -0.0f;
    }
}

/* Fetch the rows of b of `vectors` vectors from packed column n on, while weights are multiplied. */
static void prefetch_expansion(const row_adapters *r, long rows, long n, long vectors)
{
    for (long m = 0; r->slots && m < rows; m++) {
        const low_rank *w = adapter_of(r, m);
        if (!w) continue;
        const long size = VL * ELEMENT_BYTES[w->type], begin = w->ranges[n / VL].begin;
        prefetch(w->b + begin * size, (w->ranges[n / VL + vectors].begin - begin) * size);
    }
}

enum { MAX_LINES = 512 };

/* The cache lines of b that `expand` reads for vectors [begin, end) of packed columns, at most `limit` and MAX_LINES;
 * their number is returned. They lie apart, so nothing but a list of them lets memory run ahead of a product. */
static long lines_of_expansion(const row_adapters *r, long rows, long begin, long end, const char **lines, long limit)
{
    long count = 0;
    if (limit > MAX_LINES) limit = MAX_LINES;
    if (end > r->vectors) end = r->vectors;
    for (long m = 0; r->slots && begin < end && m < rows; m++) {
        const low_rank *w = adapter_of(r, m);
        if (!w || (m && w == adapter_of(r, m - 1))) continue;
        const long size = VL * ELEMENT_BYTES[w->type];
        const char *at = w->b + w->ranges[begin].begin * size, *last = w->b + w->ranges[end].begin * size;
        for (; at < last && count < limit; at += 64) lines[count++] = at;
        if (count < limit) lines[count++] = (const char *)(w->ranges + end) + 64; /* for the panels behind these */
    }
    return count;
}
