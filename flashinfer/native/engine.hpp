// The verbs of the backend: work split over threads such that the split cannot be seen in the results.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "pool.hpp"
#include "table.hpp"
#include "work.hpp"

namespace flashinfer {

// Scratch memory that grows and is kept; what it held is lost when it grows.
template <class T> class Scratch {
   public:
    T* get(long count) {
        if (count > size_) {
            data_.reset();
            data_.reset(new T[count]);
            size_ = count;
        }
        return data_.get();
    }
    long bytes() const { return size_ * long(sizeof(T)); }

   private:
    std::unique_ptr<T[]> data_;
    long size_ = 0;
};

struct Part {
    const Codec* codec;
    long offset;  // in the bundle; below 0: there is none
};

// Activations of some tokens as products with a codec want them: as they are, or prepared for codes.
struct Tokens {
    const float* x;
    long width;
    const std::uint8_t* prepared;
    long stride;  // bytes

    Tokens from(long t) const { return {x + t * width, width, prepared + t * stride, stride}; }
};

struct Neurons {
    const float* fired;  // [tiles, tokens, tile]
    const std::uint8_t* memory;
    const std::int64_t* offsets;  // [tiles, tile]
    long tiles, tile;
    Part up, up_bias, down;
    int up_activation;  // of products with `up`; below 0: they count as they are
};

// Decision rows in bundles; those whose index is negative are left out.
struct Decision {
    const std::uint8_t* memory;
    const std::int64_t *index, *offsets;  // [count]
    long count;
    Part rows, bias;
};

struct KeyValues {
    const std::uint8_t *k, *v;  // [heads, capacity, dim], [heads, capacity, value_dim]
    Type type;
    long heads, capacity, dim, value_dim;
};

// What becomes of scores before their softmax, beside the causal mask; see `Scoring` of backend/base.py.
struct Scoring {
    long window;                  // positions a query sees, its own the last of them
    float cap;                    // 0: none
    const float *slopes, *sinks;  // [heads], or null
};

class Engine {
   public:
    Engine(int threads, const Table& table) : table_(table), pool_(threads) {}

    // out[t, :rows] = x[t] @ weights.T; rows of `out` lie `out_stride` apart.
    void linear(float* out, long out_stride, const float* x, long tokens, const std::uint8_t* weights,
                const Codec& codec, long rows, long cols);

    // out[t, index] += x[t] . row + bias for each row, with the bits of `linear`; rows of `out` hold `neurons` values.
    void decide(float* out, long neurons, const float* x, long tokens, long width, const Decision& decision);

    // acc[t] += what the neurons give for x[t], one neuron after the other.
    void ffn(float* acc, const float* x, long tokens, long width, const Neurons& neurons);

    // Positions at, at + 1, ... of a cache of keys or values become `tokens` rows of x, [tokens, heads * dim].
    void append(std::uint8_t* cache, Type type, const float* x, long tokens, long heads, long capacity, long dim,
                long at);

    // Causal attention of tokens at positions first, first + 1, ...; q is [tokens, heads * dim], out
    // [tokens, heads * value_dim].
    void attend(float* out, const float* q, long tokens, const KeyValues& kv, long first, long heads,
                const Scoring& scoring);

    void norm(float* out, const float* x, long tokens, long width, const float* weight, const float* bias, bool center,
              float eps);
    void rotate(float* out, const float* x, long tokens, long heads, long dim, const float* cos, const float* sin,
                long half);

    // out[tile, t, n] = activation(gate[t, index[tile, n]]), 0 where the index is negative.
    void fire(float* out, const float* gate, long tokens, long neurons, Activation activation, float threshold,
              const std::int64_t* index, long tiles, long tile);

    // Copies `count` records of `size` bytes between bytes of `memory`; none overlaps another.
    void copy(std::uint8_t* memory, const std::int64_t* targets, const std::int64_t* sources, long count, long size);

    const char* name() const { return table_.name; }
    long scratch_bytes() const;
    void close() { pool_.close(); }

   private:
    // f(first token, tokens prepared for the codec), PREPARED_TOKENS at a time where it has codes, else all at once.
    template <class F> void prepared(const Codec& codec, const float* x, long tokens, long width, const F& f) {
        const long most = codec.type == Type::codes ? PREPARED_TOKENS : tokens;
        for (long t = 0; t < tokens; t += most) {
            const long some = std::min(most, tokens - t);
            f(t, some, prepare(codec, x + t * width, some, width));
        }
    }
    Tokens prepare(const Codec& codec, const float* x, long tokens, long width);

    // Those of the table, for any codec; `sums` of columns [from, from + cols) of rows that begin at `rows.at`.
    void dots(const Codec& codec, Rows rows, const Tokens& x, int tokens, float* out, long out_stride) const;
    void sums(const Codec& codec, Rows rows, const float* h, long h_stride, int tokens, long width, long from, long cols,
              float* acc, long acc_stride) const;

    void ffn_one(float* acc, const Tokens& x, const Neurons& neurons);
    void ffn_tile(float* acc, const Tokens& x, long tokens, const Neurons& neurons, long tile,
                  const float* fired);
    void attend_some(float* out, const float* q, long tokens, const KeyValues& kv, long first, long heads, long head,
                     const Scoring& scoring, float* scratch);
    float weigh(float* scores, long count, const Scoring& scoring, long head) const;

    // f(task, worker) for each task; `work` counts multiply-adds: whether they are worth waking a thread for.
    template <class F> void spread(long tasks, long work, const F& f) {
        if (work < WORTH_A_THREAD)
            for (long task = 0; task < tasks; task++) f(int(task), 0);
        else
            pool_.run(int(tasks), f);
    }

    const Table& table_;
    Pool pool_;
    Scratch<const std::uint8_t*> rows_;
    Scratch<float> values_;
    Scratch<std::int32_t> lists_;
    Scratch<float> attention_;
    Scratch<std::uint8_t> prepared_;
};

}  // namespace flashinfer
