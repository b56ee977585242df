/* Draws from the softmax of scores, and its normaliser, without keeping probabilities. Sums are of doubles, block by
 * block, so that the token is found without adding up all that come before.
 */
enum { BLOCK = 512 };

/* exp(score - peak) of 8 scores, of which `count` exist. */
INLINE __m256 masses8(const float *scores, int64_t count, __m256 peak) {
    if (count >= 8) return exp8(_mm256_sub_ps(_mm256_loadu_ps(scores), peak));
    float padded[8];
    for (int i = 0; i < 8; i++) padded[i] = i < count ? scores[i] : -INFINITY;
    return exp8(_mm256_sub_ps(_mm256_loadu_ps(padded), peak));
}

static double block_mass(const float *scores, int64_t count, float peak) {
    __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    for (int64_t i = 0; i < count; i += 8) {
        const __m256 mass = masses8(scores + i, count - i, _mm256_set1_ps(peak));
        sum[0] = _mm256_add_pd(sum[0], _mm256_cvtps_pd(_mm256_castps256_ps128(mass)));
        sum[1] = _mm256_add_pd(sum[1], _mm256_cvtps_pd(_mm256_extractf128_ps(mass, 1)));
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(sum[0], sum[1]));
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

/* The first score whose mass takes the sum beyond `height`; else the last with any, -1 where none has. */
static int64_t find(const float *scores, int64_t count, float peak, double height) {
    double sum = 0;
    int64_t last = -1;
    for (int64_t i = 0; i < count; i += 8) {
        float mass[8];
        _mm256_storeu_ps(mass, masses8(scores + i, count - i, _mm256_set1_ps(peak)));
        for (int64_t j = 0; j < MIN(8, count - i); j++) {
            if (!(mass[j] > 0)) continue;
            last = i + j, sum += mass[j];
            if (sum > height) return last;
        }
    }
    return last;
}

static float largest(const float *scores, int64_t n) {
    float lanes[8], peak = -INFINITY;
    __m256 top = _mm256_set1_ps(-INFINITY);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) top = _mm256_max_ps(_mm256_loadu_ps(scores + i), top); /* passes over NaN: masses keep it */
    _mm256_storeu_ps(lanes, top);
    for (int l = 0; l < 8; l++) peak = MAX(lanes[l], peak);
    for (; i < n; i++) peak = MAX(scores[i], peak);
    return peak;
}

/* Per row of n scores: log of the sum of exp, and the token whose slice of the mass contains u, if there is one. */
void sample(int threads, int64_t rows, int64_t n, const float *scores, const double *u, int64_t *tokens, float *logs) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    threads = (int)MIN(useful_threads(8 * (double)rows * (double)n, threads), rows);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *x = scores + row * n, peak = largest(x, n);
        double *mass = scratch((size_t)blocks * sizeof(double)), total = 0, below = 0;
        for (int64_t b = 0; b < blocks; b++) total += mass[b] = block_mass(x + b * BLOCK, MIN(BLOCK, n - b * BLOCK), peak);
        logs[row] = peak + (float)log(total);
        if (!u) continue;
        tokens[row] = 0; /* of a row without mass or with NaN */
        int64_t at = -1; /* the block that contains u; the last with any mass where rounding leaves none */
        for (int64_t b = 0; b < blocks && (at < 0 || below + mass[at] <= u[row] * total); b++) {
            if (!(mass[b] > 0)) continue;
            if (at >= 0) below += mass[at];
            at = b;
        }
        if (at < 0) continue;
        const int64_t found = find(x + at * BLOCK, MIN(BLOCK, n - at * BLOCK), peak, u[row] * total - below);
        tokens[row] = at * BLOCK + MAX(found, 0);
    }
}
