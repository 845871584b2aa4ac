/* RMSNorm and LayerNorm over rows, computed in float32. */

enum { NO_NORM, RMS, LAYER };

static void normalize(float *x, long n, int kind, const float *weight, const float *bias, float eps)
{
    vf total = splat(0.0f), squares = splat(0.0f);
    float mean = 0, tail = 0;
    long i;
    if (kind == LAYER) {
        for (i = 0; i + VL <= n; i += VL) total += *(vf *)(x + i);
        for (; i < n; i++) tail += x[i];
        mean = (reduce_add(total) + tail) / n;
    }
    for (i = 0, tail = 0; i + VL <= n; i += VL) {
        vf v = *(vf *)(x + i) - mean;
        squares = multiply_add(v, v, squares);
    }
    for (; i < n; i++) tail += (x[i] - mean) * (x[i] - mean);
    float r = 1.0f / sqrtf((reduce_add(squares) + tail) / n + eps);
    for (i = 0; i + VL <= n; i += VL) {
        vf v = (*(vf *)(x + i) - mean) * r, w = *(const vf *)(weight + i);
        *(vf *)(x + i) = bias ? multiply_add(v, w, *(const vf *)(bias + i)) : v * w;
    }
    for (; i < n; i++) x[i] = (x[i] - mean) * r * weight[i] + (bias ? bias[i] : 0);
}

/* out = norm(x), or out += scale * norm(x) when `add`. */
typedef struct {
    long n;
    int32_t kind, dtype;
    float eps, scale;
    const float *weight, *bias;
} norm;

typedef struct { const norm *n; const char *x; char *out; long rows; int add; } norm_job;

static void norm_run(pool *p, void *arg, int id)
{
    const norm_job j = *(norm_job *)arg;
    int f = j.n->dtype, size = ELEMENT_BYTES[f];
    float *row = (float *)p->thread_scratch[id];
    for (long m; (m = claim(p)) < j.rows;) {
        char *out = j.out + m * j.n->n * size;
        widen(row, j.x + m * j.n->n * size, j.n->n, f);
        normalize(row, j.n->n, j.n->kind, j.n->weight, j.n->bias, j.n->eps);
        if (j.add)
            for (long i = 0; i < j.n->n; i++) row[i] = load_scalar(out, i, f) + j.n->scale * row[i];
        narrow(out, row, j.n->n, f);
    }
}

static size_t norm_scratch(const norm *n) { return (n->n + VL) * 4; }

/* Returns 0 when memory for scratch runs out, as every kernel does. */
int ps_norm(pool *p, const norm *n, const void *x, long rows, void *out, int add)
{
    norm_job j = {n, x, out, rows, add};
    if (!reserve_scratch(p, 0, norm_scratch(n))) return 0;
    run_on_pool(p, norm_run, &j);
    return 1;
}
