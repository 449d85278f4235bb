// Sixty-four codes at once, and what they stand for, on every instruction set: as simd.hpp, inside its namespace.
//
// Sums of products of integers are exact, so they need no order. Lane j of `Ints` has bytes 4 j .. 4 j + 3.
#pragma once

#include "simd.hpp"

namespace flashinfer::FLASHINFER_ISA {

constexpr int BYTES = 64;

#if defined(FLASHINFER_AVX512)

constexpr int SIGNED_OFFSET = 128;  // what `dot_signed` adds to its codes, which the caller takes off again
constexpr int CODE_ROWS = 4;        // rows of codes in flight with one token
constexpr int CODE_WIDE_ROWS = 2;   // rows times
constexpr int CODE_WIDE_TOKENS = 4; // tokens of a prefill kernel
constexpr int SUM_ROWS = 8;         // rows added to one load of the accumulator with one token
constexpr int SUM_NIBBLES = 8;      // of the eight nibbles of a lane, those whose sums are in registers at a time

struct Bytes { __m512i v; };
struct Ints { __m512i v; };
struct Picks { __m512i v; };    // a lane for each lane
struct Sixteen { __m512 v; };   // a table

FLASHINFER_INLINE Bytes load_bytes(Raw p) { return {_mm512_loadu_si512(p)}; }
FLASHINFER_INLINE Bytes load_bytes_part(Raw p, int n) { return {_mm512_maskz_loadu_epi8((1ULL << n) - 1, p)}; }
FLASHINFER_INLINE Bytes low_nibbles(Bytes b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
FLASHINFER_INLINE Bytes high_nibbles(Bytes b) { return low_nibbles({_mm512_srli_epi16(b.v, 4)}); }
FLASHINFER_INLINE Bytes every_sixteen(Raw p) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FLASHINFER_INLINE Bytes look_up(Bytes table, Bytes at) { return {_mm512_shuffle_epi8(table.v, at.v)}; }

FLASHINFER_INLINE Ints no_ints() { return {_mm512_setzero_si512()}; }
FLASHINFER_INLINE Ints load_ints(Raw p) { return {_mm512_loadu_si512(p)}; }
FLASHINFER_INLINE Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
FLASHINFER_INLINE Ints times_255(Ints a) { return {_mm512_sub_epi32(_mm512_slli_epi32(a.v, 8), a.v)}; }
FLASHINFER_INLINE Lanes floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
FLASHINFER_INLINE Ints dot(Ints sum, Bytes codes, Bytes x) { return {_mm512_dpbusd_epi32(sum.v, codes.v, x.v)}; }
FLASHINFER_INLINE Ints dot_signed(Ints sum, Bytes codes, Bytes x) {
    return dot(sum, {_mm512_xor_si512(codes.v, _mm512_set1_epi8(-128))}, x);
}

FLASHINFER_INLINE Picks load_picks(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
FLASHINFER_INLINE Lanes pick(const float* p, Picks at) { return {_mm512_permutexvar_ps(at.v, _mm512_loadu_ps(p))}; }

FLASHINFER_INLINE __m512i widened(Raw p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FLASHINFER_INLINE Sixteen load_sixteen(const float* table) { return {_mm512_loadu_ps(table)}; }
template <int HALF> FLASHINFER_INLINE Lanes nibbles(Sixteen table, Raw p) {  // only the lower four bits count
    return {_mm512_permutexvar_ps(HALF ? _mm512_srli_epi32(widened(p), 4) : widened(p), table.v)};
}
// Lane j: nibble I of bytes 4 j .. 4 j + 3, the low half of the first byte being 0.
template <int I> FLASHINFER_INLINE Lanes nibbles_of(Sixteen table, Bytes b) {
    return {_mm512_permutexvar_ps(I ? _mm512_srli_epi32(b.v, 4 * I) : b.v, table.v)};
}
FLASHINFER_INLINE Lanes look_up(const float* table, Raw p) { return {_mm512_i32gather_ps(widened(p), table, 4)}; }
FLASHINFER_INLINE Lanes e4m3(Raw p) {
    __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    bits = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(bits, 8), 1), _mm256_set1_epi16(short(0xBF80)));
    return {_mm512_cvtph_ps(bits)};
}
FLASHINFER_INLINE Lanes powers(Raw p) {
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(widened(p), 23), _mm512_set1_epi32(0x400000)))};
}

#elif defined(FLASHINFER_AVX2)

constexpr int SIGNED_OFFSET = 0, CODE_ROWS = 2, CODE_WIDE_ROWS = 1, CODE_WIDE_TOKENS = 4;
constexpr int SUM_ROWS = 8, SUM_NIBBLES = 2;

struct Bytes { __m256i a, b; };
struct Ints { __m256i a, b; };
struct Picks { __m256i a, b; };
struct Sixteen { __m256 a, b; };

FLASHINFER_INLINE __m256i load_half_bytes(Raw p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
FLASHINFER_INLINE Bytes load_bytes(Raw p) { return {load_half_bytes(p), load_half_bytes(p + 32)}; }
FLASHINFER_INLINE Bytes low_nibbles(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
FLASHINFER_INLINE Bytes high_nibbles(Bytes x) {
    return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
FLASHINFER_INLINE Bytes every_sixteen(Raw p) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {twice, twice};
}
FLASHINFER_INLINE Bytes look_up(Bytes table, Bytes at) {
    return {_mm256_shuffle_epi8(table.a, at.a), _mm256_shuffle_epi8(table.b, at.b)};
}

FLASHINFER_INLINE Ints no_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FLASHINFER_INLINE Ints load_ints(Raw p) { return {load_half_bytes(p), load_half_bytes(p + 32)}; }
FLASHINFER_INLINE Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
FLASHINFER_INLINE Ints times_255(Ints x) {
    return {_mm256_sub_epi32(_mm256_slli_epi32(x.a, 8), x.a), _mm256_sub_epi32(_mm256_slli_epi32(x.b, 8), x.b)};
}
FLASHINFER_INLINE Lanes floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// Pairs of products stay below 2^15: one factor is at most 128, the other 127.
FLASHINFER_INLINE __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
}
FLASHINFER_INLINE Ints dot(Ints sum, Bytes codes, Bytes x) {
    return {dot_half(sum.a, codes.a, x.a), dot_half(sum.b, codes.b, x.b)};
}
FLASHINFER_INLINE Ints dot_signed(Ints sum, Bytes codes, Bytes x) {
    return dot(sum, {_mm256_abs_epi8(codes.a), _mm256_abs_epi8(codes.b)},
               {_mm256_sign_epi8(x.a, codes.a), _mm256_sign_epi8(x.b, codes.b)});
}

FLASHINFER_INLINE Picks load_picks(const std::int32_t* p) {
    return {load_half_bytes(reinterpret_cast<Raw>(p)), load_half_bytes(reinterpret_cast<Raw>(p + 8))};
}
FLASHINFER_INLINE Lanes pick(const float* p, Picks at) {  // none of the upper eight is asked for
    const __m256 values = _mm256_loadu_ps(p);
    return {_mm256_permutevar8x32_ps(values, at.a), _mm256_permutevar8x32_ps(values, at.b)};
}

FLASHINFER_INLINE __m256i widened(Raw p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
FLASHINFER_INLINE Sixteen load_sixteen(const float* table) {
    return {_mm256_loadu_ps(table), _mm256_loadu_ps(table + 8)};
}
FLASHINFER_INLINE __m256 nibbles_half(Sixteen table, __m256i at) {
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.a, at), _mm256_permutevar8x32_ps(table.b, at),
                            _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}
template <int HALF> FLASHINFER_INLINE Lanes nibbles(Sixteen table, Raw p) {
    return {nibbles_half(table, _mm256_srli_epi32(widened(p), 4 * HALF)),
            nibbles_half(table, _mm256_srli_epi32(widened(p + 8), 4 * HALF))};
}
template <int I> FLASHINFER_INLINE Lanes nibbles_of(Sixteen table, Bytes x) {
    return {nibbles_half(table, _mm256_srli_epi32(x.a, 4 * I)), nibbles_half(table, _mm256_srli_epi32(x.b, 4 * I))};
}
FLASHINFER_INLINE Lanes look_up(const float* table, Raw p) {
    return {_mm256_i32gather_ps(table, widened(p), 4), _mm256_i32gather_ps(table, widened(p + 8), 4)};
}
FLASHINFER_INLINE __m256 e4m3_half(Raw p) {
    __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    bits = _mm_and_si128(_mm_srai_epi16(_mm_slli_epi16(bits, 8), 1), _mm_set1_epi16(short(0xBF80)));
    return _mm256_cvtph_ps(bits);
}
FLASHINFER_INLINE Lanes e4m3(Raw p) { return {e4m3_half(p), e4m3_half(p + 8)}; }
FLASHINFER_INLINE __m256 powers_half(Raw p) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(widened(p), 23), _mm256_set1_epi32(0x400000)));
}
FLASHINFER_INLINE Lanes powers(Raw p) { return {powers_half(p), powers_half(p + 8)}; }

#else  // plain loops, which compilers make of what there is

constexpr int SIGNED_OFFSET = 0, CODE_ROWS = 2, CODE_WIDE_ROWS = 1, CODE_WIDE_TOKENS = 4;
constexpr int SUM_ROWS = 2, SUM_NIBBLES = 1;

struct Bytes { std::uint8_t v[BYTES]; };
struct Ints { std::int32_t v[LANES]; };
struct Picks { const std::int32_t* v; };
struct Sixteen { const float* v; };

FLASHINFER_INLINE Bytes load_bytes(Raw p) {
    Bytes r;
    std::memcpy(r.v, p, BYTES);
    return r;
}
FLASHINFER_INLINE Bytes low_nibbles(Bytes b) {
    for (auto& v : b.v) v &= 15;
    return b;
}
FLASHINFER_INLINE Bytes high_nibbles(Bytes b) {
    for (auto& v : b.v) v >>= 4;
    return b;
}
FLASHINFER_INLINE Bytes every_sixteen(Raw p) {
    Bytes r;
    for (int i = 0; i < BYTES; i++) r.v[i] = p[i % 16];
    return r;
}
FLASHINFER_INLINE Bytes look_up(Bytes table, Bytes at) {
    for (auto& v : at.v) v = table.v[v];
    return at;
}

FLASHINFER_INLINE Ints no_ints() { return {}; }
FLASHINFER_INLINE Ints load_ints(Raw p) {
    Ints r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
FLASHINFER_INLINE Ints add(Ints a, Ints b) {
    for (int i = 0; i < LANES; i++) a.v[i] += b.v[i];
    return a;
}
FLASHINFER_INLINE Ints times_255(Ints a) {
    for (auto& v : a.v) v *= 255;
    return a;
}
FLASHINFER_INLINE Lanes floats(Ints a) {
    float v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = float(a.v[i]);
    return load(v);
}
template <class T> FLASHINFER_INLINE Ints dot_of(Ints sum, Bytes codes, Bytes x) {
    for (int i = 0; i < BYTES; i++) sum.v[i / 4] += T(codes.v[i]) * std::int8_t(x.v[i]);
    return sum;
}
FLASHINFER_INLINE Ints dot(Ints sum, Bytes codes, Bytes x) { return dot_of<std::uint8_t>(sum, codes, x); }
FLASHINFER_INLINE Ints dot_signed(Ints sum, Bytes codes, Bytes x) { return dot_of<std::int8_t>(sum, codes, x); }

// Sixteen floats, one by one.
template <class F> FLASHINFER_INLINE Lanes each(F f) {
    float v[LANES];
    for (int i = 0; i < LANES; i++) v[i] = f(i);
    return load(v);
}
FLASHINFER_INLINE Picks load_picks(const std::int32_t* p) { return {p}; }
FLASHINFER_INLINE Lanes pick(const float* p, Picks at) { return each([=](int i) { return p[at.v[i]]; }); }
FLASHINFER_INLINE Sixteen load_sixteen(const float* table) { return {table}; }
template <int HALF> FLASHINFER_INLINE Lanes nibbles(Sixteen table, Raw p) {
    return each([=](int i) { return table.v[p[i] >> 4 * HALF & 15]; });
}
template <int I> FLASHINFER_INLINE Lanes nibbles_of(Sixteen table, Bytes b) {
    return each([&](int j) { return table.v[b.v[4 * j + I / 2] >> I % 2 * 4 & 15]; });
}
FLASHINFER_INLINE Lanes look_up(const float* table, Raw p) { return each([=](int i) { return table[p[i]]; }); }
FLASHINFER_INLINE Lanes e4m3(Raw p) {
    std::uint16_t bits[LANES];
    for (int i = 0; i < LANES; i++) bits[i] = std::uint16_t((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7);
    return load<Type::f16>(reinterpret_cast<Raw>(bits));
}
FLASHINFER_INLINE Lanes powers(Raw p) {
    return each([=](int i) {
        const std::uint32_t bits = p[i] ? std::uint32_t(p[i]) << 23 : 0x400000u;
        float power;
        std::memcpy(&power, &bits, sizeof power);
        return power;
    });
}

#endif

#if !defined(FLASHINFER_AVX512)
FLASHINFER_INLINE Bytes load_bytes_part(Raw p, int n) {
    std::uint8_t buffer[BYTES] = {};
    std::memcpy(buffer, p, n);
    return load_bytes(buffer);
}
#endif

}  // namespace flashinfer::FLASHINFER_ISA
