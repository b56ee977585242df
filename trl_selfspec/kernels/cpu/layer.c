/* A decoder layer of Llama's family in one call: norm, q/k/v, their norms, rotary embedding, attention, output
 * projection, norm, gated MLP; rounded wherever the modules round. Threads meet four times.
 */
enum { Q, K, V, O, GATE, UP, DOWN, MATRICES };
enum { NORM_IN, NORM_POST, NORM_Q, NORM_K, NORMS };

typedef struct { /* 8 bytes each, as Python packs them */
    const void *x, *cos, *sin; /* (rows, steps, hidden); (rows or 1, steps, dim) */
    void *y, *keys, *values;
    const int64_t *positions, *write_index;
    int64_t rows, steps, capacity, num_slots, angle_row; /* stride of cos and sin from row to row */
    int64_t dtype, hidden, heads, kv_heads, dim, inner, window;
    double scale, eps[NORMS];
    const void *norm[NORMS]; /* weights; NULL: none */
    Matrix matrix[MATRICES];
} DecoderLayer;

/* A buffer that outlives the call, one per calling thread; the team shares it. */
static char *workspace(size_t bytes) {
    static _Thread_local void *buffer;
    static _Thread_local size_t capacity;
    return grown(&buffer, &capacity, bytes);
}

static void normalise(const DecoderLayer *l, int which, const void *x, void *y, int64_t rows, int64_t n) {
    const int dtype = (int)l->dtype;
    const Norm norm = {x, l->norm[which], y, n, (float)l->eps[which], dtype, dtype, dtype};
    norm_rows(&norm, 0, rows);
}

/* y = x * cos + rotate_half(x) * sin, in place at `states`; each product is rounded, as torch does. */
static void rotate(const DecoderLayer *l, void *states, int64_t at, int64_t angle) {
    const int dtype = (int)l->dtype;
    const int64_t half = l->dim / 2;
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t i = 0; i < half; i += 8) {
        const __m256 a = load8(states, at + i, dtype), b = load8(states, at + half + i, dtype);
        const __m256 ca = load8(l->cos, angle + i, dtype), cb = load8(l->cos, angle + half + i, dtype);
        const __m256 sa = load8(l->sin, angle + i, dtype), sb = load8(l->sin, angle + half + i, dtype);
        const __m256 turned = _mm256_mul_ps(_mm256_xor_ps(b, sign), sa);
        store8(states, at + i, dtype, _mm256_add_ps(round8(_mm256_mul_ps(a, ca), dtype), round8(turned, dtype)));
        store8(states, at + half + i, dtype,
               _mm256_add_ps(round8(_mm256_mul_ps(b, cb), dtype), round8(_mm256_mul_ps(a, sb), dtype)));
    }
}

/* Everything between the projections for one row and key head. */
static void attend_head(const DecoderLayer *l, const Attention *a, void *q, void *k, int64_t row, int64_t kv_head) {
    const int64_t group = l->heads / l->kv_heads, packed = group * l->steps;
    for (int64_t step = 0; step < l->steps; step++) {
        const int64_t token = row * l->steps + step, angle = row * l->angle_row + step * l->dim;
        const int64_t size = l->dtype == BF16 ? 2 : 4, key = (token * l->kv_heads + kv_head) * l->dim;
        const int64_t query = (token * l->heads + kv_head * group) * l->dim;
        if (l->norm[NORM_Q]) {
            char *to = (char *)q + query * size;
            normalise(l, NORM_Q, to, to, group, l->dim);
        }
        if (l->norm[NORM_K]) {
            char *to = (char *)k + key * size;
            normalise(l, NORM_K, to, to, 1, l->dim);
        }
        for (int64_t head = 0; head < group && l->cos; head++) rotate(l, q, query + head * l->dim, angle);
        if (l->cos) rotate(l, k, key, angle);
        write_states(a, token, kv_head);
    }
    for (int64_t begin = 0; begin < packed; begin += QUERIES)
        attend(a, row, kv_head, begin, MIN(begin + QUERIES, packed));
}

/* y = x + y over features [begin, end) of every token. */
static void add_residual(const DecoderLayer *l, int64_t tokens, const void *x, void *y, int64_t begin, int64_t end) {
    const int dtype = (int)l->dtype;
    for (int64_t token = 0; token < tokens; token++) {
        const int64_t first = token * l->hidden;
        for (int64_t at = first + begin; at < first + end; at += 8)
            store8(y, at, dtype, _mm256_add_ps(load8(x, at, dtype), load8(y, at, dtype)));
    }
}

/* gate = silu(gate) * up over features [begin, end) of every token. */
static void gate_features(const DecoderLayer *l, int64_t tokens, void *gate, const void *up, int64_t begin, int64_t end) {
    const int dtype = (int)l->dtype;
    const __m256 one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t f = begin; f < end; f += 8) {
            const int64_t at = token * l->inner + f;
            const __m256 g = load8(gate, at, dtype);
            const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp8(_mm256_xor_ps(g, sign))));
            store8(gate, at, dtype, _mm256_mul_ps(round8(silu, dtype), load8(up, at, dtype)));
        }
}

void decoder_layer(const DecoderLayer *l, int threads) {
    const int64_t tokens = l->rows * l->steps, size = l->dtype == BF16 ? 2 : 4, items = l->rows * l->kv_heads;
    const int64_t queries = l->heads * l->dim, keys = l->kv_heads * l->dim;
    const int dtype = (int)l->dtype;
    double work = 0;
    for (int i = 0; i < MATRICES; i++) work += (double)l->matrix[i].n * (double)l->matrix[i].k;
    threads = useful_threads((double)tokens * work, threads);
    char *at = workspace((size_t)(tokens * (threads * l->hidden + 2 * queries + 2 * keys + l->hidden + 2 * l->inner) * size));
#define TAKE(NAME, N) \
    char *NAME = at;  \
    at += tokens * (N) * size;
    TAKE(normed, threads * l->hidden)
    TAKE(q, queries)
    TAKE(k, keys)
    TAKE(v, keys)
    TAKE(mixed, queries)
    TAKE(middle, l->hidden)
    TAKE(gate, l->inner)
    TAKE(up, l->inner)
#undef TAKE
    const Attention a = {
        .query = q, .key = k, .value = v, .keys = l->keys, .values = l->values, .out = mixed,
        .positions = l->positions, .write_index = l->write_index, .rows = l->rows, .steps = l->steps,
        .heads = l->heads, .kv_heads = l->kv_heads, .key_dim = l->dim, .value_dim = l->dim, .capacity = l->capacity,
        .num_slots = l->num_slots, .window = l->window, .query_dtype = dtype, .state_dtype = dtype, .cache_dtype = dtype,
        .query_row = l->steps * queries, .query_head = l->dim, .query_step = queries,
        .key_row = l->steps * keys, .key_head = l->dim, .key_step = keys,
        .value_row = l->steps * keys, .value_head = l->dim, .value_step = keys, .scale = l->scale,
    };
    int64_t next = 0; /* rows differ in length, so threads take items as they go */
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        char *own = normed + me * tokens * l->hidden * size;
#define PROJECT(OF, X, Y) project(l->matrix + OF, l->matrix + (OF + 1) % MATRICES, tokens, X, Y, dtype, me, all)
        const int64_t begin = first_feature(l->hidden, me, all), end = first_feature(l->hidden, me + 1, all);
        normalise(l, NORM_IN, l->x, own, tokens, l->hidden);
        PROJECT(Q, own, q);
        PROJECT(K, own, k);
        PROJECT(V, own, v);
#pragma omp barrier
        for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < items;)
            attend_head(l, &a, q, k, i / l->kv_heads, i % l->kv_heads);
#pragma omp barrier
        PROJECT(O, mixed, middle);
        add_residual(l, tokens, l->x, middle, begin, end);
#pragma omp barrier
        normalise(l, NORM_POST, middle, own, tokens, l->hidden);
        PROJECT(GATE, own, gate);
        PROJECT(UP, own, up);
        gate_features(l, tokens, gate, up, first_feature(l->inner, me, all), first_feature(l->inner, me + 1, all));
#pragma omp barrier
        PROJECT(DOWN, gate, l->y);
        add_residual(l, tokens, middle, l->y, begin, end);
#undef PROJECT
    }
}
