/* The hot operations of a forward pass on a CPU, as one translation unit of GNU C (gcc or clang).
 *
 * Owns a pool of threads and its scratch; every tensor is the caller's. `build.py` compiles it on first use for the
 * instruction set of this CPU, `native.py` loads it; `reference.py` and the tests hold the arithmetic in plain torch.
 *
 * Invariant, which makes outputs deterministic: a row of the output depends on its own inputs alone and is summed in one
 * order, whatever other rows, chunks, tiles and threads there are. Products sum over k in order, matrix tiles over TILE
 * words of it at once; attention goes over keys in tiles that begin at multiples of KEYS, and a tile that is masked as a
 * whole changes nothing.
 */
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#elif defined(__aarch64__)
#include <arm_neon.h>
#define PAUSE() ((void)0)
#else
#define PAUSE() ((void)0)
#endif

#include "vectors.h"
#include "pool.c"
#include "microkernels.h"
#include "tiles.h"
#include "norms.c"
#include "quantization.c"
#include "low_rank.c"
#include "linear.c"
#include "low_rank_packing.c"
#include "packing.c"
#include "kv_cache.c"
#include "rotary.c"
#include "attention.c"
#include "program.c"
#include "logits.c"

/* Size of a structure that Python mirrors, 0 for an unknown name: `native.py` compares all of them when it loads this. */
long ps_size_of(const char *name)
{
#define STRUCTURE(type) if (!strcmp(name, #type)) return sizeof(type);
    STRUCTURE(norm) STRUCTURE(linear) STRUCTURE(packing) STRUCTURE(kv_cache) STRUCTURE(attention_metadata)
    STRUCTURE(attention) STRUCTURE(rotary) STRUCTURE(operation) STRUCTURE(program) STRUCTURE(logit_summary)
    STRUCTURE(allowed_argmax) STRUCTURE(token_draw) STRUCTURE(masked_copy) STRUCTURE(low_rank) STRUCTURE(low_rank_part)
    STRUCTURE(low_rank_layer) STRUCTURE(greatest_logits)
#undef STRUCTURE
    return 0;
}
