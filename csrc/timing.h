// How long threads were at work, by kind: a profiler of PyTorch sees its own operations alone.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace datasetdm {

enum class Work { attention, convolution, norm, linear, layout, elementwise };

// Takes the time of the block it stands in, where times are taken; of those that stand in each other, the outermost
// counts.
class Timed {
public:
    explicit Timed(Work work);
    ~Timed();
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;

private:
    Work work_;
    bool is_counting_;
    std::chrono::steady_clock::time_point begin_;
};

// Seconds by kind of each thread that was at work since the last call; from now on times are taken, or no longer.
std::vector<std::map<std::string, double>> take_times(bool is_on);

}  // namespace datasetdm
