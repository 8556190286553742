// One decoding step of a transformer for many sequences, each at its own position: the arithmetic of
// `dalle.decoding.torch_decoder` in one call. A step of few rows is hundreds of operations of microseconds each, which
// take longer to dispatch than to compute; here reading the weights from memory takes the time.
//
// All threads run the whole step together (`Team`) and divide its parts by rows (norms, activations), by outputs of a
// matrix, or by heads.
//
// Letters: B rows, W width, M codes per position, V codebook size; see also attention.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <map>
#include <utility>
#include <vector>

#include "attention.h"
#include "matrix.h"
#include "model.h"
#include "rows.h"
#include "sampling.h"
#include "team.h"

namespace {

class Step {
 public:
  Step(const Model& model, int most_rows)
      : model_(model),
        widest_(std::max(model.width, model.inner_width)),
        x_(most_rows, model.width),
        branch_(most_rows, model.width),
        qkv_(most_rows, 3 * model.width),
        inner_(most_rows, 2 * model.inner_width),
        inputs_(most_rows, widest_),
        logits_(most_rows, model.codebook_size),
        bytes_(most_rows * inputs_.stride),
        scales_(most_rows),
        most_scores_(model.length + kPanel) {}

  void run(int threads, int rows, const int64_t* slots, const int64_t* codes, const int64_t* positions, float* hidden) {
    run(threads, rows, slots, codes, positions, [&](int b) { return hidden + static_cast<int64_t>(b) * model_.width; });
  }

  // hidden_of(b): where row b's hidden state [W] is written.
  template <class HiddenOf>
  void run(int threads, int rows, const int64_t* slots, const int64_t* codes, const int64_t* positions,
           HiddenOf hidden_of) {
    const int W = model_.width;
    together(threads, rows, [&]<Precision p>(const Part& part) {
      part.each_row([&](int b) {
        std::copy_n(model_.position_inputs + positions[b] * W, W, x_.row(b));
        embed(codes + b * model_.num_codebooks, model_.num_codebooks, model_.code_inputs, x_.row(b));
      });
      layers<p>(
          part, [&](int b) { return slots[b]; },
          [&](int b) { return static_cast<int>(positions[b]) + model_.text_length + 1; },
          [&](int b) { std::copy_n(x_.row(b), W, hidden_of(b)); });
    });
  }

  // hidden_of(b): row b's hidden state [W]. keys_of(c): the noise keys [M] of row c of those with caption.
  template <class HiddenOf, class KeysOf>
  void sample(int threads, int rows, HiddenOf hidden_of, int candidates, const int32_t* candidate_of_row,
              const Sampling* sampling, KeysOf keys_of, int64_t* codes, float* log_likelihood) {
    const int M = model_.num_codebooks, V = model_.codebook_size;
    together(threads, rows, [&]<Precision p>(const Part& part) {
      SamplingScratch& scratch = sampling_scratch_[part.member];
      for (int m = 0; m < M; ++m) {
        const auto codes_of = [&](int b) { return codes + candidate_of_row[b] * M; };
        predict<p>(part, hidden_of, m, codes_of, {logits_.row(0), logits_.stride});
        part.each(candidates, [&](int c) {
          guide(sampling[c], logits_.row(c), scratch.logits.data());
          if (!all_finite(scratch.logits.data(), V)) {  // they have no order; log p tells it
            log_likelihood[c] = NAN;
            return;
          }
          const int code = sample_code(sampling[c], keys_of(c)[m], V, scratch);
          codes[c * M + m] = code;
          log_likelihood[c] += log_probability(logits_.row(c), V, code);
        });
        part.team.wait_for_all();  // all codes are known
      }
    });
  }

  // Run the model on the inputs [rows, W] of a slot from `first` on: the hidden state [W] of the last one.
  void prefill(int threads, int rows, int64_t slot, int first, const float* inputs, float* hidden) {
    const int W = model_.width;
    together(threads, rows, [&]<Precision p>(const Part& part) {
      part.each_row([&](int b) { std::copy_n(inputs + static_cast<int64_t>(b) * W, W, x_.row(b)); });
      layers<p>(
          part, [&](int) { return slot; }, [&](int b) { return first + b; },
          [&](int b) {
            if (b == rows - 1) std::copy_n(x_.row(b), W, hidden);
          });
    });
  }

  void code_logits(int threads, int rows, const float* hidden, int m, const int64_t* codes, int64_t codes_stride,
                   float* logits) {
    together(threads, rows, [&]<Precision p>(const Part& part) {
      predict<p>(
          part, [&](int b) { return hidden + static_cast<int64_t>(b) * model_.width; }, m,
          [&](int b) { return codes + b * codes_stride; }, {logits, model_.codebook_size});
    });
  }

  void sample(int threads, int rows, const float* hidden, int candidates, const int32_t* candidate_of_row,
              const Sampling* sampling, const uint64_t* noise_keys, int64_t* codes, float* log_likelihood) {
    sample(
        threads, rows, [&](int b) { return hidden + static_cast<int64_t>(b) * model_.width; }, candidates,
        candidate_of_row, sampling, [&](int c) { return noise_keys + static_cast<int64_t>(c) * model_.num_codebooks; },
        codes, log_likelihood);
  }

  // Bytes of the keys and values of a slot's first inputs.
  int64_t prefix_size(int inputs) const {
    int64_t size = 0;
    each_part(0, inputs, [&](void*, int64_t bytes) { size += bytes; });
    return size;
  }

  // Copy the keys and values of a slot's first inputs to or from one piece of memory.
  void save_prefix(int64_t slot, int inputs, uint8_t* to) const {
    each_part(slot, inputs, [&](const void* part, int64_t bytes) {
      std::memcpy(to, part, bytes);
      to += bytes;
    });
  }
  void load_prefix(int64_t slot, int inputs, const uint8_t* from) const {
    each_part(slot, inputs, [&](void* part, int64_t bytes) {
      std::memcpy(part, from, bytes);
      from += bytes;
    });
  }

  const Model& model() const { return model_; }

 private:
  // One thread's share of the work.
  struct Part {
    Team& team;
    int member, members, rows;

    template <class Work>
    void each(int64_t number, Work work) const {
      for (int64_t i = number * member / members; i < number * (member + 1) / members; ++i) work(static_cast<int>(i));
    }
    template <class Work>
    void each_row(Work work) const {
      each(rows, work);
    }
  };

  // Call work<precision>(part) in each of the threads.
  template <class Work>
  void together(int threads, int rows, Work work) {
    Team& team = teams_.try_emplace(threads, threads).first->second;
    scores_.resize(std::max<size_t>(scores_.size(), threads * most_scores_));
    while (static_cast<int>(sampling_scratch_.size()) < threads) sampling_scratch_.emplace_back(model_.codebook_size);
    team.run([&](int member) {
      const Part part{team, member, threads, rows};
      switch (model_.precision) {
        case kFloat: return work.template operator()<kFloat>(part);
        case kHalf: return work.template operator()<kHalf>(part);
        case kByte: return work.template operator()<kByte>(part);
        case kSmallByte: return work.template operator()<kSmallByte>(part);
      }
    });
  }

  // Call work(address, bytes) for each part of the keys and values of a slot's first inputs.
  template <class Work>
  void each_part(int64_t slot, int inputs, Work work) const {
    const int64_t row = (head_width() + kPanel - 1) / kPanel * kPanel;
    for (int l = 0; l < model_.num_layers; ++l) {
      for (const Table& table : {model_.layers[l].keys, model_.layers[l].values}) {
        const int64_t bytes = row * (table.ranges ? sizeof(uint8_t) : sizeof(float));
        for (int h = 0; h < model_.num_heads; ++h) {
          work(static_cast<uint8_t*>(table.rows) + first_row(slot, h) * bytes, inputs * bytes);
          if (table.ranges) work(table.ranges + 2 * first_row(slot, h), inputs * 2 * sizeof(float));
        }
      }
    }
  }

  Rows inputs() { return {inputs_.row(0), bytes_.data(), scales_.data(), inputs_.stride}; }

  template <Precision p>
  void product(const Part& part, const Matrix& matrix, Outputs outputs) {
    part.team.wait_for_all();  // all rows are written
    multiply<p>(matrix, inputs(), part.rows, outputs, part.member, part.members);
    part.team.wait_for_all();
  }

  // Convert a row of inputs_ to what the next matrix reads.
  template <Precision p>
  void encode_row(int b, int width) {
    if constexpr (is_bytes(p)) inputs().to_bytes(b, width);
  }

  template <Precision p>
  void normalise_row(const Norm& norm, int b) {
    normalise(norm, x_.row(b), model_.width, inputs_.row(b));
    encode_row<p>(b, model_.width);
  }

  // Compute the branch of a feed-forward network from normalised inputs.
  template <Precision p>
  void feed_forward(const Part& part, const FeedForward& network) {
    const int inner = network.contract.inputs;
    product<p>(part, network.expand, {inner_.row(0), inner_.stride});
    part.each_row([&](int b) {
      activate(network.activation, inner_.row(b), inner, inputs_.row(b));
      encode_row<p>(b, inner);
    });
    product<p>(part, network.contract, {branch_.row(0), branch_.stride});
  }

  // All layers, in x_. slot_of(b), input_of(b): the slot of row b and its place in the sequence. done(b) is called when
  // the row has passed them all.
  template <Precision p, class SlotOf, class InputOf, class Done>
  void layers(const Part& part, SlotOf slot_of, InputOf input_of, Done done) {
    const int W = model_.width;
    part.each_row([&](int b) { normalise_row<p>(model_.layers[0].norm, b); });
    for (int l = 0; l < model_.num_layers; ++l) {
      const Layer& layer = model_.layers[l];
      product<p>(part, layer.qkv, {qkv_.row(0), qkv_.stride});
      // Head by head, since rows of the same slot read the same keys and values.
      const auto each_head = [&](auto work) {
        part.each(model_.num_heads * part.rows, [&](int unit) {
          const int b = unit % part.rows;
          work(b, unit / part.rows, slot_of(b), input_of(b));
        });
      };
      each_head([&](int b, int h, int64_t slot, int i) { remember_head(layer, b, h, slot, i); });
      part.team.wait_for_all();  // a row sees those before it of its slot
      each_head([&](int b, int h, int64_t slot, int i) { attend_head(part, layer, b, h, slot, i); });
      if constexpr (is_bytes(p)) {  // a row's bytes depend on all of its heads
        part.team.wait_for_all();
        part.each_row([&](int b) { encode_row<p>(b, W); });
      }
      product<p>(part, layer.out, {branch_.row(0), branch_.stride});
      part.each_row([&](int b) {
        add(x_.row(b), branch_.row(b), layer.out_gain, W);
        normalise_row<p>(layer.feed_forward.norm, b);
      });
      feed_forward<p>(part, layer.feed_forward);
      part.each_row([&](int b) {
        add(x_.row(b), branch_.row(b), layer.contract_gain, W);
        if (l + 1 < model_.num_layers) {
          normalise_row<p>(model_.layers[l + 1].norm, b);
        } else {
          done(b);
        }
      });
    }
  }

  // Compute the logits of code m. codes_of(b): the codes before m of the position that row b predicts.
  template <Precision p, class HiddenOf, class Codes>
  void predict(const Part& part, HiddenOf hidden_of, int m, Codes codes_of, Outputs logits) {
    const int W = model_.width;
    const Head& head = model_.heads[m];
    part.each_row([&](int b) {
      std::copy_n(hidden_of(b), W, x_.row(b));
      embed(codes_of(b), m, head.earlier, x_.row(b));
      normalise_row<p>(m ? head.mix.norm : head.norm, b);
    });
    if (m) {
      feed_forward<p>(part, head.mix);
      part.each_row([&](int b) {
        add(x_.row(b), branch_.row(b), nullptr, W);
        normalise_row<p>(head.norm, b);
      });
    }
    product<p>(part, head.to_logits, logits);
  }

  // Guidance: logits of a candidate's row, moved away from those of its row without caption.
  void guide(const Sampling& sampling, const float* own, float* guided) {
    if (sampling.blank_row < 0) {
      std::copy_n(own, model_.codebook_size, guided);
      return;
    }
    const float* blank = logits_.row(sampling.blank_row);
    for (int v = 0; v < model_.codebook_size; ++v) guided[v] = blank[v] + sampling.guidance_scale * (own[v] - blank[v]);
  }

  // Add the embeddings of codes, each of another codebook.
  void embed(const int64_t* codes, int number, const float* tables, float* x) {
    for (int m = 0; m < number; ++m) {
      add(x, tables + (static_cast<int64_t>(m) * model_.codebook_size + codes[m]) * model_.width, nullptr, model_.width);
    }
  }

  int head_width() const { return model_.width / model_.num_heads; }

  // Row of input 0 of a slot's head in the tables.
  int64_t first_row(int64_t slot, int h) const { return (slot * model_.num_heads + h) * model_.length; }

  // Store key and value of input i of a slot, those of row b.
  void remember_head(const Layer& layer, int b, int h, int64_t slot, int i) {
    const int D = head_width();
    const float* key = qkv_.row(b) + model_.width + h * D;
    with_registers([&]<int C>() {
      const auto call = layer.keys.ranges ? remember<C, ByteTable> : remember<C, FloatTable>;
      call(layer.keys, layer.values, first_row(slot, h), i, D, layer.normalises_heads, key, key + model_.width);
    });
  }

  void attend_head(const Part& part, const Layer& layer, int b, int h, int64_t slot, int i) {
    const int D = head_width();
    with_registers([&]<int C>() {
      const auto call = layer.keys.ranges ? attend<C, ByteTable> : attend<C, FloatTable>;
      call(layer.keys, layer.values, layer.seen, first_row(slot, h), i, D, layer.normalises_heads, qkv_.row(b) + h * D,
           scores_.data() + part.member * most_scores_, inputs_.row(b) + h * D);
    });
  }

  // Call work<C>() for the number of registers of the fewest panels that hold a head.
  template <class Work>
  void with_registers(Work work) const {
    [&]<int... I>(std::integer_sequence<int, I...>) {
      const int panels = (head_width() + kPanel - 1) / kPanel;
      ((panels == I + 1 ? work.template operator()<(I + 1) * kParts>() : void()), ...);
    }(std::make_integer_sequence<int, kMostHeadWidth / kPanel>());
  }

  const Model model_;
  const int widest_;
  Buffer x_, branch_, qkv_, inner_, inputs_, logits_;
  std::vector<uint8_t> bytes_;
  std::vector<float> scales_, scores_;
  std::vector<SamplingScratch> sampling_scratch_;
  const int64_t most_scores_;
  std::map<int, Team> teams_;  // by size, so that trying several numbers of threads starts each once
};

}  // namespace
