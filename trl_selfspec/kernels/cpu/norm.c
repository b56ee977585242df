/* Llama's RMSNorm, y = weight * cast(x / rms(x)), rounded where torch rounds. */
typedef struct {
    const void *x, *weight;
    void *y;
    int64_t n;
    float eps;
    int x_dtype, weight_dtype, y_dtype;
} Norm;

static void norm_rows(const Norm *j, int64_t begin, int64_t end) {
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
    threads = (int)MIN(useful_threads(4 * (double)m * (double)n, threads), m);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int64_t me = omp_get_thread_num(), all = omp_get_num_threads();
        norm_rows(&j, m * me / all, m * (me + 1) / all);
    }
}
