// 3x3 convolutions of stride 1 by Winograd's minimal filtering F(4x4, 3x3): 36 products for 16 results in place of 144.
// The points 0, +-1/2 and +-3/2 keep its error at three times that of the direct sum; those of the usual +-1 and +-2
// would make it seven times.
#pragma once

#include <cstdint>

namespace datasetdm {

// out [images, height, width, outputs] of the channels-last image x [images, height, width, channels] with a border of
// zeros; with `is_doubled` x is [images, height / 2, width / 2, channels], every cell of it standing for four. `weight`
// is [36, P, channels, 16] of P panels of 16 outputs, the last of zeros where their number would be odd; `residual`, of
// the form of `out` or 0, is added. With a `storage` of 0 all are fp32. With 1 the images are bf16 and the weight of
// bf16 pairs, [24, P, channels / 2, 16, 2], to which the transformed cells are rounded, too, of F(4x2, 3x3), half the
// error of 4x4; with 2 the images are fp32, but not these. Bias and sums are fp32; `vector_bytes` 0 takes the widest
// instructions of this CPU. What one 4x4 tile becomes depends on nothing but the tile, so neither the batch nor
// `threads` change a bit.
void winograd_cpu(uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t residual, uintptr_t out, int64_t images,
                  int64_t height, int64_t width, int64_t channels, int64_t outputs, bool is_doubled, int64_t storage,
                  int64_t threads, int64_t vector_bytes);

// The same from the taps of a weight, [P, 9, channels, 16] or of pairs [P, 9, channels / 2, 16, 2] of as many panels,
// which are transformed where they are needed: a large weight would take four times its memory, and longer to write and
// to read. `memory` is of winograd_memory numbers.
void winograd_taps_cpu(uintptr_t x, uintptr_t taps, uintptr_t bias, uintptr_t residual, uintptr_t out, uintptr_t memory,
                       int64_t images, int64_t height, int64_t width, int64_t channels, int64_t outputs,
                       bool is_doubled, int64_t storage, int64_t threads, int64_t vector_bytes);
int64_t winograd_memory(int64_t images, int64_t height, int64_t width, int64_t channels, int64_t storage,
                        int64_t threads);

// The gradient of the transformed weight, [36, channels, outputs], from the image `x` and the gradient `out` of what
// became of it; the sums over tiles have one order, whatever `threads` is.
void winograd_gradient(uintptr_t x, uintptr_t out, uintptr_t weight, int64_t images, int64_t height, int64_t width,
                       int64_t channels, int64_t outputs, int64_t threads, int64_t vector_bytes);

// The `weight` above, from that of the plain convolution in channels-last order [outputs, 3, 3, channels]; the sums are
// those of fp64.
void winograd_weight(uintptr_t plain, uintptr_t weight, int64_t channels, int64_t outputs, int64_t threads,
                     int64_t vector_bytes);

}  // namespace datasetdm
