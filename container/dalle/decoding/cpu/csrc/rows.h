// Operations on a row of numbers between two matrices: norms, activations, residual sums.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes.h"

enum Activation : int32_t { kGelu = 0, kGeglu = 1, kRelu2 = 2 };

struct Norm {
  const float* gain;
  const float* bias;  // null: RMSNorm
  float epsilon;
};

inline void normalise(const Norm& norm, const float* x, int width, float* y) {
  const auto at = [&](__mmask16 lanes, int i) { return _mm512_maskz_loadu_ps(lanes, x + i); };
  const float mean = norm.bias ? sum_of(width, at) / width : 0;
  const auto apart = [&](__mmask16 lanes, int i) { return _mm512_maskz_sub_ps(lanes, at(lanes, i), _mm512_set1_ps(mean)); };
  const float squares = sum_of(width, [&](__mmask16 lanes, int i) {
    const __m512 each = apart(lanes, i);
    return _mm512_mul_ps(each, each);
  });
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(squares / width + norm.epsilon));
  for (int i = 0; i < width; i += kLanes) {
    const __mmask16 lanes = first_lanes(width - i);
    const __m512 bias = norm.bias ? _mm512_maskz_loadu_ps(lanes, norm.bias + i) : _mm512_setzero_ps();
    const __m512 gain = _mm512_maskz_loadu_ps(lanes, norm.gain + i);
    _mm512_mask_storeu_ps(y + i, lanes, _mm512_fmadd_ps(_mm512_mul_ps(apart(lanes, i), factor), gain, bias));
  }
}

// x + branch · gain, in x's memory.
inline void add(float* x, const float* branch, const float* gain, int width) {
  for (int i = 0; i < width; i += kLanes) {
    const __mmask16 lanes = first_lanes(width - i);
    const __m512 factor = gain ? _mm512_maskz_loadu_ps(lanes, gain + i) : _mm512_set1_ps(1);
    const __m512 added = _mm512_maskz_loadu_ps(lanes, branch + i);
    _mm512_mask_storeu_ps(x + i, lanes, _mm512_fmadd_ps(added, factor, _mm512_maskz_loadu_ps(lanes, x + i)));
  }
}

// Activation: outputs of the expanding matrix -> `inner` inputs of the contracting one.
inline void activate(int32_t activation, const float* x, int inner, float* y) {
  for (int i = 0; i < inner; i += kLanes) {
    const __mmask16 lanes = first_lanes(inner - i);
    __m512 each = _mm512_maskz_loadu_ps(lanes, x + i);
    if (activation == kGelu) {
      each = gelu(each);
    } else if (activation == kGeglu) {
      each = _mm512_mul_ps(each, gelu(_mm512_maskz_loadu_ps(lanes, x + inner + i)));
    } else {
      each = _mm512_max_ps(each, _mm512_setzero_ps());
      each = _mm512_mul_ps(each, each);
    }
    _mm512_mask_storeu_ps(y + i, lanes, each);
  }
}

// A matrix of floats with one row per sequence. Each row begins on a cache line, an odd number of lines after the row
// before it: with a power of two all rows would share the same few sets of a cache.
class Buffer {
 public:
  Buffer(int rows, int width) : stride((width + 31) / 32 * 32 + kLanes), numbers_(rows * stride + kLanes) {
    const auto address = reinterpret_cast<uintptr_t>(numbers_.data());
    first_ = numbers_.data() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* row(int b) const { return first_ + b * stride; }
  const int64_t stride;

 private:
  std::vector<float> numbers_;
  float* first_;
};
