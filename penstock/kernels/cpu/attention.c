/* Attention over the paged cache, with an online softmax over tiles of KEYS keys (FlashAttention, Dao et al. 2022, arXiv
 * 2205.14135). */

enum { Q_WORDS = MAX_HEAD + 16, /* so that rows begin in different sets of the L1 cache */
     O_WIDTH = MAX_HEAD + WIDE * VL };

/* Of one thread: up to MR queries that attend to the same keys. */
typedef struct {
    int32_t query[MR][Q_WORDS], weight[MR][KEYS];
    float out[MR][O_WIDTH], score[MR][KEYS], peak[MR], total[MR], key_scale[KEYS], value_scale[KEYS];
    long position[MR], row[MR], token[MR], head[MR];
    const char *next_keys[PANELS]; /* the first panels of the next call of `attend_keys`, to be prefetched */
    long num_next;
    char keys[KEYS * MAX_HEAD * 4 + 4096], values[KEYS * MAX_HEAD * 4 + 4096];
} workspace;

/* Copy scattered slots, or convert int8, to panels that `rows_kernel` can read. */
static void copy_panels(const attention *a, workspace *w, const int32_t *table, long n, long head)
{
    const kv_cache *c = a->cache;
    long size = ELEMENT_BYTES[c->compute], values = region_bytes(c, c->key_dim);
    for (long i = 0; i < n * LANES && c->format != I8; i++) {
        long slot = table[i], lane = slot % LANES;
        char *at = head_of(c, slot / LANES, head);
        copy_vector(c, at, w->keys + i / LANES * c->key_dim * LANES * size, lane, i % LANES, c->key_dim, 1);
        copy_vector(c, at + values, w->values + i / LANES * c->value_dim * LANES * size, lane, i % LANES, c->value_dim, 0);
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

/* Turn the scores of query i over n panels, the first of which begins with key `from`, into weights; update its running
 * maximum, its sum of weights and its output. `plain`: all keys are visible, and there is no soft cap and no int8. */
INLINE void softmax_tile_as(const attention *a, workspace *w, long i, long from, const long n, const int f, const int plain)
{
    const long position = w->position[i], low = a->window && position >= a->window ? position - a->window + 1 : 0;
    const int scaled = !plain && a->cache->format == I8;
    vf s[KEYS / VL], peaks = splat(-INFINITY), sum = splat(0.0f), scaling = splat(a->scaling);
    vi lane;
    for (int x = 0; x < VL; x++) lane[x] = x;
    _Pragma("GCC unroll 16") for (long j = 0; j < n * LANES / VL; j++) {
        s[j] = *(vf *)(w->score[i] + j * VL) * scaling;
        if (scaled) s[j] *= *(vf *)(w->key_scale + j * VL);
        if (!plain && a->softcap > 0) s[j] = a->softcap * vtanh(s[j] / a->softcap);
        if (!plain) {
            vi key = lane + (int32_t)(from + j * VL);
            s[j] = blend((key <= (int32_t)position) & (key >= (int32_t)low), s[j], splat(-INFINITY));
        }
        peaks = vmax(s[j], peaks);
    }
    float peak = reduce_max(peaks), previous = w->peak[i];
    peak = peak > previous ? peak : previous;
    if (peak == -INFINITY) { /* all masked or NaN */
        for (long j = 0; j < n * LANES / VL; j++) sum += blend(s[j] != s[j], s[j], splat(0.0f));
        w->total[i] += reduce_add(sum);
        memset(w->weight[i], 0, sizeof w->weight[i]);
        return;
    }
    _Pragma("GCC unroll 16") for (long j = 0; j < n * LANES / VL; j++) {
        s[j] = vexp(s[j] - peak);
        sum += s[j];
        if (scaled) s[j] = blend(s[j] > 0.0f, s[j] * *(vf *)(w->value_scale + j * VL), splat(0.0f));
        store(w->weight[i], j * VL, f == BF16 ? BF16 : F32, s[j]);
    }
    if (peak == previous) { w->total[i] += reduce_add(sum); return; }
    float rescale = vexp(splat(previous - peak))[0];
    w->total[i] = w->total[i] * rescale + reduce_add(sum);
    w->peak[i] = peak;
    for (long d = 0; d < a->cache->value_dim; d += VL) *(vf *)(w->out[i] + d) *= rescale;
}

INLINE void softmax_tile(const attention *a, workspace *w, long i, long from, long n, const int f)
{
    const long position = w->position[i];
    const int visible = from + n * LANES - 1 <= position && (!a->window || from > position - a->window);
    if (n == PANELS && visible && a->softcap <= 0 && a->cache->format != I8) softmax_tile_as(a, w, i, from, PANELS, f, 1);
    else softmax_tile_as(a, w, i, from, n, f, 0);
}

/* The next call of `attend_keys` begins with keys [from, to) of a row: prefetch them during the last tile of this one. */
static void set_next_keys(const attention *a, workspace *w, long row, long head, long from, long to)
{
    const int32_t *table = a->metadata->tables + a->metadata->table_begin[row] + from / LANES;
    w->num_next = 0;
    for (long j = 0; a->metadata->by_panel && a->cache->format != I8 && j < PANELS && from + j * LANES < to; j++)
        w->next_keys[w->num_next++] = head_of(a->cache, table[j], head);
}

/* Where the keys and values of a tile's n panels begin, then those of the PANELS panels to prefetch: the next tile's, or
 * those that `set_next_keys` found if this tile is the last. Entries beyond both repeat a panel: they are masked. */
typedef struct { const char *keys[2 * PANELS + 1], *values[2 * PANELS + 1]; } tile_panels;

INLINE void find_panels(const attention *a, workspace *w, const int32_t *table, long n, long remaining, long head, const int copied, tile_panels *at)
{
    const kv_cache *c = a->cache;
    const long values = region_bytes(c, c->key_dim), size = ELEMENT_BYTES[c->compute];
    for (long j = 0; j <= 2 * PANELS; j++) {
        long index = j < remaining ? j : j < PANELS ? n - 1 : remaining - 1;
        if (copied) index = index < n ? index : n - 1;
        char *panel = copied ? NULL : head_of(c, table[index], head);
        at->keys[j] = copied ? w->keys + index * c->key_dim * LANES * size : panel;
        at->values[j] = copied ? w->values + index * c->value_dim * LANES * size : panel + values;
    }
    for (long j = 0; remaining <= PANELS && j < w->num_next; j++) {
        at->keys[PANELS + j] = w->next_keys[j];
        at->values[PANELS + j] = w->next_keys[j] + values;
        if (j >= n) prefetch(w->next_keys[j], values + region_bytes(c, c->value_dim));
    }
}

/* Copy a tile's panels; indices beyond the last key repeat it. */
static void copy_tile(const attention *a, workspace *w, const int32_t *table, long n, long keys, long head)
{
    const long last = (a->metadata->by_panel ? n : keys < KEYS ? keys : KEYS) - 1;
    int32_t padded[KEYS];
    for (long j = 0; j < KEYS; j++) padded[j] = table[j < last ? j : last];
    copy_panels(a, w, padded, n, head);
}

/* Queries [i, i + mr) attend to keys [from, to) of a row; `from` is a multiple of KEYS. */
static void attend_keys(const attention *a, workspace *w, long i, long mr, long row, long head, long from, long to)
{
    const kv_cache *c = a->cache;
    const int f = c->compute, by_panel = a->metadata->by_panel, copied = c->format == I8 || !by_panel;
    const long word = f == F16 ? 2 : 4, p = per_word(f);
    const int32_t *table = a->metadata->tables + a->metadata->table_begin[row];
    const int wide = mr <= WIDE_ROWS, nv = wide ? WIDE : NV;
    const rows_kernel_fn multiply = (wide ? wide_kernels : rows_kernels)[f][mr];
    tile_panels at;
    for (long t = from; t < to; t += KEYS) {
        long n = (to - t + LANES - 1) / LANES, remaining = n < 2 * PANELS ? n : 2 * PANELS;
        if (n > PANELS) n = PANELS;
        const int32_t *tile_table = table + (by_panel ? t / LANES : t);
        if (copied) copy_tile(a, w, tile_table, n, to - t, head);
        find_panels(a, w, tile_table, n, remaining, head, copied, &at);
        for (long v = 0; v < n * LANES; v += nv * VL) { /* scores = queries keys^T */
            b_operand b = {.segments = 1, .steps = c->key_dim / p, .stride = LANES * word};
            for (int x = 0; x < nv; x++) {
                long lane = v + x * VL;
                b.at[x] = &at.keys[lane / LANES], b.ahead[x] = &at.keys[PANELS + lane / LANES];
                b.shift[x] = lane % LANES * word;
            }
            multiply(w->query[i], Q_WORDS, NULL, &b, w->score[i] + v, KEYS, 0);
        }
        for (long x = i; x < i + mr; x++) {
            if (f == BF16) softmax_tile(a, w, x, t, n, BF16);
            else softmax_tile(a, w, x, t, n, F32);
        }
        b_operand b = {.segments = n, .steps = LANES / p, .stride = c->value_dim * word};
        for (int x = 0; x < nv; x++) b.at[x] = at.values, b.ahead[x] = at.values + PANELS;
        for (long d = 0; d < c->value_dim; d += nv * VL) { /* out += weights values */
            for (int x = 0; x < nv; x++) b.shift[x] = (d + x * VL) * word;
            multiply(w->weight[i], KEYS, NULL, &b, w->out[i] + d, O_WIDTH, 1);
        }
    }
}

/* Also prefetches the query `ahead` tokens later, which belongs to the next tile. */
static void load_query(const attention *a, workspace *w, long i, long row, long token, long position, long head, long ahead)
{
    float x[MAX_HEAD + VL];
    const long dim = a->cache->key_dim, size = ELEMENT_BYTES[a->type];
    const int operand = a->cache->compute == BF16 ? BF16 : F32;
    const char *query = a->query + (token * a->query_token + head * a->query_head) * size;
    prefetch(query + ahead * a->query_token * size, dim * size);
    w->row[i] = row;
    w->token[i] = token;
    w->position[i] = position;
    w->head[i] = head;
    w->peak[i] = -INFINITY;
    w->total[i] = 0;
    memset(w->out[i], 0, (dim + WIDE * VL) * sizeof(float));
    if (a->type == operand && a->cache->format != I8) { memcpy(w->query[i], query, dim * size); return; }
    widen(x, query, dim, a->type);
    if (a->cache->format == I8) rotate_channels(x, dim);
    narrow(w->query[i], x, dim, operand);
}

static void store_output(const attention *a, workspace *w, long i)
{
    const long dim = a->cache->value_dim;
    float total = w->total[i], scale = 1;
    if (a->sinks) {
        float sink = a->sinks[w->head[i]], peak = fmaxf(sink, w->peak[i]);
        scale = expf(w->peak[i] - peak);
        total = total * scale + expf(sink - peak);
    }
    scale /= total;
    for (long d = 0; d < dim; d++) w->out[i][d] *= scale;
    if (a->cache->format == I8) restore_channels(w->out[i], dim);
    narrow(a->out + (w->token[i] * a->heads + w->head[i]) * dim * ELEMENT_BYTES[a->type], w->out[i], dim, a->type);
}

/* Where the first tile of keys begins that query i sees. */
static long first_key(const attention *a, const workspace *w, long i)
{
    long low = a->window && w->position[i] >= a->window ? w->position[i] - a->window + 1 : 0;
    return low / KEYS * KEYS;
}

/* The next call of `attend_keys` is that of this unit of work, if there is one. */
static void set_next_unit(const attention *a, workspace *w, long unit)
{
    const attention_metadata *s = a->metadata;
    long task = unit / a->cache->heads;
    w->num_next = 0;
    if (task >= s->tasks) return;
    long row = s->task_row[task], position = s->first_position[row] + (s->task_rows[task] > 1 ? 0 : s->task_begin[task]);
    long low = a->window && position >= a->window ? position - a->window + 1 : 0;
    set_next_keys(a, w, row, unit % a->cache->heads, low / KEYS * KEYS, position + 1);
}

/* Queries [begin, end) of a task and K/V head; `next` is the unit of work that this thread does afterwards. */
static void attend_queries(const attention *a, workspace *w, long task, long head, long begin, long end, long next)
{
    const attention_metadata *s = a->metadata;
    const long group = a->heads / a->cache->heads, row = s->task_row[task], several_rows = s->task_rows[task] > 1;
    long from = 1L << 40;
    for (long q = begin; q < end; q++) {
        long r = several_rows ? row + q / group : row, t = several_rows ? 0 : s->task_begin[task] + q / group;
        load_query(a, w, q - begin, r, s->first_token[r] + t, s->first_position[r] + t, head * group + q % group, (end - begin) / group);
        from = first_key(a, w, q - begin) < from ? first_key(a, w, q - begin) : from;
    }
    const long shared = s->task_shared[task];
    if (!several_rows) {
        set_next_unit(a, w, next);
        attend_keys(a, w, 0, end - begin, row, head, from, w->position[end - begin - 1] + 1);
    } else {
        set_next_keys(a, w, row, head, shared, w->position[0] + 1);
        attend_keys(a, w, 0, end - begin, row, head, from, shared);
    }
    for (long i = 0, n; several_rows && i < end - begin; i += n) { /* then each row attends to its own keys */
        for (n = 1; i + n < end - begin && w->row[i + n] == w->row[i];) n++;
        from = first_key(a, w, i);
        if (i + n == end - begin) set_next_unit(a, w, next);
        else set_next_keys(a, w, w->row[i + n], head, shared, w->position[i + n] + 1);
        attend_keys(a, w, i, n, w->row[i], head, from > shared ? from : shared, w->position[i] + 1);
    }
    for (long i = 0; i < end - begin; i++) store_output(a, w, i);
}

static void attention_run(pool *p, void *arg, int id)
{
    const attention *a = arg;
    const attention_metadata *s = a->metadata;
    const long group = a->heads / a->cache->heads, heads = a->cache->heads;
    workspace *w = (workspace *)p->thread_scratch[id];
    prepare_tokens(p, a, (float *)p->thread_scratch[id]);
    barrier(p);
    for (long u = claim(p), next; u < s->tasks * heads; u = next) {
        next = claim(p);
        long task = u / heads, several_rows = s->task_rows[task] > 1;
        long queries = group * (several_rows ? s->task_rows[task] : s->task_end[task] - s->task_begin[task]);
        long per_tile = several_rows && group < MR ? MR / group * group : MR;
        for (long q = 0; q < queries; q += per_tile)
            attend_queries(a, w, task, u % heads, q, q + per_tile < queries ? q + per_tile : queries, next);
    }
}

static size_t attention_scratch(const attention *a, long key_dim)
{
    size_t row = (a->heads * key_dim + VL) * 4;
    return row > sizeof(workspace) ? row : sizeof(workspace);
}

/* Write the step's keys and values, then attend: out [tokens][heads][value_dim]. */
int ps_attention(pool *p, const attention *a)
{
    if (!reserve_scratch(p, 0, attention_scratch(a, a->cache->key_dim))) return 0;
    run_on_pool(p, attention_run, (void *)a);
    return 1;
}
