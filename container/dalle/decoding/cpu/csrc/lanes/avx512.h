// Sixteen numbers of 32 bits in a register of AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr int kLanes = 16;
using Floats = __m512;
using Words = __m512i;  // integers of 32 bits, or four bytes in place of each

// The first n of the lanes; all of them from 16 on.
inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm512_storeu_ps(y, x); }

// Half-precision numbers as floats.
inline Floats load(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// Bytes as floats.
inline Floats load(const uint8_t* x) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}

// The first n lanes of what lies at x, and 0 in the others, whose memory is not touched.
inline Floats load_first(int64_t n, const float* x) { return _mm512_maskz_loadu_ps(first_lanes(n), x); }
inline Floats load_first(int64_t n, const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), x));
}
inline Words load_first(int64_t n, const int32_t* x) { return _mm512_maskz_loadu_epi32(first_lanes(n), x); }
inline void store_first(int64_t n, float* y, Floats x) { _mm512_mask_storeu_ps(y, first_lanes(n), x); }

// The first n lanes of x, and those of `others` after them.
inline Floats first_or(int64_t n, Floats x, Floats others) { return _mm512_mask_mov_ps(others, first_lanes(n), x); }
inline Floats first_or_zero(int64_t n, Floats x) { return _mm512_maskz_mov_ps(first_lanes(n), x); }

inline Floats multiply_add(Floats x, Floats y, Floats z) { return _mm512_fmadd_ps(x, y, z); }        // x y + z
inline Floats subtract_product(Floats x, Floats y, Floats z) { return _mm512_fnmadd_ps(x, y, z); }  // z - x y
inline Floats max(Floats x, Floats y) { return _mm512_max_ps(x, y); }                               // y where x is NaN
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline Floats nearest_integer(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline bool has_nan(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }

// x, its sign changed where `like` is negative.
inline Floats flip_sign(Floats x, Floats like) { return _mm512_xor_ps(x, _mm512_and_ps(like, all(-0.0f))); }

inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float least(Floats x) { return _mm512_reduce_min_ps(x); }
inline float greatest(Floats x) { return _mm512_reduce_max_ps(x); }

// Round to integers, add `zero` and limit to 0 to 255.
inline void store_bytes(uint8_t* y, Floats x, int zero) {
  const Words rounded = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(zero));
  const Words positive = _mm512_max_epi32(rounded, _mm512_setzero_si512());
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm512_cvtusepi32_epi8(positive));
}

inline Words load_words(const void* x) { return _mm512_loadu_si512(x); }
inline Words all_words(int32_t x) { return _mm512_set1_epi32(x); }
inline Words subtract_words(Words x, Words y) { return _mm512_sub_epi32(x, y); }
template <int n>
inline Words shift_right(Words x) {  // keeps the sign
  return _mm512_srai_epi32(x, n);
}
inline Floats to_floats(Words x) { return _mm512_cvtepi32_ps(x); }

// Four products of bytes, x unsigned and w signed, added to each of the sums. Their pairs must fit in 16 bits: weights
// of at most 63.
inline Words add_small_products(Words sums, Words x, Words w) {
  const Words pairs = _mm512_maddubs_epi16(x, w);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

// The same for weights of any size, by the one instruction of VNNI. As assembly, since the rest of the code is for
// processors without it too.
inline Words add_products(Words sums, Words x, Words w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "vm"(w));
  return sums;
}
