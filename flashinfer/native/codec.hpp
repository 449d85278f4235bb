// How weights are coded: the types that are values themselves, and codes with scales, as `quant/layout.py` has them.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace flashinfer {

enum class Type : int { f32, f16, bf16, int8, codes };  // int8 is `int8g32`

constexpr long GROUP = 32;  // columns of int8 that share a scale
constexpr long value_bytes(Type type) { return type == Type::f32 ? 4 : type == Type::int8 ? 1 : 2; }

// An int8 row is its float16 scales, then its integers, both in whole blocks; other rows are their values.
constexpr long row_bytes(Type type, long columns) {
    return type == Type::int8 ? (columns + GROUP - 1) / GROUP * (GROUP + 2) : columns * value_bytes(type);
}
// Where in a row what belongs to a column begins, a multiple of GROUP: its scale, or its value.
constexpr long column_at(Type type, long column) {
    return type == Type::int8 ? column / GROUP * 2 : column * value_bytes(type);
}
// How far behind that its integer lies.
constexpr long integers_at(Type type, long columns, long column = 0) {
    return type == Type::int8 ? (columns + GROUP - 1) / GROUP * 2 + column - column / GROUP * 2 : 0;
}

enum class Scale : int { f16, f32, e8m0, nested };

// What is added to a code's value times its scale: nothing; a float16; -z times the scale, z a byte.
enum class Zero : int { none, f16, u8 };

// What a code is before its scale: an entry of a table of 16; a signed byte times `step`; an e4m3, whose bits are those
// of a half; an entry of a table of 256.
enum class Form : int { nibbles, integers, e4m3, bytes };

// The facts of a codec. Type::codes alone has more than `type`.
struct Codec {
    Type type = Type::f32;
    Form form = Form::nibbles;
    Scale scale = Scale::f32;
    Zero zero = Zero::none;
    long group = 0;   // columns that share a scale, a power of two; more than any row has where it is the row's
    float unit = 1;   // what a stored scale is multiplied by
    std::array<float, 256> table{};
    std::array<float, 256> map{};  // of nested scales
    std::vector<std::int32_t> outliers;  // columns whose values lie as float16 behind the codes

    // Where the table is `step` times integers: products are of integers, and 16 of these are `nibbles - offset`. With
    // zero-points these are less by `centre` (so that their products, and what rounding x does to them, are small):
    // a value is (integer + centre) * scale + zero, or (integer + (centre - z)) * scale.
    bool fixed = false;
    float step = 1;
    int offset = 0, centre = 0;
    std::array<std::uint8_t, 16> nibbles{};

    bool zeros() const { return zero != Zero::none; }
    long groups(long columns) const { return (columns + group - 1) / group; }
    long zeros_at(long columns) const;
    long codes_at(long columns) const;
    long outliers_at(long columns) const;
    long bytes(long columns) const;

    // Columns that have codes: those of a row in whole 16 bytes.
    long stored(long columns) const { return form == Form::nibbles ? (columns + 31) / 32 * 32 : (columns + 15) / 16 * 16; }
    // Of `columns` codes, that many bytes; a multiple of 32 columns.
    long code_bytes(long columns) const { return form == Form::nibbles ? columns / 2 : columns; }
};

// A codec of codes. `group` 0: the row. Throws std::invalid_argument for what no kernel knows.
Codec code_codec(int bits, long group, const std::vector<float>& table, int scale, float unit, int zero,
                 const std::vector<float>& map, const std::vector<std::int32_t>& outliers);

}  // namespace flashinfer
