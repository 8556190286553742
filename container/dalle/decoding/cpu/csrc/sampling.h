// Sampling of one code from its logits, as by `dalle.decoding.sampling.choose`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lanes/lanes.h"

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

// log p of a code by its logits [V], all finite.
inline float log_probability(const float* logits, int V, int code) {
  const float most = greatest_of(logits, V);
  const float total = sum_of(V, [&](int i) {
    const Floats each = first_or_zero(V - i, load(logits + i));
    return first_or_zero(V - i, exponential(each - all(most)));
  });
  return logits[code] - most - std::log(total);
}

// Whether no value [n] is NaN or infinite: x - x is 0, else NaN.
inline bool all_finite(const float* x, int n) {
  bool is_nan = false;
  for (int i = 0; i < n; i += kLanes) {
    const Floats each = first_or_zero(n - i, load(x + i));
    is_nan |= has_nan(each - each);
  }
  return !is_nan;
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

// Hash 32 bits to 32 bits: "lowbias32" of C. Wellons' hash prospector (2018).
inline Bits mix(Bits x) {
  x ^= x >> 16;
  x *= 0x7feb352d;
  x ^= x >> 15;
  x *= 0x846ca68b;
  return x ^ x >> 16;
}

// Gumbel noise of the codes from `first` on, a function of the key and the code: `dalle.decoding.sampling.gumbel_noise`.
inline Floats gumbel_noise(uint64_t key, int first) {
  alignas(Bits) static constexpr uint32_t kLaneNumbers[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Bits codes = *reinterpret_cast<const Bits*>(kLaneNumbers) + static_cast<uint32_t>(first);
  const Bits hashes = mix(mix(codes + static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32));
  const Floats one = all(1.0f), half = all(0.5f);
  const Floats uniforms = (__builtin_convertvector(hashes, Floats) + half) * all(0x1p-32f);
  const Floats below_one = all(1 - 0x1p-24f);
  const Floats t = uniforms < below_one ? uniforms : below_one;
  // -ln(1 - t), exact where it is small (Kahan).
  const Floats rest = one - t;
  const Floats quotient = logarithm(rest) * t / (rest - one);
  return -logarithm(rest == one ? t : quotient);
}

// The first code [0, V) of the greatest score; score(i) gives a register of them from i on.
template <class Score>
inline int likeliest(int V, Score score) {
  Floats best = all(-INFINITY);
  Bits places = {};
  for (int i = 0; i < V; i += kLanes) {
    const Floats each = first_or(V - i, score(i), all(-INFINITY));
    const auto is_better = each > best;
    best = is_better ? each : best;
    places = is_better ? Bits{} + i : places;
  }
  const float most = greatest(best);
  int code = V - 1;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int place = static_cast<int>(places[lane]) + lane;
    if (best[lane] == most) code = std::min(code, place);
  }
  return code;
}

// The code of the greatest sum of the scratch's logits and the key's noise.
inline int sample_code(const Sampling& sampling, uint64_t key, int V, SamplingScratch& scratch) {
  const float* logits = scratch.logits.data();
  if (sampling.temperature < 1e-30f) {  // below it a division might be one by 0
    return likeliest(V, [&](int i) { return load(logits + i); });
  }
  const bool keeps_all = sampling.top_k >= V && sampling.top_p >= 1;
  float* weights = scratch.weights.data();
  if (!keeps_all) weigh(logits, V, sampling.temperature, weights);
  if (sampling.top_k < V) keep_likeliest(sampling.top_k, V, scratch);
  if (sampling.top_p < 1) keep_nucleus(sampling.top_p, V, scratch);
  const Floats most = all(greatest_of(logits, V)), temperature = all(sampling.temperature);
  return likeliest(V, [&](int i) {
    const Floats score = (load(logits + i) - most) / temperature + gumbel_noise(key, i);
    return keeps_all ? score : load(weights + i) > all(0) ? score : all(-INFINITY);
  });
}
