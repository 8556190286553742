// Several positions of a candidate in one step, and several steps in one call: `dalle.decoding.windows` in compiled code.
//
// Letters: S slots, K widest window, N positions, M codes per position, W width, B rows, R of them with caption.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "step.h"

namespace {

// Tensors of the engine by slot, as `dalle.decoding.step.SlotState` describes them.
struct State {
  float* hidden;               // [S, K, W]
  int64_t* tokens;             // [S, N, M]
  const uint64_t* noise_keys;  // [S, N, M]
  float* log_likelihood;       // [S]
  int64_t widest, num_positions;
};

// A candidate whose window is sampled next; the hidden states that predict it are known.
struct Candidate {
  Sampling sampling;
  int64_t slot, blank_slot;  // with the caption and without it; the latter negative where there is no guidance
  int64_t position;          // positions that are primed or sampled
  int64_t window;            // positions that the next step samples
  int64_t guessed;           // positions that hold a token: known ones, then guesses
  int64_t leader;            // its request's place among the leaders
};

// The candidate of a request that has most positions, or was the first to have all.
struct Leader {
  const int64_t* tokens;  // [N, M]; null: none has any
  int64_t position, guessed;
  int64_t candidate;  // its place among the candidates; negative where it is none of them
};

// What the steps of a call have found.
struct Counts {
  int64_t* compared;  // [K + 1] windows by the number of their guesses that were compared
  int64_t* right;     // [K + 1] and by the number of those that were right
  int64_t steps;
};

// Rows of a step: those of the candidates' windows, then those without caption in the same order.
struct WindowRows {
  std::vector<int64_t> slots, positions, codes;  // [B], [B], [B, M]
  std::vector<float*> hidden;                    // [B], of W each
  std::vector<int32_t> sampled_as;               // [B] row with caption
  std::vector<int64_t> places;                   // [B], slot with caption and position as one index: slot · N + position
  std::vector<Sampling> sampling;                // [R]

  int size() const { return static_cast<int>(slots.size()); }
  int number_sampled() const { return static_cast<int>(sampling.size()); }

  void fill(const State& state, int64_t width, const Candidate* candidates, int number) {
    slots.clear(), positions.clear(), hidden.clear(), sampled_as.clear(), places.clear(), sampling.clear();
    const auto add = [&](const Candidate& candidate, int64_t slot, int64_t i, int row) {
      slots.push_back(slot);
      positions.push_back(candidate.position + i);
      hidden.push_back(state.hidden + (slot * state.widest + i) * width);
      sampled_as.push_back(row);
      places.push_back(candidate.slot * state.num_positions + candidate.position + i);
    };
    for (const Candidate* each = candidates; each != candidates + number; ++each) {
      for (int64_t i = 0; i < each->window; ++i) {
        add(*each, each->slot, i, size());
        sampling.push_back(each->sampling);
      }
    }
    int row = 0;
    for (const Candidate* each = candidates; each != candidates + number; ++each) {
      for (int64_t i = 0; i < each->window; ++i, ++row) {
        if (each->blank_slot < 0) continue;
        sampling[row].blank_row = size();
        add(*each, each->blank_slot, i, row);
      }
    }
  }
};

// Keep what a window has sampled [window, M], and move past its exact positions: the first one, and each further one as
// long as the guess before it is what was sampled.
void accept(const State& state, int M, Candidate& candidate, const int64_t* sampled, const float* log_p,
                   Counts& counts) {
  const int64_t place = candidate.slot * state.num_positions + candidate.position, window = candidate.window;
  int64_t* tokens = state.tokens + place * M;
  int64_t exact = 1;
  while (exact < window && std::equal(sampled + (exact - 1) * M, sampled + exact * M, tokens + (exact - 1) * M)) ++exact;
  std::copy_n(sampled, window * M, tokens);
  // One after the other, as without windows.
  for (int64_t i = 0; i < exact; ++i) state.log_likelihood[candidate.slot] += log_p[i];
  candidate.guessed = std::max(candidate.guessed, candidate.position + window);
  candidate.position += exact;
  ++counts.compared[std::min(exact, window - 1)];
  ++counts.right[exact - 1];
}

// Guess the tokens that the window needs and has none of: those of the request's leader where it has them, else those of
// the position before.
void guess(const State& state, int M, Candidate& candidate, int place, const Leader& leader,
                  const Candidate* candidates) {
  const int64_t first = candidate.guessed, end = candidate.position + candidate.window - 1;
  if (first >= end) return;
  int64_t* tokens = state.tokens + candidate.slot * state.num_positions * M;
  const int64_t known = leader.candidate < 0 ? leader.guessed : candidates[leader.candidate].guessed;
  if (leader.tokens != nullptr && leader.candidate != place && known >= end) {
    std::copy(leader.tokens + first * M, leader.tokens + end * M, tokens + first * M);
  } else {
    for (int64_t i = first * M; i < end * M; ++i) tokens[i] = tokens[i - M];
  }
  candidate.guessed = end;
}

// The steps of an engine's candidates.
class WindowLoop {
 public:
  explicit WindowLoop(Step& step) : step_(step), M_(step.model().num_codebooks) {}

  // Sample the candidates' windows, and run the model on the next ones of at most `widest` positions: once, and again
  // until a candidate has all positions or so many nanoseconds have passed.
  void decode(int threads, const State& state, Candidate* candidates, int number, Leader* leaders, int64_t widest,
              int64_t nanoseconds, Counts& counts) {
    using Clock = std::chrono::steady_clock;
    const auto ends = Clock::now() + std::chrono::nanoseconds(nanoseconds);
    bool has_finished = false;
    do {
      sample(threads, state, candidates, number);
      ++counts.steps;
      int64_t row = 0;
      for (int c = 0; c < number; ++c) {
        Candidate& each = candidates[c];
        const int64_t window = each.window;
        accept(state, M_, each, codes_.data() + row * M_, log_p_.data() + row, counts);
        row += window;
        lead(state, each, c, candidates, leaders[each.leader]);
        each.window = std::min(widest, state.num_positions - each.position);
        has_finished |= each.window == 0;
      }
      for (int c = 0; c < number; ++c) guess(state, M_, candidates[c], c, leaders[candidates[c].leader], candidates);
      run(threads, state, candidates, number);
    } while (!has_finished && Clock::now() < ends);
  }

 private:
  // Sample every position of the windows into codes_ and log_p_.
  void sample(int threads, const State& state, const Candidate* candidates, int number) {
    rows_.fill(state, step_.model().width, candidates, number);
    const int sampled = rows_.number_sampled();
    codes_.assign(sampled * M_, 0);
    log_p_.assign(sampled, 0);
    step_.sample(
        threads, rows_.size(), [&](int b) { return rows_.hidden[b]; }, sampled, rows_.sampled_as.data(),
        rows_.sampling.data(), [&](int c) { return state.noise_keys + rows_.places[c] * M_; }, codes_.data(),
        log_p_.data());
  }

  // Run the model on the position before each of the windows'.
  void run(int threads, const State& state, const Candidate* candidates, int number) {
    rows_.fill(state, step_.model().width, candidates, number);
    if (!rows_.size()) return;
    codes_.resize(rows_.size() * M_);
    for (int b = 0; b < rows_.size(); ++b) {
      std::copy_n(state.tokens + (rows_.places[b] - 1) * M_, M_, codes_.data() + b * M_);
      --rows_.positions[b];
    }
    step_.run(threads, rows_.size(), rows_.slots.data(), codes_.data(), rows_.positions.data(),
              [&](int b) { return rows_.hidden[b]; });
  }

  // Make a candidate its request's leader where it has most positions.
  void lead(const State& state, const Candidate& candidate, int place, const Candidate* candidates,
            Leader& leader) const {
    const int64_t most = leader.candidate < 0 ? leader.position : candidates[leader.candidate].position;
    if (leader.tokens != nullptr && candidate.position <= most) return;
    leader = {state.tokens + candidate.slot * state.num_positions * M_, 0, 0, place};
  }

  Step& step_;
  const int M_;
  WindowRows rows_;
  std::vector<int64_t> codes_;
  std::vector<float> log_p_;
};

}  // namespace
