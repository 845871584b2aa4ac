/* Before attention: norm and rotary positions of queries and keys, then the write into the cache. */

/* One step. A row is a sequence; its tokens begin with token `first_token` of the step, at position `first_position`.
 * Its block table begins at tables[table_begin]: of panels if `by_panel`, else of single slots. A task is tokens
 * [task_begin, task_end) of row `task_row`, or `task_rows` rows of one token each from there on, whose first `task_shared`
 * keys (a multiple of KEYS) lie in the same slots. */
typedef struct {
    long tokens, tasks, by_panel;
    const int64_t *slots; /* [tokens]: where keys and values are written */
    const int32_t *first_token, *first_position, *table_begin, *tables;
    const int32_t *task_row, *task_rows, *task_begin, *task_end, *task_shared;
} attention_metadata;

/* Norm of queries and keys (0 none, 1 per head, 2 over all heads), then rotary positions. */
typedef struct {
    int32_t norm, type; /* type of cos and sin */
    long width;         /* the halves of the first `width` numbers of a head are rotated; 0: none */
    float eps;
    const float *query_norm, *key_norm;
    const char *cos, *sin; /* [tokens][width] */
} rotary;

typedef struct {
    const kv_cache *cache;
    const attention_metadata *metadata;
    const rotary *rotary; /* NULL: queries and keys need no norm or rotation */
    char *query, *key, *value, *out;
    long query_token, query_head, key_token, key_head, value_token, value_head; /* strides in elements */
    long heads;
    int32_t type;
    float scaling, softcap;
    long window;
    const float *sinks;
    long layer; /* index into the caches of a program */
} attention;

typedef struct { float cosine[MAX_HEAD], sine[MAX_HEAD]; } angles;

static void angles_of(const rotary *r, long token, angles *g)
{
    widen(g->cosine, r->cos + token * r->width * ELEMENT_BYTES[r->type], r->width, r->type);
    widen(g->sine, r->sin + token * r->width * ELEMENT_BYTES[r->type], r->width, r->type);
}

static void norm_and_rotate(const rotary *r, const angles *g, float *restrict x, long dim, const float *weight)
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

/* The same in registers, for a head that is rotated in full. */
INLINE void norm_and_rotate_full(const rotary *r, const angles *g, const void *from, const int f, void *to, const int t, const float *weight, const long vectors)
{
    const long half = vectors / 2;
    vf x[MAX_HEAD / VL], squares = splat(0.0f);
    for (long i = 0; i < vectors; i++) {
        x[i] = load(from, i * VL, f);
        squares = multiply_add(x[i], x[i], squares);
    }
    float scale = r->norm == 1 ? 1.0f / sqrtf(reduce_add(squares) / (vectors * VL) + r->eps) : 1;
    for (long i = 0; r->norm == 1 && i < vectors; i++) x[i] = x[i] * scale * *(const vf *)(weight + i * VL);
    for (long i = 0; i < half; i++) {
        const float *c = g->cosine + i * VL, *s = g->sine + i * VL;
        vf lo = x[i], hi = x[i + half];
        store(to, i * VL, t, multiply_add(lo, *(const vf *)c, -hi * *(const vf *)s));
        store(to, (i + half) * VL, t, multiply_add(hi, *(const vf *)(c + half * VL), lo * *(const vf *)(s + half * VL)));
    }
}

/* Norm and rotary position of a query or key. */
static void prepare_head(const attention *a, const angles *g, const char *from, void *to, const int t, const float *weight)
{
    const long dim = a->cache->key_dim, common = a->type == BF16 && a->rotary->width == dim;
    float x[MAX_HEAD + VL];
    if (common && dim == 128 && t == BF16) norm_and_rotate_full(a->rotary, g, from, BF16, to, BF16, weight, 128 / VL);
    else if (common && dim == 128) norm_and_rotate_full(a->rotary, g, from, BF16, to, F32, weight, 128 / VL);
    else if (common && dim == 64 && t == BF16) norm_and_rotate_full(a->rotary, g, from, BF16, to, BF16, weight, 64 / VL);
    else if (common && dim == 64) norm_and_rotate_full(a->rotary, g, from, BF16, to, F32, weight, 64 / VL);
    else {
        widen(x, from, dim, a->type);
        norm_and_rotate(a->rotary, g, x, dim, weight);
        narrow(to, x, dim, t);
    }
}

/* Prepare the queries and the key of one K/V head; write key and value into the cache. */
static void prepare_group(const attention *a, long token, long head, const angles *g)
{
    const long group = a->heads / a->cache->heads, dim = a->cache->key_dim, size = ELEMENT_BYTES[a->type];
    const char *k = a->key + (token * a->key_token + head * a->key_head) * size;
    const char *v = a->value + (token * a->value_token + head * a->value_head) * size;
    float key[MAX_HEAD + VL], value[MAX_HEAD + VL];
    prefetch(k + a->key_token * size, dim * size);
    prefetch(v + a->value_token * size, a->cache->value_dim * size);
    if (a->rotary) prepare_head(a, g, k, key, F32, a->rotary->key_norm);
    else widen(key, k, dim, a->type);
    widen(value, v, a->cache->value_dim, a->type);
    write_head(a->cache, a->metadata->slots[token], head, key, value);
    for (long h = head * group; a->rotary && h < (head + 1) * group; h++) {
        char *q = a->query + (token * a->query_token + h * a->query_head) * size;
        prefetch(q + a->query_token * size, dim * size);
        prepare_head(a, g, q, q, a->type, a->rotary->query_norm);
    }
}

static void normalize_all(const attention *a, char *x, long n, const float *weight, float *row)
{
    widen(row, x, n, a->type);
    normalize(row, n, RMS, weight, NULL, a->rotary->eps);
    narrow(x, row, n, a->type);
}

static void prepare_token(const attention *a, long token, float *row)
{
    const long heads = a->cache->heads, size = ELEMENT_BYTES[a->type], dim = a->cache->key_dim;
    angles g;
    if (a->rotary && a->rotary->width) angles_of(a->rotary, token, &g);
    if (a->rotary && a->rotary->norm == 2) {
        normalize_all(a, a->query + token * a->query_token * size, a->heads * dim, a->rotary->query_norm, row);
        normalize_all(a, a->key + token * a->key_token * size, heads * dim, a->rotary->key_norm, row);
    }
    for (long h = 0; h < heads; h++) prepare_group(a, token, h, &g);
}

/* Threads claim single heads of few tokens, LANES tokens of many: then two of them rarely write to the same cache line. */
static void prepare_tokens(pool *p, const attention *a, float *row)
{
    const long tokens = a->metadata->tokens, heads = a->cache->heads, over_heads = a->rotary && a->rotary->norm == 2;
    const long per_claim = tokens >= 4 * LANES * p->active ? LANES : 1, by_head = !over_heads && tokens < 4 * p->active;
    angles g;
    for (long u; by_head && (u = claim(p)) < tokens * heads;) {
        if (a->rotary && a->rotary->width) angles_of(a->rotary, u / heads, &g);
        prepare_group(a, u / heads, u % heads, &g);
    }
    for (long u; !by_head && (u = claim(p) * per_claim) < tokens;)
        for (long t = u; t < u + per_claim && t < tokens; t++) prepare_token(a, t, row);
}
