// Convolutions in bf16 on CPUs that multiply tiles (AMX), with fp32 sums.
#pragma once

#include <cstdint>

namespace datasetdm {

// out = x * weight + bias + residual, of channels-last images; `bias` is fp32, `residual` has the form of `out` or is
// null. `side` is that of the taps: 3, with padding 1, or 2: every cell doubled along both axes, then a 3x3
// convolution, by four 2x2 ones, one a place. Channels and outputs are multiples of 32. The weight is
// [places, outputs / 32, channels / 32, taps, 2, 16 pairs of channels, 16 outputs, 2].
void tiled_convolution_cpu(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out,
                           int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                           int64_t side, int64_t threads);

}  // namespace datasetdm
