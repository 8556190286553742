// Functions of a register of floats, in terms of those of avx2.h or avx512.h, one of which is included first:
// the same code for each of them. (G++ 12 does not define __AVX512F__ after the pragma.)
#pragma once

// Integers of 32 bits, of which overflow is modulo 2^32.
using Bits = uint32_t __attribute__((vector_size(sizeof(Floats))));

constexpr int kPanel = 16;               // outputs of a matrix, or channels of a head, that are laid out together
constexpr int kParts = kPanel / kLanes;  // registers of a panel

// e^x for x <= 0, with an error of about 1e-7 of it: 2^n e^r with |r| <= ln 2 / 2, by a polynomial of degree 6 (Cephes,
// expf).
inline Floats exponential(Floats x) {
  x = max(x, all(-105.0f));  // e^-105 is 0 already, and inf times 0 would be NaN
  const Floats n = nearest_integer(x * all(1.44269504f));
  // ln 2 in two parts, of which the greater has few digits: n times it is exact.
  Floats r = subtract_product(n, all(0.693359375f), x);
  r = subtract_product(n, all(-2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = multiply_add(p, r, all(c));
  }
  p = multiply_add(p, r * r, r + all(1.0f));
  return times_power_of_two(p, n);
}

// The natural logarithm of normal numbers above 0, with an error of about 1e-7 of it: ln x = n ln 2 + ln m, m being between
// the square roots of 1/2 and of 2, by a polynomial of degree 9 (Cephes, logf).
inline Floats logarithm(Floats x) {
  constexpr uint32_t kRoot = 0x3f3504f3;  // the bits of the square root of 1/2
  const Bits apart = reinterpret_cast<Bits>(x) - kRoot;
  const Floats n = to_floats(shift_right<23>(reinterpret_cast<Words>(apart)));
  const Floats r = reinterpret_cast<Floats>((apart & 0x7fffff) + kRoot) - all(1.0f);
  Floats p = all(7.0376836292e-2f);
  for (const float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                        2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    p = multiply_add(p, r, all(c));
  }
  const Floats squared = r * r;
  p = multiply_add(n, all(-2.12194440e-4f), p * r * squared);
  p = subtract_product(squared, all(0.5f), p);
  return multiply_add(n, all(0.693359375f), r + p);
}

// The error function, off by 1.5e-7 at most (Abramowitz and Stegun 1964, 7.1.26).
inline Floats error_function(Floats x) {
  const Floats one = all(1.0f), size = magnitude(x);
  const Floats t = one / multiply_add(all(0.3275911f), size, one);
  Floats p = all(1.061405429f);
  for (const float c : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) p = multiply_add(p, t, all(c));
  return flip_sign(subtract_product(p * t, exponential(-(size * size)), one), x);
}

// x Φ(x), Φ being the normal distribution.
inline Floats gelu(Floats x) {
  const Floats half = x * all(0.5f);
  return multiply_add(half, error_function(x * all(0.70710678f)), half);
}

// The sum of n numbers; term(i) gives a register of them from i on, with 0 in the lanes beyond n.
template <class Term>
inline float sum_of(int n, Term term) {
  Floats total = all(0);
  for (int i = 0; i < n; i += kLanes) total = total + term(i);
  return sum(total);
}
