// What an instruction set's kernels offer. Each function runs on one thread; who splits the work is `engine.cpp`.
#pragma once

#include <cstdint>

#include "codec.hpp"

namespace flashinfer {

enum class Activation : int { relu, relu2, silu, gelu, gelu_tanh, gelu_quick, fatrelu, shifted_relu, swiglu_oai, clamped };
constexpr Activation LAST_ACTIVATION = Activation::clamped;

// Rows of weights anywhere in memory, unaligned. `ahead` more follow in `at`: they come next, and may be prefetched.
struct Rows {
    const std::uint8_t* const* at;
    int count;
    int ahead;
    long integers = 0;  // of int8: bytes from the first scale to the first integer
};

// Of rows of codes, which begin at `rows.at` and have `width` columns.
struct CodeTable {
    // x as `dots` wants it.
    long (*prepared_bytes)(const Codec&, long width);
    void (*prepare)(const Codec&, const float* x, long width, std::uint8_t* out);

    // As those of `Table`; a token every `x_stride` bytes.
    void (*dots)(const Codec&, Rows, const std::uint8_t* x, long x_stride, int tokens, long width, float* out,
                 long out_stride);

    // Columns [from, from + cols), `from` a multiple of GROUP, of any number of rows with one
    // token, else of up to MOST_ROWS.
    void (*sums)(const Codec&, Rows, const float* h, long h_stride, int tokens, long width, long from, long cols,
                 float* acc, long acc_stride);
};

struct Table {
    const char* name;
    const CodeTable& codes;

    // out[t, r] = x[t, :] . row r. The sum over columns has one order, whatever the numbers of rows and tokens.
    void (*dots)(Type, Rows, const float* x, long x_stride, int tokens, long cols, float* out, long out_stride);

    // acc[t, :] += h[t, r] * row r, one row after the other.
    void (*sums)(Type, Rows, const float* h, long h_stride, int tokens, long cols, float* acc, long acc_stride);

    // values = cap * tanh(values / cap).
    void (*soften)(float* values, long count, float cap);

    // values[i] += slope * (first + i).
    void (*lean)(float* values, long count, float slope, long first);

    // values = e^(values - the largest); returns their sum. A sink, where there is one, counts as a value in both.
    float (*softmax)(float* values, long count, const float* sink);

    // out = values * factor, or / divisor.
    void (*scale)(float* out, const float* values, long count, float factor);
    void (*divide)(float* out, const float* values, long count, float divisor);

    // RMSNorm, or LayerNorm where `center`; weight and bias may be null.
    void (*norm)(float* out, const float* x, long count, const float* weight, const float* bias, bool center,
                 float eps);

    // Rotary positions of one head: halves of `half` values each; the rest of `dim` is copied.
    void (*rotate)(float* out, const float* x, long dim, long half, const float* cos, const float* sin);

    // float32 to float16, to nearest, ties to even.
    void (*halve)(std::uint8_t* out, const float* x, long count);

    void (*activate)(Activation, float threshold, float* values, long count);
};

// The fastest first; `supported` says whether this processor has it.
struct Variant {
    const Table* table;
    bool supported;
};
struct Variants {
    const Variant* at;
    int count;
};
Variants variants();

}  // namespace flashinfer
