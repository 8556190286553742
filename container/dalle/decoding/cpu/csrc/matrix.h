// Matrices of a decoding step: a few rows times many weights, each of which is read once.
//
// A row's result does not depend on the rows beside it or on the number of threads: its products are always added in
// the same order. Letters: B rows, K inputs, N outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes/lanes.h"

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
    Floats most = all(0);
    for (int i = 0; i < width; i += kLanes) most = max(most, magnitude(load_first(width - i, x + i)));
    const float size = greatest(most);
    scales[b] = size / 127;
    const Floats factor = all(size > 0 ? 127 / size : 0);
    for (int i = 0; i < width; i += kLanes) store_bytes(y + i, load_first(width - i, x + i) * factor, 128);
  }
};

// Where products are written: row b from y + b * stride on.
struct Outputs {
  float* y;
  int64_t stride;
};

// The compiler keeps sums in registers where every loop over them is unrolled.
#define UNROLLED _Pragma("GCC unroll 16")

// R rows from b on, P outputs from n on.
template <int R, int P, class T>
inline void multiply_numbers(const Matrix& m, const Rows& x, int b, int n, Outputs out) {
  const int64_t K = m.inputs, whole = K / kLanes * kLanes, stride = x.stride;
  const T* weights = static_cast<const T*>(m.weights) + n * K;
  const float* numbers = x.row(b);
  Floats sums[R][P] = {};
  const auto add_products = [&](auto lanes_of) __attribute__((always_inline)) {
    Floats w[P];
    UNROLLED for (int p = 0; p < P; ++p) w[p] = lanes_of(weights + p * K);
    UNROLLED for (int r = 0; r < R; ++r) {
      const Floats number = lanes_of(numbers + r * stride);
      UNROLLED for (int p = 0; p < P; ++p) sums[r][p] = multiply_add(number, w[p], sums[r][p]);
    }
  };
  for (int64_t k = 0; k < whole; k += kLanes) add_products([&](auto* from) { return load(from + k); });
  if (whole < K) add_products([&](auto* from) { return load_first(K - whole, from + whole); });
  UNROLLED for (int r = 0; r < R; ++r) {
    float* y = out.y + (b + r) * out.stride + n;
    UNROLLED for (int p = 0; p < P; ++p) y[p] = sum(sums[r][p]) + (m.bias ? m.bias[n + p] : 0);
  }
}

// R rows from b on, P panels of 16 outputs from `panel` on.
template <int R, int P, Precision precision>
inline void multiply_bytes(const Matrix& m, const Rows& x, int b, int panel, Outputs out) {
  const int64_t quads = (m.inputs + 3) / 4, stride = x.stride;
  const int8_t* weights = static_cast<const int8_t*>(m.weights) + panel * quads * 64;
  const uint8_t* bytes = x.bytes + b * stride;
  constexpr int kRegisters = P * kParts;
  Words sums[R][kRegisters] = {};
  for (int64_t quad = 0; quad < quads; ++quad) {
    Words w[kRegisters];
    UNROLLED for (int p = 0; p < kRegisters; ++p) {
      w[p] = load_words(weights + (p / kParts * quads + quad) * 64 + p % kParts * sizeof(Words));
    }
    UNROLLED for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, bytes + r * stride + 4 * quad, 4);
      const Words each = all_words(four);
      UNROLLED for (int p = 0; p < kRegisters; ++p) {
        constexpr auto add = precision == kByte ? add_products : add_small_products;
        sums[r][p] = add(sums[r][p], each, w[p]);
      }
    }
  }
  UNROLLED for (int p = 0; p < kRegisters; ++p) {
    const int n = panel * kPanel + p * kLanes, left = m.outputs - n;
    const Words zero = load_first(left, m.sums + n);
    const Floats scale = load_first(left, m.scales + n);
    const Floats bias = m.bias ? load_first(left, m.bias + n) : all(0);
    UNROLLED for (int r = 0; r < R; ++r) {
      const Floats factor = scale * all(x.scales[b + r]);
      const Floats product = to_floats(subtract_words(sums[r][p], zero));
      store_first(left, out.y + (b + r) * out.stride + n, multiply_add(product, factor, bias));
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

// One thread's share of the outputs of all rows, in panels of 16. The blocks' sums fill the registers: 32 of AVX-512, 16
// of AVX2.
template <Precision precision>
inline void multiply(const Matrix& m, const Rows& x, int rows, Outputs out, int member, int members) {
  const int panels = (m.outputs + kPanel - 1) / kPanel;
  const int first = panels * member / members, last = panels * (member + 1) / members;
  if constexpr (is_bytes(precision)) {
    const auto block = [&]<int R, int P>(int b, int panel) { multiply_bytes<R, P, precision>(m, x, b, panel, out); };
    if constexpr (kLanes == 16) {
      return rows <= 2 ? in_blocks<2, 4>(rows, first, last, block) : in_blocks<8, 2>(rows, first, last, block);
    } else {
      return rows <= 2 ? in_blocks<1, 2>(rows, first, last, block) : in_blocks<3, 1>(rows, first, last, block);
    }
  } else {
    using Weight = std::conditional_t<precision == kHalf, uint16_t, float>;
    const auto block = [&]<int R, int P>(int b, int n) { multiply_numbers<R, P, Weight>(m, x, b, n, out); };
    const int begin = first * kPanel, end = std::min(last * kPanel, m.outputs);
    if constexpr (kLanes == 16) {
      in_blocks<6, 4>(rows, begin, end, block);
    } else {
      rows <= 3 ? in_blocks<3, 4>(rows, begin, end, block) : in_blocks<4, 3>(rows, begin, end, block);
    }
  }
}
