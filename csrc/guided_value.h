// One value of a guided step.
#pragma once

#include <cstdint>

#include "both_sides.h"

namespace datasetdm {

constexpr int64_t kFixedNumbers = 5;  // guidance, sample, both of the entry, weight of this call's entry

struct Stepped {
    float latent, entry;
};

// `history` of this value, its slots `stride` apart.
DATASETDM_BOTH inline Stepped guided_value(float without, float with_text, float latent, const float* history,
                                           int64_t slots, int64_t stride, const float* numbers) {
    const float entry = numbers[2] * latent + numbers[3] * (without + numbers[0] * (with_text - without));
    float next = numbers[1] * latent + numbers[4] * entry;
    for (int64_t slot = 0; slot < slots; ++slot) {
        const float weight = numbers[kFixedNumbers + slot];
        if (weight != 0) next += weight * history[slot * stride];
    }
    return {next, entry};
}

}  // namespace datasetdm
