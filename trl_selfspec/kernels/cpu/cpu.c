/* What one decode step needs on x86 CPUs: linear layers, attention over the cache, norms, draws. This file holds what
 * they share and includes them.
 *
 * An output element is summed in an order that depends on its own row alone, never on the other rows or on
 * the number of threads: results are batch-invariant.
 * It needs AVX2 and FMA, and uses AVX-512 where `vectors.c` says so. It is compiled with -fopenmp but linked without an OpenMP runtime: the
 * symbols resolve to the runtime that torch has loaded, so both share one pool and torch.set_num_threads.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

static const double MIN_WORK = 1e5; /* multiply-adds that pay for waking one more thread */

enum { BF16 = 0, FP32 = 1 };

INLINE float from_bf16(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (f != f) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float load_scalar(const void *p, int64_t i, int dtype) {
    return dtype == BF16 ? from_bf16(((const uint16_t *)p)[i]) : ((const float *)p)[i];
}

INLINE void store_scalar(void *p, int64_t i, int dtype, float v) {
    if (dtype == BF16) ((uint16_t *)p)[i] = to_bf16(v);
    else ((float *)p)[i] = v;
}

INLINE float sum8(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static void *grown(void **buffer, size_t *capacity, size_t bytes) {
    if (bytes > *capacity) {
        free(*buffer);
        *capacity = (bytes + 4095) / 4096 * 4096;
        *buffer = aligned_alloc(4096, *capacity);
        if (!*buffer) abort();
    }
    return *buffer;
}

/* A buffer that outlives the call, one per thread. */
static void *scratch(size_t bytes) {
    static _Thread_local void *buffer;
    static _Thread_local size_t capacity;
    return grown(&buffer, &capacity, bytes);
}

INLINE __m256 load8(const void *p, int64_t i, int dtype) {
    if (dtype == FP32) return _mm256_loadu_ps((const float *)p + i);
    const __m128i v = _mm_loadu_si128((const __m128i *)((const uint16_t *)p + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

/* bf16 as the upper halves of eight floats. */
INLINE __m256i rounded8(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v), even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_and_si256(_mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan), _mm256_set1_epi32((int)0xffff0000));
}

INLINE __m256 round8(__m256 v, int dtype) {
    return dtype == FP32 ? v : _mm256_castsi256_ps(rounded8(v));
}

INLINE void store8(void *p, int64_t i, int dtype, __m256 v) {
    if (dtype == FP32) {
        _mm256_storeu_ps((float *)p + i, v);
        return;
    }
    const __m256i halves = _mm256_srli_epi32(rounded8(v), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128((__m128i *)((uint16_t *)p + i), packed);
}

/* Within 2 ulp of exp; 0 below -87, inf above 88.4, NaN for NaN. (Cephes' polynomial.) */
INLINE __m256 exp8(__m256 x) {
    const __m256 lowest = _mm256_set1_ps(-87.0f);
    const __m256 kept = _mm256_cmp_ps(x, lowest, _CMP_NLT_UQ);
    x = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(lowest, x)); /* a NaN stays: it is the second operand */
    const __m256 exponent = _mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f));
    const __m256 n = _mm256_round_ps(exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.3981999507e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(8.3334519073e-3f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(4.1665795894e-2f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(1.6666665459e-1f));
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(5.0000001201e-1f));
    y = _mm256_add_ps(_mm256_fmadd_ps(_mm256_mul_ps(y, x), x, x), _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(kept, _mm256_mul_ps(y, _mm256_castsi256_ps(power)));
}

/* Threads that `work` multiply-adds pay for. */
static int useful_threads(double work, int most) {
    if (omp_in_parallel()) return 1;
    return (int)MIN((double)most, 1 + work / MIN_WORK);
}

#include "vectors.c"
#include "linear.c"
#include "attention.c"
#include "norm.c"
#include "layer.c"
#include "sampling.c"
#include "matching.c"
