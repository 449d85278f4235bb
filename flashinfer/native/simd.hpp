// Sixteen float lanes on every instruction set, with identical bits.
//
// Whatever the register width, lane j is the same chain of IEEE operations: fused multiply-adds where the code says
// `fma`, nothing contracted elsewhere (-ffp-contract=off), and one fixed tree for sums over the lanes. This file is
// compiled once per instruction set, always inside a namespace of its own and with nothing that has external linkage:
// an inline function shared with other objects could be linked in the wrong variant.
#pragma once

#include <cstdint>
#include <cstring>

#include "table.hpp"

#if defined(FLASHINFER_AVX512) || defined(FLASHINFER_AVX2)
#include <immintrin.h>
#elif defined(FLASHINFER_NEON)
#include <arm_neon.h>
#endif

#if defined(FLASHINFER_PORTABLE)
#define FLASHINFER_METHOD inline  // forced, it takes the compiler minutes
#else
#define FLASHINFER_METHOD inline __attribute__((always_inline))
#endif
#define FLASHINFER_INLINE static FLASHINFER_METHOD

namespace flashinfer::FLASHINFER_ISA {

constexpr int LANES = 16;
using Raw = const std::uint8_t*;

template <Type C> constexpr long SIZE = value_bytes(C);

#if defined(FLASHINFER_AVX512)

constexpr int WIDE_TOKENS = 8;   // tokens a prefill kernel keeps in registers
constexpr int WIDE_ROWS = 2;     // times so many rows of weights (dots)
constexpr int WIDE_COLUMNS = 2;  // or so many lanes of columns (sums)
constexpr int DECODE_ROWS = 8;   // rows in flight with one token

struct Lanes { __m512 v; };

FLASHINFER_INLINE Lanes broadcast(float x) { return {_mm512_set1_ps(x)}; }
FLASHINFER_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FLASHINFER_INLINE Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
FLASHINFER_INLINE Lanes sub(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
FLASHINFER_INLINE Lanes mul(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
FLASHINFER_INLINE Lanes div(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
FLASHINFER_INLINE Lanes max(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
FLASHINFER_INLINE Lanes min(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
FLASHINFER_INLINE void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.v); }
FLASHINFER_INLINE void store_part(float* p, Lanes a, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, a.v); }

FLASHINFER_INLINE Lanes exponent(Lanes t) {
    __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)))};
}

template <Type C> FLASHINFER_INLINE Lanes widened(__m256i half) {
    if constexpr (C == Type::f16) return {_mm512_cvtph_ps(half)};
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
FLASHINFER_INLINE Lanes integers(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
template <Type C> FLASHINFER_INLINE Lanes load(Raw p) {
    if constexpr (C == Type::f32) return {_mm512_loadu_ps(p)};
    else if constexpr (C == Type::int8) return integers(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    else return widened<C>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <Type C> FLASHINFER_INLINE Lanes load_part(Raw p, int n) {
    if constexpr (C == Type::f32) return {_mm512_maskz_loadu_ps((1u << n) - 1, p)};
    else if constexpr (C == Type::int8) return integers(_mm_maskz_loadu_epi8((1u << n) - 1, p));
    else return widened<C>(_mm256_maskz_loadu_epi16((1u << n) - 1, p));
}
FLASHINFER_INLINE void store_half(std::uint8_t* p, Lanes a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
FLASHINFER_INLINE float reduce(Lanes a) {
    __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
    __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

#elif defined(FLASHINFER_AVX2)

constexpr int WIDE_TOKENS = 4, WIDE_ROWS = 1, WIDE_COLUMNS = 1, DECODE_ROWS = 4;

struct Lanes { __m256 a, b; };

FLASHINFER_INLINE Lanes broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FLASHINFER_INLINE Lanes fma(Lanes x, Lanes y, Lanes z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
FLASHINFER_INLINE Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
FLASHINFER_INLINE Lanes sub(Lanes x, Lanes y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
FLASHINFER_INLINE Lanes mul(Lanes x, Lanes y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
FLASHINFER_INLINE Lanes div(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
FLASHINFER_INLINE Lanes max(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
FLASHINFER_INLINE Lanes min(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
FLASHINFER_INLINE void store(float* p, Lanes x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }

FLASHINFER_INLINE __m256 exponent_half(__m256 t) {
    __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)));
}
FLASHINFER_INLINE Lanes exponent(Lanes t) { return {exponent_half(t.a), exponent_half(t.b)}; }

template <Type C> FLASHINFER_INLINE __m256 load_half(Raw p) {
    if constexpr (C == Type::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if constexpr (C == Type::int8)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (C == Type::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
template <Type C> FLASHINFER_INLINE Lanes load(Raw p) { return {load_half<C>(p), load_half<C>(p + 8 * SIZE<C>)}; }
FLASHINFER_INLINE void store_half(std::uint8_t* p, Lanes x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
FLASHINFER_INLINE float reduce(Lanes x) {
    __m256 b = _mm256_add_ps(x.a, x.b);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

#elif defined(FLASHINFER_NEON)

constexpr int WIDE_TOKENS = 4, WIDE_ROWS = 1, WIDE_COLUMNS = 1, DECODE_ROWS = 4;

struct Lanes { float32x4_t v[4]; };

#define FLASHINFER_EACH(expression) Lanes r; for (int i = 0; i < 4; i++) r.v[i] = expression; return r
FLASHINFER_INLINE Lanes broadcast(float x) { FLASHINFER_EACH(vdupq_n_f32(x)); }
FLASHINFER_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { FLASHINFER_EACH(vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
FLASHINFER_INLINE Lanes add(Lanes a, Lanes b) { FLASHINFER_EACH(vaddq_f32(a.v[i], b.v[i])); }
FLASHINFER_INLINE Lanes sub(Lanes a, Lanes b) { FLASHINFER_EACH(vsubq_f32(a.v[i], b.v[i])); }
FLASHINFER_INLINE Lanes mul(Lanes a, Lanes b) { FLASHINFER_EACH(vmulq_f32(a.v[i], b.v[i])); }
FLASHINFER_INLINE Lanes div(Lanes a, Lanes b) { FLASHINFER_EACH(vdivq_f32(a.v[i], b.v[i])); }
// As x86: the second operand where one is NaN.
FLASHINFER_INLINE Lanes max(Lanes a, Lanes b) { FLASHINFER_EACH(vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
FLASHINFER_INLINE Lanes min(Lanes a, Lanes b) { FLASHINFER_EACH(vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
FLASHINFER_INLINE void store(float* p, Lanes a) { for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]); }
FLASHINFER_INLINE Lanes exponent(Lanes t) {
    FLASHINFER_EACH(vreinterpretq_f32_s32(
        vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(t.v[i]), 23), vdupq_n_s32(0x3f800000))));
}
template <Type C> FLASHINFER_INLINE float32x4_t load_quarter(Raw p) {
    if constexpr (C == Type::f32) return vreinterpretq_f32_u8(vld1q_u8(p));
    uint16x4_t half = vreinterpret_u16_u8(vld1_u8(p));
    if constexpr (C == Type::f16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
}
FLASHINFER_INLINE Lanes integers(int8x16_t bytes) {
    int16x8_t wide[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
    FLASHINFER_EACH(vcvtq_f32_s32(vmovl_s16(i % 2 ? vget_high_s16(wide[i / 2]) : vget_low_s16(wide[i / 2]))));
}
template <Type C> FLASHINFER_INLINE Lanes load(Raw p) {
    if constexpr (C == Type::int8) return integers(vreinterpretq_s8_u8(vld1q_u8(p)));
    else { FLASHINFER_EACH(load_quarter<C>(p + i * 4 * SIZE<C>)); }
}
#undef FLASHINFER_EACH
FLASHINFER_INLINE void store_half(std::uint8_t* p, Lanes a) {
    for (int i = 0; i < 4; i++) vst1_u8(p + 8 * i, vreinterpret_u8_f16(vcvt_f16_f32(a.v[i])));
}
FLASHINFER_INLINE float reduce(Lanes a) {
    float32x4_t b = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
    return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}

#else  // portable: as slow as the platform's fmaf, but the same bits

constexpr int WIDE_TOKENS = 4, WIDE_ROWS = 1, WIDE_COLUMNS = 1, DECODE_ROWS = 2;

struct Lanes { float v[LANES]; };

#define FLASHINFER_EACH(expression) Lanes r; for (int i = 0; i < LANES; i++) r.v[i] = expression; return r
FLASHINFER_INLINE Lanes broadcast(float x) { FLASHINFER_EACH(x); }
FLASHINFER_INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { FLASHINFER_EACH(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
FLASHINFER_INLINE Lanes add(Lanes a, Lanes b) { FLASHINFER_EACH(a.v[i] + b.v[i]); }
FLASHINFER_INLINE Lanes sub(Lanes a, Lanes b) { FLASHINFER_EACH(a.v[i] - b.v[i]); }
FLASHINFER_INLINE Lanes mul(Lanes a, Lanes b) { FLASHINFER_EACH(a.v[i] * b.v[i]); }
FLASHINFER_INLINE Lanes div(Lanes a, Lanes b) { FLASHINFER_EACH(a.v[i] / b.v[i]); }
FLASHINFER_INLINE Lanes max(Lanes a, Lanes b) { FLASHINFER_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
FLASHINFER_INLINE Lanes min(Lanes a, Lanes b) { FLASHINFER_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
FLASHINFER_INLINE void store(float* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
FLASHINFER_INLINE float from_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
FLASHINFER_INLINE std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
FLASHINFER_INLINE Lanes exponent(Lanes t) {
    Lanes r;
    for (int i = 0; i < LANES; i++) r.v[i] = from_bits((bits_of(t.v[i]) << 23) + 0x3f800000u);
    return r;
}
FLASHINFER_INLINE float half_to_float(std::uint32_t h) {
    std::uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13 | (rest > 0x7c00u ? 0x400000u : 0u));
    float x = from_bits(rest << 13) * 0x1p112f;  // exact, subnormals included
    return sign ? -x : x;
}
// To nearest, ties to even, as the processors' own conversions.
FLASHINFER_INLINE std::uint16_t float_to_half(float x) {
    std::uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return std::uint16_t(sign | 0x7e00u | (rest >> 13 & 0x3ffu));
    if (rest >= 0x47800000u) return std::uint16_t(sign | 0x7c00u);
    if (rest < 0x38800000u) return std::uint16_t(sign | (bits_of(from_bits(rest) + 0.5f) - bits_of(0.5f)));
    return std::uint16_t(sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}
FLASHINFER_INLINE void store_half(std::uint8_t* p, Lanes a) {
    for (int i = 0; i < LANES; i++) {
        std::uint16_t half = float_to_half(a.v[i]);
        std::memcpy(p + 2 * i, &half, 2);
    }
}
template <Type C> FLASHINFER_INLINE Lanes load(Raw p) {
    Lanes r;
    for (int i = 0; i < LANES; i++) {
        if constexpr (C == Type::f32) {
            std::memcpy(&r.v[i], p + 4 * i, 4);
        } else if constexpr (C == Type::int8) {
            r.v[i] = float(std::int8_t(p[i]));
        } else {
            std::uint16_t half;
            std::memcpy(&half, p + 2 * i, 2);
            r.v[i] = C == Type::f16 ? half_to_float(half) : from_bits(std::uint32_t(half) << 16);
        }
    }
    return r;
}
#undef FLASHINFER_EACH
FLASHINFER_INLINE float reduce(Lanes a) {
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) a.v[i] += a.v[i + width];
    return a.v[0];
}

#endif

#if !defined(FLASHINFER_AVX512)  // no masks: through a buffer
template <Type C> FLASHINFER_INLINE Lanes load_part(Raw p, int n) {
    std::uint8_t buffer[LANES * 4] = {};
    std::memcpy(buffer, p, n * SIZE<C>);
    return load<C>(buffer);
}
FLASHINFER_INLINE void store_part(float* p, Lanes a, int n) {
    float buffer[LANES];
    store(buffer, a);
    std::memcpy(p, buffer, n * sizeof(float));
}
#endif

FLASHINFER_INLINE Lanes load(const float* p) { return load<Type::f32>(reinterpret_cast<Raw>(p)); }
FLASHINFER_INLINE Lanes load_part(const float* p, int n) { return load_part<Type::f32>(reinterpret_cast<Raw>(p), n); }

// e^x within 2 ulp, subnormal results included; NaN stays NaN. 2^(2n) in two factors, so that neither overflows.
FLASHINFER_INLINE Lanes exp(Lanes x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    constexpr float taylor[] = {1.f / 3628800, 1.f / 362880, 1.f / 40320, 1.f / 5040, 1.f / 720, 1.f / 120,
                                1.f / 24,      1.f / 6,      0.5f,        1.f,        1.f};
    x = min(broadcast(100.0f), max(broadcast(-110.0f), x));
    Lanes t = fma(x, broadcast(0.72134752f), broadcast(magic));  // x / (2 ln 2)
    Lanes n = sub(t, broadcast(magic));
    Lanes r = fma(n, broadcast(-1.38629436f), x);   // 2 ln 2, high part
    r = fma(n, broadcast(3.8093084e-9f), r);       // and low part
    Lanes p = broadcast(taylor[0]);
    for (int i = 1; i < 11; i++) p = fma(p, r, broadcast(taylor[i]));
    Lanes scale = exponent(t);
    return mul(mul(p, scale), scale);
}

}  // namespace flashinfer::FLASHINFER_ISA
