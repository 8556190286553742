// Eight numbers of 32 bits in a register of AVX2. Every function means the same as that of avx512.h.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

constexpr int kLanes = 8;
using Floats = __m256;
using Words = __m256i;

inline Words first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm256_storeu_ps(y, x); }
inline Floats load(const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Floats load(const uint8_t* x) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}

// Whole registers without a mask, which costs these processors more than the branch.
inline Floats load_first(int64_t n, const float* x) {
  return n >= kLanes ? load(x) : _mm256_maskload_ps(x, first_lanes(n));
}
inline Floats load_first(int64_t n, const uint16_t* x) {
  if (n >= kLanes) return load(x);
  uint16_t first[kLanes] = {};
  if (n > 0) std::memcpy(first, x, n * sizeof(uint16_t));
  return load(first);
}
inline Words load_first(int64_t n, const int32_t* x) { return _mm256_maskload_epi32(x, first_lanes(n)); }
inline void store_first(int64_t n, float* y, Floats x) {
  if (n >= kLanes) return store(y, x);
  _mm256_maskstore_ps(y, first_lanes(n), x);
}

inline Floats first_or(int64_t n, Floats x, Floats others) {
  return _mm256_blendv_ps(others, x, _mm256_castsi256_ps(first_lanes(n)));
}
inline Floats first_or_zero(int64_t n, Floats x) { return _mm256_and_ps(x, _mm256_castsi256_ps(first_lanes(n))); }

inline Floats multiply_add(Floats x, Floats y, Floats z) { return _mm256_fmadd_ps(x, y, z); }
inline Floats subtract_product(Floats x, Floats y, Floats z) { return _mm256_fnmadd_ps(x, y, z); }
inline Floats max(Floats x, Floats y) { return _mm256_max_ps(x, y); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(all(-0.0f), x); }
inline Floats nearest_integer(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline bool has_nan(Floats x) { return _mm256_movemask_ps(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)); }
inline Floats flip_sign(Floats x, Floats like) { return _mm256_xor_ps(x, _mm256_and_ps(like, all(-0.0f))); }

// 2^n for integers from -126 to 127.
inline Floats power_of_two(Words n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// For |n| up to 252: by two factors, since 2^n alone may be too small for a float.
inline Floats times_power_of_two(Floats x, Floats n) {
  const Words whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return x * power_of_two(half) * power_of_two(_mm256_sub_epi32(whole, half));
}

template <class Two>
inline float across(Floats x, Two two) {
  __m128 y = two(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = two(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(two(y, _mm_movehdup_ps(y)));
}
inline float sum(Floats x) {
  return across(x, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}
inline float least(Floats x) {
  return across(x, [](__m128 a, __m128 b) { return _mm_min_ps(a, b); });
}
inline float greatest(Floats x) {
  return across(x, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}

inline void store_bytes(uint8_t* y, Floats x, int zero) {
  const Words rounded = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(zero));
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(y), _mm_packus_epi16(words, words));
}

inline Words load_words(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
inline Words all_words(int32_t x) { return _mm256_set1_epi32(x); }
inline Words subtract_words(Words x, Words y) { return _mm256_sub_epi32(x, y); }
template <int n>
inline Words shift_right(Words x) {
  return _mm256_srai_epi32(x, n);
}
inline Floats to_floats(Words x) { return _mm256_cvtepi32_ps(x); }

inline Words add_small_products(Words sums, Words x, Words w) {
  const Words pairs = _mm256_maddubs_epi16(x, w);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// Not called: weights are small where there is no VNNI.
inline Words add_products(Words sums, Words x, Words w) { return add_small_products(sums, x, w); }
