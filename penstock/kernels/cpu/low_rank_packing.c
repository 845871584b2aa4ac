/* Packing of adapters for the products of low_rank.c. Runs on the calling thread, which need not be the kernels' own. */

/* One matrix of a layer: scaling * b a x is added to outputs [first, first + size). a is [rank][k], b [size][rank]; the
 * strides are bytes from row to row. */
typedef struct {
    const char *a, *b;
    long a_stride, b_stride, rank, first, size;
    int32_t a_type, b_type;
    float scaling;
    int32_t unused;
} low_rank_part;

enum { PIECE = 64 }; /* numbers of a row that are transposed at once */

static long vectors_of(const linear *w) { return (w->n + NR - 1) / NR * NV; }

/* The outputs [*first, *end) of vector v of packed columns. */
static void outputs_of(const linear *w, long v, long *first, long *end)
{
    const long half = w->n / 2, is_up = v % NV, gated = w->mode == GATED, limit = gated && !is_up ? half : w->n;
    *first = gated ? v / NV * VL + is_up * half : v * VL;
    *end = *first + VL < limit ? *first + VL : limit;
}

static int overlaps(const low_rank_part *g, long first, long end) { return g->first < end && g->first + g->size > first; }

/* The first rank of the parts that vector v has outputs of; their number is returned. */
static long ranks_of(const linear *w, const low_rank_part *parts, long count, long v, int32_t *rank)
{
    long first, end, begin = 0, number = 0, at = 0;
    outputs_of(w, v, &first, &end);
    for (long i = 0; i < count; at += parts[i++].rank) {
        if (!overlaps(parts + i, first, end)) continue;
        if (!number) begin = at;
        number = at + parts[i].rank - begin;
    }
    *rank = begin;
    return number;
}

static long total_rank(const low_rank_part *parts, long count)
{
    long rank = 0;
    for (long i = 0; i < count; i++) rank += parts[i].rank;
    return (rank + VL - 1) / VL * VL;
}

/* Whole cache lines, so that no vector of a or b that lies behind crosses two. */
static long range_bytes(const linear *w) { return round_up((vectors_of(w) + 1) * sizeof(rank_range), 64); }

static long low_rank_bytes(const linear *w, const low_rank_part *parts, long count)
{
    long vectors = vectors_of(w), rows = 0;
    for (long v = 0; v < vectors; v++) {
        int32_t rank;
        rows += ranks_of(w, parts, count, v, &rank);
    }
    long numbers = total_rank(parts, count) * w->k + rows * VL;
    return range_bytes(w) + round_up(numbers * ELEMENT_BYTES[w->in_type], 64);
}

/* A row of one of the matrices that are packed, as a lane of vectors; NULL is a row of zeros. */
typedef struct {
    const char *at;
    int32_t type;
    float scaling;
    long part;
} lane_row;

/* Numbers [begin, begin + VL) of a row of n. */
INLINE vf lane_of(const lane_row *r, long begin, long n)
{
    if (!r->at) return splat(0.0f);
    if (begin + VL <= n) return load(r->at, begin, r->type) * r->scaling;
    vf v = splat(0.0f);
    for (long i = begin; i < n; i++) v[i - begin] = load_scalar(r->at, i, r->type) * r->scaling;
    return v;
}

/* Store n numbers of VL rows as n vectors, one below the other at `to`. Returns the first part with a number that is not
 * finite as it is stored, `none` without one. */
static long transpose(const lane_row *rows, long n, char *to, int type, long none)
{
    long broken = none;
    vf error = splat(0.0f);
    for (long begin = 0; begin < n; begin += VL) {
        vf v[VL];
        _Pragma("GCC unroll 16") for (long lane = 0; lane < VL; lane++) v[lane] = lane_of(rows + lane, begin, n);
        transpose_square(v);
        for (long i = 0; i < VL && begin + i < n; i++) {
            store(to, (begin + i) * VL, type, v[i]);
            error += load(to, (begin + i) * VL, type) * 0.0f;
        }
    }
    for (long lane = 0; lane < VL; lane++)
        if (!(error[lane] == 0) && rows[lane].part < broken) broken = rows[lane].part;
    return broken;
}

static long pack_a(const linear *w, const low_rank_part *parts, long count, char *to, long rank)
{
    long broken = count, part = 0, row = 0;
    for (long v = 0; v < rank / VL; v++, to += w->k * VL * ELEMENT_BYTES[w->in_type]) {
        lane_row rows[VL] = {{0}};
        for (long lane = 0; lane < VL; lane++) {
            while (part < count && row == parts[part].rank) part++, row = 0;
            rows[lane].part = part;
            if (part == count) continue;
            const low_rank_part *g = parts + part;
            rows[lane] = (lane_row){g->a + row++ * g->a_stride, g->a_type, 1.0f, part};
        }
        long found = transpose(rows, w->k, to, w->in_type, count);
        broken = found < broken ? found : broken;
    }
    return broken;
}

/* The rows of b for vector v, whose first rank is `first`. */
static long pack_b(const linear *w, const low_rank_part *parts, long count, long v, long first, char *to)
{
    long broken = count, from, end, at = 0;
    outputs_of(w, v, &from, &end);
    for (long i = 0; i < count; at += parts[i++].rank) {
        const low_rank_part *g = parts + i;
        if (!overlaps(g, from, end)) continue;
        lane_row rows[VL] = {{0}};
        for (long lane = 0; lane < VL; lane++) {
            long row = from + lane - g->first;
            rows[lane].part = i;
            if (row < 0 || row >= g->size || from + lane >= end) continue;
            rows[lane] = (lane_row){g->b + row * g->b_stride, g->b_type, g->scaling, i};
        }
        long found = transpose(rows, g->rank, to + (at - first) * VL * ELEMENT_BYTES[w->in_type], w->in_type, count);
        broken = found < broken ? found : broken;
    }
    return broken;
}

static long pack_layer(const linear *w, const low_rank_part *parts, long count, low_rank *target, char *memory)
{
    const long rank = total_rank(parts, count), vectors = vectors_of(w), size = ELEMENT_BYTES[w->in_type];
    rank_range *ranges = (rank_range *)memory;
    char *a = memory + range_bytes(w), *b = a + rank * w->k * size;
    long broken = pack_a(w, parts, count, a, rank);
    ranges[0].begin = 0;
    for (long v = 0; v < vectors; v++) {
        ranges[v + 1].begin = ranges[v].begin + ranks_of(w, parts, count, v, &ranges[v].first);
        long found = pack_b(w, parts, count, v, ranges[v].first, b + ranges[v].begin * VL * size);
        broken = found < broken ? found : broken;
    }
    *target = (low_rank){rank, w->in_type, 0, a, b, ranges};
    return broken;
}

/* What an adapter has of one layer, `count` parts in the order of their outputs. `broken` is the first that is not finite
 * in the type of the layer's inputs, `count` if all are. */
typedef struct {
    const linear *layer;
    const low_rank_part *parts;
    low_rank *target;
    long count, broken;
} low_rank_layer;

/* Bytes of the memory that `ps_pack_low_ranks` needs. */
long ps_low_rank_bytes(const low_rank_layer *layers, long count)
{
    long bytes = 0;
    for (const low_rank_layer *g = layers; g < layers + count; g++) bytes += low_rank_bytes(g->layer, g->parts, g->count);
    return bytes;
}

/* Pack an adapter into `memory`, up to a layer with a part that is not finite. All layers are one call, because a caller
 * that holds an interpreter's lock may have to wait for it after each. */
void ps_pack_low_ranks(low_rank_layer *layers, long count, char *memory)
{
    for (low_rank_layer *g = layers; g < layers + count; g++) {
        g->broken = pack_layer(g->layer, g->parts, g->count, g->target, memory);
        if (g->broken < g->count) return;
        memory += low_rank_bytes(g->layer, g->parts, g->count);
    }
}
