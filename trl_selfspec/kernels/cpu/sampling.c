/* Gumbel-max: per row the token whose score plus noise is largest, and the log of the sum of exp.
 *
 * The noise of token t is -log(E) with E = -log1p(-v), where v in [0, 1) is the hash of key + (t + 1) * GOLDEN, as in
 * `sampling/rng.py`. A token beats the best so far only if E < exp(score - best), and v < E. So only tokens whose v is
 * below that bound need logarithms: a handful per row.
 */
static const uint64_t GOLDEN = 0x9E3779B97F4A7C15, FIRST = 0xBF58476D1CE4E5B9, SECOND = 0x94D049BB133111EB;

static float gumbel(uint64_t key, int64_t token) {
    uint64_t z = key + (uint64_t)(token + 1) * GOLDEN;
    z = (z ^ (z >> 30)) * FIRST;
    z = (z ^ (z >> 27)) * SECOND;
    z = (z ^ (z >> 31)) & INT64_MAX;
    const float v = (float)(int64_t)z * 0x1p-63f;
    return -logf(-log1pf(-MIN(MAX(v, 0x1p-64f), 1 - 0x1p-24f)));
}

/* The low halves of 64-bit products, which AVX2 has no instruction for. */
INLINE __m256i multiply4(__m256i z, uint64_t factor) {
    const __m256i low = _mm256_set1_epi64x((int64_t)(factor & UINT32_MAX)), high = _mm256_set1_epi64x((int64_t)(factor >> 32));
    const __m256i cross = _mm256_add_epi64(_mm256_mul_epu32(_mm256_srli_epi64(z, 32), low), _mm256_mul_epu32(z, high));
    return _mm256_add_epi64(_mm256_mul_epu32(z, low), _mm256_slli_epi64(cross, 32));
}

/* SplitMix64's finaliser but for its last shift, which changes a single bit of the high half. */
INLINE __m256i mix4(__m256i z) {
    z = multiply4(_mm256_xor_si256(z, _mm256_srli_epi64(z, 30)), FIRST);
    return multiply4(_mm256_xor_si256(z, _mm256_srli_epi64(z, 27)), SECOND);
}

/* Eight tokens' v, from the 31 highest of 63 bits; `counter` is key + (t + 1) * GOLDEN for the first of them. */
INLINE __m256 uniforms8(uint64_t counter) {
    const __m256i first = _mm256_set1_epi64x((int64_t)counter);
    const __m256i a = _mm256_setr_epi64x(0, (int64_t)GOLDEN, (int64_t)(4 * GOLDEN), (int64_t)(5 * GOLDEN));
    const __m256i b = _mm256_add_epi64(a, _mm256_set1_epi64x((int64_t)(2 * GOLDEN))); /* tokens 2, 3, 6, 7 */
    const __m256 low = _mm256_castsi256_ps(mix4(_mm256_add_epi64(first, a)));
    const __m256 high = _mm256_castsi256_ps(mix4(_mm256_add_epi64(first, b)));
    __m256i bits = _mm256_castps_si256(_mm256_shuffle_ps(low, high, _MM_SHUFFLE(3, 1, 3, 1)));
    bits = _mm256_xor_si256(bits, _mm256_srli_epi32(bits, 31)); /* the last shift */
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(INT32_MAX))), _mm256_set1_ps(0x1p-31f));
}

/* exp(score - peak) of 8 scores, of which `count` exist. */
INLINE __m256 masses8(const float *scores, int64_t count, __m256 peak) {
    if (count >= 8) return exp8(_mm256_sub_ps(_mm256_loadu_ps(scores), peak));
    float padded[8];
    for (int i = 0; i < 8; i++) padded[i] = i < count ? scores[i] : -INFINITY;
    return exp8(_mm256_sub_ps(_mm256_loadu_ps(padded), peak));
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

/* Log of the sum of exp of n scores; `token`, if wanted, is the lowest of the best, and 0 in a row without mass. */
static float sample_row(int64_t n, const float *scores, const int64_t *key, int64_t *token) {
    const float peak = largest(scores, n);
    const __m256 peaks = _mm256_set1_ps(peak), smallest = _mm256_set1_ps(0x1p-65f); /* v is 2^-64 at least */
    const float slack = 1e-4f + 0x1p-21f * fabsf(peak); /* sums of score and noise are rounded, and so are masses */
    __m256 bound = _mm256_set1_ps(INFINITY); /* of v, per unit of mass */
    __m256d sum[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    float best = -INFINITY;
    if (token) *token = 0;
    for (int64_t i = 0; i < n; i += 8) {
        const __m256 mass = masses8(scores + i, n - i, peaks);
        sum[0] = _mm256_add_pd(sum[0], _mm256_cvtps_pd(_mm256_castps256_ps128(mass)));
        sum[1] = _mm256_add_pd(sum[1], _mm256_cvtps_pd(_mm256_extractf128_ps(mass, 1)));
        if (!token) continue;
        unsigned hits;
        if (key) {
            const __m256 limit = _mm256_mul_ps(mass, bound); /* NaN for no mass while there is no best */
            if (!_mm256_movemask_ps(_mm256_cmp_ps(limit, smallest, _CMP_GT_OQ))) continue;
            const __m256 v = uniforms8((uint64_t)*key + (uint64_t)(i + 1) * GOLDEN);
            hits = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_LT_OQ));
        } else {
            hits = (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(mass, _mm256_set1_ps(1 - 1e-6f), _CMP_GT_OQ));
        }
        for (; hits; hits &= hits - 1) {
            const int64_t t = i + __builtin_ctz(hits);
            const float score = key ? scores[t] + gumbel((uint64_t)*key, t) : scores[t];
            if (score > best) *token = t, best = score, bound = _mm256_set1_ps(expf(peak - best + slack));
        }
    }
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(sum[0], sum[1]));
    return peak + (float)log((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
}

/* `sample_row` for every row; without `keys` there is no noise, without `tokens` no draw. */
void sample(int threads, int64_t rows, int64_t n, const float *scores, const int64_t *keys, int64_t *tokens, float *logs) {
    threads = (int)MIN(useful_threads(16 * (double)rows * (double)n, threads), rows);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        logs[row] = sample_row(n, scores + row * n, keys ? keys + row : NULL, tokens ? tokens + row : NULL);
    }
}
