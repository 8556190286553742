// Attention of one head of one row over the inputs that its query sees, each read once from a table of all slots.
//
// Letters: S slots, H heads, L inputs of a sequence, D head width, D' the same rounded up to whole lanes, n inputs seen.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.h"

constexpr int kMostHeadWidth = 128;

// Keys or values of a layer. A row belongs to one input and one head. Numbers between D and D' have no effect: the
// query is 0 there.
struct Table {
  void* rows;     // float or byte [S, H, L, D']
  float* ranges;  // for bytes: [S, H, L, 2], scale and least value of a row; null for floats
};

// Inputs that the queries in the image part of a sequence see.
struct Seen {
  const int32_t* inputs;  // [L, most]; null: all inputs up to the query's
  const int32_t* counts;  // [L]
  int32_t most;
};

// Rows of D' = 16 C floats.
template <int C>
struct FloatTable {
  float* rows;

  FloatTable(const Table& table, int64_t first) : rows(static_cast<float*>(table.rows) + first * C * kLanes) {}

  void store(int64_t i, const __m512 (&x)[C], int) const {
    for (int c = 0; c < C; ++c) _mm512_storeu_ps(rows + (i * C + c) * kLanes, x[c]);
  }
  __m512 lanes(int64_t i, int c) const { return _mm512_loadu_ps(rows + (i * C + c) * kLanes); }
  void fetch(int64_t i) const {
    for (int c = 0; c < C; ++c) _mm_prefetch(rows + (i * C + c) * kLanes, _MM_HINT_T0);
  }
  static float one(int64_t) { return 1; }
  static float zero(int64_t) { return 0; }
};

// Rows of bytes, each over the range of its numbers.
template <int C>
struct ByteTable {
  uint8_t* rows;
  float* ranges;

  ByteTable(const Table& table, int64_t first)
      : rows(static_cast<uint8_t*>(table.rows) + first * C * kLanes), ranges(table.ranges + 2 * first) {}

  void store(int64_t i, const __m512 (&x)[C], int width) const {
    float least = INFINITY, greatest = -INFINITY;
    for (int c = 0; c < C; ++c) {
      const __mmask16 used = first_lanes(width - c * kLanes);
      least = std::min(least, _mm512_mask_reduce_min_ps(used, x[c]));
      greatest = std::max(greatest, _mm512_mask_reduce_max_ps(used, x[c]));
    }
    const float scale = std::max((greatest - least) / 255, 1e-20f);
    ranges[2 * i] = scale;
    ranges[2 * i + 1] = least;
    for (int c = 0; c < C; ++c) {
      const __m512 scaled = _mm512_div_ps(_mm512_sub_ps(x[c], _mm512_set1_ps(least)), _mm512_set1_ps(scale));
      const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_max_ps(scaled, _mm512_setzero_ps())));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows + (i * C + c) * kLanes), bytes);
    }
  }
  __m512 lanes(int64_t i, int c) const {
    const auto* bytes = reinterpret_cast<const __m128i*>(rows + (i * C + c) * kLanes);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(bytes)));
  }
  void fetch(int64_t i) const {
    for (int c = 0; c < C; c += 4) _mm_prefetch(rows + (i * C + c) * kLanes, _MM_HINT_T0);
    _mm_prefetch(ranges + 2 * i, _MM_HINT_T0);
  }
  float one(int64_t i) const { return ranges[2 * i]; }
  float zero(int64_t i) const { return ranges[2 * i + 1]; }
};

// LayerNorm without gain or bias over `width` numbers of C times 16 lanes, in place; the other lanes stay 0.
template <int C>
inline void normalise_head(__m512 (&x)[C], int width) {
  __m512 sum = _mm512_setzero_ps();
  for (const __m512& each : x) sum = _mm512_add_ps(sum, each);
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
  __m512 squares = _mm512_setzero_ps();
  for (int c = 0; c < C; ++c) {
    x[c] = _mm512_maskz_sub_ps(first_lanes(width - c * kLanes), x[c], mean);
    squares = _mm512_fmadd_ps(x[c], x[c], squares);
  }
  const __m512 factor = _mm512_set1_ps(1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + 1e-5f));
  for (__m512& each : x) each = _mm512_mul_ps(each, factor);
}

// Store key and value of input i, and attend. first: row of this slot's and head's input 0 in both tables.
// query, key, value, attended: D numbers each. scores: memory for L + 16 numbers.
template <int C, template <int> class T>
inline void attend(const Table& key_table, const Table& value_table, const Seen& seen, int64_t first, int i,
                   int width, bool normalises, const float* query, const float* key, const float* value,
                   float* scores, float* attended) {
  constexpr int kAhead = 8;  // rows by which prefetching is ahead
  const T<C> keys(key_table, first), values(value_table, first);
  __m512 q[C], k[C], v[C];
  for (int c = 0; c < C; ++c) {
    const __mmask16 used = first_lanes(width - c * kLanes);
    q[c] = _mm512_maskz_loadu_ps(used, query + c * kLanes);
    k[c] = _mm512_maskz_loadu_ps(used, key + c * kLanes);
    v[c] = _mm512_maskz_loadu_ps(used, value + c * kLanes);
  }
  if (normalises) {
    normalise_head(q, width);
    normalise_head(k, width);
  }
  keys.store(i, k, width);
  values.store(i, v, width);
  const __m512 scale = _mm512_set1_ps(1 / std::sqrt(static_cast<float>(width)));
  __m512 q_sum = _mm512_setzero_ps();
  for (__m512& each : q) {
    each = _mm512_mul_ps(each, scale);
    q_sum = _mm512_add_ps(q_sum, each);
  }
  const float zero_score = _mm512_reduce_add_ps(q_sum);

  const int32_t* inputs = seen.inputs ? seen.inputs + static_cast<int64_t>(i) * seen.most : nullptr;
  const int n = inputs ? seen.counts[i] : i + 1;
  const auto input = [&](int j) -> int64_t { return inputs ? inputs[j] : j; };
  float greatest = -INFINITY;
  for (int j = 0; j < n; ++j) {
    if (inputs && j + kAhead < n) keys.fetch(inputs[j + kAhead]);
    const int64_t at = input(j);
    __m512 sum = _mm512_mul_ps(q[0], keys.lanes(at, 0));
    for (int c = 1; c < C; ++c) sum = _mm512_fmadd_ps(q[c], keys.lanes(at, c), sum);
    scores[j] = keys.one(at) * _mm512_reduce_add_ps(sum) + keys.zero(at) * zero_score;
    greatest = std::max(greatest, scores[j]);
  }
  const float total = sum_of(n, [&](__mmask16 lanes, int j) {
    const __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(scores + j), _mm512_set1_ps(greatest));
    const __m512 share = _mm512_maskz_mov_ps(lanes, exponential(apart));
    _mm512_storeu_ps(scores + j, share);
    return share;
  });

  __m512 sums[C];
  for (__m512& each : sums) each = _mm512_setzero_ps();
  float zeros = 0;
  for (int j = 0; j < n; ++j) {
    if (inputs && j + kAhead < n) values.fetch(inputs[j + kAhead]);
    const int64_t at = input(j);
    const __m512 share = _mm512_set1_ps(scores[j] * values.one(at));
    for (int c = 0; c < C; ++c) sums[c] = _mm512_fmadd_ps(share, values.lanes(at, c), sums[c]);
    zeros += scores[j] * values.zero(at);
  }
  const __m512 by_total = _mm512_set1_ps(1 / total), base = _mm512_set1_ps(zeros);
  for (int c = 0; c < C; ++c) {
    const __m512 mean = _mm512_mul_ps(_mm512_add_ps(sums[c], base), by_total);
    _mm512_mask_storeu_ps(attended + c * kLanes, first_lanes(width - c * kLanes), mean);
  }
}
