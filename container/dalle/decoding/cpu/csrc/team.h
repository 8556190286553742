// A few threads that run the same function together, and wait for one another inside it.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

// A step waits about a hundred times, for less than a microsecond each where all threads run: they spin. Where another
// process occupies the processor of one thread, the others yield theirs. Between two calls they sleep.
class Team {
 public:
  // size: number of threads with the calling one, which is member 0.
  explicit Team(int size) : size_(size) {
    try {
      for (int member = 1; member < size; ++member) threads_.emplace_back([this, member] { serve(member); });
    } catch (...) {
      dismiss();
      throw;
    }
  }

  ~Team() { dismiss(); }

  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Call work(member) once in each thread; return when all are done.
  void run(const std::function<void(int)>& work) {
    if (size_ == 1) return work(0);
    work_ = &work;
    running_.store(size_ - 1, std::memory_order_relaxed);
    begin_round();
    work(0);
    await([&] { return running_.load(std::memory_order_acquire) == 0; });
  }

  // Barrier: return when all threads have called it.
  void wait_for_all() {
    if (size_ == 1) return;
    const uint32_t barrier = barrier_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      barrier_.store(barrier + 1, std::memory_order_release);
    } else {
      await([&] { return barrier_.load(std::memory_order_acquire) != barrier; });
    }
  }

 private:
  static constexpr int kSpins = 2000;  // 10 to 100 microseconds

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

  void dismiss() {
    is_over_ = true;
    begin_round();
    for (auto& thread : threads_) thread.join();
  }

  void begin_round() {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }

  void serve(int member) {
    for (uint32_t seen = 0;; ++seen) {
      for (int spins = 0; spins < kSpins && round_.load(std::memory_order_acquire) == seen; ++spins) _mm_pause();
      round_.wait(seen, std::memory_order_acquire);
      if (is_over_) return;
      (*work_)(member);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  const int size_;
  bool is_over_ = false;
  const std::function<void(int)>* work_ = nullptr;
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<uint32_t> barrier_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> running_{0};
  std::vector<std::thread> threads_;
};
