// Sampling of one code from its logits, as by `dalle.decoding.sampling.choose`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lanes.h"

// Sampling options of a candidate.
struct Sampling {
  double top_p;       // 1: all
  float temperature;  // 0: the likeliest
  float guidance_scale;
  int32_t top_k;      // V: all
  int32_t blank_row;  // row of the step without caption; negative where there is no guidance
};

// Memory of one thread.
struct SamplingScratch {
  std::vector<float> logits, weights;
  std::vector<int32_t> order;

  explicit SamplingScratch(int codebook_size)
      : logits(codebook_size + kLanes), weights(codebook_size + kLanes), order(codebook_size) {}
};

inline float greatest_of(const float* x, int n) {
  Floats most = all(-INFINITY);
  for (int i = 0; i < n; i += kLanes) most = max(first_or(n - i, load(x + i), most), most);
  return greatest(most);
}

// Logits [V] -> probabilities at a temperature, in units of the greatest.
inline void weigh(const float* logits, int V, float temperature, float* weights) {
  const Floats most = all(greatest_of(logits, V));
  for (int i = 0; i < V; i += kLanes) store(weights + i, exponential((load(logits + i) - most) / all(temperature)));
}

// log p of a code by its logits [V]; NaN where a logit is NaN.
inline float log_probability(const float* logits, int V, int code) {
  const float most = greatest_of(logits, V);
  bool is_nan = false;
  const float total = sum_of(V, [&](int i) {
    const Floats each = first_or_zero(V - i, load(logits + i));
    is_nan |= has_nan(each);
    return first_or_zero(V - i, exponential(each - all(most)));
  });
  return is_nan ? NAN : logits[code] - most - std::log(total);
}

// Set weights to 0 but for the k greatest logits; of equal logits the first ones stay.
inline void keep_likeliest(int k, int V, SamplingScratch& scratch) {
  std::iota(scratch.order.begin(), scratch.order.end(), 0);
  std::nth_element(scratch.order.begin(), scratch.order.begin() + k, scratch.order.begin() + V,
                   [&](int32_t a, int32_t b) {
                     return scratch.logits[a] != scratch.logits[b] ? scratch.logits[a] > scratch.logits[b] : a < b;
                   });
  for (int i = k; i < V; ++i) scratch.weights[scratch.order[i]] = 0;
}

// Set weights to 0 but for the fewest likeliest codes whose probabilities reach top_p.
inline void keep_nucleus(double top_p, int V, SamplingScratch& scratch) {
  std::iota(scratch.order.begin(), scratch.order.end(), 0);
  std::stable_sort(scratch.order.begin(), scratch.order.begin() + V,
                   [&](int32_t a, int32_t b) { return scratch.weights[a] > scratch.weights[b]; });
  const double enough = top_p * std::accumulate(scratch.weights.begin(), scratch.weights.begin() + V, 0.0);
  double before = 0;
  for (int i = 0; i < V; ++i) {
    float& weight = scratch.weights[scratch.order[i]];
    const double own = weight;
    if (before >= enough) weight = 0;
    before += own;
  }
}

// The code that a number in [0, 1) chooses by the scratch's logits.
inline int sample_code(const Sampling& sampling, float uniform, int V, SamplingScratch& scratch) {
  if (sampling.temperature < 1e-30f) {  // below it a division might be one by 0
    return static_cast<int>(std::max_element(scratch.logits.begin(), scratch.logits.begin() + V) -
                            scratch.logits.begin());
  }
  weigh(scratch.logits.data(), V, sampling.temperature, scratch.weights.data());
  if (sampling.top_k < V) keep_likeliest(sampling.top_k, V, scratch);
  if (sampling.top_p < 1) keep_nucleus(sampling.top_p, V, scratch);
  const double threshold = uniform * std::accumulate(scratch.weights.begin(), scratch.weights.begin() + V, 0.0);
  double sum = 0;
  for (int code = 0; code < V; ++code) {
    sum += scratch.weights[code];
    if (sum > threshold) return code;
  }
  return V - 1;  // where a logit is NaN, and the log p too
}
