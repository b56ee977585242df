/* Functions of single rows or elements, rounded where the chains of torch operations they replace round. */
typedef void (*Rows)(const void *job, int64_t begin, int64_t end);

static void split_rows(Rows body, const void *job, int64_t rows, double work, int threads) {
    threads = (int)MIN(useful_threads(work, threads), rows);
    if (threads <= 1) {
        body(job, 0, rows);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        body(job, rows * me / all, rows * (me + 1) / all);
    }
}

/* ---- y = weight * cast(x / rms(x)) ---- */

typedef struct {
    const void *x, *weight;
    void *y;
    int64_t n;
    float eps;
    int x_dtype, weight_dtype, y_dtype;
} Norm;

INLINE __m256 round8(__m256 v, int dtype) {
    uint16_t rounded[8];
    if (dtype == FP32) return v;
    store8(rounded, 0, BF16, v);
    return load8(rounded, 0, BF16);
}

static void norm_rows(const void *job, int64_t begin, int64_t end) {
    const Norm *j = job;
    for (int64_t at = begin * j->n; at < end * j->n; at += j->n) {
        __m256 squares[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int64_t i = 0; i < j->n; i += 8) {
            const __m256 v = load8(j->x, at + i, j->x_dtype);
            squares[i / 8 % 2] = _mm256_fmadd_ps(v, v, squares[i / 8 % 2]);
        }
        const float mean = sum8(_mm256_add_ps(squares[0], squares[1])) / (float)j->n;
        const __m256 factor = _mm256_set1_ps(1.0f / sqrtf(mean + j->eps));
        for (int64_t i = 0; i < j->n; i += 8) {
            const __m256 v = round8(_mm256_mul_ps(load8(j->x, at + i, j->x_dtype), factor), j->x_dtype);
            store8(j->y, at + i, j->y_dtype, _mm256_mul_ps(load8(j->weight, i, j->weight_dtype), v));
        }
    }
}

void rms_norm(int threads, int64_t m, int64_t n, double eps, const void *x, int x_dtype, const void *weight,
              int weight_dtype, void *y, int y_dtype) {
    const Norm j = {x, weight, y, n, (float)eps, x_dtype, weight_dtype, y_dtype};
    split_rows(norm_rows, &j, m, 4 * (double)m * (double)n, threads);
}

/* ---- y = silu(gate) * up ---- */

typedef struct {
    const void *gate, *up;
    void *y;
    int dtype;
} Gate;

static void gate_rows(const void *job, int64_t begin, int64_t end) {
    const Gate *j = job;
    const __m256 one = _mm256_set1_ps(1.0f), sign = _mm256_set1_ps(-0.0f);
    for (int64_t i = 8 * begin; i < 8 * end; i += 8) {
        const __m256 v = load8(j->gate, i, j->dtype);
        const __m256 silu = _mm256_div_ps(v, _mm256_add_ps(one, exp8(_mm256_xor_ps(v, sign))));
        store8(j->y, i, j->dtype, _mm256_mul_ps(round8(silu, j->dtype), load8(j->up, i, j->dtype)));
    }
}

void silu_mul(int threads, int64_t n, const void *gate, const void *up, int dtype, void *y) {
    const Gate j = {gate, up, y, dtype};
    split_rows(gate_rows, &j, n / 8, 16 * (double)n, threads);
}
