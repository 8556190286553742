// Functions of sixteen floats at a time that AVX-512 has no instruction for.
#pragma once

#include <immintrin.h>

#include <cstdint>

constexpr int kLanes = 16;

// The first n of the lanes, for 0 < n; all of them from 16 on.
inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }

// e^x with an error of about 1e-7 of it: 2^n e^r with |r| <= ln 2 / 2, by a polynomial of degree 6 (Cephes, expf).
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-105.0f));  // e^-105 is 0 already, and inf times 0 would be NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  // ln 2 in two parts, of which the greater has few digits: n times it is exact.
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// The error function, off by 1.5e-7 at most (Abramowitz and Stegun 1964, 7.1.26).
inline __m512 error_function(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), size = _mm512_abs_ps(x);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(_mm512_set1_ps(0.3275911f), size, one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(c));
  }
  p = _mm512_mul_ps(p, t);
  const __m512 squared = _mm512_mul_ps(size, size);
  const __m512 y = _mm512_fnmadd_ps(p, exponential(_mm512_sub_ps(_mm512_setzero_ps(), squared)), one);
  const __mmask16 is_negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
  return _mm512_mask_sub_ps(y, is_negative, _mm512_setzero_ps(), y);
}

// x Φ(x), Φ being the normal distribution.
inline __m512 gelu(__m512 x) {
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  return _mm512_fmadd_ps(half, error_function(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), half);
}

// The sum of n numbers; term(lanes, i) gives 16 of them from i on, with 0 in the lanes beyond n.
template <class Term>
inline float sum_of(int n, Term term) {
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < n; i += kLanes) sum = _mm512_add_ps(sum, term(first_lanes(n - i), i));
  return _mm512_reduce_add_ps(sum);
}
