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
#include "timing.h"
#include "winograd.h"

namespace datasetdm {
namespace {

constexpr int64_t kRowsAtOnce =
    256;  // cells of one or several images: what lies between two layers stays in the second-level cache
constexpr int64_t kFewestTiles = 8;  // of 4x4 results; with fewer the transformed weight is read for too little
constexpr int64_t kTile = 4;
constexpr int64_t kMostWithin = 4;  // threads on one image; more would wait for each other longer than they work

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

// The cells that one result reads, taps outermost, zero beyond the border.
void gather(const Convolution& convolution, const float* x, int64_t images, int64_t height, int64_t width,
            float* rows) {
    const int64_t channels = convolution.channels, taps = convolution.taps;
    for (int64_t image = 0; image < images; ++image, x += height * width * channels)
        for (int64_t top = -convolution.padding; top + taps <= height + convolution.padding; top += convolution.stride)
            for (int64_t left = -convolution.padding; left + taps <= width + convolution.padding;
                 left += convolution.stride)
                for (int64_t row = top; row < top + taps; ++row) {
                    const int64_t before = std::max<int64_t>(-left, 0),
                                  after = std::max<int64_t>(left + taps - width, 0);
                    const bool is_inside = row >= 0 && row < height;
                    const int64_t count = is_inside ? (taps - before - after) * channels : 0;
                    std::memset(rows, 0, (is_inside ? before : taps) * channels * sizeof(float));
                    if (is_inside) {
                        std::memcpy(rows + before * channels, x + (row * width + left + before) * channels,
                                    count * sizeof(float));
                        std::memset(rows + before * channels + count, 0, after * channels * sizeof(float));
                    }
                    rows += taps * channels;
                }
}

void require_images(const char* name, int64_t images, int64_t cells, int64_t threads,
                    std::initializer_list<uintptr_t> pointers) {
    for (uintptr_t pointer : pointers) require(pointer, name, ": a pointer is null; pass data_ptr() of a CPU tensor");
    require(images > 0 && cells > 0, name, ": an empty tensor, ", images, " images of ", cells, " cells");
    require(threads > 0, name, ": threads is ", threads, ", expected at least 1");
}

void require_same(const char* name, int64_t found, int64_t expected) {
    require(found == expected, name, ": ", found, " channels, expected ", expected);
}

}  // namespace

void normalise(const Norm& norm, bool has_silu, const float* x, float* out, int64_t images, int64_t cells,
               int64_t threads, int64_t vector_bytes) {
    group_norm_cpu(kFp32, place(x), norm.weight, norm.bias, place(out), images, cells, norm.channels, norm.groups,
                   norm.eps, has_silu, threads, vector_bytes);
}

void normalise_rows(const Norm& norm, const float* x, float* out, int64_t rows, int64_t threads, int64_t vector_bytes) {
    layer_norm_cpu(kFp32, place(x), norm.weight, norm.bias, place(out), rows, norm.channels, norm.eps, threads,
                   vector_bytes);
}

int64_t images_at_once(int64_t cells) { return std::max<int64_t>(kRowsAtOnce / cells, 1); }

void share_images(int64_t images, int64_t cells, int64_t threads,
                  const std::function<void(int64_t, int64_t, int64_t)>& work) {
    const int64_t step = images_at_once(cells), most = std::min(threads, kMostWithin),
                  within = images < most ? most : 1;
    share(images, within > 1 ? 1 : threads, [&](int64_t first, int64_t last) {
        for (int64_t image = first; image < last; image += step) work(image, std::min(step, last - image), within);
    });
}

Convolution::Convolution(uintptr_t weight, uintptr_t bias, uintptr_t transformed, int64_t channels, int64_t outputs,
                         int64_t taps, int64_t stride, int64_t padding, bool is_paired)
    : product{at(weight), at(bias), taps * taps * channels, outputs, is_paired},
      transformed(transformed),
      channels(channels),
      taps(taps),
      stride(stride),
      padding(padding) {
    require(weight && bias, "convolution: a pointer is null; pass data_ptr() of a CPU tensor");
    require(channels > 0 && outputs > 0 && stride > 0, "convolution: ", channels, " channels to ", outputs,
            " with a stride of ", stride);
    require((taps == 1 && padding == 0 && stride == 1) || (taps == 3 && padding == 1), "convolution: ", taps,
            " taps with a padding of ", padding, " and a stride of ", stride, ", expected 1 with 0 and 1, or 3 with 1");
    require(!transformed || (taps == 3 && stride == 1),
            "convolution: minimal filtering is for 3 taps with a stride of 1");
}

bool Convolution::is_minimal(const Part& part) const {
    const int64_t tiles = part.of * ((part.height + kTile - 1) / kTile) * ((part.width + kTile - 1) / kTile);
    return transformed && std::min(part.height, part.width) >= kTile && tiles >= kFewestTiles;
}

void Convolution::on(const Part& part, const float* x, const float* bias, const float* residual, float* out) const {
    const Timed timed(Work::convolution);
    if (is_minimal(part)) {
        winograd_cpu(place(x), transformed, place(bias), place(residual), place(out), part.count, part.height,
                     part.width, channels, product.outputs, false, product.storage(), part.threads, part.vector_bytes);
        return;
    }
    Product with_bias = product;
    with_bias.bias = bias;
    const int64_t rows = part.count * side(part.height) * side(part.width);
    if (taps > 1) {
        float* cells = cells_scratch(rows * product.inner);
        gather(*this, x, part.count, part.height, part.width, cells);
        x = cells;
    }
    multiply_shared(with_bias, x, rows, residual, out, part.threads, part.vector_bytes);
}

void Convolution::run(uintptr_t x, uintptr_t bias, uintptr_t residual, uintptr_t out, int64_t images, int64_t height,
                      int64_t width, int64_t threads, int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("convolution", images, height * width, threads, {x, bias, out});
    const int64_t cells = height * width, results = side(height) * side(width) * product.outputs;
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        on({images, count, height, width, within, vector_bytes}, at(x) + first * cells * channels, at(bias),
           residual ? at(residual) + first * results : nullptr, at(out) + first * results);
    });
}

Upsample::Upsample(const Convolution& convolution) : convolution(convolution) {
    require(convolution.taps == 3 && convolution.stride == 1,
            "upsample: expected a convolution with 3 taps and a stride of 1");
}

void Upsample::on(const Part& part, const float* x, float* out) const {
    const Timed timed(Work::convolution);
    const int64_t channels = convolution.channels;
    const Part doubled{part.of, part.count, 2 * part.height, 2 * part.width, part.threads, part.vector_bytes};
    if (convolution.is_minimal(doubled)) {
        winograd_cpu(place(x), convolution.transformed, place(convolution.product.bias), 0, place(out), part.count,
                     doubled.height, doubled.width, channels, convolution.product.outputs, true,
                     convolution.product.storage(), part.threads, part.vector_bytes);
        return;
    }
    float* wide = scratch(doubled.rows() * channels);
    for (int64_t row = 0; row < part.count * doubled.height; ++row)
        for (int64_t column = 0; column < doubled.width; ++column)
            std::memcpy(wide + (row * doubled.width + column) * channels,
                        x + (row / 2 * part.width + column / 2) * channels, channels * sizeof(float));
    convolution.on(doubled, wide, convolution.product.bias, nullptr, out);
}

void Upsample::run(uintptr_t x, uintptr_t out, int64_t images, int64_t height, int64_t width, int64_t threads,
                   int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("upsample", images, height * width, threads, {x, out});
    const int64_t cells = height * width;
    share_images(images, 4 * cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        on({images, count, height, width, within, vector_bytes}, at(x) + first * cells * convolution.channels,
           at(out) + first * 4 * cells * convolution.product.outputs);
    });
}

Linear::Linear(uintptr_t weight, uintptr_t bias, int64_t inner, int64_t outputs, bool is_paired)
    : product{at(weight), at(bias), inner, outputs, is_paired} {
    require(weight, "linear: a pointer is null; pass data_ptr() of a CPU tensor");
    require(inner > 0 && outputs > 0, "linear: an empty weight, ", inner, " channels to ", outputs);
}

Resnet::Resnet(const Norm& norm1, const Convolution& conv1, const Norm& norm2, const Convolution& conv2,
               std::optional<Convolution> shortcut)
    : norm1(norm1), norm2(norm2), conv1(conv1), conv2(conv2), shortcut(shortcut) {
    require_same("resnet: first convolution", conv1.channels, norm1.channels);
    require_same("resnet: second norm", norm2.channels, conv1.product.outputs);
    require_same("resnet: second convolution", conv2.channels, norm2.channels);
    require_same("resnet: shortcut", shortcut ? shortcut->channels : conv2.product.outputs, conv1.channels);
    require_same("resnet: shortcut's result", shortcut ? shortcut->product.outputs : conv1.channels,
                 conv2.product.outputs);
}

void Resnet::on(const Part& part, const float* x, const float* bias, float* out) const {
    const int64_t rows = part.rows(), cells = part.cells(), channels = conv1.channels, outputs = conv2.product.outputs,
                  inner = norm2.channels;
    float *normed = scratch(rows * (std::max(channels, inner) + inner + outputs)),
          *hidden = normed + rows * std::max(channels, inner);
    float* beside = hidden + rows * inner;
    normalise(norm1, true, x, normed, part.count, cells, part.threads, part.vector_bytes);
    conv1.on(part, normed, bias, nullptr, hidden);
    normalise(norm2, true, hidden, normed, part.count, cells, part.threads, part.vector_bytes);
    if (shortcut) multiply_shared(shortcut->product, x, rows, nullptr, beside, part.threads, part.vector_bytes);
    conv2.on(part, normed, conv2.product.bias, shortcut ? beside : x, out);
}

void Resnet::run(uintptr_t x, uintptr_t bias, uintptr_t out, int64_t images, int64_t height, int64_t width,
                 int64_t threads, int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("resnet", images, height * width, threads, {x, bias, out});
    const int64_t cells = height * width;
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        on({images, count, height, width, within, vector_bytes}, at(x) + first * cells * conv1.channels, at(bias),
           at(out) + first * cells * conv2.product.outputs);
    });
}

Transformer::Transformer(const Norm& norm, const Norm& norm1, const Norm& norm2, const Norm& norm3, const Linear& entry,
                         const Linear& self_qkv, const Linear& self_out, const Linear& text_q, const Linear& text_out,
                         const Linear& wide, const Linear& narrow, const Linear& exit, int64_t heads)
    : norm(norm),
      norm1(norm1),
      norm2(norm2),
      norm3(norm3),
      entry(entry),
      self_qkv(self_qkv),
      self_out(self_out),
      text_q(text_q),
      text_out(text_out),
      wide(wide),
      narrow(narrow),
      exit(exit),
      heads(heads) {
    const int64_t width = entry.product.outputs;
    require(heads > 0 && width % heads == 0, "transformer: ", width, " channels do not make ", heads, " heads");
    require_same("transformer: entry", entry.product.inner, norm.channels);
    for (const Norm* one : {&norm1, &norm2, &norm3}) require_same("transformer: norm", one->channels, width);
    for (const Linear* one : {&self_qkv, &self_out, &text_q, &text_out, &wide, &exit})
        require_same("transformer: linear", one->product.inner, width);
    for (const Linear* one : {&self_out, &text_q, &text_out, &narrow})
        require_same("transformer: linear's result", one->product.outputs, width);
    require_same("transformer: queries, keys and values", self_qkv.product.outputs, 3 * width);
    require_same("transformer: gated unit", wide.product.outputs, 2 * narrow.product.inner);
    require_same("transformer: exit", exit.product.outputs, norm.channels);
}

void Transformer::before(const Part& part, const float* x, float* hidden, float* query) const {
    const int64_t rows = part.rows(), cells = part.cells(), width = entry.product.outputs, head = width / heads,
                  widest_rows = rows * std::max(norm.channels, width);
    const int64_t threads = part.threads, vector_bytes = part.vector_bytes;
    float *normed = scratch(widest_rows + rows * 4 * width), *attended = normed + widest_rows,
          *packed = attended + rows * width;
    normalise(norm, false, x, normed, part.count, cells, threads, vector_bytes);
    multiply_shared(entry.product, normed, rows, nullptr, hidden, threads, vector_bytes);
    normalise_rows(norm1, hidden, normed, rows, threads, vector_bytes);
    multiply_shared(self_qkv.product, normed, rows, nullptr, packed, threads, vector_bytes);
    const std::vector<int64_t> strides{cells * 3 * width, head, 3 * width};
    attention_cpu(entry.product.storage(), place(packed), strides, place(packed + width), strides,
                  place(packed + 2 * width), strides, place(attended), {cells * width, head, width}, part.count, heads,
                  cells, cells, head, 1 / std::sqrt(static_cast<double>(head)), threads, vector_bytes);
    multiply_shared(self_out.product, attended, rows, hidden, hidden, threads, vector_bytes);
    normalise_rows(norm2, hidden, normed, rows, threads, vector_bytes);
    multiply_shared(text_q.product, normed, rows, nullptr, query, threads, vector_bytes);
}

void Transformer::after(const Part& part, const float* x, const float* hidden, const float* attended,
                        float* out) const {
    const int64_t rows = part.rows(), width = entry.product.outputs, inner = narrow.product.inner,
                  threads = part.threads, vector_bytes = part.vector_bytes;
    float *h = scratch(rows * (2 * width + 3 * inner)), *normed = h + rows * width, *both = normed + rows * width,
          *gated = both + rows * 2 * inner;
    multiply_shared(text_out.product, attended, rows, hidden, h, threads, vector_bytes);
    normalise_rows(norm3, h, normed, rows, threads, vector_bytes);
    multiply_shared(wide.product, normed, rows, nullptr, both, threads, vector_bytes);
    geglu_cpu(kFp32, place(both), place(gated), rows, inner, threads, vector_bytes);
    multiply_shared(narrow.product, gated, rows, h, h, threads, vector_bytes);
    multiply_shared(exit.product, h, rows, x, out, threads, vector_bytes);
}

void Transformer::before(uintptr_t x, uintptr_t hidden, uintptr_t query, int64_t images, int64_t cells, int64_t threads,
                         int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("transformer", images, cells, threads, {x, hidden, query});
    const int64_t width = entry.product.outputs;
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        before({images, count, 1, cells, within, vector_bytes}, at(x) + first * cells * norm.channels,
               at(hidden) + first * cells * width, at(query) + first * cells * width);
    });
}

void Transformer::after(uintptr_t x, uintptr_t hidden, uintptr_t attended, uintptr_t out, int64_t images, int64_t cells,
                        int64_t threads, int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("blocks", vector_bytes);
    require_images("transformer", images, cells, threads, {x, hidden, attended, out});
    const int64_t channels = norm.channels, width = entry.product.outputs;
    share_images(images, cells, threads, [&](int64_t first, int64_t count, int64_t within) {
        const int64_t start = first * cells;
        after({images, count, 1, cells, within, vector_bytes}, at(x) + start * channels, at(hidden) + start * width,
              at(attended) + start * width, at(out) + start * channels);
    });
}

}  // namespace datasetdm
