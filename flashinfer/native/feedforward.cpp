// Neurons anywhere in memory: their decision products, and what they add to the output.
#include <algorithm>

#include "engine.hpp"

namespace flashinfer {

namespace {

// products += bias, in one rounding: what adding the decoded value gives.
void add_bias(const Table& table, Type type, const std::uint8_t* bias, float* products, long tokens, long stride) {
    const float one = 1;
    table.sums(type, {&bias, 1, 0}, &one, 0, int(tokens), 1, products, stride);
}

}  // namespace

void Engine::decide(float* out, long neurons, const float* x, long tokens, long width, const Decision& d) {
    auto lock = pool_.exclusive();
    const std::uint8_t** rows = rows_.get(d.count);
    std::int32_t* place = lists_.get(d.count);
    long count = 0;
    for (long i = 0; i < d.count; i++)
        if (d.index[i] >= 0) {
            rows[count] = d.memory + d.offsets[i] + d.rows.offset;
            place[count++] = std::int32_t(d.index[i]);
        }
    const long share = tokens == 1 ? GATHERED : MOST_ROWS;
    prepared(*d.rows.codec, x, tokens, width, [&](long first, long some_tokens, const Tokens& input) {
        spread(ceil_div(count, share), count * width * some_tokens, [&](int task, int) {
            const long a = task * share, some = std::min(share, count - a);
            const long ahead = tokens == 1 ? std::min(AHEAD, count - a - some) : 0;
            float products[TOKENS * MOST_ROWS];
            for (long t = 0; t < some_tokens; t += TOKENS) {
                const long many = std::min(TOKENS, some_tokens - t);
                dots(*d.rows.codec, {rows + a, int(some), int(ahead)}, input.from(t), int(many), products, share);
                for (long r = 0; r < some; r++) {
                    const std::uint8_t* bias = rows[a + r] - d.rows.offset + d.bias.offset;
                    if (d.bias.offset >= 0) add_bias(table_, d.bias.codec->type, bias, products + r, many, share);
                    float* to = out + (first + t) * neurons + place[a + r];
                    for (long i = 0; i < many; i++) to[i * neurons] += products[i * share + r];
                }
            }
        });
    });
}

// Columns [from, from + cols) of rows of any codec.
void Engine::sums(const Codec& codec, Rows rows, const float* h, long h_stride, int tokens, long width, long from,
                  long cols, float* acc, long acc_stride) const {
    if (codec.type == Type::codes)
        return table_.codes.sums(codec, rows, h, h_stride, tokens, width, from, cols, acc, acc_stride);
    const std::uint8_t* at[MOST_ROWS + AHEAD];
    for (long r = 0; r < rows.count + rows.ahead; r++) at[r] = rows.at[r] + column_at(codec.type, from);
    table_.sums(codec.type, {at, rows.count, rows.ahead, integers_at(codec.type, width, from)}, h, h_stride, tokens,
                cols, acc, acc_stride);
}

void Engine::ffn(float* acc, const float* x, long tokens, long width, const Neurons& neurons) {
    auto lock = pool_.exclusive();
    static const Codec none;
    prepared(neurons.up.offset < 0 ? none : *neurons.up.codec, x, tokens, width, [&](long t, long some, const Tokens& input) {
        if (tokens == 1) return ffn_one(acc, input, neurons);
        for (long tile = 0; tile < neurons.tiles; tile++)
            ffn_tile(acc + t * width, input, some, neurons, tile, neurons.fired + (tile * tokens + t) * neurons.tile);
    });
}

namespace {

// h *= up product and bias, activated: the factor of a neuron's down row. Overwrites `products`.
void gate(const Table& table, float* h, float* products, const std::uint8_t* const* bundles, long count,
          const Neurons& n) {
    if (n.up_bias.offset >= 0)
        for (long i = 0; i < count; i++) {
            const float one = 1;
            const std::uint8_t* at = bundles[i] + n.up_bias.offset;
            float b = 0;
            table.dots(n.up_bias.codec->type, {&at, 1, 0}, &one, 1, 1, 1, &b, 1);
            products[i] += b;
        }
    if (n.up_activation >= 0) table.activate(Activation(n.up_activation), 0, products, count);
    for (long i = 0; i < count; i++) h[i] *= products[i];
}

}  // namespace

// One token. A neuron that fired exactly zero is left out, here as in prefill, so that it adds nothing in either.
void Engine::ffn_one(float* acc, const Tokens& x, const Neurons& n) {
    const long width = x.width;
    const long most = n.tiles * n.tile;
    const std::uint8_t** bundles = rows_.get(3 * most);
    const std::uint8_t **ups = bundles + most, **downs = ups + most;
    float *h = values_.get(2 * most), *products = h + most;
    long count = 0;
    for (long i = 0; i < most; i++)
        if (n.fired[i] != 0) {
            h[count] = n.fired[i];
            bundles[count] = n.memory + n.offsets[i];
            ups[count] = bundles[count] + n.up.offset;
            downs[count] = bundles[count] + n.down.offset;
            count++;
        }
    if (n.up.offset >= 0)
        spread(ceil_div(count, GATHERED), count * width, [&](int task, int) {
            const long a = task * GATHERED, b = std::min(count, a + GATHERED);
            const int ahead = int(std::min(AHEAD, count - b));
            dots(*n.up.codec, {ups + a, int(b - a), ahead}, x, 1, products + a, width);
            gate(table_, h + a, products + a, bundles + a, b - a, n);
        });
    const long share = column_share(width, pool_.threads());
    const long together = n.down.codec->type == Type::codes ? count : MOST_ROWS;
    spread(ceil_div(width, share), count * width, [&](int task, int) {
        const long from = task * share, cols = std::min(share, width - from);
        for (long i = 0; i < count; i += together) {
            const long some = std::min(together, count - i), ahead = std::min(AHEAD, count - i - some);
            sums(*n.down.codec, {downs + i, int(some), int(ahead)}, h + i, 0, 1, width, from, cols, acc + from, width);
        }
    });
}

namespace {

// Which neurons of a tile each token needs, and its factors for them, one behind the other.
struct Lists {
    std::int32_t* index;  // [tokens, tile]
    std::int32_t* count;  // [tokens]
    float* h;             // [tokens, tile]
    long tile;

    void fill(const float* fired, long t) const {
        std::int32_t found = 0;
        for (long i = 0; i < tile; i++)
            if (fired[t * tile + i] != 0) {
                h[t * tile + found] = fired[t * tile + i];
                index[t * tile + found++] = std::int32_t(i);
            }
        count[t] = found;
    }

    // Whether these tokens need the same neurons.
    bool same(long from, long to) const {
        for (long t = from + 1; t < to; t++)
            if (count[t] != count[from] || !std::equal(index + t * tile, index + t * tile + count[t], index + from * tile))
                return false;
        return true;
    }
};

// Calls f(token, tokens) for the tokens of a group: once where they need the same neurons, else one by one.
template <class F> void by_need(const Lists& lists, long from, long to, const F& f) {
    const long step = lists.same(from, to) ? to - from : 1;
    for (long t = from; t < to; t += step)
        if (lists.count[t]) f(t, step);
}

}  // namespace

// Many tokens, one tile. What sums over columns or neurons is the order of one token, so it does not matter with whom
// a token shares a pass over the weights.
void Engine::ffn_tile(float* acc, const Tokens& x, long tokens, const Neurons& n, long tile, const float* fired) {
    const long size = n.tile, width = x.width, groups = ceil_div(tokens, TOKENS);
    std::int32_t* memory = lists_.get(tokens * (size + 1));
    const Lists lists{memory, memory + tokens * size, values_.get(tokens * size), size};
    const std::uint8_t* bundles[MOST_ROWS];
    for (long i = 0; i < size; i++) bundles[i] = n.memory + n.offsets[tile * size + i];
    auto rows_of = [&](long t, long offset, const std::uint8_t** at) {
        for (long i = 0; i < lists.count[t]; i++) at[i] = bundles[lists.index[t * size + i]] + offset;
        return Rows{at, lists.count[t], 0};
    };
    spread(groups, tokens * size * width, [&](int task, int) {
        const long from = task * TOKENS, to = std::min(tokens, from + TOKENS);
        for (long t = from; t < to; t++) lists.fill(fired, t);
        if (n.up.offset < 0) return;
        const std::uint8_t* at[MOST_ROWS];
        float products[TOKENS * MOST_ROWS];
        by_need(lists, from, to, [&](long t, long some) {
            dots(*n.up.codec, rows_of(t, n.up.offset, at), x.from(t), int(some), products, size);
            rows_of(t, 0, at);
            for (long i = 0; i < some; i++)
                gate(table_, lists.h + (t + i) * size, products + i * size, at, lists.count[t], n);
        });
    });
    const long share = column_share(width, pool_.threads());
    spread(ceil_div(width, share), tokens * size * width, [&](int task, int) {
        const long first = task * share, cols = std::min(share, width - first);
        const std::uint8_t* at[MOST_ROWS];
        for (long from = 0; from < tokens; from += TOKENS)
            by_need(lists, from, std::min(tokens, from + TOKENS), [&](long t, long some) {
                sums(*n.down.codec, rows_of(t, n.down.offset, at), lists.h + t * size, size, int(some), width, first, cols,
                     acc + t * width + first, width);
            });
    });
}

}  // namespace flashinfer
