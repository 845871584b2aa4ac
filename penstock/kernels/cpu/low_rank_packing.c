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

/* Bytes of the memory that `ps_pack_low_rank` needs, in whole cache lines. */
long ps_low_rank_bytes(const linear *w, const low_rank_part *parts, long count)
{
    long vectors = vectors_of(w), rows = 0;
    for (long v = 0; v < vectors; v++) {
        int32_t rank;
        rows += ranks_of(w, parts, count, v, &rank);
    }
    long numbers = total_rank(parts, count) * w->k + rows * VL;
    return (numbers * ELEMENT_BYTES[w->in_type] + (2 * vectors + 1) * sizeof(int32_t) + 63) / 64 * 64;
}

/* A row of one of the matrices that are packed, as a lane of vectors; NULL is a row of zeros. */
typedef struct {
    const char *at;
    int32_t type;
    float scaling;
    long part;
} lane_row;

/* Store n numbers of VL rows as n vectors, one below the other at `to`. Returns the first part with a number that is not
 * finite as it is stored, `none` without one. */
static long transpose(const lane_row *rows, long n, char *to, int type, long none)
{
    float x[VL][PIECE + VL];
    long broken = none;
    vf error = splat(0.0f);
    for (long begin = 0; begin < n; begin += PIECE) {
        const long size = n - begin < PIECE ? n - begin : PIECE;
        for (long lane = 0; lane < VL; lane++) {
            const lane_row *r = rows + lane;
            if (r->at) widen(x[lane], r->at + begin * ELEMENT_BYTES[r->type], size, r->type);
            else memset(x[lane], 0, size * sizeof(float));
        }
        for (long i = 0; i < size; i++) {
            vf v;
            for (long lane = 0; lane < VL; lane++) v[lane] = x[lane][i] * rows[lane].scaling;
            store(to, (begin + i) * VL, type, v);
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

/* Pack the parts that an adapter has of one layer, in the order of their outputs, into `memory`. Returns the number of
 * the first part that is not finite in the type of the layer's inputs, `count` if all are. */
long ps_pack_low_rank(const linear *w, const low_rank_part *parts, long count, low_rank *target, char *memory)
{
    const long rank = total_rank(parts, count), vectors = vectors_of(w), size = ELEMENT_BYTES[w->in_type];
    int32_t *first = (int32_t *)memory, *begin = first + vectors;
    char *a = (char *)(begin + vectors + 1), *b = a + rank * w->k * size;
    long broken = pack_a(w, parts, count, a, rank);
    begin[0] = 0;
    for (long v = 0; v < vectors; v++) {
        begin[v + 1] = begin[v] + ranks_of(w, parts, count, v, first + v);
        long found = pack_b(w, parts, count, v, first[v], b + begin[v] * VL * size);
        broken = found < broken ? found : broken;
    }
    *target = (low_rank){rank, w->in_type, 0, a, b, first, begin};
    return broken;
}
