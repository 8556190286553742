// Attention of one head of one row over the inputs that its query sees, each read once from a table of all slots.
//
// Letters: S slots, H heads, L inputs of a sequence, D head width, D' the same rounded up to whole panels, n inputs seen.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes/lanes.h"

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

// Rows of D' floats in C registers.
template <int C>
struct FloatTable {
  float* rows;

  FloatTable(const Table& table, int64_t first) : rows(static_cast<float*>(table.rows) + first * C * kLanes) {}

  void store(int64_t i, const Floats (&x)[C], int) const {
    for (int c = 0; c < C; ++c) ::store(rows + (i * C + c) * kLanes, x[c]);
  }
  Floats lanes(int64_t i, int c) const { return load(rows + (i * C + c) * kLanes); }
  void fetch(int64_t i) const {
    for (int at = 0; at < C * kLanes; at += 64 / sizeof(float)) _mm_prefetch(rows + i * C * kLanes + at, _MM_HINT_T0);
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

  void store(int64_t i, const Floats (&x)[C], int width) const {
    float low = INFINITY, high = -INFINITY;
    for (int c = 0; c < C; ++c) {
      const int used = width - c * kLanes;
      low = std::min(low, least(first_or(used, x[c], all(INFINITY))));
      high = std::max(high, greatest(first_or(used, x[c], all(-INFINITY))));
    }
    const float scale = std::max((high - low) / 255, 1e-20f);
    ranges[2 * i] = scale;
    ranges[2 * i + 1] = low;
    for (int c = 0; c < C; ++c) store_bytes(rows + (i * C + c) * kLanes, (x[c] - all(low)) / all(scale), 0);
  }
  Floats lanes(int64_t i, int c) const { return load(rows + (i * C + c) * kLanes); }
  void fetch(int64_t i) const {
    for (int at = 0; at < C * kLanes; at += 64) _mm_prefetch(rows + i * C * kLanes + at, _MM_HINT_T0);
    _mm_prefetch(ranges + 2 * i, _MM_HINT_T0);
  }
  float one(int64_t i) const { return ranges[2 * i]; }
  float zero(int64_t i) const { return ranges[2 * i + 1]; }
};

// LayerNorm without gain or bias over `width` numbers in C registers, in place; the other lanes stay 0.
template <int C>
inline void normalise_head(Floats (&x)[C], int width) {
  Floats total = all(0);
  for (const Floats& each : x) total = total + each;
  const Floats mean = all(sum(total) / width);
  Floats squares = all(0);
  for (int c = 0; c < C; ++c) {
    x[c] = first_or_zero(width - c * kLanes, x[c] - mean);
    squares = multiply_add(x[c], x[c], squares);
  }
  const Floats factor = all(1 / std::sqrt(sum(squares) / width + 1e-5f));
  for (Floats& each : x) each = each * factor;
}

// The `width` numbers of a query, key or value.
template <int C>
inline void load_head(const float* from, int width, Floats (&x)[C]) {
  for (int c = 0; c < C; ++c) x[c] = load_first(width - c * kLanes, from + c * kLanes);
}

// Store key and value of input i, D numbers each. first: row of this slot's and head's input 0 in both tables.
template <int C, template <int> class T>
inline void remember(const Table& keys, const Table& values, int64_t first, int i, int width, bool normalises,
                     const float* key, const float* value) {
  Floats k[C], v[C];
  load_head(key, width, k);
  load_head(value, width, v);
  if (normalises) normalise_head(k, width);
  T<C>(keys, first).store(i, k, width);
  T<C>(values, first).store(i, v, width);
}

// Attend from input i, whose key and value are stored. query, attended: D numbers each. scores: memory for L + 16.
template <int C, template <int> class T>
inline void attend(const Table& key_table, const Table& value_table, const Seen& seen, int64_t first, int i,
                   int width, bool normalises, const float* query, float* scores, float* attended) {
  constexpr int kAhead = 8;  // rows by which prefetching is ahead
  const T<C> keys(key_table, first), values(value_table, first);
  Floats q[C];
  load_head(query, width, q);
  if (normalises) normalise_head(q, width);
  const Floats scale = all(1 / std::sqrt(static_cast<float>(width)));
  Floats q_sum = all(0);
  for (Floats& each : q) {
    each = each * scale;
    q_sum = q_sum + each;
  }
  const float zero_score = sum(q_sum);

  const int32_t* inputs = seen.inputs ? seen.inputs + static_cast<int64_t>(i) * seen.most : nullptr;
  const int n = inputs ? seen.counts[i] : i + 1;
  const auto input = [&](int j) -> int64_t { return inputs ? inputs[j] : j; };
  float most = -INFINITY;
  for (int j = 0; j < n; ++j) {
    if (inputs && j + kAhead < n) keys.fetch(inputs[j + kAhead]);
    const int64_t at = input(j);
    Floats products = q[0] * keys.lanes(at, 0);
    for (int c = 1; c < C; ++c) products = multiply_add(q[c], keys.lanes(at, c), products);
    scores[j] = keys.one(at) * sum(products) + keys.zero(at) * zero_score;
    most = std::max(most, scores[j]);
  }
  const float total = sum_of(n, [&](int j) {
    const Floats share = first_or_zero(n - j, exponential(load(scores + j) - all(most)));
    store(scores + j, share);
    return share;
  });

  Floats sums[C];
  for (Floats& each : sums) each = all(0);
  float zeros = 0;
  for (int j = 0; j < n; ++j) {
    if (inputs && j + kAhead < n) values.fetch(inputs[j + kAhead]);
    const int64_t at = input(j);
    const Floats share = all(scores[j] * values.one(at));
    for (int c = 0; c < C; ++c) sums[c] = multiply_add(share, values.lanes(at, c), sums[c]);
    zeros += scores[j] * values.zero(at);
  }
  const Floats by_total = all(1 / total), base = all(zeros);
  for (int c = 0; c < C; ++c) store_first(width - c * kLanes, attended + c * kLanes, (sums[c] + base) * by_total);
}
