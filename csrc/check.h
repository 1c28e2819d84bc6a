// The one place where bad input from Python is refused: std::invalid_argument becomes ValueError.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace datasetdm {

template <typename... Parts>
void require(bool holds, const Parts&... parts) {
    if (holds) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

// 16384 x 16384: run lengths fit 32 bits, and a file that lies about its size cannot ask for more than 256 MiB.
constexpr int64_t kMaxPixels = int64_t{1} << 28;

inline void require_size(const char* name, int64_t height, int64_t width) {
    require(height > 0 && width > 0 && height <= kMaxPixels / width, name, ": size is [", height, ", ", width,
            "], both sides must be at least 1 and their product at most ", kMaxPixels);
}

}  // namespace datasetdm
