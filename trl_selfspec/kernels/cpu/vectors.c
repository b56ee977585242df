/* The vectors in which dense layers are multiplied: AVX-512 with its dot product of bf16 pairs where the CPU has it,
 * AVX2 elsewhere. With -DEMULATE the former are computed by AVX2, so that their tiles and tails run on any machine.
 */
#if defined(EMULATE)
#define WIDE 1
typedef struct { __m256 half[2]; } Lanes;
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512VL__) && !defined(NARROW)
#define WIDE 1
typedef __m512 Lanes;
#else
#define WIDE 0
typedef __m256 Lanes;
#endif

enum { LANES = WIDE ? 16 : 8 };
enum { STEP = 2 * LANES }; /* columns per step: two vectors of fp32 */

#if defined(EMULATE)

INLINE Lanes zero_lanes(void) { return (Lanes){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }

INLINE Lanes load_lanes(const void *p) {
    return (Lanes){{_mm256_loadu_ps(p), _mm256_loadu_ps((const float *)p + 8)}};
}

INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) {
    for (int i = 0; i < 2; i++) sum.half[i] = _mm256_fmadd_ps(a.half[i], b.half[i], sum.half[i]);
    return sum;
}

/* What the instruction takes for zero: numbers below the smallest normal one. */
INLINE __m256 without_subnormals(__m256 v) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    const __m256 small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
    return _mm256_blendv_ps(v, _mm256_and_ps(v, _mm256_set1_ps(-0.0f)), small);
}

/* Odd elements first, as Intel's manual has it; a product of two bf16 is exact, so each step is rounded once. */
INLINE Lanes dot_pairs(Lanes sum, Lanes x, Lanes w) {
    const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32((int)0xffff0000));
    for (int i = 0; i < 2; i++) {
        const __m256i xs = _mm256_castps_si256(x.half[i]), ws = _mm256_castps_si256(w.half[i]);
        const __m256 x_even = without_subnormals(_mm256_castsi256_ps(_mm256_slli_epi32(xs, 16)));
        const __m256 w_even = without_subnormals(_mm256_castsi256_ps(_mm256_slli_epi32(ws, 16)));
        const __m256 x_odd = without_subnormals(_mm256_and_ps(x.half[i], odd));
        const __m256 w_odd = without_subnormals(_mm256_and_ps(w.half[i], odd));
        const __m256 first = without_subnormals(_mm256_fmadd_ps(x_odd, w_odd, without_subnormals(sum.half[i])));
        sum.half[i] = without_subnormals(_mm256_fmadd_ps(x_even, w_even, first));
    }
    return sum;
}

INLINE __m256 eight_sums(Lanes v) { return _mm256_add_ps(v.half[0], v.half[1]); }

#elif WIDE

INLINE Lanes zero_lanes(void) { return _mm512_setzero_ps(); }
INLINE Lanes load_lanes(const void *p) { return _mm512_loadu_ps(p); }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm512_fmadd_ps(a, b, sum); }

INLINE Lanes dot_pairs(Lanes sum, Lanes x, Lanes w) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_castps_si512(w));
}

INLINE __m256 eight_sums(Lanes v) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(v), high);
}

#else

INLINE Lanes zero_lanes(void) { return _mm256_setzero_ps(); }
INLINE Lanes load_lanes(const void *p) { return _mm256_loadu_ps(p); }
INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes sum) { return _mm256_fmadd_ps(a, b, sum); }
INLINE Lanes dot_pairs(Lanes sum, Lanes x, Lanes w) { return (void)x, (void)w, sum; } /* never called */
INLINE __m256 eight_sums(Lanes v) { return v; }

#endif
