// The blocks of a small network on a CPU in one call each: convolutions, residual blocks and transformers over fp32
// weights that were packed once, or over bf16 ones in pairs, in which products round their rows, too, and all else is
// fp32. In such a network the calls between Python, PyTorch and a library take longer than the arithmetic. The blocks
// read their weights where they lie, and images as channels-last data [images, height, width, channels]. `vector_bytes`
// 0 takes the widest instructions of this CPU, and how many threads share the images changes no result.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "products.h"

namespace datasetdm {

struct Norm {
    uintptr_t weight, bias;  // [channels]
    int64_t channels, groups;
    double eps;
};

// The norm of groups of `images`, with SiLU after it where asked, and that of rows.
void normalise(const Norm& norm, bool has_silu, const float* x, float* out, int64_t images, int64_t cells,
               int64_t threads, int64_t vector_bytes);
void normalise_rows(const Norm& norm, const float* x, float* out, int64_t rows, int64_t threads, int64_t vector_bytes);

// Images that are worked on at once: some of those of a call.
struct Part {
    int64_t of;  // all images of the call, on which the form of a convolution depends: not on how they are shared among
                 // threads
    int64_t count, height, width;
    int64_t threads, vector_bytes;

    int64_t cells() const { return height * width; }
    int64_t rows() const { return count * cells(); }
};

// Calls work(first, count, threads) on images that are worked on together: the threads share the images, or, where
// these are fewer, the work on each.
void share_images(int64_t images, int64_t cells, int64_t threads,
                  const std::function<void(int64_t, int64_t, int64_t)>& work);

// How many images of so many cells one thread works on together.
int64_t images_at_once(int64_t cells);

// A convolution with `taps` along each side as a product over the cells it reads, or by Winograd's minimal filtering.
struct Convolution {
    Product product;        // inner = taps * taps * channels, the taps' rows and columns outermost
    uintptr_t transformed;  // see winograd.h, or 0; of pairs where those of the product are
    int64_t channels, taps, stride, padding;

    Convolution(uintptr_t weight, uintptr_t bias, uintptr_t transformed, int64_t channels, int64_t outputs,
                int64_t taps, int64_t stride, int64_t padding, bool is_paired = false);

    // `images` of height x width cells, with `bias` and, where it is not 0, plus `residual`.
    void run(uintptr_t x, uintptr_t bias, uintptr_t residual, uintptr_t out, int64_t images, int64_t height,
             int64_t width, int64_t threads, int64_t vector_bytes) const;
    void on(const Part& part, const float* x, const float* bias, const float* residual, float* out) const;
    int64_t side(int64_t side) const { return (side + 2 * padding - taps) / stride + 1; }  // of the result
    bool is_minimal(const Part& part) const;
};

// Every cell doubled along both axes, then a convolution.
struct Upsample {
    Convolution convolution;

    explicit Upsample(const Convolution& convolution);

    // From `images` of height x width cells.
    void run(uintptr_t x, uintptr_t out, int64_t images, int64_t height, int64_t width, int64_t threads,
             int64_t vector_bytes) const;
    void on(const Part& part, const float* x, float* out) const;
};

struct Linear {
    Product product;

    Linear(uintptr_t weight, uintptr_t bias, int64_t inner, int64_t outputs, bool is_paired = false);
};

// Norm, SiLU and convolution, twice, plus the block's input or what a 1x1 convolution makes of it.
struct Resnet {
    Norm norm1, norm2;
    Convolution conv1, conv2;
    std::optional<Convolution> shortcut;

    Resnet(const Norm& norm1, const Convolution& conv1, const Norm& norm2, const Convolution& conv2,
           std::optional<Convolution> shortcut);

    // `bias` of the first convolution.
    void run(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t images, int64_t height, int64_t width, int64_t threads,
             int64_t vector_bytes) const;
    void on(const Part& part, const float* x, const float* bias, float* out) const;
};

// A transformer block before and after its attention over the text.
struct Transformer {
    Norm norm, norm1, norm2, norm3;
    Linear entry, self_qkv, self_out, text_q, text_out, wide, narrow, exit;
    int64_t heads;

    Transformer(const Norm& norm, const Norm& norm1, const Norm& norm2, const Norm& norm3, const Linear& entry,
                const Linear& self_qkv, const Linear& self_out, const Linear& text_q, const Linear& text_out,
                const Linear& wide, const Linear& narrow, const Linear& exit, int64_t heads);

    // From the image x [images, cells, channels]: `hidden` [images, cells, width] after self-attention, and the queries
    // of the text, `query`.
    void before(uintptr_t x, uintptr_t hidden, uintptr_t query, int64_t images, int64_t cells, int64_t threads,
                int64_t vector_bytes) const;
    void before(const Part& part, const float* x, float* hidden, float* query) const;

    // From what the text's attention gave, `attended`: the block's output, x included.
    void after(uintptr_t x, uintptr_t hidden, uintptr_t attended, uintptr_t out, int64_t images, int64_t cells,
               int64_t threads, int64_t vector_bytes) const;
    void after(const Part& part, const float* x, const float* hidden, const float* attended, float* out) const;
};

}  // namespace datasetdm
