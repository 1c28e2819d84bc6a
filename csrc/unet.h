// A whole UNet of such blocks in one call: every thread takes its images from the first layer to the last without
// waiting for the others.
#pragma once

#include <array>
#include <cstdint>
#include <variant>
#include <vector>

#include "blocks.h"

namespace datasetdm {

// A block in the order of the calls.
struct Step {
    std::variant<Convolution, Upsample, Resnet, Transformer> block;
    bool joins, keeps, parts;  // it reads its input beside the last output that was kept; its output is kept; the
                               // halves of the batch part in it
};

struct UNet {
    Convolution entry;  // its output is kept, too
    std::vector<Step> steps;
    Norm norm;
    Convolution exit;

    UNet(const Convolution& entry, const std::vector<Step>& steps, const Norm& norm, const Convolution& exit);

    // Channels, height and width of what the entry and every step give for latents of these sides.
    std::vector<std::array<int64_t, 3>> sizes(int64_t height, int64_t width) const;

    // `out` of twice as many images as `latents`, which stand for both halves until these part in the attention over
    // the text. `biases` are those of the first convolutions of all resnets end to end; `texts` has a transformer's
    // keys and values [2, 2 * images, heads, tokens, width of a head]. `outputs` is empty, or where the entry and every
    // step are to write what they give; 0 is nowhere. `queries` is empty, or where every transformer's queries over the
    // text go, [images it reads, cells, width].
    void run(uintptr_t latents, uintptr_t biases, const std::vector<uintptr_t>& texts, uintptr_t out,
             const std::vector<uintptr_t>& outputs, const std::vector<uintptr_t>& queries, int64_t images,
             int64_t height, int64_t width, int64_t tokens, int64_t threads, int64_t vector_bytes) const;
};

}  // namespace datasetdm
