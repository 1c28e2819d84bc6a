// One pixel of each kind of packing.
#pragma once

#include <cstdint>

#include "both_sides.h"

namespace datasetdm {

struct Best {
    uint8_t label;
    float score;
};

// The largest of `classes` scores that lie `stride` apart, as torch.max decides: the first of equals, and a NaN above all.
DATASETDM_BOTH inline Best best_class(const float* scores, int64_t classes, int64_t stride) {
    Best best{0, scores[0]};
    for (int64_t k = 1; k < classes; ++k) {
        const float score = scores[k * stride];
        if (score > best.score || (score != score && best.score == best.score)) best = {static_cast<uint8_t>(k), score};
    }
    return best;
}

DATASETDM_BOTH inline uint8_t image_byte(float value) {
    const float shifted = value / 2 + 0.5f;
    if (!(shifted > 0)) return 0;
    return static_cast<uint8_t>((shifted < 1 ? shifted : 1.0f) * 255);
}

}  // namespace datasetdm
