// Structures of a model, filled by `dalle.decoding.cpu.structures` field by field.
//
// Letters: W width, M codes per position, V codebook size, N positions; see also attention.h.
#pragma once

#include <cstdint>

#include "attention.h"
#include "matrix.h"
#include "rows.h"

struct FeedForward {
  Norm norm;
  Matrix expand, contract;
  int32_t activation;
};

struct Layer {
  Norm norm;
  Matrix qkv, out;
  const float* out_gain;  // [W] or null
  FeedForward feed_forward;
  const float* contract_gain;  // [W] or null
  Table keys, values;
  Seen seen;
  int32_t normalises_heads;
};

struct Head {
  const float* earlier;  // [m V, W]: embeddings of the m codes before this one; null for the first
  FeedForward mix;       // unused in the first
  Norm norm;
  Matrix to_logits;
};

struct Model {
  const Layer* layers;
  const Head* heads;
  const float* code_inputs;      // [M V, W]
  const float* position_inputs;  // [N, W]
  int32_t width, num_layers, num_heads, length, text_length, num_codebooks, codebook_size, inner_width;
  int32_t precision;
};
