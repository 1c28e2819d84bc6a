#include "blocks.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "check.h"
#include "depth_head.h"
#include "network_ops.h"
#include "sharing.h"
#include "winograd.h"

namespace datasetdm {
namespace {

constexpr int64_t kRowsAtOnce = 256;  // cells of one or several images: what lies between two layers stays in the second-level cache
constexpr int64_t kFewestTiles = 8;   // of 4x4 results; with fewer the transformed weight is read for too little
constexpr int64_t kTile = 4;
constexpr int64_t kMostWithin = 4;    // threads on one image; more would wait for each other longer than they work
constexpr int64_t kFp32 = 0;

float* at(uintptr_t pointer) { return reinterpret_cast<float*>(pointer); }
uintptr_t place(const float* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

float* scratch(int64_t count) {
    static thread_local KeptFloats kept;
    return kept.of(count);
}

float* cells_scratch(int64_t count) {
    static thread_local KeptFloats kept;
    return kept.of(count);
}

void normalise(const Norm& norm, bool has_silu, const float* x, float* out, int64_t images, int64_t cells, int64_t threads, int64_t vector_bytes) {
    group_norm_cpu(kFp32, place(x), norm.weight, norm.bias, place(out), images, cells, norm.channels, norm.groups, norm.eps, has_silu, threads, vector_bytes);
}

void normalise_rows(const Norm& norm, const float* x, float* out, int64_t rows, int64_t threads, int64_t vector_bytes) {
    layer_norm_cpu(kFp32, place(x), norm.weight, norm.bias, place(out), rows, norm.channels, norm.eps, threads, vector_bytes);
}

// Calls work(first, count, threads) on images that are worked on together: the threads share the images, or, where these are fewer, the work on each.
template <typename Work>
void share_images(int64_t images, int64_t cells, int64_t threads, const Work& work) {
    const int64_t step = std::max<int64_t>(kRowsAtOnce / cells, 1), most = std::min(threads, kMostWithin), within = images < most ? most : 1;
    share(images, within > 1 ? 1 : threads, [&](int64_t first, int64_t last) {
        for (int64_t image = first; image < last; image += step) work(image, std::min(step, last - image), within);
    });
}

void multiply(const Product& product, const float* x, int64_t rows, const float* residual, float* out, int64_t threads, int64_t vector_bytes) {
    share(rows, threads, [&](int64_t first, int64_t last) {
        const int64_t place = first * product.outputs;
        multiply(product, x + first * product.inner, last - first, residual ? residual + place : nullptr, out + place, vector_bytes);
    });
}

int64_t side_of(int64_t side, const Convolution& convolution) {
    return (side + 2 * convolution.padding - convolution.taps) / convolution.stride + 1;
}

// Whether all images of a call, however many threads share them, are convolved by minimal filtering.
bool is_minimal(const Convolution& convolution, int64_t images, int64_t height, int64_t width) {
    const int64_t tiles = images * ((height + kTile - 1) / kTile) * ((width + kTile - 1) / kTile);
    return convolution.transformed && std::min(height, width) >= kTile && tiles >= kFewestTiles;
}

// The cells that one result reads, taps outermost, zero beyond the border.
void gather(const Convolution& convolution, const float* x, int64_t images, int64_t height, int64_t width, float* rows) {
    const int64_t channels = convolution.channels, taps = convolution.taps;
    for (int64_t image = 0; image < images; ++image, x += height * width * channels)
        for (int64_t top = -convolution.padding; top + taps <= height + convolution.padding; top += convolution.stride)
            for (int64_t left = -convolution.padding; left + taps <= width + convolution.padding; left += convolution.stride)
                for (int64_t row = top; row < top + taps; ++row) {
                    const int64_t before = std::max<int64_t>(-left, 0), after = std::max<int64_t>(left + taps - width, 0);
                    const bool is_inside = row >= 0 && row < height;
                    const int64_t count = is_inside ? (taps - before - after) * channels : 0;
                    std::memset(rows, 0, (is_inside ? before : taps) * channels * sizeof(float));
                    if (is_inside) {
                        std::memcpy(rows + before * channels, x + (row * width + left + before) * channels, count * sizeof(float));
                        std::memset(rows + before * channels + count, 0, after * channels * sizeof(float));
                    }
                    rows += taps * channels;
                }
}

void convolve(const Convolution& convolution, bool is_minimal, const float* x, const float* bias, const float* residual, float* out, int64_t images,
              int64_t height, int64_t width, int64_t threads, int64_t vector_bytes) {
    if (is_minimal) {
        winograd_cpu(place(x), convolution.transformed, place(bias), place(residual), place(out), images, height, width, convolution.channels,
                     convolution.product.outputs, false, threads, vector_bytes);
        return;
    }
    Product product = convolution.product;
    product.bias = bias;
    const int64_t rows = images * side_of(height, convolution) * side_of(width, convolution);
    if (convolution.taps > 1) {
        float* cells = cells_scratch(rows * product.inner);
        gather(convolution, x, images, height, width, cells);
        x = cells;
    }
    multiply(product, x, rows, residual, out, threads, vector_bytes);
}

void require_images(const char* name, int64_t images, int64_t cells, int64_t threads, std::initializer_list<uintptr_t> pointers) {
    for (uintptr_t pointer : pointers) require(pointer, name, ": a pointer is null; pass data_ptr() of a CPU tensor");
    require(images > 0 && cells > 0, name, ": an empty tensor, ", images, " images of ", cells, " cells");
    require(threads > 0, name, ": threads is ", threads, ", expected at least 1");
}

void require_same(const char* name, int64_t found, int64_t expected) {
    require(found == expected, name, ": ", found, " channels, expected ", expected);
}

}  // namespace

Convolution::Convolution(uintptr_t weight, uintptr_t bias, uintptr_t transformed, int64_t channels, int64_t outputs, int64_t taps, int64_t stride,
                         int64_t padding)
    : product{at(weight), at(bias), taps * taps * channels, outputs}, transformed(transformed), channels(channels), taps(taps), stride(stride), padding(padding) {
    require(weight && bias, "convolution: a pointer is null; pass data_ptr() of a CPU tensor");
    require(channels > 0 && outputs > 0 && stride > 0, "convolution: ", channels, " channels to ", outputs, " with a stride of ", stride);
    require((taps == 1 && padding == 0 && stride == 1) || (taps == 3 && padding == 1), "convolution: ", taps, " taps with a padding of ", padding, " and a stride of ",
            stride, ", expected 1 with 0 and 1, or 3 with 1");
    require(!transformed || (taps == 3 && stride == 1), "convolution: minimal filtering is for 3 taps with a stride of 1");
}

void Convolution::run(uintptr_t x, uintptr_t bias, uintptr_t residual, uintptr_t out, int64_t images, int64_t height, int64_t width, int64_t threads,
                 int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("convolution", images, height * width, threads, {x, bias, out});
    const bool minimal = is_minimal(*this, images, height, width);
    const int64_t cells = height * width, results = side_of(height, *this) * side_of(width, *this), outputs = product.outputs;
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        convolve(*this, minimal, at(x) + first * cells * channels, at(bias), residual ? at(residual) + first * results * outputs : nullptr,
                 at(out) + first * results * outputs, count, height, width, within, vector_bytes);
    });
}

Linear::Linear(uintptr_t weight, uintptr_t bias, int64_t inner, int64_t outputs) : product{at(weight), at(bias), inner, outputs} {
    require(weight, "linear: a pointer is null; pass data_ptr() of a CPU tensor");
    require(inner > 0 && outputs > 0, "linear: an empty weight, ", inner, " channels to ", outputs);
}

Resnet::Resnet(const Norm& norm1, const Convolution& conv1, const Norm& norm2, const Convolution& conv2, std::optional<Convolution> shortcut)
    : norm1(norm1), norm2(norm2), conv1(conv1), conv2(conv2), shortcut(shortcut) {
    require_same("resnet: first convolution", conv1.channels, norm1.channels);
    require_same("resnet: second norm", norm2.channels, conv1.product.outputs);
    require_same("resnet: second convolution", conv2.channels, norm2.channels);
    require_same("resnet: shortcut", shortcut ? shortcut->channels : conv2.product.outputs, conv1.channels);
    require_same("resnet: shortcut's result", shortcut ? shortcut->product.outputs : conv1.channels, conv2.product.outputs);
}

void Resnet::run(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t images, int64_t height, int64_t width, int64_t threads,
                 int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("resnet", images, height * width, threads, {x, bias, out});
    const int64_t cells = height * width, channels = conv1.channels, outputs = conv2.product.outputs, inner = norm2.channels;
    const bool first_is_minimal = is_minimal(conv1, images, height, width), second_is_minimal = is_minimal(conv2, images, height, width);
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        const int64_t rows = count * cells;
        float *normed = scratch(rows * (std::max(channels, inner) + inner + outputs)), *hidden = normed + rows * std::max(channels, inner);
        float* beside = hidden + rows * inner;
        const float *own = at(x) + first * cells * channels, *residual = own;
        float* target = at(out) + first * cells * outputs;
        normalise(norm1, true, own, normed, count, cells, within, vector_bytes);
        convolve(conv1, first_is_minimal, normed, at(bias), nullptr, hidden, count, height, width, within, vector_bytes);
        normalise(norm2, true, hidden, normed, count, cells, within, vector_bytes);
        if (shortcut) {
            multiply(shortcut->product, own, rows, nullptr, beside, within, vector_bytes);
            residual = beside;
        }
        convolve(conv2, second_is_minimal, normed, conv2.product.bias, residual, target, count, height, width, within, vector_bytes);
    });
}

Transformer::Transformer(const Norm& norm, const Norm& norm1, const Norm& norm2, const Norm& norm3, const Linear& entry, const Linear& self_qkv,
                         const Linear& self_out, const Linear& text_q, const Linear& text_out, const Linear& wide, const Linear& narrow, const Linear& exit,
                         int64_t heads)
    : norm(norm), norm1(norm1), norm2(norm2), norm3(norm3), entry(entry), self_qkv(self_qkv), self_out(self_out), text_q(text_q), text_out(text_out),
      wide(wide), narrow(narrow), exit(exit), heads(heads) {
    const int64_t width = entry.product.outputs;
    require(heads > 0 && width % heads == 0, "transformer: ", width, " channels do not make ", heads, " heads");
    require_same("transformer: entry", entry.product.inner, norm.channels);
    for (const Norm* one : {&norm1, &norm2, &norm3}) require_same("transformer: norm", one->channels, width);
    for (const Linear* one : {&self_qkv, &self_out, &text_q, &text_out, &wide, &exit}) require_same("transformer: linear", one->product.inner, width);
    for (const Linear* one : {&self_out, &text_q, &text_out, &narrow}) require_same("transformer: linear's result", one->product.outputs, width);
    require_same("transformer: queries, keys and values", self_qkv.product.outputs, 3 * width);
    require_same("transformer: gated unit", wide.product.outputs, 2 * narrow.product.inner);
    require_same("transformer: exit", exit.product.outputs, norm.channels);
}

void Transformer::before(uintptr_t x, uintptr_t hidden, uintptr_t query, int64_t images, int64_t cells, int64_t threads,
                 int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("transformer", images, cells, threads, {x, hidden, query});
    const int64_t channels = norm.channels, width = entry.product.outputs, head = width / heads;
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        const int64_t rows = count * cells, widest_rows = rows * std::max(channels, width);
        float *normed = scratch(widest_rows + rows * 4 * width), *attended = normed + widest_rows, *packed = attended + rows * width;
        float *h = at(hidden) + first * cells * width, *q = at(query) + first * cells * width;
        normalise(norm, false, at(x) + first * cells * channels, normed, count, cells, within, vector_bytes);
        multiply(entry.product, normed, rows, nullptr, h, within, vector_bytes);
        normalise_rows(norm1, h, normed, rows, within, vector_bytes);
        multiply(self_qkv.product, normed, rows, nullptr, packed, within, vector_bytes);
        const std::vector<int64_t> strides{cells * 3 * width, head, 3 * width};
        attention_cpu(kFp32, place(packed), strides, place(packed + width), strides, place(packed + 2 * width), strides, place(attended),
                      {cells * width, head, width}, count, heads, cells, cells, head, 1 / std::sqrt(static_cast<double>(head)), within, vector_bytes);
        multiply(self_out.product, attended, rows, h, h, within, vector_bytes);
        normalise_rows(norm2, h, normed, rows, within, vector_bytes);
        multiply(text_q.product, normed, rows, nullptr, q, within, vector_bytes);
    });
}

void Transformer::after(uintptr_t x, uintptr_t hidden, uintptr_t attended, uintptr_t out, int64_t images, int64_t cells, int64_t threads,
                 int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("transformer", images, cells, threads, {x, hidden, attended, out});
    const int64_t channels = norm.channels, width = entry.product.outputs, inner = narrow.product.inner;
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        const int64_t rows = count * cells;
        float *h = scratch(rows * (2 * width + 3 * inner)), *normed = h + rows * width, *both = normed + rows * width, *gated = both + rows * 2 * inner;
        multiply(text_out.product, at(attended) + first * cells * width, rows, at(hidden) + first * cells * width, h, within, vector_bytes);
        normalise_rows(norm3, h, normed, rows, within, vector_bytes);
        multiply(wide.product, normed, rows, nullptr, both, within, vector_bytes);
        geglu_cpu(kFp32, place(both), place(gated), rows, inner, within, vector_bytes);
        multiply(narrow.product, gated, rows, h, h, within, vector_bytes);
        multiply(exit.product, h, rows, at(x) + first * cells * channels, at(out) + first * cells * channels, within, vector_bytes);
    });
}

}  // namespace datasetdm
