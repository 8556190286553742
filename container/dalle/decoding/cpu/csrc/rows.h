// Operations on a row of numbers between two matrices: norms, activations, residual sums.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "lanes/lanes.h"

enum Activation : int32_t { kGelu = 0, kGeglu = 1, kRelu2 = 2 };

struct Norm {
  const float* gain;
  const float* bias;  // null: RMSNorm
  float epsilon;
};

inline void normalise(const Norm& norm, const float* x, int width, float* y) {
  const auto at = [&](const float* from, int i) { return load_first(width - i, from + i); };
  const float mean = norm.bias ? sum_of(width, [&](int i) { return at(x, i); }) / width : 0;
  const float squares = sum_of(width, [&](int i) {
    const Floats apart = first_or_zero(width - i, at(x, i) - all(mean));
    return apart * apart;
  });
  const Floats factor = all(1 / std::sqrt(squares / width + norm.epsilon));
  for (int i = 0; i < width; i += kLanes) {
    const Floats bias = norm.bias ? at(norm.bias, i) : all(0);
    store_first(width - i, y + i, multiply_add((at(x, i) - all(mean)) * factor, at(norm.gain, i), bias));
  }
}

// x + branch · gain, in x's memory.
inline void add(float* x, const float* branch, const float* gain, int width) {
  for (int i = 0; i < width; i += kLanes) {
    const auto at = [&](const float* from) { return load_first(width - i, from + i); };
    store_first(width - i, x + i, multiply_add(at(branch), gain ? at(gain) : all(1), at(x)));
  }
}

// Activation: outputs of the expanding matrix -> `inner` inputs of the contracting one.
inline void activate(int32_t activation, const float* x, int inner, float* y) {
  for (int i = 0; i < inner; i += kLanes) {
    Floats each = load_first(inner - i, x + i);
    if (activation == kGelu) {
      each = gelu(each);
    } else if (activation == kGeglu) {
      each = each * gelu(load_first(inner - i, x + inner + i));
    } else {
      each = max(each, all(0));
      each = each * each;
    }
    store_first(inner - i, y + i, each);
  }
}

// A matrix of floats with one row per sequence. Each row begins on a cache line, an odd number of lines after the row
// before it: with a power of two all rows would share the same few sets of a cache.
class Buffer {
 public:
  Buffer(int rows, int width) : stride((width + 31) / 32 * 32 + 16), numbers_(rows * stride + 16) {
    const auto address = reinterpret_cast<uintptr_t>(numbers_.data());
    first_ = numbers_.data() + (64 - address % 64) % 64 / sizeof(float);
  }
  float* row(int b) const { return first_ + b * stride; }
  const int64_t stride;

 private:
  std::vector<float> numbers_;
  float* first_;
};
