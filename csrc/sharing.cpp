#include "sharing.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace datasetdm {
namespace {

constexpr std::chrono::microseconds kAwake{
    30};  // between two operations; being woken takes as long as a small operation

// A thread for this work, or none where the system has no more.
template <typename... Work>
std::thread started(const Work&... work) {
    try {
        return std::thread(work...);
    } catch (const std::system_error&) {
        return {};
    }
}

// Threads that wait for work; each has its own place, so that share i is always that of worker i.
class Workers {
public:
    Workers() : process_(getpid()) {}

    bool is_of_this_process() const { return process_ == getpid(); }

    // False where they are busy: nothing was done. `work` throws nothing.
    bool run(int64_t shares, const std::function<void(int64_t)>& work) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        while (started_ < shares - 1) {
            std::thread next = started(&Workers::wait, this, started_ + 1, round_.load());
            if (!next.joinable()) break;
            next.detach();
            ++started_;
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
        for (int64_t place = started_ + 1; place < shares; ++place) work(place);
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

// Never taken down, as its threads may still wait when the process ends; a child of a fork has none of its parent's
// threads, and a lock that one of them held would stay locked.
Workers& workers() {
    static std::atomic<Workers*> kept{nullptr};
    Workers* found = kept.load(std::memory_order_acquire);
    if (found && found->is_of_this_process()) return *found;
    auto own = std::make_unique<Workers>();
    return kept.compare_exchange_strong(found, own.get()) ? *own.release() : *found;
}

}  // namespace

void share(int64_t count, int64_t threads, const std::function<void(int64_t, int64_t)>& work) {
    const int64_t shares = std::min(threads, count);
    if (shares <= 1) return work(0, count);
    std::atomic_flag has_failed = ATOMIC_FLAG_INIT;
    std::exception_ptr failure;
    const auto one = [&](int64_t i) {
        try {
            work(count * i / shares, count * (i + 1) / shares);
        } catch (...) {  // beyond a thread's first function it would end the process
            if (!has_failed.test_and_set()) failure = std::current_exception();
        }
    };
    if (!workers().run(shares, one)) {
        std::vector<std::thread> others(shares);
        for (int64_t i = 1; i < shares; ++i) others[i] = started(one, i);
        one(0);
        for (int64_t i = 1; i < shares; ++i) others[i].joinable() ? others[i].join() : one(i);
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace datasetdm
