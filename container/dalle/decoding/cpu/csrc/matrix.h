// Matrices of a decoding step: a few rows times many weights, each of which is read once.
//
// A row's result does not depend on the rows beside it or on the number of threads: its products are always added in
// the same order. Letters: B rows, K inputs, N outputs.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"

// kSmallByte: weights of magnitude 63 at most, for processors without VNNI.
enum Precision : int32_t { kFloat = 0, kHalf = 1, kByte = 2, kSmallByte = 3 };

constexpr bool is_bytes(Precision precision) { return precision == kByte || precision == kSmallByte; }

// Laid out by `dalle.decoding.cpu.structures`.
struct Matrix {
  const void* weights;    // float and half: [N, K]; bytes: [ceil(N / 16), ceil(K / 4), 16, 4], zeros at the ends
  const float* scales;    // bytes: [N], the number that 1 stands for
  const int32_t* sums;    // bytes: [N], 128 times the sum of an output's weights
  const float* bias;      // [N] or null
  int32_t inputs, outputs;  // K, N
};

// Rows that a matrix reads, as floats or as bytes. A byte is 128 plus the number in 127ths of the row's greatest
// magnitude. Numbers between K and the stride have no effect.
struct Rows {
  float* numbers;
  uint8_t* bytes;
  float* scales;  // [B], the number that 1 stands for
  int64_t stride;

  float* row(int b) const { return numbers + b * stride; }

  void to_bytes(int b, int width) const {
    const float* x = row(b);
    uint8_t* y = bytes + b * stride;
    __m512 most = _mm512_setzero_ps();
    for (int i = 0; i < width; i += kLanes) {
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(width - i), x + i)));
    }
    const float greatest = _mm512_reduce_max_ps(most);
    scales[b] = greatest / 127;
    const __m512 factor = _mm512_set1_ps(greatest > 0 ? 127 / greatest : 0);
    for (int i = 0; i < width; i += kLanes) {
      const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(width - i), x + i), factor);
      const __m512i rounded = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(128));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm512_cvtepi32_epi8(rounded));
    }
  }
};

// Where products are written: row b from y + b * stride on.
struct Outputs {
  float* y;
  int64_t stride;
};

template <class T>
inline __m512 load(const T* weights, __mmask16 lanes);
template <>
inline __m512 load(const float* weights, __mmask16 lanes) {
  return _mm512_maskz_loadu_ps(lanes, weights);
}
template <>
inline __m512 load(const uint16_t* weights, __mmask16 lanes) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, weights));
}

// The compiler keeps sums in registers where every loop over them is unrolled.
#define UNROLLED _Pragma("GCC unroll 16")

// R rows from b on, P outputs from n on.
template <int R, int P, class T>
inline void multiply_numbers(const Matrix& m, const Rows& x, int b, int n, Outputs out) {
  const int64_t K = m.inputs, stride = x.stride;
  const T* weights = static_cast<const T*>(m.weights) + n * K;
  const float* numbers = x.row(b);
  __m512 sums[R][P] = {};
  for (int64_t k = 0; k < K; k += kLanes) {
    const __mmask16 lanes = first_lanes(K - k);
    __m512 w[P];
    UNROLLED for (int p = 0; p < P; ++p) w[p] = load(weights + p * K + k, lanes);
    UNROLLED for (int r = 0; r < R; ++r) {
      const __m512 number = _mm512_maskz_loadu_ps(lanes, numbers + r * stride + k);
      UNROLLED for (int p = 0; p < P; ++p) sums[r][p] = _mm512_fmadd_ps(number, w[p], sums[r][p]);
    }
  }
  UNROLLED for (int r = 0; r < R; ++r) {
    float* y = out.y + (b + r) * out.stride + n;
    UNROLLED for (int p = 0; p < P; ++p) y[p] = _mm512_reduce_add_ps(sums[r][p]) + (m.bias ? m.bias[n + p] : 0);
  }
}

// Four products of bytes, x unsigned and w signed, added to each of 16 sums.
template <Precision precision>
inline __m512i add_four_products(__m512i sums, __m512i x, __m512i w) {
  if constexpr (precision == kByte) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "vm"(w));
    return sums;
  }
  const __m512i pairs = _mm512_maddubs_epi16(x, w);  // 7-bit weights do not overflow 16 bits
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

// R rows from b on, P panels of 16 outputs from `panel` on.
template <int R, int P, Precision precision>
inline void multiply_bytes(const Matrix& m, const Rows& x, int b, int panel, Outputs out) {
  const int64_t quads = (m.inputs + 3) / 4, stride = x.stride;
  const int8_t* weights = static_cast<const int8_t*>(m.weights) + panel * quads * 64;
  const uint8_t* bytes = x.bytes + b * stride;
  __m512i sums[R][P] = {};
  for (int64_t quad = 0; quad < quads; ++quad) {
    __m512i w[P];
    UNROLLED for (int p = 0; p < P; ++p) w[p] = _mm512_loadu_si512(weights + (p * quads + quad) * 64);
    UNROLLED for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, bytes + r * stride + 4 * quad, 4);
      const __m512i each = _mm512_set1_epi32(four);
      UNROLLED for (int p = 0; p < P; ++p) sums[r][p] = add_four_products<precision>(sums[r][p], each, w[p]);
    }
  }
  UNROLLED for (int p = 0; p < P; ++p) {
    const int n = (panel + p) * kLanes;
    const __mmask16 lanes = first_lanes(m.outputs - n);
    const __m512i zero = _mm512_maskz_loadu_epi32(lanes, m.sums + n);
    const __m512 scale = _mm512_maskz_loadu_ps(lanes, m.scales + n);
    const __m512 bias = m.bias ? _mm512_maskz_loadu_ps(lanes, m.bias + n) : _mm512_setzero_ps();
    UNROLLED for (int r = 0; r < R; ++r) {
      const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r][p], zero));
      const __m512 factor = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[b + r]));
      _mm512_mask_storeu_ps(out.y + (b + r) * out.stride + n, lanes, _mm512_fmadd_ps(sum, factor, bias));
    }
  }
}

// All rows in blocks of at most `Most`, the outputs [begin, end) in blocks of P: block<R, P>(row, output).
template <int Most, int P, class Block>
inline void in_blocks(int rows, int begin, int end, Block block) {
  int n = begin;
  for (; n + P <= end; n += P) {
    int b = 0;
    for (; b + Most <= rows; b += Most) block.template operator()<Most, P>(b, n);
    if constexpr (Most > 1) {
      if (rows - b >= Most / 2) {
        block.template operator()<Most / 2, P>(b, n);
        b += Most / 2;
      }
    }
    for (; b < rows; ++b) block.template operator()<1, P>(b, n);
  }
  if constexpr (P > 1) in_blocks<Most, 1>(rows, n, end, block);
}

// One thread's share of the outputs of all rows, in panels of 16.
template <Precision precision>
inline void multiply(const Matrix& m, const Rows& x, int rows, Outputs out, int member, int members) {
  const int panels = (m.outputs + kLanes - 1) / kLanes;
  const int first = panels * member / members, last = panels * (member + 1) / members;
  if constexpr (is_bytes(precision)) {
    const auto block = [&]<int R, int P>(int b, int panel) { multiply_bytes<R, P, precision>(m, x, b, panel, out); };
    if (rows <= 2) return in_blocks<2, 4>(rows, first, last, block);
    return in_blocks<8, 2>(rows, first, last, block);
  } else {
    using Weight = std::conditional_t<precision == kHalf, uint16_t, float>;
    const auto block = [&]<int R, int P>(int b, int n) { multiply_numbers<R, P, Weight>(m, x, b, n, out); };
    in_blocks<6, 4>(rows, first * kLanes, std::min(last * kLanes, m.outputs), block);
  }
}
