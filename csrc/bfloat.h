// Numbers in bf16, and whether this CPU multiplies pairs of them.
#pragma once

#include <cstdint>

namespace datasetdm {

constexpr int64_t kFp32 = 0, kBf16 = 1,
                  kRounded = 2;  // storages: the last is fp32 that may be rounded to bf16 before it is multiplied

struct Bfloat {
    uint16_t bits;
};

#if defined(__x86_64__)
inline bool has_dots() {
    static const bool found = __builtin_cpu_supports("avx512bf16");
    return found;
}
#endif

}  // namespace datasetdm
