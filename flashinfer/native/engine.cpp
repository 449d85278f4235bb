#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace flashinfer {

Tokens Engine::prepare(const Codec& codec, const float* x, long tokens, long width) {
    if (codec.type != Type::codes) return {x, width, nullptr, 0};
    const CodeTable& codes = table_.codes;
    const long size = codes.prepared_bytes(codec, width);
    std::uint8_t* to = prepared_.get(tokens * size);
    spread(tokens, tokens * width * 4, [&](int t, int) { codes.prepare(codec, x + t * width, width, to + t * size); });
    return {x, width, to, size};
}

void Engine::dots(const Codec& codec, Rows rows, const Tokens& x, int tokens, float* out, long out_stride) const {
    if (codec.type == Type::codes)
        return table_.codes.dots(codec, rows, x.prepared, x.stride, tokens, x.width, out, out_stride);
    rows.integers = integers_at(codec.type, x.width);
    table_.dots(codec.type, rows, x.x, x.width, tokens, x.width, out, out_stride);
}

void Engine::linear(float* out, long out_stride, const float* x, long tokens, const std::uint8_t* weights,
                    const Codec& codec, long rows, long cols) {
    auto lock = pool_.exclusive();
    const long size = codec.bytes(cols);
    const long share = std::clamp(round_up(ceil_div(rows, 4 * pool_.threads()), 8), 8L, MOST_ROWS);
    prepared(codec, x, tokens, cols, [&](long t, long many, const Tokens& input) {
        spread(ceil_div(rows, share), rows * cols * many, [&](int task, int) {
            const long first = task * share, count = std::min(share, rows - first);
            const long ahead = std::min(AHEAD, rows - first - count);
            const std::uint8_t* at[MOST_ROWS + AHEAD];
            for (long r = 0; r < count + ahead; r++) at[r] = weights + (first + r) * size;
            dots(codec, {at, int(count), int(ahead)}, input, int(many), out + t * out_stride + first, out_stride);
        });
    });
}

// -- attention

namespace {

float half_value(std::uint16_t half) {
    const int exponent = half >> 10, mantissa = half & 1023;
    return exponent ? std::ldexp(float(1024 + mantissa), exponent - 25) : std::ldexp(float(mantissa), -24);
}

// The least float16 with 127 * scale >= largest, as `quant/int8g32.py` has it; the largest float16 where there is none.
std::uint16_t least_scale(const Table& table, float largest) {
    const float wanted = largest / 127;
    std::uint16_t half;
    table.halve(reinterpret_cast<std::uint8_t*>(&half), &wanted, 1);
    half = std::min<std::uint16_t>(half, 0x7bff);
    while (half < 0x7bff && 127 * half_value(half) < largest) half++;
    while (half > 0 && 127 * half_value(half - 1) >= largest) half--;
    return half;
}

// A row of `int8g32`: its scales, then its integers, both in whole groups.
void quantise(const Table& table, std::uint8_t* out, const float* x, long count) {
    std::int8_t* integers = reinterpret_cast<std::int8_t*>(out + integers_at(Type::int8, count));
    for (long from = 0; from < count; from += GROUP, out += 2) {
        const long some = std::min(GROUP, count - from);
        float largest = 0;
        for (long i = 0; i < some; i++) largest = std::max(largest, std::fabs(x[from + i]));
        const std::uint16_t half = least_scale(table, largest);
        const double scale = half ? half_value(half) : 1;
        std::memcpy(out, &half, 2);
        for (long i = 0; i < GROUP; i++) integers[from + i] = i < some ? std::int8_t(std::nearbyint(x[from + i] / scale)) : 0;
    }
}

}  // namespace

void Engine::append(std::uint8_t* cache, Type type, const float* x, long tokens, long heads, long capacity, long dim,
                    long at) {
    auto lock = pool_.exclusive();
    const long row = row_bytes(type, dim);
    for (long t = 0; t < tokens; t++)
        for (long head = 0; head < heads; head++, x += dim) {
            std::uint8_t* to = cache + (head * capacity + at + t) * row;
            if (type == Type::int8) quantise(table_, to, x, dim);
            else if (type == Type::f16) table_.halve(to, x, dim);
            else std::memcpy(to, x, row);
        }
}

// Scores of a query and `count` keys, the last one its own, become weights; returns their sum.
float Engine::weigh(float* scores, long count, const Scoring& scoring, long head) const {
    if (scoring.cap > 0) table_.soften(scores, count, scoring.cap);
    if (scoring.slopes) table_.lean(scores, count, scoring.slopes[head], 1 - count);
    return table_.softmax(scores, count, scoring.sinks ? scoring.sinks + head : nullptr);
}

void Engine::attend(float* out, const float* q, long tokens, const KeyValues& kv, long first, long heads,
                    const Scoring& scoring) {
    auto lock = pool_.exclusive();
    const long group = heads / kv.heads, together = tokens == 1 ? 1 : std::max(1L, TOKENS / group);
    const long parts = ceil_div(tokens, together);
    const long scratch = together * group * (round_up(kv.capacity, 16) + kv.dim + kv.value_dim + 1);
    float* memory = attention_.get(scratch * pool_.threads());
    spread(parts * kv.heads, tokens * heads * std::min(first + tokens, scoring.window) * kv.dim, [&](int task, int worker) {
        const long head = task / parts, t = task % parts * together;
        attend_some(out + t * heads * kv.value_dim, q + t * heads * kv.dim, std::min(together, tokens - t), kv, first + t,
                    heads, head, scoring, memory + worker * scratch);
    });
}

void Engine::attend_some(float* out, const float* q, long tokens, const KeyValues& kv, long first, long heads, long head,
                         const Scoring& scoring, float* scratch) {
    const long dim = kv.dim, value_dim = kv.value_dim, keys = first + tokens;
    const long group = heads / kv.heads, queries = tokens * group, stride = round_up(kv.capacity, 16);
    float *scores = scratch, *scaled = scores + queries * stride, *sums = scaled + queries * dim;
    float* totals = sums + queries * value_dim;
    const std::uint8_t* at[MOST_ROWS + AHEAD];
    // up to MOST_ROWS positions of this head from i on, of keys or values of `width`
    auto rows_at = [&](const std::uint8_t* cache, long width, long i, long end) {
        const long some = std::min(MOST_ROWS, end - i), ahead = std::min(AHEAD, end - i - some);
        const long row = row_bytes(kv.type, width);
        const std::uint8_t* from = cache + head * kv.capacity * row;
        for (long r = 0; r < some + ahead; r++) at[r] = from + (i + r) * row;
        return Rows{at, int(some), int(ahead), integers_at(kv.type, width)};
    };
    auto seen_from = [&](long t) { return std::max(0L, first + t + 1 - scoring.window); };
    for (long t = 0; t < tokens; t++)
        table_.scale(scaled + t * group * dim, q + (t * heads + head * group) * dim, group * dim,
                     1.0f / __builtin_sqrtf(float(dim)));
    for (long i = seen_from(0); i < keys; i += MOST_ROWS)
        table_.dots(kv.type, rows_at(kv.k, dim, i, keys), scaled, dim, int(queries), dim, scores + i, stride);
    std::fill(sums, sums + queries * value_dim, 0.0f);
    auto add_values = [&](long query, long count, long from, long to) {
        for (long i = from; i < to; i += MOST_ROWS)
            table_.sums(kv.type, rows_at(kv.v, value_dim, i, to), scores + query * stride + i, stride, int(count),
                        value_dim, sums + query * value_dim, value_dim);
    };
    for (long query = 0; query < queries; query++) {
        const long from = seen_from(query / group), to = first + query / group + 1;
        totals[query] = weigh(scores + query * stride + from, to - from, scoring, head * group + query % group);
    }
    // in order: keys only the first tokens still see, those all of them see, those a later token sees beyond
    const long all_from = seen_from(tokens - 1), all_to = std::max(all_from, first + 1);
    for (long t = 0; t + 1 < tokens; t++) add_values(t * group, group, seen_from(t), std::min(all_from, first + t + 1));
    add_values(0, queries, all_from, all_to);
    for (long t = 1; t < tokens; t++) add_values(t * group, group, all_to, first + t + 1);
    for (long query = 0; query < queries; query++)
        table_.divide(out + (query / group * heads + head * group + query % group) * value_dim, sums + query * value_dim,
                      value_dim, totals[query]);
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

void Engine::fire(float* out, const float* gate, long tokens, long neurons, Activation activation, float threshold,
                  const std::int64_t* index, long tiles, long tile) {
    auto lock = pool_.exclusive();
    spread(tiles, tiles * tokens * tile * 8, [&](int task, int) {
        const std::int64_t* wanted = index + task * tile;
        for (long t = 0; t < tokens; t++) {
            float* to = out + (task * tokens + t) * tile;
            for (long n = 0; n < tile; n++) to[n] = wanted[n] < 0 ? 0.0f : gate[t * neurons + wanted[n]];
            table_.activate(activation, threshold, to, tile);
            for (long n = 0; n < tile; n++) to[n] = wanted[n] < 0 ? 0.0f : to[n];  // of `clamped` it would be 1
        }
    });
}

void Engine::copy(std::uint8_t* memory, const std::int64_t* targets, const std::int64_t* sources, long count,
                  long size) {
    auto lock = pool_.exclusive();
    const long share = std::clamp(ceil_div(count, 4 * pool_.threads()), 1L, MOST_ROWS);
    spread(ceil_div(count, share), count * size, [&](int task, int) {
        for (long i = task * share; i < std::min(count, (task + 1) * share); i++)
            std::memcpy(memory + targets[i], memory + sources[i], size);
    });
}

long Engine::scratch_bytes() const { return rows_.bytes() + values_.bytes() + lists_.bytes() + attention_.bytes() + prepared_.bytes(); }

}  // namespace flashinfer
