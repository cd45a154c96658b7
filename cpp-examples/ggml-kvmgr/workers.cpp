#include "workers.hpp"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {
class Pool {
  public:
    explicit Pool(unsigned count) {
        for (unsigned i = 1; i < count; ++i) threads.emplace_back([this, i] { loop(i); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            stopping = true;
            generation.fetch_add(1);
        }
        wake.notify_all();
        for (auto &thread : threads) thread.join();
    }
    void run(const Work &next) {
        const unsigned count = unsigned(threads.size()) + 1;
        {
            std::lock_guard<std::mutex> lock(mutex);
            work = &next;
            pending.store(count - 1);
            generation.fetch_add(1);
        }
        if (count > 1) wake.notify_all();
        next(0, count);
        while (pending.load(std::memory_order_acquire)) std::this_thread::yield();
    }
    unsigned size() const { return unsigned(threads.size()) + 1; }

  private:
    void loop(unsigned index) {
        unsigned seen = 0;
        for (;;) {
            // The next layer follows soon: look for it a while before sleeping.
            for (int i = 0; i < 2000 && generation.load() == seen; ++i) std::this_thread::yield();
            if (generation.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return generation.load() != seen; });
            }
            seen = generation.load();
            if (stopping) return;
            (*work)(index, size());
            pending.fetch_sub(1, std::memory_order_release);
        }
    }
    std::vector<std::thread> threads;
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<unsigned> generation{0}, pending{0};
    std::atomic<bool> stopping{false};
    const Work *work = nullptr;
};

// One pool for all contexts of the process; contexts take turns.
std::mutex turn;
unsigned wanted = std::thread::hardware_concurrency();
// Never destroyed: a host may end while threads of another library still run.
Pool *pool = nullptr;
}  // namespace

void set_workers(unsigned count) {
    std::lock_guard<std::mutex> lock(turn);
    wanted = count ? count : 1;
}

void run_workers(const Work &work) {
    std::lock_guard<std::mutex> lock(turn);
    if (!pool || pool->size() != (wanted ? wanted : 1)) {
        delete pool;
        pool = new Pool(wanted ? wanted : 1);
    }
    pool->run(work);
}
