/* Attention of a few new tokens per row over a dense key/value cache, and the write of their own states into it.
 *
 * A query at position p sees slots max(0, p - window + 1) .. p of its row and reads nothing else. Queries that share
 * a key head are packed; a block of keys is converted to fp32 once for all of them. Scores, softmax and sums are
 * fp32; the order of a sum depends on the query's own slots alone.
 */
enum { QUERIES = 16 }; /* packed queries per work item */
enum { SLOTS = 32 };   /* keys converted at a time */

typedef struct { /* 8 bytes each, as Python packs them */
    const void *query, *key, *value;
    void *keys, *values, *out;
    const int64_t *positions, *write_index; /* (rows, steps) */
    int64_t rows, steps, heads, kv_heads, key_dim, value_dim;
    int64_t capacity, num_slots, window; /* slots per row in storage; upper bound of those in use; 0: no window */
    int64_t query_dtype, state_dtype, cache_dtype;
    int64_t query_row, query_head, query_step; /* strides in elements; the last dimension is contiguous */
    int64_t key_row, key_head, key_step;
    int64_t value_row, value_head, value_step;
    double scale;
} Attention;

static void convert(const void *from, int64_t offset, int from_dtype, void *to, int64_t at, int to_dtype, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) store8(to, at + i, to_dtype, load8(from, offset + i, from_dtype));
}

static void write_states(const Attention *a, int64_t token, int64_t head) {
    const int64_t row = token / a->steps, step = token % a->steps, slot = a->write_index[token] * a->kv_heads + head;
    convert(a->key, row * a->key_row + head * a->key_head + step * a->key_step, (int)a->state_dtype, a->keys,
            slot * a->key_dim, (int)a->cache_dtype, a->key_dim);
    convert(a->value, row * a->value_row + head * a->value_head + step * a->value_step, (int)a->state_dtype, a->values,
            slot * a->value_dim, (int)a->cache_dtype, a->value_dim);
}

/* scores[r][c] = query_r . key_c for R queries and 4 keys. */
INLINE void score_tile(const int R, const float *query, const float *keys, int64_t dim, float *scores, int64_t lds) {
    __m256 acc[3][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) acc[r][c] = _mm256_setzero_ps();
    for (int64_t d = 0; d < dim; d += 8) {
        __m256 q[3];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) q[r] = _mm256_load_ps(query + r * dim + d);
#pragma GCC unroll 4
        for (int c = 0; c < 4; c++) {
            const __m256 k = _mm256_load_ps(keys + c * dim + d);
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) acc[r][c] = _mm256_fmadd_ps(q[r], k, acc[r][c]);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(acc[r][0], acc[r][1]), _mm256_hadd_ps(acc[r][2], acc[r][3]));
        _mm_storeu_ps(scores + r * lds, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
    }
}

/* out[d .. d + 8V) += sum of p[s] * values[s][d ..] over n slots. */
INLINE void value_tile(const int V, const float *p, const float *values, int64_t dim, int64_t n, float *out) {
    __m256 acc[8];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[v] = _mm256_load_ps(out + 8 * v);
    for (int64_t s = 0; s < n; s++) {
        const __m256 weight = _mm256_broadcast_ss(p + s);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[v] = _mm256_fmadd_ps(weight, _mm256_load_ps(values + s * dim + 8 * v), acc[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) _mm256_store_ps(out + 8 * v, acc[v]);
}

/* Unnormalised weights in place; returns 1 / their sum. */
static float softmax(float *scores, int64_t n, float scale) {
    float last[8];
    const int64_t full = n & ~(int64_t)7;
    for (int i = 0; i < 8; i++) last[i] = full + i < n ? scores[full + i] : -INFINITY;
    __m256 top = _mm256_loadu_ps(last), sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < full; i += 8) top = _mm256_max_ps(top, _mm256_loadu_ps(scores + i));
    float lanes[8], peak = -INFINITY;
    _mm256_storeu_ps(lanes, top);
    for (int i = 0; i < 8; i++) peak = MAX(peak, lanes[i]);
    const __m256 shift = _mm256_set1_ps(peak), factor = _mm256_set1_ps(scale);
#define WEIGHT(S) exp8(_mm256_mul_ps(factor, _mm256_sub_ps(S, shift)))
    for (int64_t i = 0; i < full; i += 8) {
        const __m256 w = WEIGHT(_mm256_loadu_ps(scores + i));
        _mm256_storeu_ps(scores + i, w);
        sum = _mm256_add_ps(sum, w);
    }
    const __m256 w = WEIGHT(_mm256_loadu_ps(last));
#undef WEIGHT
    _mm256_storeu_ps(last, w);
    for (int64_t i = full; i < n; i++) scores[i] = last[i - full];
    return 1.0f / sum8(_mm256_add_ps(sum, w));
}

/* Packed queries [begin, end) of one row and key head; query r belongs to step r / group and head r % group. */
static void attend(const Attention *a, int64_t row, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t group = a->heads / a->kv_heads, n = end - begin, kd = a->key_dim, vd = a->value_dim;
    int64_t first[QUERIES], last[QUERIES], low = a->num_slots, high = 0;
    for (int64_t r = 0; r < n; r++) {
        const int64_t position = a->positions[row * a->steps + (begin + r) / group];
        last[r] = MIN(position, a->num_slots - 1);
        first[r] = a->window ? MAX(0, MIN(last[r], position - a->window + 1)) : 0;
        low = MIN(low, first[r]), high = MAX(high, last[r] + 1);
    }
    const int64_t lds = (high - low + SLOTS - 1) / SLOTS * SLOTS;
    float *query = scratch((size_t)(QUERIES * (kd + vd + lds) + SLOTS * MAX(kd, vd)) * sizeof(float));
    float *out = query + QUERIES * kd, *block = out + QUERIES * vd, *scores = block + SLOTS * MAX(kd, vd), total[QUERIES];
    for (int64_t r = 0; r < n; r++) {
        const int64_t step = (begin + r) / group, head = kv_head * group + (begin + r) % group;
        const int64_t offset = row * a->query_row + head * a->query_head + step * a->query_step;
        convert(a->query, offset, (int)a->query_dtype, query, r * kd, FP32, kd);
        if (a->cache_dtype == BF16 && a->query_dtype == FP32) /* the precision of the keys, as in a plain forward */
            for (int64_t d = r * kd; d < (r + 1) * kd; d++) query[d] = from_bf16(to_bf16(query[d]));
    }
    const int64_t base = (row + 1) * a->capacity; /* a row's page follows the page that takes padding */
    for (int64_t slot = low; slot < high; slot += SLOTS) {
        const int64_t count = MIN(SLOTS, high - slot), padded = (count + 3) / 4 * 4;
        for (int64_t s = 0; s < count; s++)
            convert(a->keys, ((base + slot + s) * a->kv_heads + kv_head) * kd, (int)a->cache_dtype, block, s * kd, FP32, kd);
        memset(block + count * kd, 0, (size_t)((padded - count) * kd) * sizeof(float));
        for (int64_t r = 0; r < n;) {
            const int64_t left = n - r;
            for (int64_t s = 0; s < padded; s += 4) {
                float *to = scores + r * lds + slot - low + s;
                if (left >= 3) score_tile(3, query + r * kd, block + s * kd, kd, to, lds);
                else if (left == 2) score_tile(2, query + r * kd, block + s * kd, kd, to, lds);
                else score_tile(1, query + r * kd, block + s * kd, kd, to, lds);
            }
            r += MIN(left, 3);
        }
    }
    for (int64_t r = 0; r < n; r++)
        total[r] = softmax(scores + r * lds + first[r] - low, last[r] + 1 - first[r], (float)a->scale);
    memset(out, 0, (size_t)(n * vd) * sizeof(float));
    for (int64_t slot = low; slot < high; slot += SLOTS) {
        const int64_t count = MIN(SLOTS, high - slot);
        for (int64_t s = 0; s < count; s++)
            convert(a->values, ((base + slot + s) * a->kv_heads + kv_head) * vd, (int)a->cache_dtype, block, s * vd, FP32, vd);
        for (int64_t r = 0; r < n; r++) {
            const int64_t from = MAX(slot, first[r]), to = MIN(slot + count, last[r] + 1);
            if (from >= to) continue; /* never touches a slot that is hidden: it may hold anything */
            const float *p = scores + r * lds + from - low, *v = block + (from - slot) * vd;
            float *sum = out + r * vd;
            int64_t d = 0;
            for (; d + 64 <= vd; d += 64) value_tile(8, p, v + d, vd, to - from, sum + d);
            for (; d + 32 <= vd; d += 32) value_tile(4, p, v + d, vd, to - from, sum + d);
            for (; d < vd; d += 8) value_tile(1, p, v + d, vd, to - from, sum + d);
        }
    }
    for (int64_t r = 0; r < n; r++) {
        const int64_t step = (begin + r) / group, head = kv_head * group + (begin + r) % group;
        const __m256 inverse = _mm256_set1_ps(total[r]);
        for (int64_t d = 0; d < vd; d += 8)
            store8(a->out, ((row * a->steps + step) * a->heads + head) * vd + d, (int)a->cache_dtype,
                   _mm256_mul_ps(_mm256_load_ps(out + r * vd + d), inverse));
    }
}

void attention(const Attention *a, int threads) {
    const int64_t packed = a->heads / a->kv_heads * a->steps, chunks = (packed + QUERIES - 1) / QUERIES;
    const int64_t tokens = a->rows * a->steps, items = a->rows * a->kv_heads * chunks;
    const double work = (double)tokens * (double)(a->heads * (a->key_dim + a->value_dim)) * (double)a->num_slots;
    int64_t next = 0; /* rows differ in length, so threads take items as they go */
    threads = (int)MIN(useful_threads(work, threads), items);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        for (int64_t token = tokens * me / all; token < tokens * (me + 1) / all; token++)
            for (int64_t head = 0; head < a->kv_heads; head++) write_states(a, token, head);
#pragma omp barrier
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < items;) {
            const int64_t begin = i % chunks * QUERIES, kv_head = i / chunks % a->kv_heads;
            attend(a, i / chunks / a->kv_heads, kv_head, begin, MIN(begin + QUERIES, packed));
        }
    }
}
