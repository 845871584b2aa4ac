/* Matrix tiles, which x86 calls AMX: registers of TILE rows of TILE words. c[TILE][TILE] += a[TILE][k] b[k][TILE] takes
 * TILE words along k at once, of 2 BF16 or 4 I8 numbers each. A panel of packed weights is two operands b side by side.
 *
 * With tiles all BF16 products use them, also those of one row: their sums round otherwise than those of vectors, and a
 * row must not depend on how many others there are. I8 sums are of integers, hence the same either way.
 *
 * EMULATED_TILES computes the same on any CPU with vectors of 16 numbers; it is for tests. */
enum { TILE = 16, PAIR = 2 * TILE }; /* a product takes one or two tiles of rows at a time */

/* The registers: sums of the first and the second tile of rows with the left and the right half of a panel; operands. */
#define UPPER_LEFT 0
#define UPPER_RIGHT 1
#define LOWER_LEFT 2
#define LOWER_RIGHT 3
#define UPPER_A 4
#define LOWER_A 5
#define LEFT_B 6
#define RIGHT_B 7

#if defined(EMULATED_TILES)
#define HAVE_TILES
static const int tiles_allowed = 1;
static _Thread_local int32_t emulated[8][TILE][TILE];

static void tiles_begin(void) {}
static void tiles_end(void) {}
static void tile_zero(int t) { memset(emulated[t], 0, sizeof emulated[t]); }
static void tile_load(int t, const void *from, long stride)
{
    for (int i = 0; i < TILE; i++) memcpy(emulated[t][i], (const char *)from + i * stride, TILE * 4);
}
static void tile_store(int t, void *to, long stride)
{
    for (int i = 0; i < TILE; i++) memcpy((char *)to + i * stride, emulated[t][i], TILE * 4);
}
static float bf16_of(int32_t word, int high)
{
    union { uint32_t u; float f; } x = {high ? (uint32_t)word & 0xffff0000 : (uint32_t)word << 16};
    return x.f;
}
static void tile_dot_bf16(int c, int a, int b)
{
    for (int m = 0; m < TILE; m++)
        for (int n = 0; n < TILE; n++) {
            float sums[2] = {0, 0}, sum;
            for (int k = 0; k < TILE; k++)
                for (int high = 0; high < 2; high++) sums[high] += bf16_of(emulated[a][m][k], high) * bf16_of(emulated[b][k][n], high);
            memcpy(&sum, &emulated[c][m][n], 4);
            sum += sums[0] + sums[1];
            memcpy(&emulated[c][m][n], &sum, 4);
        }
}
static void tile_dot_i8(int c, int a, int b)
{
    for (int m = 0; m < TILE; m++)
        for (int n = 0; n < TILE; n++)
            for (int k = 0; k < 4 * TILE; k++)
                emulated[c][m][n] += (int8_t)(emulated[a][m][k / 4] >> 8 * (k % 4)) * (uint8_t)(emulated[b][k / 4][n] >> 8 * (k % 4));
}
#elif defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#define HAVE_TILES
#include <sys/syscall.h>
#include <unistd.h>

static int tiles_allowed;
/* Linux gives a process these registers on request, unless a thread has too small a stack for signals to save them. */
__attribute__((constructor)) static void request_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    tiles_allowed = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}
/* Compilers do not know that these instructions read and write memory. */
#define MEMORY() __asm__ volatile("" ::: "memory")
static void tiles_begin(void)
{
    struct { uint8_t palette, start_row, zero[14]; uint16_t row_bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int t = 0; t < 8; t++) config.row_bytes[t] = TILE * 4, config.rows[t] = TILE;
    MEMORY();
    _tile_loadconfig(&config);
}
static void tiles_end(void) { _tile_release(); }
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride) do { MEMORY(); _tile_loadd(t, from, stride); } while (0)
#define tile_store(t, to, stride) do { _tile_stored(t, to, stride); MEMORY(); } while (0)
#define tile_dot_bf16(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_dot_i8(c, a, b) _tile_dpbsud(c, a, b) /* a signed, b unsigned */
#else
static const int tiles_allowed = 0;
static void tiles_begin(void) {}
static void tiles_end(void) {}
#endif

#if defined(HAVE_TILES)
#define TILE_DOT(c, a, b) do { if (f == I8) tile_dot_i8(c, a, b); else tile_dot_bf16(c, a, b); } while (0)

/* Words [0, TILE) along k of one or two tiles of rows, `a` and a + lower bytes, and of a panel; rows of a are adjacent. */
INLINE void tile_step(const int f, const int pair, const char *a, long lower, const char *b)
{
    tile_load(LEFT_B, b, NR * 4);
    tile_load(RIGHT_B, b + VL * 4, NR * 4);
    tile_load(UPPER_A, a, TILE * 4);
    TILE_DOT(UPPER_LEFT, UPPER_A, LEFT_B);
    TILE_DOT(UPPER_RIGHT, UPPER_A, RIGHT_B);
    if (!pair) return;
    tile_load(LOWER_A, a + lower, TILE * 4);
    TILE_DOT(LOWER_LEFT, LOWER_A, LEFT_B);
    TILE_DOT(LOWER_RIGHT, LOWER_A, RIGHT_B);
}

INLINE void zero_sums(void) { tile_zero(UPPER_LEFT); tile_zero(UPPER_RIGHT); tile_zero(LOWER_LEFT); tile_zero(LOWER_RIGHT); }

INLINE void store_sums(const int pair, void *to) /* [PAIR][NR] */
{
    char *left = to, *right = left + VL * 4, *below = left + TILE * NR * 4;
    tile_store(UPPER_LEFT, left, NR * 4);
    tile_store(UPPER_RIGHT, right, NR * 4);
    if (!pair) return;
    tile_store(LOWER_LEFT, below, NR * 4);
    tile_store(LOWER_RIGHT, below + VL * 4, NR * 4);
}

/* Add the sums over block g of k to those in c[rows][NR], scaled, and begin anew: as `add_block`. */
INLINE void add_tile_block(const int pair, long rows, const float *scales, long blocks, long g, float *c)
{
    int32_t sums[PAIR * NR];
    store_sums(pair, sums);
    zero_sums();
    for (long i = 0; i < rows; i++)
        for (int j = 0; j < NR; j += VL) {
            vf *sum = (vf *)(c + i * NR + j);
            *sum = multiply_add(to_float(*(const vi *)(sums + i * NR + j)), splat(scales[i * blocks + g]), g ? *sum : splat(0.0f));
        }
}

/* Up to PAIR rows with one panel of weights b[k][NR]: c[rows][NR] = a b. Rows are packed as [k / TILE][TILE][TILE] words
 * for each tile, zero beyond k and beyond the rows. Prefetches `step` bytes at `ahead` for each TILE words along k. */
INLINE void tile_kernel(
    const int f, const int pair, long rows, const char *a, const float *scales, const char *b, long k, const char *ahead, long step, float *c)
{
    const long full = k / TILE, steps = (k + TILE - 1) / TILE, lower = steps * TILE * TILE * 4, blocks = blocks_of(k);
    int32_t last[TILE * NR];
    zero_sums();
    for (long s = 0; s < steps; s++, a += TILE * TILE * 4, b += TILE * NR * 4, ahead += step) {
        if (f == I8 && s && s % (BLOCK_WORDS / TILE) == 0) add_tile_block(pair, rows, scales, blocks, s / (BLOCK_WORDS / TILE) - 1, c);
        if (s == full) { /* behind the panel are weights of another, or nothing */
            memset(last, 0, sizeof last);
            memcpy(last, b, (k - full * TILE) * NR * 4);
            b = (const char *)last;
        }
        prefetch(ahead, step);
        tile_step(f, pair, a, lower, b);
    }
    if (f == I8) add_tile_block(pair, rows, scales, blocks, blocks - 1, c);
    else store_sums(pair, c);
}

static void multiply_tile(int f, long rows, const char *a, const float *scales, const char *b, long k, const char *ahead, long step, float *c)
{
    if (f == I8 && rows > TILE) tile_kernel(I8, 1, rows, a, scales, b, k, ahead, step, c);
    else if (f == I8) tile_kernel(I8, 0, rows, a, scales, b, k, ahead, step, c);
    else if (rows > TILE) tile_kernel(BF16, 1, rows, a, scales, b, k, ahead, step, c);
    else tile_kernel(BF16, 0, rows, a, scales, b, k, ahead, step, c);
}
#else
static void multiply_tile(int f, long rows, const char *a, const float *scales, const char *b, long k, const char *ahead, long step, float *c) {}
#endif
