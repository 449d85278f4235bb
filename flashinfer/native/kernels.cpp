// The kernels of one instruction set: compiled once for each, with FLASHINFER_ISA as the namespace.
#include <cmath>

#include "simd.hpp"

namespace flashinfer::FLASHINFER_ISA {
namespace {

#include "rows.hpp"

constexpr long BLOCK = SPAN;    // columns of x that stay in the first cache while a panel of rows passes
constexpr int PANEL = 32;       // rows of that panel
constexpr int SUM_ROWS = 8;     // rows added to one load of the accumulator when there is one token

// -- dots

// Adds columns [from, to) of R rows and T tokens to their lanes. `from` is a multiple of SPAN. The tokens of `x` are
// interleaved: sixteen columns of the first, of the second, ..., then the next sixteen.
template <Type C, int R, int T, bool AHEAD>
FLASHINFER_INLINE void accumulate(const Raw* w, const Raw* next, long integers, const float* x, long from, long to,
                                  Lanes (&acc)[R][T]) {
    Scales<C, R> scales;
    Raw values[R];
    for (int r = 0; r < R; r++) values[r] = w[r] + integers;
    long k = from;
    for (; k + LANES <= to; k += LANES, x += T * LANES) {
        scales.template reach<AHEAD>(w, next, k);
        if constexpr (AHEAD) prefetch<C, R>(next, integers, k);
        if constexpr (T == 1) {  // row by row: few registers
            Lanes value = load(x);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                acc[r][0] = fma(columns<C>(values[r], k, scales.at(r, k)), value, acc[r][0]);
            continue;
        }
        Lanes row[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) row[r] = columns<C>(values[r], k, scales.at(r, k));
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            Lanes value = load(x + t * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][t] = fma(row[r], value, acc[r][t]);
        }
    }
    if (k == to) return;
    scales.template reach<false>(w, next, k);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        Lanes value = load_part(x + t * LANES, int(to - k));
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            acc[r][t] = fma(columns_part<C>(values[r], k, int(to - k), scales.at(r, k)), value, acc[r][t]);
    }
}

template <Type C, int R, bool AHEAD>
FLASHINFER_INLINE void decode_rows(const Raw* w, long integers, const float* x, long cols, float* out) {
    Lanes acc[R][1];
    for (int r = 0; r < R; r++) acc[r][0] = broadcast(0);
    accumulate<C, R, 1, AHEAD>(w, w + R, integers, x, 0, cols, acc);
    for (int r = 0; r < R; r++) out[r] = reduce(acc[r][0]);
}

template <Type C> void decode_dots(Rows rows, const float* x, long cols, float* out) {
    constexpr int R = DECODE_ROWS;
    int r = 0;
    for (; r + R <= rows.count; r += R) {
        if (r + 2 * R <= rows.count + rows.ahead) decode_rows<C, R, true>(rows.at + r, rows.integers, x, cols, out + r);
        else decode_rows<C, R, false>(rows.at + r, rows.integers, x, cols, out + r);
    }
    for (; r < rows.count; r++) decode_rows<C, 1, false>(rows.at + r, rows.integers, x, cols, out + r);
}

template <Type C, int R, int T>
FLASHINFER_INLINE void add_block(const Raw* w, long integers, const float* x, long from, long to, Lanes* lanes) {
    Lanes acc[R][T];
#pragma GCC unroll 32
    for (int i = 0; i < R * T; i++) acc[i / T][i % T] = lanes[i];
    accumulate<C, R, T, false>(w, nullptr, integers, x, from, to, acc);
#pragma GCC unroll 32
    for (int i = 0; i < R * T; i++) lanes[i] = acc[i / T][i % T];
}

// Columns [from, to) of T tokens, interleaved and aligned, as `accumulate` wants them.
template <int T> FLASHINFER_INLINE void interleave(float* to, const float* x, long x_stride, long from, long end) {
    for (long k = from; k < end; k += LANES)
        for (int t = 0; t < T; t++, to += LANES) {
            const float* values = x + t * x_stride + k;
            store(to, k + LANES <= end ? load(values) : load_part(values, int(end - k)));
        }
}

// T tokens and a panel of rows, BLOCK columns at a time: the lanes wait in memory in between.
template <Type C, int T>
void panel_dots(const Raw* w, int rows, long integers, const float* x, long x_stride, long cols, float* out,
                long out_stride) {
    alignas(64) float block[BLOCK * T];
    Lanes lanes[PANEL * T];
    for (int i = 0; i < rows * T; i++) lanes[i] = broadcast(0);
    for (long from = 0; from < cols; from += BLOCK) {
        long to = from + BLOCK < cols ? from + BLOCK : cols;
        interleave<T>(block, x, x_stride, from, to);
        int r = 0;
        for (; r + WIDE_ROWS <= rows; r += WIDE_ROWS)
            add_block<C, WIDE_ROWS, T>(w + r, integers, block, from, to, lanes + r * T);
        for (; r < rows; r++) add_block<C, 1, T>(w + r, integers, block, from, to, lanes + r * T);
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < T; t++) out[t * out_stride + r] = reduce(lanes[r * T + t]);
}

template <Type C>
void dots_of(Rows rows, const float* x, long x_stride, int tokens, long cols, float* out, long out_stride) {
    int t = 0;
    for (; t + WIDE_TOKENS <= tokens; t += WIDE_TOKENS)
        for (int r = 0; r < rows.count; r += PANEL) {
            int some = rows.count - r < PANEL ? rows.count - r : PANEL;
            panel_dots<C, WIDE_TOKENS>(rows.at + r, some, rows.integers, x + t * x_stride, x_stride, cols,
                                       out + t * out_stride + r, out_stride);
        }
    for (; t < tokens; t++) decode_dots<C>(rows, x + t * x_stride, cols, out + t * out_stride);
}

void dots(Type type, Rows rows, const float* x, long x_stride, int tokens, long cols, float* out, long out_stride) {
    constexpr decltype(&dots_of<Type::f32>) of[] = {dots_of<Type::f32>, dots_of<Type::f16>, dots_of<Type::bf16>,
                                                     dots_of<Type::int8>};
    of[int(type)](rows, x, x_stride, tokens, cols, out, out_stride);
}

// -- sums

// One token: R rows are added to each load of the accumulator.
template <Type C, int R, bool AHEAD>
FLASHINFER_INLINE void add_rows(const Raw* w, long integers, const float* h, long cols, float* acc) {
    Scales<C, R> scales;
    Raw values[R];
    Lanes factor[R];
    for (int r = 0; r < R; r++) values[r] = w[r] + integers, factor[r] = broadcast(h[r]);
    long c = 0;
    for (; c + LANES <= cols; c += LANES) {
        scales.template reach<AHEAD>(w, w + R, c);
        if constexpr (AHEAD) prefetch<C, R>(w + R, integers, c);
        Lanes sum = load(acc + c);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) sum = fma(factor[r], columns<C>(values[r], c, scales.at(r, c)), sum);
        store(acc + c, sum);
    }
    if (c == cols) return;
    scales.template reach<false>(w, nullptr, c);
    Lanes sum = load_part(acc + c, int(cols - c));
    for (int r = 0; r < R; r++)
        sum = fma(factor[r], columns_part<C>(values[r], c, int(cols - c), scales.at(r, c)), sum);
    store_part(acc + c, sum, int(cols - c));
}

template <Type C> void decode_sums(Rows rows, const float* h, long cols, float* acc) {
    constexpr int R = SUM_ROWS;
    int r = 0;
    for (; r + R <= rows.count; r += R) {
        if (r + 2 * R <= rows.count + rows.ahead) add_rows<C, R, true>(rows.at + r, rows.integers, h + r, cols, acc);
        else add_rows<C, R, false>(rows.at + r, rows.integers, h + r, cols, acc);
    }
    for (; r + 2 <= rows.count; r += 2) add_rows<C, 2, false>(rows.at + r, rows.integers, h + r, cols, acc);
    for (; r < rows.count; r++) add_rows<C, 1, false>(rows.at + r, rows.integers, h + r, cols, acc);
}

// T tokens, L * LANES columns from `c` on (the first `width` of them where L is 1), all rows: sums stay in registers.
template <Type C, int T, int L>
FLASHINFER_INLINE void add_columns(Rows rows, const float* h, long h_stride, long c, int width, float* acc,
                                   long acc_stride) {
    static_assert(L * LANES <= GROUP, "these columns have one scale");
    Scales<C, 1> scales;
    Lanes sum[T][L];
#pragma GCC unroll 16
    for (int i = 0; i < T * L; i++) {
        const float* from = acc + i / L * acc_stride + c + i % L * LANES;
        sum[i / L][i % L] = width < LANES ? load_part(from, width) : load(from);
    }
    for (int r = 0; r < rows.count; r++) {
        Lanes row[L];
        scales.load_span(rows.at + r, c);
#pragma GCC unroll 4
        for (int l = 0; l < L; l++)
            row[l] = width < LANES ? columns_part<C>(rows.at[r] + rows.integers, c, width, scales.at(0, c))
                                   : columns<C>(rows.at[r] + rows.integers, c + l * LANES, scales.at(0, c));
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            Lanes factor = broadcast(h[t * h_stride + r]);
#pragma GCC unroll 4
            for (int l = 0; l < L; l++) sum[t][l] = fma(factor, row[l], sum[t][l]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < T * L; i++) {
        float* to = acc + i / L * acc_stride + c + i % L * LANES;
        width < LANES ? store_part(to, sum[i / L][i % L], width) : store(to, sum[i / L][i % L]);
    }
}

template <Type C>
void sums_of(Rows rows, const float* h, long h_stride, int tokens, long cols, float* acc, long acc_stride) {
    constexpr int T = WIDE_TOKENS, L = WIDE_COLUMNS;
    int t = 0;
    for (; t + T <= tokens; t += T) {
        const float* factors = h + t * h_stride;
        float* to = acc + t * acc_stride;
        long c = 0;
        for (; c + L * LANES <= cols; c += L * LANES)
            add_columns<C, T, L>(rows, factors, h_stride, c, LANES, to, acc_stride);
        for (; c + LANES <= cols; c += LANES) add_columns<C, T, 1>(rows, factors, h_stride, c, LANES, to, acc_stride);
        if (c < cols) add_columns<C, T, 1>(rows, factors, h_stride, c, int(cols - c), to, acc_stride);
    }
    for (; t < tokens; t++) decode_sums<C>(rows, h + t * h_stride, cols, acc + t * acc_stride);
}

void sums(Type type, Rows rows, const float* h, long h_stride, int tokens, long cols, float* acc, long acc_stride) {
    constexpr decltype(&sums_of<Type::f32>) of[] = {sums_of<Type::f32>, sums_of<Type::f16>, sums_of<Type::bf16>,
                                                     sums_of<Type::int8>};
    of[int(type)](rows, h, h_stride, tokens, cols, acc, acc_stride);
}

#include "vectors.hpp"

}  // namespace

extern const CodeTable code_table;
extern const Table table;
const Table table = {FLASHINFER_NAME, code_table, dots, sums, soften, lean, softmax, scale, divide, norm, rotate, halve, activate};

}  // namespace flashinfer::FLASHINFER_ISA
