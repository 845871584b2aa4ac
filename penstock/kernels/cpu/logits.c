/* What the sampler needs of logits: maxima and sums of exponentials, in one pass over memory; maxima under a mask. */

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
    const uint32_t *masks;     /* [rows][words]; bit t % 32 of word t / 32: token t is allowed */
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
