// One code from its logits, as `dalle.decoding.sampling.choose` draws it.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lanes.h"

// How a candidate's codes are drawn.
struct Draw {
  double top_p;       // 1: all
  float temperature;  // 0: the likeliest
  float guidance_scale;
  int32_t top_k;      // V: all
  int32_t blank_row;  // of the step, without the caption; below 0 where there is no guidance
};

// Room for what one thread draws.
struct DrawRoom {
  std::vector<float> logits, weights;
  std::vector<int32_t> order;

  explicit DrawRoom(int codebook_size)
      : logits(codebook_size + kLanes), weights(codebook_size + kLanes), order(codebook_size) {}
};

inline float greatest_of(const float* x, int n) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int i = 0; i < n; i += kLanes) most = _mm512_mask_max_ps(most, first_lanes(n - i), most, _mm512_loadu_ps(x + i));
  return _mm512_reduce_max_ps(most);
}

// Logits [V] -> after temperature, each probability in units of the greatest.
inline void weigh(const float* logits, int V, float temperature, float* weights) {
  const __m512 greatest = _mm512_set1_ps(greatest_of(logits, V));
  const __m512 factor = _mm512_set1_ps(temperature);
  for (int i = 0; i < V; i += kLanes) {
    const __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(logits + i), greatest);
    _mm512_storeu_ps(weights + i, exponential(_mm512_div_ps(apart, factor)));
  }
}

// log p of a code by its logits [V]; no number where one of those is none.
inline float log_probability(const float* logits, int V, int code) {
  const float greatest = greatest_of(logits, V);
  __mmask16 none = 0;
  const float total = sum_of(V, [&](__mmask16 lanes, int i) {
    const __m512 each = _mm512_loadu_ps(logits + i);
    none |= _mm512_mask_cmp_ps_mask(lanes, each, each, _CMP_UNORD_Q);
    return _mm512_maskz_mov_ps(lanes, exponential(_mm512_sub_ps(each, _mm512_set1_ps(greatest))));
  });
  return none ? NAN : logits[code] - greatest - std::log(total);
}

// Leave weight to the k greatest logits only; of equal ones to those that come first.
inline void keep_likeliest(int k, int V, DrawRoom& room) {
  std::iota(room.order.begin(), room.order.end(), 0);
  std::nth_element(room.order.begin(), room.order.begin() + k, room.order.begin() + V, [&](int32_t a, int32_t b) {
    return room.logits[a] != room.logits[b] ? room.logits[a] > room.logits[b] : a < b;
  });
  for (int i = k; i < V; ++i) room.weights[room.order[i]] = 0;
}

// Leave weight to the fewest likeliest codes whose probabilities reach the sum.
inline void keep_nucleus(double top_p, int V, DrawRoom& room) {
  std::iota(room.order.begin(), room.order.end(), 0);
  std::stable_sort(room.order.begin(), room.order.begin() + V,
                   [&](int32_t a, int32_t b) { return room.weights[a] > room.weights[b]; });
  const double enough = top_p * std::accumulate(room.weights.begin(), room.weights.begin() + V, 0.0);
  double before = 0;
  for (int i = 0; i < V; ++i) {
    float& weight = room.weights[room.order[i]];
    const double own = weight;
    if (before >= enough) weight = 0;
    before += own;
  }
}

// The code that a number in [0, 1) draws from the room's logits.
inline int draw_code(const Draw& draw, float uniform, int V, DrawRoom& room) {
  if (draw.temperature < 1e-30f) {  // a division by less might be one by 0
    return static_cast<int>(std::max_element(room.logits.begin(), room.logits.begin() + V) - room.logits.begin());
  }
  weigh(room.logits.data(), V, draw.temperature, room.weights.data());
  if (draw.top_k < V) keep_likeliest(draw.top_k, V, room);
  if (draw.top_p < 1) keep_nucleus(draw.top_p, V, room);
  const double threshold = uniform * std::accumulate(room.weights.begin(), room.weights.begin() + V, 0.0);
  double sum = 0;
  for (int code = 0; code < V; ++code) {
    sum += room.weights[code];
    if (sum > threshold) return code;
  }
  return V - 1;  // where logits are no numbers, which the log p tells
}
