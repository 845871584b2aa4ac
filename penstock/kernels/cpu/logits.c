/* What the sampler needs of logits: maxima and sums of exponentials, in one pass over memory; maxima, the greatest in
 * order, draws and copies under a mask, whose bit t % 32 of word t / 32 is set if token t is allowed. Tokens beyond its words are not. */

enum { CHUNK = 8192 }; /* logits that stay in the L1 cache between the maximum and the sum */

typedef struct {
    const float *logits; /* [rows][width]; `block` divides width and CHUNK and is a multiple of LANES */
    long rows, width, block;
    float *block_maxima; /* [rows][width / block] */
    float *maxima;       /* [rows]; NaN if a row has one */
    double *totals;      /* [rows]: sum of exp(logit - maximum) */
    int64_t *tokens;     /* [rows]: argmax, the first of equals */
} logit_summary;

typedef struct { double total; float maximum; } chunk_summary; /* total: sum of exp(logit - maximum) */

static chunk_summary summarize_chunk(const logit_summary *s, const float *x, float *block_maxima, long n)
{
    chunk_summary chunk = {0, -INFINITY};
    for (long b = 0; b < n; b += s->block) {
        vf maxima = *(const vf *)(x + b);
        for (long i = VL; i < s->block; i += VL) maxima = vmax(maxima, *(const vf *)(x + b + i));
        *block_maxima = reduce_max(maxima);
        chunk.maximum = *block_maxima > chunk.maximum ? *block_maxima : chunk.maximum;
        block_maxima++;
    }
    const float base = chunk.maximum > -INFINITY ? chunk.maximum : 0;
    for (long b = 0; b < n; b += s->block) {
        vf sum = splat(0.0f);
        for (long i = 0; i < s->block; i += VL) sum += vexp(*(const vf *)(x + b + i) - base);
        chunk.total += reduce_add(sum);
    }
    return chunk;
}

static void summarize_row(const logit_summary *s, long m, const chunk_summary *chunks, long count)
{
    const float *x = s->logits + m * s->width, *block_maxima = s->block_maxima + m * (s->width / s->block);
    float maximum = -INFINITY;
    double total = 0;
    long block = 0, token = 0;
    for (long i = 0; i < count; i++) maximum = chunks[i].maximum > maximum ? chunks[i].maximum : maximum;
    for (long i = 0; i < count; i++) total += chunks[i].total * exp((double)chunks[i].maximum - maximum);
    while (block + 1 < s->width / s->block && block_maxima[block] != maximum) block++;
    while (token + 1 < s->block && x[block * s->block + token] != maximum) token++;
    s->totals[m] = total;
    s->tokens[m] = block * s->block + token;
    s->maxima[m] = total == total ? maximum : NAN;
}

static void summarize_run(pool *p, void *arg, int id)
{
    const logit_summary *s = arg;
    const long count = (s->width + CHUNK - 1) / CHUNK;
    chunk_summary *chunks = (chunk_summary *)p->scratch;
    (void)id;
    for (long u; (u = claim(p)) < s->rows * count;) {
        long at = u / count * s->width + u % count * CHUNK, rest = s->width - u % count * CHUNK;
        chunks[u] = summarize_chunk(s, s->logits + at, s->block_maxima + at / s->block, rest < CHUNK ? rest : CHUNK);
    }
    barrier(p);
    for (long m; (m = claim(p)) < s->rows;) summarize_row(s, m, chunks + m * count, count);
}

int ps_summarize_logits(pool *p, logit_summary *s)
{
    if (!reserve_scratch(p, s->rows * ((s->width + CHUNK - 1) / CHUNK) * sizeof(chunk_summary), 0)) return 0;
    run_on_pool(p, summarize_run, s);
    return 1;
}

typedef struct {
    const float *logits;       /* [..][width]; `block` is a multiple of 32 and divides width */
    const float *block_maxima; /* [..][width / block], of all logits */
    const int64_t *indices;    /* [rows]: which row of the logits each mask belongs to */
    const uint32_t *masks;     /* [rows][words] */
    long rows, width, block, words;
    float *maxima;             /* [rows]: the greatest allowed logit; -INFINITY if none is allowed */
    int64_t *tokens;           /* [rows]: its token, the first of equals */
} allowed_argmax;

/* Reads only the blocks that can hold a greater logit than those before: few of them, whatever the mask. */
static void find_allowed(const allowed_argmax *s, long m)
{
    const int64_t row = s->indices[m];
    const float *x = s->logits + row * s->width, *block_maxima = s->block_maxima + row * (s->width / s->block);
    const uint32_t *mask = s->masks + m * s->words;
    const long last = s->words * 32 < s->width ? s->words * 32 : s->width;
    float maximum = -INFINITY;
    int64_t token = 0;
    for (long b = 0; b * s->block < last; b++) {
        if (!(block_maxima[b] > maximum)) continue;
        const long end = (b + 1) * s->block < last ? (b + 1) * s->block : last;
        for (long w = b * s->block / 32; w < end / 32; w++)
            for (uint32_t bits = mask[w]; bits; bits &= bits - 1) {
                const long t = w * 32 + __builtin_ctz(bits);
                if (x[t] > maximum) { maximum = x[t]; token = t; }
            }
    }
    s->maxima[m] = maximum;
    s->tokens[m] = token;
}

static void find_allowed_run(pool *p, void *arg, int id)
{
    const allowed_argmax *s = arg;
    (void)id;
    for (long m; (m = claim(p)) < s->rows;) find_allowed(s, m);
}

int ps_allowed_argmax(pool *p, allowed_argmax *s)
{
    run_on_pool(p, find_allowed_run, s);
    return 1;
}

/* The words of a mask for the tokens from `begin` on; 0 beyond its end. Without a mask all are allowed. */
INLINE uint32_t allowed_word(const uint32_t *mask, long words, long begin)
{
    return !mask ? ~(uint32_t)0 : begin / 32 < words ? mask[begin / 32] : 0;
}

INLINE uint32_t any_allowed(const uint32_t *mask, long words, long begin, long block)
{
    uint32_t any = 0;
    for (long i = 0; i < block; i += 32) any |= allowed_word(mask, words, begin + i);
    return any;
}

/* All ones in lane j where bit `shift` + j is set. */
INLINE vi lanes_of(uint32_t word, long shift)
{
    static const int32_t bits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
    return (splati(word >> shift) & *(const vi *)bits) != 0;
}

typedef struct {
    const float *logits;    /* [..][width]; `block` is a multiple of 32 and divides width and CHUNK */
    const int64_t *indices; /* [rows]: the row of the logits that each token is drawn from */
    const uint32_t *masks;  /* [rows][words], or NULL */
    const float *peaks, *rates, *floors; /* [rows]: a weight is exp((logit - peak) * rate), and 0 below the floor */
    const double *uniforms; /* [rows] in [0, 1); NULL: `tokens` are given */
    long rows, width, block, words;
    double *totals;         /* [rows]: sum of the weights */
    int64_t *tokens;        /* [rows]: drawn in vocabulary order */
    float *weights;         /* [rows]: those of the tokens */
} token_draw;

/* The sum of a block's weights, which are stored too if `weights` is not NULL. */
INLINE float weigh_block(const token_draw *d, long m, long begin, float *weights)
{
    const float *x = d->logits + d->indices[m] * d->width + begin, peak = d->peaks[m], rate = d->rates[m];
    const uint32_t *mask = d->masks ? d->masks + m * d->words : NULL;
    vf sum = splat(0.0f);
    for (long i = 0; i < d->block; i += VL) {
        vf weight = vexp((*(const vf *)(x + i) - peak) * rate);
        vi kept = weight >= splat(d->floors[m]);
        if (mask) kept &= lanes_of(allowed_word(mask, d->words, begin + i), i % 32);
        weight = (vf)((vi)weight & kept);
        if (weights) *(vf *)(weights + i) = weight;
        sum += weight;
    }
    return reduce_add(sum);
}

static void weigh_chunk(const token_draw *d, long m, long begin, float *sums)
{
    const uint32_t *mask = d->masks ? d->masks + m * d->words : NULL;
    const long end = begin + CHUNK < d->width ? begin + CHUNK : d->width;
    for (long at = begin; at < end; at += d->block)
        sums[at / d->block] = any_allowed(mask, d->words, at, d->block) ? weigh_block(d, m, at, NULL) : 0;
}

/* Draw from a row whose blocks have these sums: first the block, then the token within it. What is drawn lies below the
 * total, so a token of weight 0 is never drawn. */
static void draw_token(const token_draw *d, long m, const float *sums)
{
    float weights[CHUNK];
    double total = 0, before = 0, in_block = 0;
    const long blocks = d->width / d->block;
    long b = 0, t = 0;
    for (long i = 0; i < blocks; i++) total += sums[i];
    d->totals[m] = total;
    if (!d->uniforms) {
        weigh_block(d, m, d->tokens[m] / d->block * d->block, weights);
        d->weights[m] = weights[d->tokens[m] % d->block];
        return;
    }
    double target = fmin(d->uniforms[m] * total, nextafter(total, 0));
    while (b + 1 < blocks && !(before + sums[b] > target)) before += sums[b++];
    weigh_block(d, m, b * d->block, weights);
    for (long i = 0; i < d->block; i++) in_block += weights[i];
    target = fmin(target - before, nextafter(in_block, 0));
    before = 0;
    while (t + 1 < d->block && !(before + weights[t] > target)) before += weights[t++];
    d->tokens[m] = b * d->block + t;
    d->weights[m] = weights[t];
}

static void draw_run(pool *p, void *arg, int id)
{
    const token_draw *d = arg;
    const long count = (d->width + CHUNK - 1) / CHUNK, blocks = d->width / d->block;
    float *sums = (float *)p->scratch;
    (void)id;
    for (long u; (u = claim(p)) < d->rows * count;) weigh_chunk(d, u / count, u % count * CHUNK, sums + u / count * blocks);
    barrier(p);
    for (long m; (m = claim(p)) < d->rows;) draw_token(d, m, sums + m * blocks);
}

int ps_draw(pool *p, token_draw *d)
{
    if (!reserve_scratch(p, d->rows * (d->width / d->block) * sizeof(float), 0)) return 0;
    run_on_pool(p, draw_run, d);
    return 1;
}

typedef struct {
    const float *logits;    /* [..][width]; `block` is a multiple of 32 and divides width and CHUNK */
    const int64_t *indices; /* [rows]: which row of the logits each mask belongs to */
    const uint32_t *masks;  /* [rows][words] */
    long rows, width, block, words;
    float *copy;            /* [rows][width]: the logits; -INFINITY where a token is not allowed */
    float *block_maxima;    /* [rows][width / block] */
} masked_copy;

static void copy_chunk(const masked_copy *s, long m, long begin)
{
    const float *x = s->logits + s->indices[m] * s->width;
    const uint32_t *mask = s->masks + m * s->words;
    const long end = begin + CHUNK < s->width ? begin + CHUNK : s->width;
    float *copy = s->copy + m * s->width;
    for (long at = begin; at < end; at += s->block) {
        const uint32_t any = any_allowed(mask, s->words, at, s->block);
        vf maxima = splat(-INFINITY);
        for (long i = at; i < at + s->block; i += VL) {
            vf logits = splat(-INFINITY);
            if (any) logits = blend(lanes_of(allowed_word(mask, s->words, i), i % 32), *(const vf *)(x + i), logits);
            *(vf *)(copy + i) = logits;
            maxima = vmax(maxima, logits);
        }
        s->block_maxima[m * (s->width / s->block) + at / s->block] = reduce_max(maxima);
    }
}

static void copy_run(pool *p, void *arg, int id)
{
    const masked_copy *s = arg;
    const long count = (s->width + CHUNK - 1) / CHUNK;
    (void)id;
    for (long u; (u = claim(p)) < s->rows * count;) copy_chunk(s, u / count, u % count * CHUNK);
}

int ps_masked_copy(pool *p, masked_copy *s)
{
    run_on_pool(p, copy_run, s);
    return 1;
}

typedef struct {
    const float *logits;       /* [..][width]; `block` is a multiple of 32 and divides width */
    const float *block_maxima; /* [..][width / block], of all logits */
    const int64_t *indices;    /* [rows]: the row of the logits that each result belongs to */
    const uint32_t *masks;     /* [rows][words], or NULL */
    long rows, width, block, words, count;
    float *greatest;           /* [rows][count]: descending; -INFINITY beyond those allowed. No NaN is among them */
    int64_t *tokens;           /* [rows][count]: of equal logits the first */
} greatest_logits;

/* A number that rises with x, and of equal x falls with the place. 0 is below all of them. */
INLINE uint64_t key_of(float x, long place)
{
    union { float f; int32_t i; } bits = {x + 0.0f}; /* -0 becomes 0 */
    const int32_t rising = bits.i ^ (bits.i >> 31 & 0x7fffffff);
    return (uint64_t)((uint32_t)rising ^ 0x80000000u) << 32 | (0xffffffffu - (uint32_t)place);
}

INLINE long place_of(uint64_t key) { return key ? 0xffffffffu - (uint32_t)key : 0; }

INLINE float value_of(uint64_t key)
{
    const int32_t rising = (int32_t)((uint32_t)(key >> 32) ^ 0x80000000u);
    union { int32_t i; float f; } bits = {rising ^ (rising >> 31 & 0x7fffffff)};
    return key ? bits.f : -INFINITY;
}

/* Put a key at the top of a heap, whose top is its least key. */
static void replace_least(uint64_t *heap, long size, uint64_t key)
{
    long at = 0;
    for (long child; (child = 2 * at + 1) < size; at = child) {
        if (child + 1 < size && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= key) break;
        heap[at] = heap[child];
    }
    heap[at] = key;
}

static void offer_block(const greatest_logits *s, long m, long b, uint64_t *heap)
{
    const float *x = s->logits + s->indices[m] * s->width;
    const uint32_t *mask = s->masks ? s->masks + m * s->words : NULL;
    float least = value_of(heap[0]);
    for (long w = b * s->block; w < (b + 1) * s->block; w += 32)
        for (uint32_t bits = allowed_word(mask, s->words, w); bits; bits &= bits - 1) {
            const long t = w + __builtin_ctz(bits);
            if (!(x[t] >= least) || key_of(x[t], t) < heap[0]) continue;
            replace_least(heap, s->count, key_of(x[t], t));
            least = value_of(heap[0]);
        }
}

/* Reads the blocks with the greatest maxima first. Unless a mask refuses what they hold, it reads no others. */
static void find_greatest(const greatest_logits *s, long m, uint64_t *heap)
{
    const long blocks = s->width / s->block, num_first = s->count < blocks ? s->count : blocks;
    const float *maxima = s->block_maxima + s->indices[m] * blocks;
    uint64_t *first = heap + s->count;
    memset(heap, 0, (s->count + num_first) * sizeof *heap);
    for (long b = 0; b < blocks; b++)
        if (key_of(maxima[b], b) > first[0]) replace_least(first, num_first, key_of(maxima[b], b));
    for (long i = num_first; i--;) offer_block(s, m, place_of(first[i]), heap);
    for (long b = 0; b < blocks; b++)
        if (key_of(maxima[b], b) < first[0] && !(maxima[b] < value_of(heap[0]))) offer_block(s, m, b, heap);
    for (long i = s->count; i--;) {
        s->greatest[m * s->count + i] = value_of(heap[0]);
        s->tokens[m * s->count + i] = place_of(heap[0]);
        replace_least(heap, i, heap[i]);
    }
}

static void find_greatest_run(pool *p, void *arg, int id)
{
    const greatest_logits *s = arg;
    for (long m; (m = claim(p)) < s->rows;) find_greatest(s, m, (uint64_t *)p->thread_scratch[id]);
}

int ps_greatest_logits(pool *p, greatest_logits *s)
{
    if (!reserve_scratch(p, 0, 2 * s->count * sizeof(uint64_t))) return 0;
    run_on_pool(p, find_greatest_run, s);
    return 1;
}
