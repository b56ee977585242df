/* Linear layers: y = x W^T + bias.
 *
 * bf16 and fp32: weights in their own row-major layout, fp32 accumulation.
 * int4: unsigned nibbles with a scale and a shift per (row, group); activations are quantized to int8 per
 *   (row, group) on the fly, products are exact integers within a group.
 *
 * Work is split over output features. The order of a sum depends on K alone.
 */
enum { ROWS = 64 };        /* activation rows per pass */
enum { GROUP = 12 };       /* features per pass: divisible by every tile width */
enum { TILE_ROWS = 8 };    /* the most rows of a tile */
enum { X_BLOCK = 24576 };  /* bytes of activations of a block of columns: they stay in L1 */
enum { GROUP_LANES = 32 }; /* int4 groups are multiples of this many codes */
enum { MAX_GROUP = 128 };  /* 4 products of at most 2*15*127 still fit into int16 */
enum { FEATURES = 16 };    /* int4 features per pass: they stay in L1 for all rows */

typedef struct {
    int64_t m, n, k;
    const void *x;
    const void *w;
    const void *scale_shift; /* int4: (n, groups, 2) */
    const void *bias;
    void *y;
    const char *next; /* what will be read after w */
    int64_t group, groups; /* int4 */
    int x_dtype, scale_dtype, bias_dtype, y_dtype;
} Job;

INLINE void finish(const Job *j, int64_t row, int64_t feature, float sum) {
    if (j->bias) sum += load_scalar(j->bias, feature, j->bias_dtype);
    store_scalar(j->y, row * j->n + feature, j->y_dtype, sum);
}

/* `finish` for up to GROUP features of a row, from sums lane by lane. */
static void finish_group(const Job *j, int64_t row, int64_t feature, int64_t count, const Lanes *sum) {
    float sums[GROUP];
    for (int64_t c = 0; c < count; c += 4) {
        const __m256 ab = _mm256_hadd_ps(eight_sums(sum[c]), eight_sums(sum[c + 1]));
        const __m256 cd = _mm256_hadd_ps(eight_sums(sum[c + 2]), eight_sums(sum[c + 3]));
        const __m256 all = _mm256_hadd_ps(ab, cd);
        _mm_storeu_ps(sums + c, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
    }
    for (int64_t c = 0; c < count; c++) finish(j, row, feature + c, sums[c]);
}

/* ---- bf16 and fp32 ---- */

/* Whether x and weights stay pairs of bf16, which one instruction multiplies. */
INLINE int in_pairs(const int type) { return WIDE && type == BF16; }

/* A row padded with zeros to whole steps, as tiles read it. Without an instruction for pairs, each 16 columns of bf16
 * become 8 even ones, then 8 odd ones: the order in which a shift and a mask unpack weights. */
INLINE void spread_row(const int type, const char *x, int64_t k, float *out) {
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    if (type == FP32 || in_pairs(type)) {
        const size_t size = type == FP32 ? 4 : 2;
        memcpy(out, x, (size_t)k * size);
        memset((char *)out + (size_t)k * size, 0, (size_t)(-k & (STEP - 1)) * size);
        return;
    }
    for (int64_t i = 0; i < k; i += 16) {
        uint16_t tail[16] = {0};
        const char *from = x + 2 * i;
        if (k - i < 16) from = memcpy(tail, from, (size_t)(k - i) * 2);
        const __m256i v = _mm256_loadu_si256((const __m256i *)from);
        _mm256_store_ps(out + i, _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)));
        _mm256_store_ps(out + i + 8, _mm256_castsi256_ps(_mm256_and_si256(v, odd)));
    }
}

/* The weights of a step: all in pairs, or those that meet the first or second vector of `spread_row`. */
INLINE Lanes unpack(const int type, const int half, const char *w) {
#if !WIDE
    const __m256i pairs = _mm256_loadu_si256((const __m256i *)w), odd = _mm256_set1_epi32((int)0xffff0000);
    if (type == BF16) return _mm256_castsi256_ps(half ? _mm256_and_si256(pairs, odd) : _mm256_slli_epi32(pairs, 16));
#endif
    return load_lanes(w + (in_pairs(type) ? 0 : 4 * LANES * half));
}

/* One tile over columns [0, k), a multiple of STEP: sum[r][c] += x_r . w_c, lane by lane. Each step also asks for a
 * piece of the weights that come next, so that memory is busy while products are computed. `ldx` and `ldw` are bytes. */
INLINE void dense_tile(const int type, const int R, const int C, const char *x, int64_t ldx, const char *w,
                       int64_t ldw, int64_t k, Lanes *sum, const char *ahead, int64_t pace) {
    const int size = type == BF16 ? 2 : 4, x_size = in_pairs(type) ? 2 : 4, halves = x_size / 2;
    Lanes acc[TILE_ROWS][4], v[4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) acc[r][c] = sum[r * GROUP + c];
    for (int64_t i = 0; i < k; i += STEP, ahead += pace) {
#pragma GCC unroll 8
        for (int line = 0; line < (C * size * STEP + 63) / 64; line++) _mm_prefetch(ahead + 64 * line, _MM_HINT_T1);
#pragma GCC unroll 2
        for (int half = 0; half < halves; half++) {
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) v[c] = unpack(type, half, w + c * ldw + i * size);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const Lanes xr = load_lanes(x + r * ldx + i * x_size + 4 * LANES * half);
#pragma GCC unroll 4
                for (int c = 0; c < C; c++)
                    acc[r][c] = in_pairs(type) ? dot_pairs(acc[r][c], xr, v[c]) : multiply_add(xr, v[c], acc[r][c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sum[r * GROUP + c] = acc[r][c];
}

/* Features of a tile, by its rows: at most 12 sums of AVX2's 16 registers, 24 of AVX-512's 32. */
static const int TILE_WIDTH[2][TILE_ROWS + 1] = {{0, 4, 4, 3, 3, 2, 2, 1, 1}, {0, 4, 4, 4, 4, 4, 4, 3, 3}};

/* Rows per tile if `rows` are split as evenly as can be. */
static int64_t tile_height(int64_t rows) {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    return (rows + tiles - 1) / tiles;
}

/* All rows against up to GROUP features over columns [0, k); returns how far ahead it has asked. */
INLINE const char *dense_block(const int type, int64_t rows, int64_t features, const char *x, int64_t ldx,
                               const char *w, int64_t ldw, int64_t k, Lanes *sum, const char *ahead, int64_t pace) {
    const int64_t most = tile_height(rows);
    for (int64_t r = 0; r < rows; r += most) {
        const int64_t height = MIN(most, rows - r), widest = TILE_WIDTH[WIDE][height];
        for (int64_t c = 0, width; c < features; c += width, ahead += k / STEP * pace) {
            width = features - c >= widest ? widest : 1;
#define TILE(R, C)                                                                                                  \
    case R * 8 + C:                                                                                                 \
        dense_tile(type, R, C, x + r * ldx, ldx, w + c * ldw, ldw, k, sum + r * GROUP + c, ahead, pace);            \
        break;
            switch (height * 8 + width) {
#if WIDE
                TILE(1, 4) TILE(2, 4) TILE(3, 4) TILE(4, 4) TILE(5, 4) TILE(6, 4) TILE(7, 3) TILE(8, 3)
                TILE(7, 1) TILE(8, 1)
#else
                TILE(1, 4) TILE(2, 4) TILE(3, 3) TILE(4, 3) TILE(5, 2) TILE(6, 2) TILE(7, 1) TILE(8, 1)
#endif
                TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
            }
#undef TILE
        }
    }
    return ahead;
}

INLINE void dense_features(const int type, const Job *j, int64_t begin, int64_t end) {
    const int64_t size = type == BF16 ? 2 : 4, ldw = j->k * size, x_size = in_pairs(type) ? 2 : 4;
    const int64_t full = j->k & ~(int64_t)(STEP - 1), ldx = ((j->k + STEP - 1) & ~(int64_t)(STEP - 1)) * x_size;
    const int64_t most = MIN(j->m, ROWS);
    Lanes *sum = scratch((size_t)(most * ldx) + (size_t)(most * GROUP) * sizeof(Lanes));
    char *x = (char *)(sum + most * GROUP);
    for (int64_t row = 0; row < j->m; row += ROWS) {
        const int64_t rows = MIN(ROWS, j->m - row), block = MAX(256, X_BLOCK / x_size / rows & ~(int64_t)(STEP - 1));
        double tiles = 0; /* that pass over a weight */
        for (int64_t r = 0, h = tile_height(rows); r < rows; r += h) tiles += 1.0 / TILE_WIDTH[WIDE][MIN(h, rows - r)];
        for (int64_t r = 0; r < rows; r++)
            spread_row(type, (const char *)j->x + (row + r) * ldw, j->k, (float *)(x + r * ldx));
        for (int64_t f = begin; f < end; f += GROUP) {
            const int64_t features = MIN(GROUP, end - f), pace = (int64_t)(STEP * size / tiles);
            const char *w = (const char *)j->w + f * ldw, *ahead = f + GROUP < end ? w + GROUP * ldw : j->next;
            for (int64_t i = 0; i < rows * GROUP; i++) sum[i] = zero_lanes();
            for (int64_t k = 0; k < full; k += block)
                ahead = dense_block(type, rows, features, x + k * x_size, ldx, w + k * size, ldw, MIN(block, full - k),
                                    sum, ahead, pace);
            if (full < j->k) {
                char tail[GROUP * STEP * 4] = {0};
                for (int64_t c = 0; c < features; c++)
                    memcpy(tail + c * STEP * size, w + c * ldw + full * size, (size_t)((j->k - full) * size));
                dense_block(type, rows, features, x + full * x_size, ldx, tail, STEP * size, STEP, sum, ahead, 0);
            }
            for (int64_t r = 0; r < rows; r++) finish_group(j, row + r, f, features, sum + r * GROUP);
        }
    }
}

static void bf16_features(const Job *j, int64_t begin, int64_t end) { dense_features(BF16, j, begin, end); }
static void fp32_features(const Job *j, int64_t begin, int64_t end) { dense_features(FP32, j, begin, end); }

/* ---- int4 ---- */

/* Where the i-th 8 of a group's activations meet their codes. 32 bytes of codes at a time are unpacked: 0..15 and
 * 32..47 from the low nibbles, then 16..31 and 48..63 from the high ones. */
INLINE int64_t nibble_order(int64_t i, int64_t vectors) {
    static const int8_t swap[8] = {0, 1, 4, 5, 2, 3, 6, 7};
    return i < vectors / 8 * 8 ? (i & ~(int64_t)7) + swap[i & 7] : i;
}

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
            _mm_storel_epi64((__m128i *)(q + from + 8 * nibble_order(i, vectors)), _mm_packs_epi16(half, half));
            sum = _mm256_add_epi32(sum, code);
        }
        int32_t lanes[8], codes = 0;
        _mm256_storeu_si256((__m256i *)lanes, sum);
        for (int i = 0; i < 8; i++) codes += lanes[i];
        scale[g] = _mm256_movemask_ps(nan) ? NAN : peak / 127.0f;
        total[g] = scale[g] * (float)codes;
    }
}

/* Scales and shifts of the next n <= 8 groups; zero beyond. */
INLINE void load_scales(const int scale_dtype, const void *scale_shift, int64_t n, __m256 *scales, __m256 *shifts) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    if (scale_dtype == BF16) {
        const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
        const __m256i pairs = _mm256_maskload_epi32(scale_shift, mask);
        *scales = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
        *shifts = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
        return;
    }
    const float *from = scale_shift;
    const __m256i left = _mm256_set1_epi32((int)(2 * n));
    const __m256 a = _mm256_maskload_ps(from, _mm256_cmpgt_epi32(left, lane));
    const __m256 b = _mm256_maskload_ps(from + 8, _mm256_cmpgt_epi32(left, _mm256_add_epi32(lane, _mm256_set1_epi32(8))));
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    *scales = _mm256_shuffle_ps(low, high, 0x88);
    *shifts = _mm256_shuffle_ps(low, high, 0xdd);
}

/* Products of a group's codes and activations, summed lane by lane; they are exact either way. */
INLINE __m256i dot_codes(const int blocks, const __m256i *codes, const __m256i *q) {
#if WIDE && !defined(EMULATE)
    __m256i dot = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int b = 0; b < blocks; b++) dot = _mm256_dpbusd_epi32(dot, codes[b], _mm256_load_si256(q + b));
    return dot;
#else
    __m256i dot = _mm256_maddubs_epi16(codes[0], _mm256_load_si256(q));
#pragma GCC unroll 4
    for (int b = 1; b < blocks; b++)
        dot = _mm256_add_epi16(dot, _mm256_maddubs_epi16(codes[b], _mm256_load_si256(q + b)));
    return _mm256_madd_epi16(dot, _mm256_set1_epi16(1));
#endif
}

/* R rows against one feature. `blocks` = group / 32; `lds` is the rows' stride of scale and total. */
INLINE void int4_tile(const int R, const int blocks, const int scale_dtype, const Job *j, int64_t feature,
                      const int8_t *q, int64_t ldq, const float *scale, const float *total, int64_t lds, int64_t row,
                      const char *ahead) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const int64_t bytes = j->groups * blocks * 16, pair = scale_dtype == BF16 ? 4 : 8;
    const uint8_t *w = (const uint8_t *)j->w + feature * bytes;
    const char *scale_shift = (const char *)j->scale_shift + feature * j->groups * pair;
    __m256 acc[4], shifted[4];
    float product[4][8] __attribute__((aligned(32)));
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) acc[r] = shifted[r] = _mm256_setzero_ps();
    for (int64_t first = 0; first < j->groups; first += 8) {
        const int64_t n = MIN(8, j->groups - first);
        __m256 scales, shifts;
        load_scales(scale_dtype, scale_shift + first * pair, n, &scales, &shifts);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            _mm256_store_ps(product[r], _mm256_mul_ps(scales, _mm256_loadu_ps(scale + r * lds + first)));
            shifted[r] = _mm256_fmadd_ps(shifts, _mm256_loadu_ps(total + r * lds + first), shifted[r]);
        }
        for (int64_t g = 0; g < n; g++, w += blocks * 16) {
            __m256i codes[4];
            _mm_prefetch(ahead, _MM_HINT_T1);
            ahead += blocks * 16;
#pragma GCC unroll 4
            for (int b = 0; b + 1 < blocks; b += 2) {
                const __m256i packed = _mm256_loadu_si256((const __m256i *)(w + b * 16));
                codes[b] = _mm256_and_si256(packed, nibble);
                codes[b + 1] = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
            }
            if (blocks % 2) {
                const __m128i packed = _mm_loadu_si128((const __m128i *)(w + (blocks - 1) * 16));
                codes[blocks - 1] = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), nibble);
            }
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const __m256i *qr = (const __m256i *)(q + r * ldq + (first + g) * blocks * 32);
                const __m256 exact = _mm256_cvtepi32_ps(dot_codes(blocks, codes, qr));
                acc[r] = _mm256_fmadd_ps(_mm256_broadcast_ss(&product[r][g]), exact, acc[r]);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) finish(j, row + r, feature, sum8(_mm256_sub_ps(acc[r], shifted[r])));
}

INLINE void int4_features(const int blocks, const int scale_dtype, const Job *j, int64_t begin, int64_t end) {
    const int64_t ldq = j->groups * j->group, lds = (j->groups + 7) / 8 * 8;
    const int64_t most = MIN(j->m, ROWS);
    float *scale = scratch((size_t)(most * (ldq + 8 * lds)));
    float *total = scale + most * lds;
    int8_t *q = (int8_t *)(total + most * lds);
    memset(scale, 0, (size_t)(8 * most * lds));
    for (int64_t row = 0; row < j->m; row += ROWS) {
        const int64_t rows = MIN(ROWS, j->m - row);
        for (int64_t r = 0; r < rows; r++)
            quantize_row(j, j->x, (row + r) * j->k, q + r * ldq, scale + r * lds, total + r * lds);
        for (int64_t f = begin; f < end; f += FEATURES)
            for (int64_t r = 0; r < rows;) {
                const int64_t left = rows - r, last = MIN(end, f + FEATURES), bytes = ldq / 2;
                const char *ahead = last < end ? (const char *)j->w + last * bytes : j->next;
#define SWEEP(R)                                                                                              \
    for (int64_t c = f; c < last; c++)                                                                        \
        int4_tile(R, blocks, scale_dtype, j, c, q + r * ldq, ldq, scale + r * lds, total + r * lds, lds, row + r, \
                  ahead + (c - f) * bytes);                                                                   \
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

typedef struct { /* 8 bytes each, as Python packs them */
    const void *w, *scale_shift, *bias;
    int64_t n, k;
    int64_t group; /* of int4 weights; 0: weights of x's dtype */
    int64_t scale_dtype, bias_dtype;
} Matrix;

/* The features of thread `me` begin here: whole passes, and whole vectors. */
INLINE int64_t first_feature(int64_t n, int64_t me, int64_t all) {
    return MIN(n, (n + 2 * GROUP - 1) / (2 * GROUP) * me / all * (2 * GROUP));
}

static const char *row_of(const Matrix *w, int64_t feature, int dtype) {
    const int64_t groups = w->group ? (w->k + w->group - 1) / w->group : 0;
    return (const char *)w->w + feature * (w->group ? groups * w->group / 2 : w->k * (dtype == BF16 ? 2 : 4));
}

/* The part of thread `me` of y = x W^T + bias; x and y have the same dtype. `next` is multiplied by after it. */
static void project(const Matrix *w, const Matrix *next, int64_t m, const void *x, void *y, int dtype, int64_t me,
                    int64_t all) {
    static const Features bodies[] = {bf16_features, int4_features_1, int4_features_2, int4_features_3, int4_features_4};
    const Job j = {.m = m, .n = w->n, .k = w->k, .x = x, .w = w->w, .scale_shift = w->scale_shift, .bias = w->bias,
                   .y = y, .next = row_of(next, first_feature(next->n, me, all), dtype), .group = w->group,
                   .groups = w->group ? (w->k + w->group - 1) / w->group : 0, .x_dtype = dtype,
                   .scale_dtype = (int)w->scale_dtype, .bias_dtype = (int)w->bias_dtype, .y_dtype = dtype};
    const Features body = w->group || dtype == BF16 ? bodies[w->group / GROUP_LANES] : fp32_features;
    body(&j, first_feature(w->n, me, all), first_feature(w->n, me + 1, all));
}

void linear(const Matrix *w, int threads, int64_t m, const void *x, void *y, int dtype) {
    threads = useful_threads((double)m * (double)w->n * (double)w->k, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    project(w, w, m, x, y, dtype, omp_get_thread_num(), omp_get_num_threads());
}
