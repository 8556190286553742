// A few threads that go through the same function together, and wait for one another inside it.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

// A step waits about a hundred times, for less than a microsecond each where all threads run: it spins then. Where
// another process has taken the processor of one of them, the others give theirs away.
class Team {
 public:
  ~Team() { dismiss(); }

  // Call work(member, size) once for each member, the caller being member 0; return when all have.
  void run(int size, const std::function<void(int, int)>& work) {
    if (size != size_) hire(size);
    if (size == 1) return work(0, 1);
    work_ = &work;
    running_.store(size, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    finish();
    await([&] { return running_.load(std::memory_order_acquire) == 0; });
  }

  // Go on when all members are here.
  void meet() {
    if (size_ == 1) return;
    const uint32_t meeting = meeting_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      meeting_.store(meeting + 1, std::memory_order_release);
    } else {
      await([&] { return meeting_.load(std::memory_order_acquire) != meeting; });
    }
  }

 private:
  static constexpr int kSpins = 2000;  // tens of microseconds

  template <class Condition>
  static void await(Condition holds) {
    for (int spins = 0; !holds(); ++spins) {
      if (spins < kSpins) {
        _mm_pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  void finish(int member = 0) {
    (*work_)(member, size_);
    running_.fetch_sub(1, std::memory_order_release);
  }

  void hire(int size) {
    dismiss();
    size_ = size;
    for (int member = 1; member < size; ++member) {
      threads_.emplace_back([this, member, seen = round_.load()]() mutable {
        for (;;) {
          for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) _mm_pause();
          round_.wait(seen, std::memory_order_acquire);  // sleeps where nothing has come meanwhile
          ++seen;
          if (is_over_) return;
          finish(member);
        }
      });
    }
  }

  void dismiss() {
    is_over_ = true;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    is_over_ = false;
  }

  int size_ = 1;
  bool is_over_ = false;
  const std::function<void(int, int)>* work_ = nullptr;
  std::vector<std::thread> threads_;
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> meeting_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> running_{0};
};
