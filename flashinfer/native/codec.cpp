#include "codec.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace flashinfer {

namespace {

constexpr long ALIGNMENT = 16;
constexpr long WHOLE_ROW = 1L << 40;

long padded(long size) { return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

// Whether all entries are `step` times an integer, and these lie no further apart than `most`.
bool integers_of(const float* table, int count, float step, float most) {
    const auto [least, largest] = std::minmax_element(table, table + count);
    return *largest - *least <= most * step &&
           std::all_of(table, table + count, [&](float v) { return std::nearbyint(v / step) * step == v; });
}

// Nibbles: the largest power of two that all entries are a multiple of, where the integers fit a signed byte.
void find_integers(Codec& c) {
    for (float step = 1; step >= 0x1p-6f && !c.fixed; step /= 2) {
        if (!integers_of(c.table.data(), 16, step, 127)) continue;
        const float least = *std::min_element(c.table.begin(), c.table.begin() + 16);
        c.fixed = true, c.step = step, c.offset = -int(least / step);
        for (int i = 0; i < 16; i++) c.nibbles[i] = std::uint8_t(int(c.table[i] / step) + c.offset);
        if (c.zeros() && c.scale == Scale::f16 && c.unit == 1 && step == 1) c.centre = 8 - c.offset, c.offset = 8;
    }
}

bool is_signed_byte(const Codec& c) {
    for (int i = 0; i < 256; i++)
        if (c.table[i] != float(std::int8_t(i))) return false;
    return true;
}

// The value of e4m3, but for the two codes that are no number: those are never written.
bool is_e4m3(const Codec& c) {
    for (int i = 0; i < 256; i++) {
        const int exponent = i >> 3 & 15, mantissa = i & 7;
        const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
        if ((i & 127) != 127 && c.table[i] != (i < 128 ? size : -size)) return false;
    }
    return true;
}

}  // namespace

long Codec::zeros_at(long columns) const {
    const long n = groups(columns);
    switch (scale) {
        case Scale::f16: return 2 * n;
        case Scale::f32: return 4 * n;
        case Scale::e8m0: return n;
        case Scale::nested: return 4 + 4 * ((n + 255) / 256) + n;
    }
    return 0;
}

long Codec::codes_at(long columns) const { return padded(zeros_at(columns) + groups(columns) * (zero == Zero::f16 ? 2 : zero == Zero::u8 ? 1 : 0)); }

long Codec::outliers_at(long columns) const {
    return codes_at(columns) + code_bytes(stored(columns));
}

long Codec::bytes(long columns) const {
    if (type != Type::codes) return row_bytes(type, columns);
    return outliers_at(columns) + padded(2 * long(outliers.size()));
}

Codec code_codec(int bits, long group, const std::vector<float>& table, int scale, float unit, int zero,
                 const std::vector<float>& map, const std::vector<std::int32_t>& outliers) {
    if ((bits != 4 && bits != 8) || long(table.size()) != 1L << bits) throw std::invalid_argument("a table of 16 or 256 values was expected");
    if (group && (group < 32 || group & (group - 1))) throw std::invalid_argument("a group is a power of two, 32 at least");
    if (scale < 0 || scale > int(Scale::nested)) throw std::invalid_argument("no such type of scale");
    if (zero < 0 || zero > int(Zero::u8)) throw std::invalid_argument("no such type of zero-point");
    if (map.size() != 256) throw std::invalid_argument("the map of nested scales has 256 values");
    if (std::adjacent_find(outliers.begin(), outliers.end(), std::greater_equal<>()) != outliers.end() ||
        (!outliers.empty() && outliers[0] < 0))
        throw std::invalid_argument("outliers are ascending columns");
    if (!outliers.empty() && (bits != 8 || zero)) throw std::invalid_argument("outliers are of eight-bit integers");
    Codec c;
    c.type = Type::codes, c.scale = Scale(scale), c.zero = Zero(zero), c.unit = unit, c.outliers = outliers;
    c.group = group ? group : WHOLE_ROW;
    std::copy(table.begin(), table.end(), c.table.begin());
    std::copy(map.begin(), map.end(), c.map.begin());
    if (bits == 4) find_integers(c);
    else c.fixed = is_signed_byte(c), c.form = c.fixed ? Form::integers : is_e4m3(c) ? Form::e4m3 : Form::bytes;
    if (c.zero == Zero::u8 && !c.centre) throw std::invalid_argument("a zero-point of a byte is of four-bit integers with float16 scales");
    return c;
}

}  // namespace flashinfer
