/* Packing of weights, at load and after each update; the layout is described in linear.c.
 *
 * int8 columns are rotated and rounded to a scale and a minimum each. With a calibration, rounding diffuses its error
 * (Floyd and Steinberg 1976; GPTQ, Frantar et al. 2022, arXiv 2210.17323, does so for all directions): the errors so far,
 * projected on the RANK directions that hold most of the energy of the layer's inputs, are subtracted from the next
 * weight before it is rounded. What remains of the errors in the outputs comes from the other directions. */

enum { RANK = 16 };

typedef struct {
    const char *const *rows; /* one source row per packed column; NULL is a column of zeros, KEPT one that stays */
    long n, k;
    int32_t type, format;
    char *weights;
    float *scales, *lows;
    const float *directions, *feedback; /* [k][RANK] each: rotated directions, and divided by their energy; or NULL */
} packing;

static const char *const KEPT = (const char *)1;

static void pack_column(const packing *g, long n, float *row, uint8_t *bytes)
{
    long per = per_word(g->format), k = (g->k + per - 1) / per, size = g->format == F16 ? 2 : 4;
    char *dst = g->weights + (n / NR) * k * NR * size + (n % NR) * size;
    if (g->rows[n] == KEPT) return;
    memset(row, 0, (g->k + 8) * sizeof *row);
    if (g->rows[n]) widen(row, g->rows[n], g->k, g->type);
    if (g->format != F32) narrow(bytes, row, g->k + 1, g->format);
    const char *src = g->format == F32 ? (char *)row : (char *)bytes;
    for (long i = 0; i < k; i++) memcpy(dst + i * NR * size, src + i * size, size);
}

/* Rotate the row of packed column n into `lane` of x[k][VL]; a scale of NaN if a number is NaN or infinite. A column
 * that is kept is zeros there. */
static void rotate_column(const packing *g, long n, float *row, float *x, long lane)
{
    if (g->rows[n] == KEPT) {
        for (long i = 0; i < g->k; i++) x[i * VL + lane] = 0;
        return;
    }
    if (g->rows[n]) widen(row, g->rows[n], g->k, g->type);
    else memset(row, 0, g->k * sizeof *row);
    rotate_blocks(row, g->k);
    float high = row[0], low = row[0], error = 0;
    for (long i = 0; i < g->k; i++) {
        x[i * VL + lane] = row[i];
        high = row[i] > high ? row[i] : high;
        low = row[i] < low ? row[i] : low;
        error += row[i] * 0.0f;
    }
    g->scales[n] = error == 0 ? (high - low) / 255 : NAN;
    g->lows[n] = low;
}

/* Round x[k][VL] to bytes, the words of VL packed columns; all bits of a lane of `kept` leave its words as they are. */
static void quantize_columns(const packing *g, const float *x, vf scale, vf low, vi kept, char *dst)
{
    const vf inverse = blend(scale > 0.0f, 1.0f / scale, splat(0.0f));
    vf error[RANK] = {0};
    vi word = splati(0);
    for (long i = 0; i < g->k; i++) {
        vf exact = *(const vf *)(x + i * VL), target = exact;
        for (int r = 0; g->feedback && r < RANK; r++) target = multiply_add(error[r], splat(-g->feedback[i * RANK + r]), target);
        vf scaled = vmax(splat(0.0f), -vmax(splat(-255.0f), -((target - low) * inverse)));
        vf rounded = scaled + 12582912.0f - 12582912.0f; /* adding 1.5 * 2^23 rounds to an integer */
        vf change = multiply_add(rounded, scale, low) - exact;
        for (int r = 0; g->feedback && r < RANK; r++) error[r] = multiply_add(change, splat(g->directions[i * RANK + r]), error[r]);
        word |= (__builtin_convertvector(rounded, vi) & 255) << (i % 4 * 8);
        if (i % 4 < 3 && i + 1 < g->k) continue;
        vi *words = (vi *)(dst + i / 4 * NR * 4);
        *words = (*words & kept) | (word & ~kept);
        word = splati(0);
    }
}

/* VL columns from packed column n on. */
static void pack_int8_columns(const packing *g, long n, float *row, float *x)
{
    char *dst = g->weights + n / NR * ((g->k + 3) / 4) * NR * 4 + n % NR * 4;
    int32_t kept[VL] __attribute__((aligned(64)));
    long num_kept = 0;
    for (long lane = 0; lane < VL; lane++) num_kept -= kept[lane] = g->rows[n + lane] == KEPT ? -1 : 0;
    if (num_kept == VL) return;
    for (long lane = 0; lane < VL; lane++) rotate_column(g, n + lane, row, x, lane);
    quantize_columns(g, x, *(const vf *)(g->scales + n), *(const vf *)(g->lows + n), *(const vi *)kept, dst);
}

static void pack_run(pool *p, void *arg, int id)
{
    const packing *g = arg;
    float *row = (float *)p->thread_scratch[id];
    const long step = g->format == I8 ? VL : 1;
    for (long q; (q = claim(p)) < (g->n + NR - 1) / NR;)
        for (long n = q * NR; n < (q + 1) * NR; n += step) {
            if (g->format == I8) pack_int8_columns(g, n, row, row + g->k + 16);
            else pack_column(g, n, row, (uint8_t *)(row + g->k + 16));
        }
}

/* `rows`, `scales` and `lows` have ps_columns(n) entries. */
int ps_pack(pool *p, const packing *g)
{
    if (!reserve_scratch(p, 0, (g->k + 16) * 4 * (g->format == I8 ? 1 + VL : 2))) return 0;
    run_on_pool(p, pack_run, (void *)g);
    return 1;
}

/* Rotate `rows` rows of n numbers as weights and activations are, in place. */
void ps_rotate(float *x, long rows, long n)
{
    for (long i = 0; i < rows; i++) rotate_blocks(x + i * n, n);
}

long ps_columns(long n) { return (n + NR - 1) / NR * NR; }
long ps_lanes(void) { return VL; }
