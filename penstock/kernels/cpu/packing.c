/* Packing of weights, once per load; the layout is described in linear.c. */

typedef struct {
    const char *const *rows; /* one source row per packed column; NULL is a column of zeros */
    long n, k;
    int32_t type, format;
    char *weights;
    float *scales;
    int32_t *offsets;
} packing;

static void pack_column(const packing *g, long n, float *row, uint8_t *bytes)
{
    long per = per_word(g->format), k = (g->k + per - 1) / per, size = g->format == F16 ? 2 : 4;
    char *dst = g->weights + (n / NR) * k * NR * size + (n % NR) * size;
    memset(row, 0, (g->k + 8) * sizeof *row);
    if (g->rows[n]) widen(row, g->rows[n], g->k, g->type);
    if (g->format == I8) {
        long sum = 0;
        memset(bytes, 128, g->k + 8);
        rotate_channels(row, g->k);
        quantize_row(bytes, row, g->k, &g->scales[n]);
        for (long i = 0; i < k * 4; i++) sum += (bytes[i] ^= 128, (int8_t)bytes[i]);
        g->offsets[n] = (int32_t)(128 * sum);
        for (long i = 0; i < k; i++) memcpy(dst + i * NR * 4, bytes + 4 * i, 4);
        return;
    }
    if (g->format != F32) narrow(bytes, row, g->k + 1, g->format);
    const char *src = g->format == F32 ? (char *)row : (char *)bytes;
    for (long i = 0; i < k; i++) memcpy(dst + i * NR * size, src + i * size, size);
}

static void pack_run(pool *p, void *arg, int id)
{
    const packing *g = arg;
    (void)id;
    float *row = malloc((g->k + 16) * 8);
    uint8_t *bytes = (uint8_t *)(row + g->k + 16);
    for (long q; (q = claim(p)) < (g->n + NR - 1) / NR;)
        for (long n = q * NR; n < (q + 1) * NR; n++) pack_column(g, n, row, bytes);
    free(row);
}

/* `rows`, `scales` and `offsets` have ps_columns(n) entries. */
void ps_pack(pool *p, const packing *g) { run_on_pool(p, pack_run, (void *)g); }
long ps_columns(long n) { return (n + NR - 1) / NR * NR; }
long ps_lanes(void) { return VL; }
