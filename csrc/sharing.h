// Work shared by the threads of this process.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace datasetdm {

// Calls work(first, last) on shares of 0 .. count, one for each thread. The threads are kept from call to call; where
// they are busy for another caller, new ones are started, and what the system has no thread for is worked on by the
// caller. What one of them throws is thrown once all have ended.
void share(int64_t count, int64_t threads, const std::function<void(int64_t, int64_t)>& work);

// Memory of one thread that grows and is kept: fresh pages cost more than the work on them.
class KeptFloats {
public:
    // `count` numbers, valid until the next call.
    float* of(int64_t count) {
        if (count > size_) {
            memory_.reset();
            size_ = 0;  // there may be no memory for them
            memory_.reset(new float[count]());
            size_ = count;
        }
        return memory_.get();
    }

private:
    std::unique_ptr<float[]> memory_;
    int64_t size_ = 0;
};

}  // namespace datasetdm
