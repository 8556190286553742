// The functions of the library, which `dalle.decoding.cpu.structures` declares for Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iterator>

#include "step.h"
#include "windows.h"

namespace {

// A step and the loop over it.
struct Decoder {
  Decoder(const Model& model, int most_rows) : step(model, most_rows), loop(step) {}

  Step step;
  WindowLoop loop;
};

Step& step_of(void* decoder) { return static_cast<Decoder*>(decoder)->step; }
const Step& step_of(const void* decoder) { return static_cast<const Decoder*>(decoder)->step; }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

// Run work: 1 when it is done, 0 where memory or a thread was missing. No exception leaves this library.
template <class Work>
int32_t is_done(Work work) {
  try {
    work();
    return 1;
  } catch (const std::exception&) {
    return 0;
  }
}

}  // namespace

// Sizes on which this library and `dalle.decoding.cpu.structures` must agree.
// To be raised with every change of a function's arguments or their meaning, in structures.py too.
constexpr int32_t kInterface = 3;

EXPORTED void dalle_layout(int32_t* sizes) {
  const int32_t own[] = {kInterface,        sizeof(Model), sizeof(Layer),  sizeof(Head), sizeof(Sampling),
                         sizeof(Candidate), sizeof(State), sizeof(Leader), kPanel,       kMostHeadWidth};
  std::copy(std::begin(own), std::end(own), sizes);
}

// The memory that the model points to must outlive the decoder. Null where there is no memory for it.
EXPORTED void* dalle_new_step(const Model* model, int32_t most_rows) {
  Decoder* decoder = nullptr;
  is_done([&] { decoder = new Decoder(*model, most_rows); });
  return decoder;
}

EXPORTED void dalle_delete_step(void* decoder) { delete static_cast<Decoder*>(decoder); }

// Run the model on the codes [B, M] of the slots' [B] positions [B]: hidden [B, W].
EXPORTED int32_t dalle_step(void* decoder, int32_t threads, int32_t rows, const int64_t* slots, const int64_t* codes,
                            const int64_t* positions, float* hidden) {
  return is_done([&] { step_of(decoder).run(threads, rows, slots, codes, positions, hidden); });
}

// Logits [B, V] of code m of the position that hidden [B, W] predicts, from the m codes before it in each row.
EXPORTED int32_t dalle_code_logits(void* decoder, int32_t threads, int32_t rows, const float* hidden, int32_t m,
                                   const int64_t* codes, int64_t codes_stride, float* logits) {
  return is_done([&] { step_of(decoder).code_logits(threads, rows, hidden, m, codes, codes_stride, logits); });
}

// Sample the codes [candidates, M] of the position that hidden [B, W] predicts, and add their log p [candidates]. The
// first rows are those with caption, in the order of the candidates.
EXPORTED int32_t dalle_sample(void* decoder, int32_t threads, int32_t rows, const float* hidden, int32_t candidates,
                              const int32_t* candidate_of_row, const Sampling* sampling, const uint64_t* noise_keys,
                              int64_t* codes, float* log_likelihood) {
  return is_done([&] {
    step_of(decoder).sample(threads, rows, hidden, candidates, candidate_of_row, sampling, noise_keys, codes,
                                     log_likelihood);
  });
}

// Sample windows of candidates and run the model on the next ones: as `WindowLoop::decode`.
EXPORTED int32_t dalle_decode(void* decoder, int32_t threads, int32_t, const State* state, Candidate* candidates,
                              int32_t number, Leader* leaders, int64_t widest, int64_t nanoseconds, Counts* counts) {
  return is_done([&] {
    static_cast<Decoder*>(decoder)->loop.decode(threads, *state, candidates, number, leaders, widest, nanoseconds, *counts);
  });
}

// Run the model on the inputs [rows, W] of a slot from `first` on: the hidden state [W] of the last one.
EXPORTED int32_t dalle_prefill(void* decoder, int32_t threads, int32_t rows, int64_t slot, int32_t first,
                               const float* inputs, float* hidden) {
  return is_done([&] { step_of(decoder).prefill(threads, rows, slot, first, inputs, hidden); });
}

// Bytes of the keys and values of a slot's first inputs, and copies of them.
EXPORTED int64_t dalle_prefix_size(const void* decoder, int32_t inputs) {
  return step_of(decoder).prefix_size(inputs);
}
EXPORTED void dalle_save_prefix(const void* decoder, int64_t slot, int32_t inputs, uint8_t* to) {
  step_of(decoder).save_prefix(slot, inputs, to);
}
EXPORTED void dalle_load_prefix(const void* decoder, int64_t slot, int32_t inputs, const uint8_t* from) {
  step_of(decoder).load_prefix(slot, inputs, from);
}
