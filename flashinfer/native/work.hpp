// How work is cut into tasks.
#pragma once

namespace flashinfer {

constexpr long WORTH_A_THREAD = 1 << 16;  // multiply-adds
constexpr long MOST_ROWS = 64;            // rows of weights in one task
constexpr long AHEAD = 8;                 // rows a kernel may prefetch behind its own
constexpr long GATHERED = 16;             // neurons of one task when there is one token
constexpr long TOKENS = 8;                // tokens of one task when there are more
constexpr long PREPARED_TOKENS = 64;      // tokens prepared together for products with codes
constexpr long ROUND = 128;               // columns are split at multiples of this: whole lines of f16 and of nibbles

constexpr long ceil_div(long a, long b) { return (a + b - 1) / b; }
constexpr long round_up(long a, long b) { return ceil_div(a, b) * b; }

// Columns of one task, one for each thread: shorter pieces of rows anywhere in memory are read more slowly.
constexpr long column_share(long width, long threads) { return round_up(ceil_div(width, threads), ROUND); }

}  // namespace flashinfer
