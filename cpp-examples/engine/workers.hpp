// workers.hpp: the engine's threads. run(f) calls f(worker, num_workers) on each and waits.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace engine {

class Workers {
 public:
  using Job = std::function<void(uint32_t worker, uint32_t num_workers)>;

  /// The calling thread is worker 0; `count` is at least 1.
  explicit Workers(uint32_t count) : count_(count) {
    for (uint32_t worker = 1; worker < count; ++worker)
      threads_.emplace_back([this, worker] { loop(worker); });
  }

  ~Workers() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    start_.notify_all();
    for (std::thread &thread : threads_) thread.join();
  }

  uint32_t count() const { return count_; }

  /// Rethrows the first exception of any worker, after all have finished.
  void run(const Job &job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      running_ = count_ - 1;
      ++round_;
      failure_ = nullptr;
    }
    start_.notify_all();
    work(job, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  void loop(uint32_t worker) {
    uint64_t seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      const Job &job = *job_;
      lock.unlock();
      work(job, worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void work(const Job &job, uint32_t worker) {
    try {
      job(worker, count_);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
  }

  const uint32_t count_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  const Job *job_ = nullptr;
  uint32_t running_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
  std::exception_ptr failure_;
};

}  // namespace engine
