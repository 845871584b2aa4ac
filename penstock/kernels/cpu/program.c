/* Programs: the operations of many layers as one call, so that threads do not wait for the caller in between. */

enum { LINEAR, ADD_NORM, ATTENTION };

/* Reads rows of register `in` and writes rows of register `out`; rows are contiguous. `parameters` are a linear, a norm
 * or an attention. Attention reads rows (H D | K D | K V); cache, metadata, cos and sin are the program's. */
typedef struct {
    int32_t kind, in, out, unused;
    const void *parameters;
} operation;

typedef struct {
    const operation *operations;
    long count, rows;
    char *const *registers;
    const kv_cache *const *caches;
    const attention_metadata *metadata;
    const char *cos, *sin; /* [rows][width]; width 0: no rotary positions */
    long width;
    int32_t type;
    const int32_t *slots; /* the adapter of each row, -1 for none; NULL: no row has one */
} program;

static scratch_bytes plan_operation(const program *g, const operation *o, linear_job *j)
{
    if (o->kind == LINEAR) {
        const linear *w = o->parameters;
        return plan_linear(j, w, g->registers[o->in], g->rows, w->k, g->registers[o->out], w->mode == GATED ? w->n / 2 : w->n, g->slots);
    }
    if (o->kind == ADD_NORM) return (scratch_bytes){0, norm_scratch(o->parameters)};
    const attention *a = o->parameters;
    return (scratch_bytes){0, attention_scratch(a, g->caches[a->layer]->key_dim)};
}

static void run_attention(pool *p, const program *g, const operation *o, int id)
{
    attention a = *(const attention *)o->parameters;
    rotary r = *a.rotary;
    a.cache = g->caches[a.layer], a.metadata = g->metadata, a.rotary = &r;
    r.cos = g->cos, r.sin = g->sin, r.type = g->type;
    if (r.width) r.width = g->width;
    a.query = g->registers[o->in];
    a.key = a.query + a.heads * a.cache->key_dim * ELEMENT_BYTES[a.type];
    a.value = a.key + a.cache->heads * a.cache->key_dim * ELEMENT_BYTES[a.type];
    a.out = g->registers[o->out];
    attention_run(p, &a, id);
}

static void run_operation(pool *p, const program *g, const operation *o, int id)
{
    linear_job j;
    plan_operation(g, o, &j);
    if (o->kind == LINEAR) {
        place_scratch(&j, p);
        linear_run(p, &j, id);
    } else if (o->kind == ADD_NORM) {
        norm_job n = {o->parameters, g->registers[o->in], g->registers[o->out], g->rows, 1};
        norm_run(p, &n, id);
    } else run_attention(p, g, o, id);
}

static void program_run(pool *p, void *arg, int id)
{
    const program *g = arg;
    for (long i = 0; i < g->count; i++) {
        run_operation(p, g, g->operations + i, id);
        barrier(p);
    }
}

int ps_program(pool *p, const program *g)
{
    size_t shared = 0, per_thread = 0;
    if (g->rows == 0) return 1;
    for (long i = 0; i < g->count; i++) {
        linear_job j;
        scratch_bytes need = plan_operation(g, g->operations + i, &j);
        shared = need.shared > shared ? need.shared : shared;
        per_thread = need.per_thread > per_thread ? need.per_thread : per_thread;
    }
    if (!reserve_scratch(p, shared, per_thread)) return 0;
    run_on_pool(p, program_run, (void *)g);
    return 1;
}
