#include "sharing.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace datasetdm {
namespace {

constexpr std::chrono::microseconds kAwake{30};  // between two operations; being woken takes as long as a small operation

// Threads that wait for work; each has its own place, so that share i is always that of worker i.
class Workers {
public:
    Workers() : process_(getpid()) {}

    bool is_of_this_process() const { return process_ == getpid(); }

    // False where they are busy: nothing was done.
    bool run(int64_t shares, const std::function<void(int64_t)>& work) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        while (static_cast<int64_t>(started_) < shares - 1) {
            std::thread(&Workers::wait, this, ++started_, round_.load()).detach();
        }
        {
            std::lock_guard<std::mutex> lock(state_);
            work_ = &work;
            shares_ = shares;
            left_.store(started_, std::memory_order_relaxed);
            round_.fetch_add(1, std::memory_order_release);
        }
        begun_.notify_all();
        work(0);
        if (!awaited([&] { return left_.load(std::memory_order_acquire) == 0; })) {
            std::unique_lock<std::mutex> lock(state_);
            done_.wait(lock, [&] { return left_.load(std::memory_order_acquire) == 0; });
        }
        return true;
    }

private:
    template <typename Condition>
    static bool awaited(const Condition& condition) {
        const auto end = std::chrono::steady_clock::now() + kAwake;
        do {
            for (int i = 0; i < 64; ++i) {
                if (condition()) return true;
#if defined(__x86_64__)
                __builtin_ia32_pause();
#endif
            }
        } while (std::chrono::steady_clock::now() < end);
        return false;
    }

    void wait(int64_t place, int64_t seen) {
        for (;; ++seen) {
            const auto has_begun = [&] { return round_.load(std::memory_order_acquire) != seen; };
            if (!awaited(has_begun)) {
                std::unique_lock<std::mutex> lock(state_);
                begun_.wait(lock, has_begun);
            }
            if (place < shares_) (*work_)(place);
            if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(state_);
                done_.notify_one();
            }
        }
    }

    const pid_t process_;
    std::mutex turn_, state_;
    std::condition_variable begun_, done_;
    std::atomic<int64_t> round_{0}, left_{0};
    const std::function<void(int64_t)>* work_ = nullptr;
    int64_t shares_ = 0, started_ = 0;
};

// Never taken down, as its threads may still wait when the process ends; a child of a fork has none of its parent's threads.
Workers& workers() {
    static std::mutex guard;
    static Workers* found = nullptr;
    std::lock_guard<std::mutex> lock(guard);
    if (!found || !found->is_of_this_process()) found = new Workers;
    return *found;
}

}  // namespace

void share(int64_t count, int64_t threads, const std::function<void(int64_t, int64_t)>& work) {
    const int64_t shares = std::min(threads, count);
    if (shares <= 1) return work(0, count);
    const auto one = [&](int64_t i) { work(count * i / shares, count * (i + 1) / shares); };
    if (workers().run(shares, one)) return;
    std::vector<std::thread> others;
    for (int64_t i = 1; i < shares; ++i) others.emplace_back(one, i);
    one(0);
    for (std::thread& other : others) other.join();
}

}  // namespace datasetdm
