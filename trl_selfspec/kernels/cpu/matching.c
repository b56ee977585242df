/* Suffix drafts: where a row's last tokens were said before, and what followed there. */

typedef struct {
    int64_t length, slot, position; /* tokens that agree; the text; where what followed them begins */
} Match;

/* The last candidate of [low, high) behind a token `last` and, `back` tokens earlier, a token `first`; -1 for none.
 * `back` < low, so every token that is read exists. */
static int64_t last_candidate(const int32_t *text, int64_t low, int64_t high, int32_t last, int32_t first, int64_t back) {
    const __m256i lasts = _mm256_set1_epi32(last), firsts = _mm256_set1_epi32(first);
    for (; high - low >= 8; high -= 8) {
        const int32_t *tokens = text + high - 9;
        const __m256i a = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)tokens), lasts);
        const __m256i b = _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i *)(tokens - back)), firsts);
        const unsigned hits = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_and_si256(a, b)));
        if (hits) return high - 8 + (31 - __builtin_clz(hits));
    }
    while (high-- > low) {
        if (text[high - 1] == last && text[high - 1 - back] == first) return high;
    }
    return -1;
}

/* Replaces `best` by the last of the longest matches in a text, if that is longer. `end` is behind the row's last token.
 * A match of n + 1 tokens agrees in the last token and in the one n before it: only such candidates are compared. */
static void search(const int32_t *text, int64_t low, int64_t high, int64_t slot, const int32_t *end, int64_t longest, Match *best) {
    while (best->length < longest) {
        const int64_t back = best->length;
        high = last_candidate(text, MAX(low, back + 1), high, end[-1], end[-1 - back], back);
        if (high < 0) return;
        const int64_t most = MIN(longest, high);
        int64_t n = 1;
        while (n < most && text[high - 1 - n] == end[-1 - n]) n++;
        if (n > back) *best = (Match){n, slot, high};
    }
}

/* Drafts of `gamma` tokens for every row. Candidates are visited best first among equally long ones: the row's own text,
 * then those of its group from the last one down, each from its end. So only a longer match replaces another, and one of
 * `max_match` tokens ends the search. `recent`, or NULL: each row's last `max_match` tokens in their order, in place of
 * its text's; -1, which no text holds, for no token. */
void suffix_match(int threads, int64_t rows, int64_t gamma, int64_t max_match, const int32_t *texts, int64_t stride, const int64_t *lengths,
                  const int64_t *starts, const int64_t *slots, const int64_t *first, const int64_t *end, const int32_t *recent, int64_t *drafts) {
    double tokens = 0;
    for (int64_t row = 0; row < rows; row++) tokens += (double)((end[row] - first[row]) * lengths[slots[row]]);
    threads = (int)MIN(useful_threads(tokens, threads), rows);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t own = slots[row], length = lengths[own], longest = recent ? max_match : MIN(length, max_match);
        const int32_t *behind = recent ? recent + (row + 1) * max_match : texts + own * stride + length;
        Match best = {0, own, length - 1}; /* without a match the last token is drafted again */
        search(texts + own * stride, 1, length, own, behind, longest, &best);
        for (int64_t slot = end[row] - 1; slot >= first[row]; slot--) {
            if (slot != own) search(texts + slot * stride, MAX(1, starts[slot]), lengths[slot], slot, behind, longest, &best);
        }
        const int32_t *text = texts + best.slot * stride;
        int64_t from = best.position;
        for (int64_t i = 0; i < gamma; i++, from++) {
            if (from == lengths[best.slot]) from = best.position;
            drafts[row * gamma + i] = text[from];
        }
    }
}
