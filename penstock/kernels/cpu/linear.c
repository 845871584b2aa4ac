/* Linear layers with packed weights: y = act(norm(x) W^T + bias), with the norm and the epilogue in the same call. */

enum { STORE, ADD, GATED };

/* mode STORE: y. ADD: out += scale * y. GATED: a panel holds VL gate columns, then VL up columns, and y = act(gate) * up.
 * Weights are [panels][words along k][NR], zero beyond n and k.
 *
 * format I8: rows of x and of W are rotated and quantized to 8 bits, x to signed ones with a scale for each block of
 * BLOCK numbers, W to unsigned ones: W = scales * bytes + lows, with a scale and a minimum for each column. */
typedef struct {
    long n, k;
    int32_t format, mode, act, in_type, out_type, norm_kind;
    float scale, eps;
    const char *weights;
    const float *bias, *scales, *lows, *norm_weight, *norm_bias;
    const low_rank *const *adapters; /* by slot; NULL where none of them changes this layer */
    long max_rank, num_slots;        /* of these */
} linear;

typedef struct {
    const linear *w;
    const char *x;
    char *out;
    long rows, ldx, ldo; /* strides in elements */
    char *prepared;      /* rows after norm and quantization, `stride` bytes each; */
    char *packed;        /* also tile after tile: for vectors, from MR + 1 rows on, as [k][mr] words; see `tile_kernel` */
    long stride;
    float *row_scales, *row_sums; /* [rows][blocks] and [rows]: of x as it was rounded */
    size_t prepared_bytes, packed_bytes;
    int in_place; /* x is what the product reads: nothing is to be prepared */
    int on_tiles; /* matrix tiles multiply, not vectors */
    row_adapters adapters;
} linear_job;

INLINE long blocks(const linear *w) { return (w->k + BLOCK - 1) / BLOCK; }
INLINE long words(const linear *w) { return (w->k + per_word(w->format) - 1) / per_word(w->format); }

static void prepare_row(const linear_job *j, long m, char *dst, float *row)
{
    const linear *w = j->w;
    const low_rank *adapter = adapter_of(&j->adapters, m);
    if (j->in_place && !adapter) return;
    widen(row, j->x + m * j->ldx * ELEMENT_BYTES[w->in_type], w->k, w->in_type);
    if (w->norm_kind) normalize(row, w->k, w->norm_kind, w->norm_weight, w->norm_bias, w->eps);
    if (adapter) shrink(adapter, row, w->k, j->adapters.inner + m * j->adapters.stride);
    if (j->in_place) return;
    ((int32_t *)dst)[words(w) - 1] = 0; /* k may end within a word */
    if (w->format == I8) {
        rotate_blocks(row, w->k);
        j->row_sums[m] = 0;
        for (long g = 0, n; (n = w->k - g * BLOCK) > 0; g++)
            j->row_sums[m] += quantize_block((int8_t *)dst + g * BLOCK, row + g * BLOCK, n < BLOCK ? n : BLOCK, &j->row_scales[m * blocks(w) + g]);
    } else narrow(dst, row, w->k, w->format == BF16 ? BF16 : F32);
}

INLINE char *prepared_row(const linear_job *j, long m)
{
    return j->in_place ? (char *)j->x + m * j->stride : j->prepared + m * j->stride;
}

#if defined(__AVX512F__)
/* Sixteen words of twelve rows, four rows at a time: a 4 x 4 transpose within each 128-bit lane. */
INLINE void pack_twelve_rows(const int32_t *const *from, long at, int32_t *to)
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

INLINE long rows_of_tile(const linear_job *j) { return j->on_tiles ? PAIR : MR; }
INLINE long round_up(long x, long unit) { return (x + unit - 1) / unit * unit; }

/* The first row of tile t out of `tiles`: equal tiles for vectors, whole ones for matrix tiles. */
INLINE long first_row(const linear_job *j, long t, long tiles)
{
    return !j->on_tiles ? t * j->rows / tiles : t < tiles ? t * PAIR : j->rows;
}

INLINE char *packed_tile(const linear_job *j, long m)
{
    return j->packed + m * 4 * (j->on_tiles ? round_up(words(j->w), TILE) : words(j->w));
}

/* Pack words [begin, end) of rows [m, m + mr) as `tile_kernel` reads them; begin is a multiple of TILE. */
static void pack_matrix_tile(const linear_job *j, long m, long mr, long begin, long end)
{
    const long steps = round_up(words(j->w), TILE) / TILE;
    for (long i = 0; i < round_up(mr, TILE); i++) {
        char *to = packed_tile(j, m) + (i / TILE * steps * TILE + i % TILE) * TILE * 4;
        for (long x = begin; x < end; x += TILE) {
            char *at = to + x / TILE * TILE * TILE * 4;
            long n = i < mr ? (end - x < TILE ? end - x : TILE) * 4 : 0;
            if (n) memcpy(at, prepared_row(j, m + i) + x * 4, n);
            memset(at + n, 0, TILE * 4 - n);
        }
    }
}

/* Pack words [begin, end) of rows [m, m + mr) as [k][mr]. */
static void pack_rows(const linear_job *j, long m, long mr, long begin, long end)
{
    const int32_t *from[MR];
    int32_t *to = (int32_t *)packed_tile(j, m) + begin * mr;
    for (long i = 0; i < mr; i++) from[i] = (const int32_t *)prepared_row(j, m + i);
#if defined(__AVX512F__)
    for (; mr == 12 && begin + 16 <= end; begin += 16, to += 16 * 12) pack_twelve_rows(from, begin, to);
#endif
    for (long x = begin; x < end; x++)
        for (long i = 0; i < mr; i++) *to++ = from[i][x];
}

/* From sums c of rows [m, m + rows) and the panel that begins at column n to outputs; `added` is what adapters add. */
INLINE void epilogue_as(
    const linear_job *j, long m, long rows, long n, const float *c, long ldc, const float *added, const int act, const int type, const int mode)
{
    const linear *w = j->w;
    const int vectors = mode == GATED ? 1 : NV, quantized = w->format == I8;
    const long at = mode == GATED ? n / 2 : n, end = mode == GATED ? w->n / 2 : w->n;
    vf bias[NV], scale[NV], low[NV];
    for (int i = 0; i < NV; i++) {
        bias[i] = w->bias ? *(const vf *)(w->bias + n + i * VL) : splat(0.0f);
        scale[i] = quantized ? *(const vf *)(w->scales + n + i * VL) : splat(1.0f);
        low[i] = quantized ? *(const vf *)(w->lows + n + i * VL) : splat(0.0f);
    }
    for (long x = 0; x < rows; x++, c += ldc) {
        char *out = j->out + (m + x) * j->ldo * ELEMENT_BYTES[type];
        vf v[NV];
        for (int i = 0; i < NV; i++) {
            v[i] = *(const vf *)(c + i * VL);
            if (quantized) v[i] = multiply_add(v[i], scale[i], low[i] * j->row_sums[m + x]);
            v[i] += bias[i];
            if (added) v[i] += *(const vf *)(added + x * NR + i * VL);
        }
        if (mode == GATED) v[0] = activate(v[0], act) * v[1];
        else if (act)
            for (int i = 0; i < NV; i++) v[i] = activate(v[i], act);
        for (int i = 0; i < vectors; i++) {
            long to = at + i * VL;
            if (to + VL <= end) {
                store(out, to, type, mode == ADD ? multiply_add(splat(w->scale), v[i], load(out, to, type)) : v[i]);
                continue;
            }
            for (long e = to; e < end; e++)
                store_scalar(out, e, type, mode == ADD ? load_scalar(out, e, type) + w->scale * v[i][e - to] : v[i][e - to]);
        }
    }
}

static void epilogue(const linear_job *j, long m, long rows, long n, const float *c, long ldc)
{
    int act = j->w->act, type = j->w->out_type, mode = j->w->mode;
    float sums[PAIR * NR], *added = j->adapters.slots ? sums : NULL;
    if (added) expand(&j->adapters, m, rows, n, added);
    if (type == BF16 && mode == GATED && act == SILU) epilogue_as(j, m, rows, n, c, ldc, added, SILU, BF16, GATED);
    else if (type == BF16 && mode == STORE && !act) epilogue_as(j, m, rows, n, c, ldc, added, IDENTITY, BF16, STORE);
    else if (type == BF16 && mode == ADD && !act) epilogue_as(j, m, rows, n, c, ldc, added, IDENTITY, BF16, ADD);
    else if (type == F32 && mode == STORE && !act) epilogue_as(j, m, rows, n, c, ldc, added, IDENTITY, F32, STORE);
    else epilogue_as(j, m, rows, n, c, ldc, added, act, type, mode);
}

enum { WORDS_PER_CLAIM = 512 };

static void prepare_rows(pool *p, const linear_job *j, long tiles, int id)
{
    for (long m = j->in_place && !j->adapters.slots ? j->rows : claim(p), next; m < j->rows; m = next) {
        next = claim(p);
        prefetch(j->x + next * j->ldx * ELEMENT_BYTES[j->w->in_type], j->w->k * ELEMENT_BYTES[j->w->in_type]);
        prepare_row(j, m, prepared_row(j, m), (float *)p->thread_scratch[id]);
    }
    barrier(p);
    if (tiles == 1 && !j->on_tiles) return;
    long k = words(j->w), pieces = (k + WORDS_PER_CLAIM - 1) / WORDS_PER_CLAIM;
    for (long u; (u = claim(p)) < tiles * pieces;) {
        long t = u / pieces, begin = u % pieces * WORDS_PER_CLAIM, end = begin + WORDS_PER_CLAIM < k ? begin + WORDS_PER_CLAIM : k;
        long m = first_row(j, t, tiles), mr = first_row(j, t + 1, tiles) - m;
        (j->on_tiles ? pack_matrix_tile : pack_rows)(j, m, mr, begin, end);
    }
    barrier(p);
}

INLINE long panel_bytes(const linear *w) { return words(w) * NR * (w->format == F16 ? 2 : 4); }

/* How many bytes ahead of a product of so many rows its weights are fetched. Measured on Zen 4: with few rows its own
 * prefetcher is as fast as the memory, and what is fetched far ahead slows it down. */
INLINE long fetched_ahead(long rows) { return rows <= 4 ? 2048 / rows : 8192; }

/* At most MR rows with panel q of those up to `last`, and with the one behind it too if the rows are few enough; `next`
 * is the panel that this thread multiplies after the last one. Returns the number of panels. */
static long multiply_few_rows(const linear_job *j, long q, long last, long next)
{
    const linear *w = j->w;
    const long size = panel_bytes(w), k = words(w), word = size / k, paired = j->rows <= WIDE_ROWS && q + 1 < last;
    const long after = q + 1 + paired < last ? q + 1 + paired : next;
    const char *at[WIDE], *ahead[WIDE], *lines[MAX_LINES];
    b_operand b = {.segments = 1, .steps = k, .stride = word};
    float c[MR * WIDE * VL];
    for (int x = 0; x < WIDE; x++) {
        at[x] = w->weights + (q + x / NV) * size + x % NV * (word / NV);
        ahead[x] = at[x] + fetched_ahead(j->rows);
        b.at[x] = &at[x], b.ahead[x] = &ahead[x];
    }
    b.num_lines = lines_of_expansion(&j->adapters, j->rows, after * NV, (after + 1 + paired) * NV, lines, k);
    if (b.num_lines) b.lines = lines;
    const rows_kernel_fn multiply = (paired ? wide_kernels : rows_kernels)[w->format][j->rows];
    multiply((const int32_t *)prepared_row(j, 0), j->stride / 4, j->row_scales, &b, c, WIDE * VL, 0);
    epilogue(j, 0, j->rows, q * NR, c, WIDE * VL);
    if (paired) epilogue(j, 0, j->rows, (q + 1) * NR, c + NR, WIDE * VL);
    return 1 + paired;
}

/* Tiles [begin, end) of rows, out of `tiles`, with panel q; `next` is the panel that this thread multiplies afterwards. */
static void multiply_panel(const linear_job *j, long q, long next, long begin, long end, long tiles)
{
    const linear *w = j->w;
    const long k = words(w), size = panel_bytes(w);
    const char *b = w->weights + q * size, *next_panel = w->weights + next * size;
    float c[PAIR * NR];
    const long shares = end - begin > 1 ? 2 : 1;
    if (tiles == 1) prefetch_expansion(&j->adapters, j->rows, q * NR, NV);
    for (long t = begin; t < end; t++) { /* the first two tiles prefetch half of the next panel each, or one all of it */
        long m = first_row(j, t, tiles), mr = first_row(j, t + 1, tiles) - m, prefetches = t - begin < shares && next != q;
        const char *ahead = prefetches ? next_panel + (t - begin) * (size / shares) : b;
        for (long i = m; w->mode == ADD && i < m + mr; i++)
            prefetch(j->out + (i * j->ldo + q * NR) * ELEMENT_BYTES[w->out_type], NR * ELEMENT_BYTES[w->out_type]);
        const float *scales = j->row_scales + m * blocks(w);
        const char *a = packed_tile(j, m);
        long step = prefetches ? size / k / shares : 0;
        if (j->on_tiles) multiply_tile(w->format, mr, a, scales, b, k, ahead, step * TILE, c);
        else packed_kernels[w->format][mr]((const int32_t *)a, scales, b, k, ahead, step, c);
        epilogue(j, m, mr, q * NR, c, NR);
    }
}

/* A unit of work is several panels, or one panel with a part of the tiles: small, so that no thread waits long. */
static void linear_run(pool *p, void *arg, int id)
{
    linear_job j = *(linear_job *)arg;
    const long panels = (j.w->n + NR - 1) / NR, tiles = (j.rows + rows_of_tile(&j) - 1) / rows_of_tile(&j);
    const long target = (tiles > 1 ? 128 : 32) * p->active;
    const long per_unit = panels >= target ? panels / target : 1, splits = panels >= target ? 1 : target / panels;
    const long parts = tiles < 8 ? 1 : splits < tiles ? splits : tiles, units = (panels + per_unit - 1) / per_unit * parts;
    const int few = tiles == 1 && !j.on_tiles;
    if (!j.in_place || !few || j.adapters.slots) prepare_rows(p, &j, tiles, id);
    if (j.on_tiles) tiles_begin();
    for (long u = claim(p), next; u < units; u = next) {
        next = claim(p); /* claimed now, so that its weights can be prefetched */
        long first = u / parts * per_unit, last = first + per_unit < panels ? first + per_unit : panels, part = u % parts;
        for (long q = first; few && q < last;) q += multiply_few_rows(&j, q, last, next * per_unit);
        for (long q = first; !few && q < last; q++) {
            long after = q + 1 < last ? q + 1 : next < units ? next / parts * per_unit : q;
            multiply_panel(&j, q, after, part * tiles / parts, (part + 1) * tiles / parts, tiles);
        }
    }
    if (j.on_tiles) tiles_end();
}

static scratch_bytes plan_linear(
    linear_job *j, const linear *w, const void *x, long rows, long ldx, void *out, long ldo, const int32_t *slots)
{
    long k = words(w), size = ELEMENT_BYTES[w->in_type];
    *j = (linear_job){.w = w, .x = x, .out = out, .rows = rows, .ldx = ldx, .ldo = ldo, .stride = ldx * size};
    int same_words = w->format == w->in_type && w->k % per_word(w->format) == 0 && (ldx * size) % 4 == 0;
    j->in_place = same_words && w->format != F16 && !w->norm_kind;
    if (!j->in_place) j->stride = k * 4 + 64;
    j->prepared_bytes = j->in_place ? 0 : rows * (j->stride + (1 + blocks(w)) * sizeof(float));
    j->on_tiles = tiles_allowed && (w->format == BF16 || (w->format == I8 && rows > MR));
    j->packed_bytes = j->on_tiles ? round_up(rows, TILE) * round_up(k, TILE) * 4 : rows > MR ? rows * k * 4 : 0;
    j->adapters = (row_adapters){w->adapters, w->adapters ? slots : NULL, NULL, w->max_rank, w->num_slots, (w->n + NR - 1) / NR * NV};
    const size_t inner_bytes = j->adapters.slots ? rows * w->max_rank * sizeof(float) : 0;
    return (scratch_bytes){j->prepared_bytes + j->packed_bytes + inner_bytes, (w->k + VL) * 4};
}

static void place_scratch(linear_job *j, pool *p)
{
    j->row_sums = (float *)p->scratch;
    j->row_scales = j->row_sums + j->rows;
    j->prepared = p->scratch + (j->in_place ? 0 : j->rows * (1 + blocks(j->w)) * sizeof(float));
    j->packed = p->scratch + j->prepared_bytes;
    j->adapters.inner = (float *)(j->packed + j->packed_bytes);
}

/* `slots`: the adapter of each row, or NULL. */
int ps_linear(pool *p, const linear *w, const void *x, long rows, long ldx, void *out, long ldo, const int32_t *slots)
{
    linear_job j;
    if (rows == 0) return 1;
    scratch_bytes need = plan_linear(&j, w, x, rows, ldx, out, ldo, slots);
    if (!reserve_scratch(p, need.shared, need.per_thread)) return 0;
    place_scratch(&j, p);
    run_on_pool(p, linear_run, &j);
    return 1;
}

static void low_rank_run(pool *p, void *arg, int id)
{
    linear_job j = *(linear_job *)arg;
    const long panels = (j.w->n + NR - 1) / NR, tiles = (j.rows + MR - 1) / MR;
    float nothing[MR * NR];
    for (int i = 0; i < MR * NR; i++) nothing[i] = -0.0f;
    prepare_rows(p, &j, 1, id);
    for (long u; (u = claim(p)) < panels * tiles;) {
        long q = u / tiles, t = u % tiles, m = t * j.rows / tiles, rows = (t + 1) * j.rows / tiles - m, any = 0;
        for (long i = 0; i < rows; i++) any |= adapter_of(&j.adapters, m + i) != NULL;
        if (any) epilogue(&j, m, rows, q * NR, nothing, NR);
    }
}

/* Products that the calling thread has done, from memory, by the time that another has woken up. */
enum { ALONE = 1 << 20 };

/* out += what the adapters of the rows of x add. w has no weights; its mode is ADD, its scale 1. */
int ps_low_rank(pool *p, const linear *w, const void *x, long rows, long ldx, void *out, long ldo, const int32_t *slots)
{
    linear_job j;
    if (rows == 0) return 1;
    plan_linear(&j, w, x, rows, ldx, out, ldo, slots);
    j.in_place = 1, j.on_tiles = 0, j.prepared_bytes = j.packed_bytes = 0;
    if (!reserve_scratch(p, rows * w->max_rank * sizeof(float), (w->k + VL) * 4)) return 0;
    place_scratch(&j, p);
    if (rows * w->max_rank * (w->k + w->n) < ALONE) run_alone(p, low_rank_run, &j);
    else run_on_pool(p, low_rank_run, &j);
    return 1;
}
