// Rows of codes added to accumulators. Part of codes.cpp, inside its namespace.
//
// A row adds `factor * value` to a column, fused, where `factor` is h times the scale, rounded, and the value is the
// code's before its scale; then, of a codec with zero-points, h times the zero-point, rounded.

constexpr long SPAN = 4096;       // columns whose factors are kept together, of one token
constexpr long WIDE_SPAN = 1024;  // and of some
constexpr int SUM_LANES = 4; // times sixteen columns, whose chains of sums overlap
constexpr long BLOCK = 128;  // columns of 64 bytes of nibbles

// Of the groups of columns [from, to) of R rows: h times the scale, h times the zero-point.
template <int R, long COLUMNS = SPAN> struct Factors {
    float scale[R][COLUMNS / CHUNK + 2 * LANES], zero[R][COLUMNS / CHUNK + 2 * LANES];

    FLASHINFER_METHOD void load_row(const Place& p, int r, Raw row, float h, long from, long to) {
        const long count = load_scales(p, row, from, to, h, scale[r]);
        if (!p.codec.zeros()) return;
        const long first = p.group(from);
        for (long i = 0; i < count; i += LANES)
            store(zero[r] + i, mul(zero_points(p, row, first + i, int(least(LANES, count - i))), broadcast(h)));
    }
};

// One token: R rows are added to L * LANES columns from k on, or to the first n of them where L is 1.
template <Form F, bool ZERO, int HALF, int R, int L>
FLASHINFER_INLINE void add_lanes(const Values<F>& values, const Raw (&codes)[R], const Factors<R>& f, const Place& p,
                                 long first, long k, int n, float* acc) {
    Lanes sum[L];
    for (int l = 0; l < L; l++) sum[l] = n < LANES ? load_part(acc, n) : load(acc + l * LANES);
    const long g[2] = {p.group(k) - first, p.group(k + (L - 1) * LANES) - first};  // every other chunk
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int l = 0; l < L; l++) {
            const Lanes row = (HALF + l) % 2 ? values.template at<1>(codes[r], k + l * LANES)
                                             : values.template at<0>(codes[r], k + l * LANES);
            sum[l] = fma(broadcast(f.scale[r][g[l / 2]]), row, sum[l]);
            if (ZERO) sum[l] = add(sum[l], broadcast(f.zero[r][g[l / 2]]));
        }
    for (int l = 0; l < L; l++) n < LANES ? store_part(acc, sum[l], n) : store(acc + l * LANES, sum[l]);
}

// Blocks of nibbles are added in the order in which they are taken out of their bytes: lane j of the sixteen number i
// belongs to nibble i of bytes 4 j .. 4 j + 3. For that, columns wait in an order of their own while all rows pass.
FLASHINFER_INLINE long column_of(int i, int j) { return j / 4 * CHUNK + i % 2 * 16 + j % 4 * 4 + i / 2; }
void into_nibbles(const float* acc, long columns, float* out) {
    for (long k = 0; k < columns; k += BLOCK)
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < LANES; j++) out[k + i * LANES + j] = acc[k + column_of(i, j)];
}
void out_of_nibbles(const float* from, long columns, float* acc) {
    for (long k = 0; k < columns; k += BLOCK)
        for (int i = 0; i < 8; i++)
            for (int j = 0; j < LANES; j++) acc[k + column_of(i, j)] = from[k + i * LANES + j];
}

// Nibbles I to N - 1 of a row's block, added to the sums that begin with nibble FIRST.
template <bool ZERO, int FIRST, int I, int N>
FLASHINFER_INLINE void add_nibbles(Sixteen table, Bytes raw, Lanes scale, Lanes zero, Lanes* sum) {
    sum[I - FIRST] = fma(scale, nibbles_of<I>(table, raw), sum[I - FIRST]);
    if (ZERO) sum[I - FIRST] = add(sum[I - FIRST], zero);
    if constexpr (I + 1 < N) add_nibbles<ZERO, FIRST, I + 1, N>(table, raw, scale, zero, sum);
}

// R rows are added to a block, as many nibbles of it at a time as there are registers for.
template <bool ZERO, int R, int FIRST = 0>
FLASHINFER_INLINE void add_block(Sixteen table, const Raw (&codes)[R], const Factors<R>& f, long group, Picks picks,
                                 long k, float* acc) {
    constexpr int N = SUM_NIBBLES;
    Lanes sum[N];
    for (int i = 0; i < N; i++) sum[i] = load(acc + (FIRST + i) * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        const Lanes scale = pick(f.scale[r] + group, picks), zero = ZERO ? pick(f.zero[r] + group, picks) : scale;
        add_nibbles<ZERO, FIRST, FIRST, FIRST + N>(table, load_bytes(codes[r] + k / 2), scale, zero, sum);
    }
    for (int i = 0; i < N; i++) store(acc + (FIRST + i) * LANES, sum[i]);
    if constexpr (FIRST + N < 8) add_block<ZERO, R, FIRST + N>(table, codes, f, group, picks, k, acc);
}

// One token: R rows are added to columns [from, to), whose sums are at `acc`, those of whole blocks at `blocks`.
template <Form F, bool ZERO, int R, bool AHEAD>
FLASHINFER_INLINE void add_rows(const Place& p, const Raw* rows, const float* h, long from, long to, float* acc,
                                float* blocks, Picks picks) {
    constexpr int L = SUM_LANES;
    const Values<F> values(p.codec);
    const long first = p.group(from);
    Raw codes[R], next[R];
    Factors<R> factors;
    for (int r = 0; r < R; r++) {
        codes[r] = rows[r] + p.codes, next[r] = rows[AHEAD ? R + r : r] + p.codes;
        if constexpr (AHEAD) prefetch_scales(p, rows[R + r], from, to);
        factors.load_row(p, r, rows[r], h[r], from, to);
    }
    long k = from;
    if constexpr (F == Form::nibbles) {
        for (; k + BLOCK <= to; k += BLOCK, blocks += BLOCK) {
            if constexpr (AHEAD) prefetch<true, R>(next, k);
            add_block<ZERO, R>(values.sixteen, codes, factors, p.group(k) - first, picks, k, blocks);
        }
        acc += k - from;
    }
    for (; k + L * LANES <= to; k += L * LANES, acc += L * LANES) {
        if constexpr (AHEAD) prefetch<F == Form::nibbles, R>(next, k);
        add_lanes<F, ZERO, 0, R, L>(values, codes, factors, p, first, k, LANES, acc);
    }
    for (; k < to; k += CHUNK, acc += CHUNK) {
        const long left = to - k;
        add_lanes<F, ZERO, 0, R, 1>(values, codes, factors, p, first, k, int(least(left, LANES)), acc);
        if (left > LANES)
            add_lanes<F, ZERO, 1, R, 1>(values, codes, factors, p, first, k + LANES, int(least(left - LANES, LANES)),
                                        acc + LANES);
    }
}

template <Form F, bool ZERO>
void decode_sums(const Place& p, Rows rows, const float* h, long from, long to, float* acc) {
    constexpr int R = SUM_ROWS;
    alignas(64) float blocks[SPAN];
    const long whole = F == Form::nibbles ? (to - from) / BLOCK * BLOCK : 0;
    into_nibbles(acc, whole, blocks);
    alignas(64) std::int32_t lanes[LANES];
    const Picks picks = load_picks(groups_of_lanes<8>(p, from, lanes));
    int r = 0;
    for (; r + R <= rows.count; r += R) {
        if (r + 2 * R <= rows.count + rows.ahead)
            add_rows<F, ZERO, R, true>(p, rows.at + r, h + r, from, to, acc, blocks, picks);
        else add_rows<F, ZERO, R, false>(p, rows.at + r, h + r, from, to, acc, blocks, picks);
    }
    for (; r < rows.count; r++) add_rows<F, ZERO, 1, false>(p, rows.at + r, h + r, from, to, acc, blocks, picks);
    out_of_nibbles(blocks, whole, acc);
}

// T tokens, sixteen columns from k on, all rows: sums stay in registers. factors: [T, rows], then those of zero-points.
template <Form F, bool ZERO, int T, int HALF>
FLASHINFER_INLINE void add_columns(const Values<F>& values, const Raw* codes, int rows, const float* factors,
                                   const float* zeros, long k, int n, float* acc, long acc_stride) {
    Lanes sum[T];
    for (int t = 0; t < T; t++) sum[t] = n < LANES ? load_part(acc + t * acc_stride, n) : load(acc + t * acc_stride);
    for (int r = 0; r < rows; r++) {
        const Lanes row = values.template at<HALF>(codes[r], k);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            sum[t] = fma(broadcast(factors[t * MOST_ROWS + r]), row, sum[t]);
            if (ZERO) sum[t] = add(sum[t], broadcast(zeros[t * MOST_ROWS + r]));
        }
    }
    for (int t = 0; t < T; t++)
        n < LANES ? store_part(acc + t * acc_stride, sum[t], n) : store(acc + t * acc_stride, sum[t]);
}

// T tokens, columns [from, to) of one span.
template <Form F, bool ZERO, int T>
void wide_sums(const Place& p, Rows rows, const float* h, long h_stride, long from, long to, float* acc,
               long acc_stride) {
    const Values<F> values(p.codec);
    Factors<MOST_ROWS, WIDE_SPAN> scales;
    Raw codes[MOST_ROWS];
    for (int r = 0; r < rows.count; r++) {
        scales.load_row(p, r, rows.at[r], 1, from, to);
        codes[r] = rows.at[r] + p.codes;
    }
    float factors[T * MOST_ROWS], zeros[T * MOST_ROWS];
    long filled = -1;
    for (long k = from; k < to; k += CHUNK, acc += CHUNK) {
        const long g = p.group(k) - p.group(from), left = to - k;
        for (int t = 0; t < T && g != filled; t++)
            for (int r = 0; r < rows.count; r++) {
                factors[t * MOST_ROWS + r] = scales.scale[r][g] * h[t * h_stride + r];
                if (ZERO) zeros[t * MOST_ROWS + r] = scales.zero[r][g] * h[t * h_stride + r];
            }
        filled = g;
        add_columns<F, ZERO, T, 0>(values, codes, rows.count, factors, zeros, k, int(least(left, LANES)), acc, acc_stride);
        if (left > LANES)
            add_columns<F, ZERO, T, 1>(values, codes, rows.count, factors, zeros, k + LANES,
                                       int(least(left - LANES, LANES)), acc + LANES, acc_stride);
    }
}

template <Form F, bool ZERO>
void sums_of(const Codec& c, Rows rows, const float* h, long h_stride, int tokens, long width, long from, long cols,
             float* acc, long acc_stride) {
    constexpr int T = WIDE_TOKENS;
    const Place p(c, width);
    const long end = from + cols;
    int t = 0;
    for (; t + T <= tokens; t += T)
        for (long k = from; k < end; k += WIDE_SPAN)
            wide_sums<F, ZERO, T>(p, rows, h + t * h_stride, h_stride, k, least(end, k + WIDE_SPAN),
                                  acc + t * acc_stride + k - from, acc_stride);
    for (; t < tokens; t++)
        for (long k = from; k < end; k += SPAN)
            decode_sums<F, ZERO>(p, rows, h + t * h_stride, k, least(end, k + SPAN), acc + t * acc_stride + k - from);
}

// What the outliers among the columns add, row after row.
void add_outliers(const Codec& c, Rows rows, const float* h, long h_stride, int tokens, long width, long from, long cols,
                  float* acc, long acc_stride) {
    const auto begin = std::lower_bound(c.outliers.begin(), c.outliers.end(), from);
    const long first = begin - c.outliers.begin();
    const long count = std::lower_bound(begin, c.outliers.end(), from + cols) - begin;
    for (int r = 0; r < rows.count; r++)
        for (long i = 0; i < count; i += LANES) {
            const long n = least(LANES, count - i);
            float values[LANES];
            store(values, load_part<Type::f16>(rows.at[r] + c.outliers_at(width) + 2 * (first + i), int(n)));
            for (int t = 0; t < tokens; t++)
                for (long j = 0; j < n; j++) {
                    float& sum = acc[t * acc_stride + c.outliers[first + i + j] - from];
                    sum = __builtin_fmaf(h[t * h_stride + r], values[j], sum);
                }
        }
}

void code_sums(const Codec& c, Rows rows, const float* h, long h_stride, int tokens, long width, long from, long cols,
               float* acc, long acc_stride) {
    constexpr decltype(&sums_of<Form::nibbles, false>) of[][2] = {
        {sums_of<Form::nibbles, false>, sums_of<Form::nibbles, true>},
        {sums_of<Form::integers, false>, sums_of<Form::integers, true>},
        {sums_of<Form::e4m3, false>, sums_of<Form::e4m3, true>},
        {sums_of<Form::bytes, false>, sums_of<Form::bytes, true>}};
    of[int(c.form)][c.zeros()](c, rows, h, h_stride, tokens, width, from, cols, acc, acc_stride);
    if (!c.outliers.empty()) add_outliers(c, rows, h, h_stride, tokens, width, from, cols, acc, acc_stride);
}
