#include "engine.hpp"

#include <algorithm>
#include <cstring>

namespace flashinfer {
namespace {

constexpr long WORTH_A_THREAD = 1 << 16;  // multiply-adds
constexpr long MOST_ROWS = 64;            // rows of weights in one task
constexpr long AHEAD = 8;                 // rows a kernel may prefetch behind its own
constexpr long GATHERED = 16;             // neurons of one task when there is one token
constexpr long TOKENS = 8;                // tokens of one task when there are more
constexpr long ROUND = 32;                // columns are split at multiples of this: whole cache lines of f16

long ceil_div(long a, long b) { return (a + b - 1) / b; }
long round_up(long a, long b) { return ceil_div(a, b) * b; }

// Columns of one task: a few tasks per thread, so that a late one costs little.
long column_share(long width, long threads) { return round_up(ceil_div(width, threads == 1 ? 1 : 2 * threads), ROUND); }

}  // namespace

template <class F> void Engine::spread(long tasks, long work, const F& f) {
    if (work < WORTH_A_THREAD)
        for (long task = 0; task < tasks; task++) f(int(task), 0);
    else
        pool_.run(int(tasks), f);
}

void Engine::linear(float* out, long out_stride, const float* x, long tokens, const std::uint8_t* weights, Codec codec,
                    long rows, long cols) {
    auto lock = pool_.exclusive();
    const long row_bytes = cols * codec_bytes(codec);
    const long share = std::clamp(round_up(ceil_div(rows, 4 * pool_.threads()), 8), 8L, MOST_ROWS);
    spread(ceil_div(rows, share), rows * cols * tokens, [&](int task, int) {
        const long first = task * share, count = std::min(share, rows - first);
        const long ahead = std::min(AHEAD, rows - first - count);
        const std::uint8_t* at[MOST_ROWS + AHEAD];
        for (long r = 0; r < count + ahead; r++) at[r] = weights + (first + r) * row_bytes;
        table_.dots(codec, {at, int(count), int(ahead)}, x, cols, int(tokens), cols, out + first, out_stride);
    });
}

// -- feed-forward

void Engine::ffn(float* acc, const float* x, long tokens, long width, const Neurons& neurons) {
    auto lock = pool_.exclusive();
    if (tokens == 1) return ffn_one(acc, x, width, neurons);
    for (long tile = 0; tile < neurons.tiles; tile++) ffn_tile(acc, x, tokens, width, neurons, tile);
}

namespace {

// h *= up product and bias: the factor of a neuron's down row.
void gate(const Table& table, float* h, const float* products, const std::uint8_t* const* bundles, long count,
          const Part& bias) {
    for (long i = 0; i < count; i++) {
        float value = products[i];
        if (bias.offset >= 0) {
            const float one = 1;
            const std::uint8_t* at = bundles[i] + bias.offset;
            float b = 0;
            table.dots(bias.codec, {&at, 1, 0}, &one, 1, 1, 1, &b, 1);
            value += b;
        }
        h[i] *= value;
    }
}

}  // namespace

// One token. A neuron that fired exactly zero is left out, here as in prefill, so that it adds nothing in either.
void Engine::ffn_one(float* acc, const float* x, long width, const Neurons& n) {
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
            table_.dots(n.up.codec, {ups + a, int(b - a), ahead}, x, width, 1, width, products + a, width);
            gate(table_, h + a, products + a, bundles + a, b - a, n.up_bias);
        });
    const long share = column_share(width, pool_.threads()), size = codec_bytes(n.down.codec);
    spread(ceil_div(width, share), count * width, [&](int task, int) {
        const long from = task * share, cols = std::min(share, width - from);
        const std::uint8_t* at[MOST_ROWS + AHEAD];
        for (long i = 0; i < count; i += MOST_ROWS) {
            const long some = std::min(MOST_ROWS, count - i), ahead = std::min(AHEAD, count - i - some);
            for (long r = 0; r < some + ahead; r++) at[r] = downs[i + r] + from * size;
            table_.sums(n.down.codec, {at, int(some), int(ahead)}, h + i, 0, 1, cols, acc + from, width);
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
void Engine::ffn_tile(float* acc, const float* x, long tokens, long width, const Neurons& n, long tile) {
    const long size = n.tile, groups = ceil_div(tokens, TOKENS);
    const float* fired = n.fired + tile * tokens * size;
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
            table_.dots(n.up.codec, rows_of(t, n.up.offset, at), x + t * width, width, int(some), width, products, size);
            rows_of(t, 0, at);
            for (long i = 0; i < some; i++)
                gate(table_, lists.h + (t + i) * size, products + i * size, at, lists.count[t], n.up_bias);
        });
    });
    const long share = column_share(width, pool_.threads());
    spread(ceil_div(width, share), tokens * size * width, [&](int task, int) {
        const long first = task * share, cols = std::min(share, width - first);
        const std::uint8_t* at[MOST_ROWS];
        for (long from = 0; from < tokens; from += TOKENS)
            by_need(lists, from, std::min(tokens, from + TOKENS), [&](long t, long some) {
                const Rows rows = rows_of(t, n.down.offset + first * codec_bytes(n.down.codec), at);
                table_.sums(n.down.codec, rows, lists.h + t * size, size, int(some), cols, acc + t * width + first, width);
            });
    });
}

// -- attention

void Engine::append(std::uint8_t* cache, Codec codec, const float* x, long tokens, long heads, long capacity, long dim,
                    long at) {
    auto lock = pool_.exclusive();
    const long row = dim * codec_bytes(codec);
    for (long t = 0; t < tokens; t++)
        for (long head = 0; head < heads; head++, x += dim) {
            std::uint8_t* to = cache + (head * capacity + at + t) * row;
            codec == Codec::f16 ? table_.halve(to, x, dim) : void(std::memcpy(to, x, row));
        }
}

void Engine::attend(float* out, const float* q, long tokens, const KeyValues& kv, long first, long heads) {
    auto lock = pool_.exclusive();
    const long group = heads / kv.heads, together = tokens == 1 ? 1 : std::max(1L, TOKENS / group);
    const long parts = ceil_div(tokens, together);
    const long scratch = together * group * (round_up(kv.capacity, 16) + 2 * kv.dim + 1);
    float* memory = attention_.get(scratch * pool_.threads());
    spread(parts * kv.heads, tokens * heads * (first + tokens) * kv.dim, [&](int task, int worker) {
        const long head = task / parts, t = task % parts * together, width = heads * kv.dim;
        attend_some(out + t * width, q + t * width, std::min(together, tokens - t), kv, first + t, heads, head,
                    memory + worker * scratch);
    });
}

void Engine::attend_some(float* out, const float* q, long tokens, const KeyValues& kv, long first, long heads, long head,
                         float* scratch) {
    const long dim = kv.dim, group = heads / kv.heads, queries = tokens * group, stride = round_up(kv.capacity, 16);
    const long row = dim * codec_bytes(kv.codec), keys = first + tokens;
    const std::uint8_t *k = kv.k + head * kv.capacity * row, *v = kv.v + head * kv.capacity * row;
    float *scores = scratch, *scaled = scores + queries * stride, *sums = scaled + queries * dim, *totals = sums + queries * dim;
    const std::uint8_t* at[MOST_ROWS + AHEAD];
    auto rows_at = [&](const std::uint8_t* from, long i, long end) {  // up to MOST_ROWS positions from i on
        const long some = std::min(MOST_ROWS, end - i), ahead = std::min(AHEAD, end - i - some);
        for (long r = 0; r < some + ahead; r++) at[r] = from + (i + r) * row;
        return Rows{at, int(some), int(ahead)};
    };
    for (long t = 0; t < tokens; t++)
        table_.scale(scaled + t * group * dim, q + (t * heads + head * group) * dim, group * dim,
                     1.0f / __builtin_sqrtf(float(dim)));
    for (long i = 0; i < keys; i += MOST_ROWS)
        table_.dots(kv.codec, rows_at(k, i, keys), scaled, dim, int(queries), dim, scores + i, stride);
    std::fill(sums, sums + queries * dim, 0.0f);
    auto add_values = [&](long query, long count, long from, long to) {
        for (long i = from; i < to; i += MOST_ROWS)
            table_.sums(kv.codec, rows_at(v, i, to), scores + query * stride + i, stride, int(count), dim,
                        sums + query * dim, dim);
    };
    for (long query = 0; query < queries; query++)
        totals[query] = table_.softmax(scores + query * stride, first + query / group + 1);
    add_values(0, queries, 0, first + 1);  // the keys all of them see, then those a later token sees beyond
    for (long t = 1; t < tokens; t++) add_values(t * group, group, first + 1, first + t + 1);
    for (long query = 0; query < queries; query++)
        table_.divide(out + (query / group * heads + head * group + query % group) * dim, sums + query * dim, dim,
                      totals[query]);
}

// -- the small verbs

void Engine::norm(float* out, const float* x, long tokens, long width, const float* weight, const float* bias,
                  bool center, float eps) {
    auto lock = pool_.exclusive();
    spread(tokens, tokens * width, [&](int t, int) {
        table_.norm(out + t * width, x + t * width, width, weight, bias, center, eps);
    });
}

void Engine::rotate(float* out, const float* x, long tokens, long heads, long dim, const float* cos, const float* sin,
                    long half) {
    auto lock = pool_.exclusive();
    spread(tokens, tokens * heads * dim, [&](int t, int) {
        for (long at = t * heads * dim; at < (t + 1) * heads * dim; at += dim)
            table_.rotate(out + at, x + at, dim, half, cos + t * half, sin + t * half);
    });
}

void Engine::fire(float* out, const float* gate, long tokens, long neurons, Activation activation,
                  const std::int64_t* index, long tiles, long tile) {
    auto lock = pool_.exclusive();
    spread(tiles, tiles * tokens * tile * 8, [&](int task, int) {
        const std::int64_t* wanted = index + task * tile;
        for (long t = 0; t < tokens; t++) {
            float* to = out + (task * tokens + t) * tile;
            for (long n = 0; n < tile; n++) to[n] = wanted[n] < 0 ? 0.0f : gate[t * neurons + wanted[n]];
            table_.activate(activation, to, tile);
        }
    });
}

long Engine::scratch_bytes() const { return rows_.bytes() + values_.bytes() + lists_.bytes() + attention_.bytes(); }

}  // namespace flashinfer
