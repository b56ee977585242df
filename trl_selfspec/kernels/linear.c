/* Linear layers: y = x W^T + bias.
 *
 * bf16: weights in their own row-major layout, fp32 accumulation.
 * int4: unsigned nibbles with a scale and a shift per (row, group); activations are quantized to int8 per
 *   (row, group) on the fly, products are exact integers within a group.
 *
 * Work is split over output features. The order of a sum depends on K alone.
 */
enum { ROWS = 64 };            /* activation rows per pass: their block stays in L2 */
enum { KBLOCK = 1024 };        /* columns per partial sum; a constant of the result, see the top */
enum { FEATURES = 96 };        /* features per pass when there are many rows: divisible by every tile width */
enum { FEW_ROWS = 16 };        /* up to here a weight row is read in one sweep, which DRAM likes */
enum { GROUP_LANES = 32 };     /* int4 groups are multiples of this many codes */
enum { MAX_GROUP = 128 };      /* 4 products of at most 2*15*127 still fit into int16 */

typedef struct {
    int64_t m, n, k;
    const void *x;
    const void *w;
    const void *scale_shift; /* int4: (n, groups, 2) */
    const void *bias;
    void *y;
    int64_t group, groups; /* int4 */
    int x_dtype, scale_dtype, bias_dtype, y_dtype;
} Job;

INLINE void finish(const Job *j, int64_t row, int64_t feature, float sum) {
    if (j->bias) sum += load_scalar(j->bias, feature, j->bias_dtype);
    store_scalar(j->y, row * j->n + feature, j->y_dtype, sum);
}

/* ---- bf16 ---- */

/* Each 16 columns become 8 even ones, then 8 odd ones: the order in which a shift and a mask unpack weights. */
static void spread_row(const uint16_t *x, int64_t k, float *out) {
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    for (int64_t i = 0; i < k; i += 16) {
        uint16_t tail[16] = {0};
        const uint16_t *from = x + i;
        if (k - i < 16) {
            memcpy(tail, from, (size_t)(k - i) * 2);
            from = tail;
        }
        __m256i v = _mm256_loadu_si256((const __m256i *)from);
        _mm256_store_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)));
        _mm256_store_ps(out + i + 8, _mm256_castsi256_ps(_mm256_and_si256(v, odd)));
    }
}

/* One tile over columns [0, k): sum[r][c] += x_r . w_c. A short last step reads a zero-padded copy. */
INLINE void bf16_tile(const int R, const int C, const float *x, int64_t ldx, const uint16_t *w, int64_t ldw,
                      int64_t k, float *sum, int64_t lds, int64_t ahead) {
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    __m256 acc[4][4], v[4];
    uint16_t tail[4][16];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) acc[r][c] = _mm256_setzero_ps();
    const int64_t full = k & ~(int64_t)15;
/* Even columns, then odd ones: with 4 x 3 sums this needs exactly the 16 registers there are. */
#define HALF(UNPACK, X)                                                                                   \
    _Pragma("GCC unroll 8") for (int c = 0; c < C; c++) v[c] = _mm256_castsi256_ps(UNPACK);               \
    _Pragma("GCC unroll 8") for (int r = 0; r < R; r++) {                                                 \
        const __m256 xr = _mm256_load_ps((X) + r * ldx);                                                  \
        _Pragma("GCC unroll 8") for (int c = 0; c < C; c++) acc[r][c] = _mm256_fmadd_ps(xr, v[c], acc[r][c]); \
    }
#define STEP(WEIGHTS, X)                                                                                  \
    HALF(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(WEIGHTS)), 16), X)                        \
    HALF(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(WEIGHTS)), odd), (X) + 8)
    for (int64_t i = 0; i < full; i += 16) {
        if (ahead) {
#pragma GCC unroll 8
            for (int c = 0; c < C; c++) _mm_prefetch((const char *)(w + c * ldw + i + ahead), _MM_HINT_T0);
        }
        STEP(w + c * ldw + i, x + i)
    }
    if (full < k) {
        memset(tail, 0, sizeof tail);
        for (int c = 0; c < C; c++) memcpy(tail[c], w + c * ldw + full, (size_t)(k - full) * 2);
        STEP(tail[c], x + full)
    }
#undef STEP
#undef HALF
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int c = 0; c < C; c++) sum[r * lds + c] += sum8(acc[r][c]);
}

/* All rows against features [0, c) of one column block, c <= 4. */
static void bf16_rows(int64_t rows, int c, const float *x, int64_t ldx, const uint16_t *w, int64_t ldw, int64_t k,
                      float *sum, int64_t lds, int64_t ahead) {
    int64_t r = 0;
#define TILE(R, C) bf16_tile(R, C, x + r * ldx, ldx, w, ldw, k, sum + r * lds, lds, r ? 0 : ahead)
    while (r < rows) {
        const int64_t left = rows - r;
        if (c == 4) {
            switch (left) {
                case 1: TILE(1, 4); r += 1; break;
                case 2: TILE(2, 4); r += 2; break;
                default: TILE(3, 4); r += 3;
            }
        } else if (c == 3) {
            switch (left) {
                case 1: TILE(1, 3); r += 1; break;
                case 2: TILE(2, 3); r += 2; break;
                case 3: TILE(3, 3); r += 3; break;
                default: TILE(4, 3); r += 4;
            }
        } else {
            for (int i = 0; i < c; i++) bf16_tile(1, 1, x + r * ldx, ldx, w + i * ldw, ldw, k, sum + r * lds + i, lds, 0);
            r += 1;
        }
    }
#undef TILE
}

static void bf16_features(const Job *j, int64_t begin, int64_t end) {
    const int64_t ldx = (j->k + 15) / 16 * 16;
    const int64_t most = MIN(j->m, ROWS);
    float *x = scratch((size_t)(most * (ldx + FEATURES)) * sizeof(float));
    float *sum = x + most * ldx;
    for (int64_t row = 0; row < j->m; row += ROWS) {
        const int64_t rows = MIN(ROWS, j->m - row);
        const int width = rows % 4 == 0 || rows > 9 ? 3 : 4;
        for (int64_t r = 0; r < rows; r++) spread_row((const uint16_t *)j->x + (row + r) * j->k, j->k, x + r * ldx);
        const int64_t pass = rows <= FEW_ROWS ? width : FEATURES;
        for (int64_t f = begin; f < end; f += pass) {
            const int64_t features = MIN(pass, end - f);
            const int64_t ahead = f + 2 * pass <= end && rows <= FEW_ROWS ? pass * j->k : 0;
            memset(sum, 0, (size_t)(rows * FEATURES) * sizeof(float));
            for (int64_t k = 0; k < j->k; k += KBLOCK)
                for (int64_t c = 0; c < features; c += width)
                    bf16_rows(rows, (int)MIN(width, features - c), x + k, ldx,
                              (const uint16_t *)j->w + (f + c) * j->k + k, j->k, MIN(KBLOCK, j->k - k), sum + c,
                              FEATURES, ahead);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = 0; c < features; c++) finish(j, row + r, f + c, sum[r * FEATURES + c]);
        }
    }
}

/* ---- int4 ---- */

/* x ~ scale * q per group; `total` is scale * sum(q), which multiplies the weights' shift. Padding is zero. */
static void quantize_row(const Job *j, const void *x, int64_t offset, int8_t *q, float *scale, float *total) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (int64_t g = 0; g < j->groups; g++) {
        const int64_t from = g * j->group, vectors = j->group / 8;
        float padded[MAX_GROUP] = {0};
        const void *in = x;
        int64_t at = offset + from;
        int dtype = j->x_dtype;
        if (from + j->group > j->k) {
            for (int64_t i = 0; from + i < j->k; i++) padded[i] = load_scalar(x, at + i, dtype);
            in = padded, at = 0, dtype = FP32;
        }
        __m256 top = _mm256_setzero_ps(), nan = top;
        for (int64_t i = 0; i < vectors; i++) {
            const __m256 v = load8(in, at + 8 * i, dtype);
            top = _mm256_max_ps(top, _mm256_and_ps(v, magnitude));
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        }
        __m128 t = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
        t = _mm_max_ps(t, _mm_movehl_ps(t, t));
        const float peak = _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
        const __m256 inverse = _mm256_set1_ps(peak > 0 ? 127.0f / peak : 0);
        __m256i sum = _mm256_setzero_si256();
        for (int64_t i = 0; i < vectors; i++) {
            const __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(load8(in, at + 8 * i, dtype), inverse));
            const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
            _mm_storel_epi64((__m128i *)(q + from + 8 * i), _mm_packs_epi16(half, half));
            sum = _mm256_add_epi32(sum, code);
        }
        int32_t lanes[8], codes = 0;
        _mm256_storeu_si256((__m256i *)lanes, sum);
        for (int i = 0; i < 8; i++) codes += lanes[i];
        scale[g] = _mm256_movemask_ps(nan) ? NAN : peak / 127.0f;
        total[g] = scale[g] * (float)codes;
    }
}

/* R rows against one feature. `blocks` = group / 32. */
INLINE void int4_tile(const int R, const int blocks, const int scale_dtype, const Job *j, int64_t feature,
                      const int8_t *q, int64_t ldq, const float *scale, const float *total, int64_t row) {
    const __m256i nibble = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
    const uint8_t *w = (const uint8_t *)j->w + feature * j->groups * (j->group / 2);
    const int64_t first = feature * j->groups * 2;
    __m256 acc[4];
    float shifted[4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r] = _mm256_setzero_ps(), shifted[r] = 0;
    for (int64_t g = 0; g < j->groups; g++, w += blocks * 16) {
        __m256i codes[4];
#pragma GCC unroll 4
        for (int b = 0; b < blocks; b++) {
            const __m128i packed = _mm_loadu_si128((const __m128i *)(w + b * 16));
            codes[b] = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), nibble);
        }
        const float w_scale = load_scalar(j->scale_shift, first + 2 * g, scale_dtype);
        const float w_shift = load_scalar(j->scale_shift, first + 2 * g + 1, scale_dtype);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const int8_t *qr = q + r * ldq + g * blocks * 32;
            __m256i dot = _mm256_maddubs_epi16(codes[0], _mm256_load_si256((const __m256i *)qr));
#pragma GCC unroll 4
            for (int b = 1; b < blocks; b++)
                dot = _mm256_add_epi16(dot, _mm256_maddubs_epi16(codes[b], _mm256_load_si256((const __m256i *)qr + b)));
            const __m256 exact = _mm256_cvtepi32_ps(_mm256_madd_epi16(dot, one));
            acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(w_scale * scale[r * j->groups + g]), exact, acc[r]);
            shifted[r] = fmaf(w_shift, total[r * j->groups + g], shifted[r]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) finish(j, row + r, feature, sum8(acc[r]) - shifted[r]);
}

INLINE void int4_features(const int blocks, const int scale_dtype, const Job *j, int64_t begin, int64_t end) {
    const int64_t ldq = j->groups * j->group;
    const int64_t most = MIN(j->m, ROWS);
    float *scale = scratch((size_t)(most * (ldq + 8 * j->groups) + 64));
    float *total = scale + most * j->groups;
    int8_t *q = (int8_t *)(((uintptr_t)(total + most * j->groups) + 31) & ~(uintptr_t)31);
    for (int64_t row = 0; row < j->m; row += ROWS) {
        const int64_t rows = MIN(ROWS, j->m - row);
        for (int64_t r = 0; r < rows; r++)
            quantize_row(j, j->x, (row + r) * j->k, q + r * ldq, scale + r * j->groups, total + r * j->groups);
        for (int64_t f = begin; f < end; f += FEW_ROWS) /* these weights stay in L1 for all rows */
            for (int64_t r = 0; r < rows;) {
                const int64_t left = rows - r, last = MIN(end, f + FEW_ROWS);
#define SWEEP(R)                                                                                                 \
    for (int64_t c = f; c < last; c++)                                                                           \
        int4_tile(R, blocks, scale_dtype, j, c, q + r * ldq, ldq, scale + r * j->groups, total + r * j->groups,  \
                  row + r);                                                                                      \
    r += R;
                if (left >= 4) { SWEEP(4) }
                else if (left == 3) { SWEEP(3) }
                else if (left == 2) { SWEEP(2) }
                else { SWEEP(1) }
#undef SWEEP
            }
    }
}

#define SPECIALISE(BLOCKS)                                                                            \
    static void int4_features_##BLOCKS(const Job *j, int64_t begin, int64_t end) {                    \
        if (j->scale_dtype == BF16) int4_features(BLOCKS, BF16, j, begin, end);                       \
        else int4_features(BLOCKS, FP32, j, begin, end);                                              \
    }
SPECIALISE(1)
SPECIALISE(2)
SPECIALISE(3)
SPECIALISE(4)

/* ---- entry point ---- */

typedef void (*Features)(const Job *, int64_t, int64_t);

typedef struct { /* what stays the same from call to call; 8 bytes each, as Python packs them */
    int64_t n, k;
    int64_t group; /* of int4 weights; 0: bf16 weights */
    int64_t x_dtype, scale_dtype, bias_dtype;
} LinearSpec;

void linear(const LinearSpec *spec, int threads, int64_t m, const void *x, const void *w, const void *scale_shift,
            const void *bias, void *y) {
    static const Features bodies[] = {bf16_features, int4_features_1, int4_features_2, int4_features_3, int4_features_4};
    const Features body = bodies[spec->group / GROUP_LANES];
    const Job j = {.m = m, .n = spec->n, .k = spec->k, .x = x, .w = w, .scale_shift = scale_shift, .bias = bias, .y = y,
                   .group = spec->group, .groups = spec->group ? (spec->k + spec->group - 1) / spec->group : 0,
                   .x_dtype = (int)spec->x_dtype, .scale_dtype = (int)spec->scale_dtype,
                   .bias_dtype = (int)spec->bias_dtype, .y_dtype = (int)spec->x_dtype};
    threads = useful_threads((double)m * (double)j.n * (double)j.k, threads);
    if (threads <= 1) {
        body(&j, 0, j.n);
        return;
    }
    const int64_t units = (j.n + 11) / 12; /* whole tiles for either tile width */
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        body(&j, MIN(j.n, units * me / all * 12), MIN(j.n, units * (me + 1) / all * 12));
    }
}
