// What an instruction set's kernels offer. Each function runs on one thread; who splits the work is `engine.cpp`.
#pragma once

#include <cstdint>

namespace flashinfer {

enum class Codec : int { f32, f16, bf16, int8 };
enum class Activation : int { relu, relu2, silu, gelu, gelu_tanh, gelu_quick };

constexpr long GROUP = 32;  // columns of int8 that share a scale
constexpr long value_bytes(Codec codec) { return codec == Codec::f32 ? 4 : codec == Codec::int8 ? 1 : 2; }

// An int8 row is its float16 scales, then its integers, both in whole blocks; other rows are their values.
constexpr long row_bytes(Codec codec, long columns) {
    return codec == Codec::int8 ? (columns + GROUP - 1) / GROUP * (GROUP + 2) : columns * value_bytes(codec);
}
// Where in a row what belongs to a column begins, a multiple of GROUP: its scale, or its value.
constexpr long column_at(Codec codec, long column) {
    return codec == Codec::int8 ? column / GROUP * 2 : column * value_bytes(codec);
}
// How far behind that its integer lies.
constexpr long integers_at(Codec codec, long columns, long column = 0) {
    return codec == Codec::int8 ? (columns + GROUP - 1) / GROUP * 2 + column - column / GROUP * 2 : 0;
}

// Rows of weights anywhere in memory, unaligned. `ahead` more follow in `at`: they come next, and may be prefetched.
struct Rows {
    const std::uint8_t* const* at;
    int count;
    int ahead;
    long integers = 0;  // of int8: bytes from the first scale to the first integer
};

struct Table {
    const char* name;

    // out[t, r] = x[t, :] . row r. The sum over columns has one order, whatever the numbers of rows and tokens.
    void (*dots)(Codec, Rows, const float* x, long x_stride, int tokens, long cols, float* out, long out_stride);

    // acc[t, :] += h[t, r] * row r, one row after the other.
    void (*sums)(Codec, Rows, const float* h, long h_stride, int tokens, long cols, float* acc, long acc_stride);

    // values = e^(values - their maximum); returns their sum.
    float (*softmax)(float* values, long count);

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

    void (*activate)(Activation, float* values, long count);
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
