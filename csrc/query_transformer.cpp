#include "query_transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "depth_head.h"
#include "network_ops.h"
#include "sharing.h"

namespace datasetdm {
namespace {

constexpr int64_t kPlaces = 3;  // of a layer in the product of positions

uintptr_t place(const float* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
const float* at(uintptr_t pointer, int64_t offset) { return reinterpret_cast<const float*>(pointer) + offset; }

int64_t whole_panels(int64_t outputs) {
    return (outputs + 2 * kProductPanel - 1) / (2 * kProductPanel) * 2 * kProductPanel;
}

// Rows [rows, width] as the weight of a product.
void lay_out(const float* rows, int64_t count, int64_t width, float* panels) {
    for (int64_t row = 0; row < whole_panels(count); ++row)
        for (int64_t i = 0; i < width; ++i)
            panels[(row / kProductPanel * width + i) * kProductPanel + row % kProductPanel] =
                row < count ? rows[row * width + i] : 0.0f;
}

// Some columns of one matrix plus some of another, as a matrix of their own or in place.
void add_columns(const float* x, int64_t x_pitch, const float* y, int64_t y_pitch, int64_t rows, int64_t columns,
                 float* out, int64_t out_pitch) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < columns; ++i) out[row * out_pitch + i] = x[row * x_pitch + i] + y[row * y_pitch + i];
}

void clip(float* x, int64_t count) {  // ReLU that keeps a NaN
    for (int64_t i = 0; i < count; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];
}

}  // namespace

QueryTransformer::QueryTransformer(const std::vector<QueryLayer>& layers, const std::vector<Linear>& memory,
                                   const Linear& positions, const Norm& norm, const std::vector<Linear>& embedding,
                                   const Linear& classes, int64_t heads)
    : layers(layers),
      memory(memory),
      positions(positions),
      norm(norm),
      embedding(embedding),
      classes(classes),
      heads(heads) {
    const int64_t channels = norm.channels, count = static_cast<int64_t>(layers.size()),
                  levels = static_cast<int64_t>(memory.size());
    const auto fits = [&](const Linear& one, int64_t inner, int64_t outputs) {
        return one.product.inner == inner && one.product.outputs == outputs;
    };
    require(heads > 0 && channels % heads == 0, "query transformer: ", channels, " channels do not make ", heads,
            " heads");
    require(levels > 0 && embedding.size() == 3, "query transformer: ", levels, " levels and ", embedding.size(),
            " layers to the mask features");
    for (const QueryLayer& layer : layers)
        require(fits(layer.cross_query, channels, channels) && fits(layer.cross_out, channels, channels) &&
                    fits(layer.self_packed, channels, 3 * channels) && fits(layer.self_out, channels, channels) &&
                    fits(layer.wide, channels, layer.narrow.product.inner) &&
                    fits(layer.narrow, layer.wide.product.outputs, channels),
                "query transformer: a layer does not fit ", channels, " channels");
    for (int64_t level = 0; level < levels; ++level) {
        const int64_t readers = (count - level + levels - 1) / levels;
        require(fits(memory[level], channels, 2 * readers * channels), "query transformer: the memory of level ", level,
                " does not fit ", readers, " layers");
    }
    require(fits(positions, channels, kPlaces * count * channels), "query transformer: positions do not fit ", count,
            " layers");
    require(fits(embedding[0], channels, channels) && fits(embedding[1], channels, channels) &&
                embedding[2].product.inner == channels && classes.product.inner == channels,
            "query transformer: an answer does not fit ", channels, " channels");
}

void QueryTransformer::run(uintptr_t content, uintptr_t position, const std::vector<uintptr_t>& level,
                           const std::vector<uintptr_t>& places, const std::vector<uintptr_t>& features,
                           const std::vector<int64_t>& cells, uintptr_t embedded, uintptr_t logits, int64_t images,
                           int64_t queries, int64_t threads, int64_t vector_bytes) const {
    vector_bytes = chosen_vector_bytes("query transformer", vector_bytes);
    const int64_t levels = static_cast<int64_t>(memory.size()), channels = norm.channels,
                  count = static_cast<int64_t>(layers.size());
    const int64_t width = embedding[2].product.outputs, head = channels / heads, steps = kPlaces * count * channels;
    require(content && position && embedded && logits,
            "query transformer: a pointer is null; pass data_ptr() of a CPU tensor");
    require(images > 0 && queries > 0 && threads > 0, "query transformer: ", images, " images, ", queries, " queries, ",
            threads, " threads; expected at least 1");
    for (const auto* one : {&level, &places, &features})
        require(static_cast<int64_t>(one->size()) == levels && std::count(one->begin(), one->end(), 0) == 0,
                "query transformer: ", one->size(), " pointers for ", levels, " levels, or one of them is null");
    require(static_cast<int64_t>(cells.size()) == levels && *std::min_element(cells.begin(), cells.end()) > 0,
            "query transformer: a level is empty or missing");
    const int64_t most = *std::max_element(cells.begin(), cells.end()), within = images < threads ? threads : 1;
    int64_t hidden = channels, packed_size = 0;
    for (const QueryLayer& layer : layers) hidden = std::max(hidden, layer.wide.product.outputs);
    for (int64_t l = 0; l < levels; ++l) packed_size += cells[l] * memory[l].product.outputs;
    share(images, within > 1 ? 1 : threads, [&](int64_t first, int64_t last) {
        static thread_local KeptFloats kept;
        const int64_t rows = queries * channels;
        float* next = kept.of(packed_size + queries * steps + most * (channels + queries) + 7 * rows +
                              queries * (hidden + width) + whole_panels(queries) * width);
        const auto take = [&](int64_t size) {
            next += size;
            return next - size;
        };
        float *all = take(packed_size), *shares = take(queries * steps), *keys = take(most * channels),
              *masks = take(most * queries), *h = take(rows);
        float *query = take(rows), *answer = take(rows), *wide = take(queries * hidden), *own = take(3 * rows),
              *normed = take(rows);
        float *target = take(queries * width), *panels = take(whole_panels(queries) * width);
        const auto product = [&](const Linear& linear, const float* x, const float* residual, float* out) {
            multiply(linear.product, x, queries, residual, out, vector_bytes);
        };
        const auto normalise = [&](const Norm& with, const float* x, float* out) {
            normalise_rows(with, x, out, queries, 1, vector_bytes);
        };
        const auto embed = [&](float* out) {  // from the norm of h, which stays in `normed`
            normalise(norm, h, normed);
            product(embedding[0], normed, nullptr, query);
            clip(query, rows);
            product(embedding[1], query, nullptr, answer);
            clip(answer, rows);
            product(embedding[2], answer, nullptr, out);
        };
        const std::vector<int64_t> side_by_side{rows, head, channels}, packed_rows{3 * rows, head, 3 * channels};
        const double scale = 1 / std::sqrt(static_cast<double>(head));
        for (int64_t image = first; image < last; ++image) {
            float* packed = all;
            for (int64_t l = 0; l < levels; packed += cells[l] * memory[l].product.outputs, ++l)
                multiply_shared(memory[l].product, at(level[l], image * cells[l] * channels), cells[l], nullptr, packed,
                                within, vector_bytes);
            product(positions, at(position, image * rows), nullptr, shares);
            std::memcpy(h, at(content, image * rows), rows * sizeof(float));
            for (int64_t i = 0; i < count; ++i) {
                const QueryLayer& layer = layers[i];
                const int64_t l = i % levels, start = i / levels * channels, pitch = memory[l].product.outputs;
                packed = all;
                for (int64_t before = 0; before < l; ++before) packed += cells[before] * memory[before].product.outputs;
                embed(target);
                lay_out(target, queries, width, panels);
                multiply_shared({panels, nullptr, width, queries}, at(features[l], image * cells[l] * width), cells[l],
                                nullptr, masks, within, vector_bytes);
                product(layer.cross_query, h, nullptr, query);
                const float* own_places = shares + kPlaces * i * channels;
                add_columns(query, channels, own_places, steps, queries, channels, query, channels);
                add_columns(packed + start, pitch, at(places[l], start), pitch / 2, cells[l], channels, keys, channels);
                masked_attention_cpu(place(query), side_by_side, place(keys), {0, head, channels},
                                     place(packed + pitch / 2 + start), {0, head, pitch}, place(masks), place(answer),
                                     side_by_side, heads, queries, cells[l], head, scale, within, vector_bytes);
                product(layer.cross_out, answer, h, h);
                normalise(layer.cross_norm, h, h);
                product(layer.self_packed, h, nullptr, own);
                add_columns(own, 3 * channels, own_places + channels, steps, queries, 2 * channels, own, 3 * channels);
                attention_cpu(kFp32, place(own), packed_rows, place(own + channels), packed_rows,
                              place(own + 2 * channels), packed_rows, place(answer), side_by_side, 1, heads, queries,
                              queries, head, scale, 1, vector_bytes);
                product(layer.self_out, answer, h, h);
                normalise(layer.self_norm, h, h);
                product(layer.wide, h, nullptr, wide);
                clip(wide, queries * layer.wide.product.outputs);
                product(layer.narrow, wide, h, h);
                normalise(layer.feed_norm, h, h);
            }
            embed(const_cast<float*>(at(embedded, image * queries * width)));
            product(classes, normed, nullptr,
                    const_cast<float*>(at(logits, image * queries * classes.product.outputs)));
        }
    });
}

}  // namespace datasetdm
