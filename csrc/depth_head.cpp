#include "depth_head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "check.h"
#include "released_gil.h"
#include "sharing.h"

namespace py = pybind11;

namespace datasetdm {
namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kChannels =
    32;  // hidden channels worked on at once: four resized rows of 160 cells stay in a 1 MiB second-level cache
constexpr int64_t kBlock =
    64;  // pixels of a row worked on at once: their hidden channels stay in the first-level cache
constexpr int64_t kPixels = 4;      // pixels that share one load of the second convolution's weights; divides kBlock
constexpr int64_t kAlignment = 64;  // bytes of the widest vector

// Where a bilinear resize reads: cells low and high with their weights.
template <typename Real>
struct Place {
    int64_t low, high;
    Real weight_low, weight_high;
};

// Half-pixel centres, clamped at the border.
template <typename Real>
Place<Real> place(int64_t target, int64_t from, int64_t to) {
    const double at = std::max(0.0, (target + 0.5) * from / to - 0.5);
    const int64_t low = std::min(static_cast<int64_t>(at), from - 1);
    const double share = from == to ? 0.0 : at - low;
    return {low, std::min(low + 1, from - 1), static_cast<Real>(1 - share), static_cast<Real>(share)};
}

// One slice of hidden channels, ready to be resized and added.
template <typename Real>
struct Head {
    int64_t side, middle, full, channels, span;
    const Real *bias, *last;
    std::vector<Place<Real>> to_middle;  // [middle]
    std::vector<Place<Real>>
        to_full;  // [full, 3]: of the pixel before, at and after each place; no weight beyond the border

    Head(int64_t side, int64_t middle, int64_t full, int64_t channels, const Real* bias, const Real* last)
        : side(side), middle(middle), full(full), channels(channels), span(0), bias(bias), last(last) {
        for (int64_t i = 0; i < middle; ++i) to_middle.push_back(place<Real>(i, side, middle));
        for (int64_t i = 0; i < full; ++i) {
            for (int64_t tap = -1; tap <= 1; ++tap) {
                to_full.push_back(place<Real>(std::clamp<int64_t>(i + tap, 0, full - 1), middle, full));
                if (i + tap < 0 || i + tap >= full) to_full.back().weight_low = to_full.back().weight_high = 0;
            }
            span = std::max(span, to_full[i * 3 + 2].high - to_full[i * 3].low + 1);
        }
    }
    int64_t padded() const { return (full + kBlock - 1) / kBlock * kBlock; }
};

// What one thread works in: every buffer at its own aligned place of one allocation; those of gradients are empty
// without a backward.
template <typename Real>
struct Scratch {
    std::vector<Real> memory;
    Real *bias, *last, *cells, *rows, *columns, *hidden, *sums;
    Real *rows_back, *columns_back, *hidden_back, *taps_back;
    int64_t lanes;

    Scratch(const Head<Real>& head, int64_t vector_bytes, bool has_backward = false)
        : lanes(vector_bytes / sizeof(Real)) {
        const int64_t rows_size = head.span * head.middle * kTaps * kChannels,
                      columns_size = head.middle * 3 * kChannels;
        const int64_t sizes[] = {kChannels,
                                 kTaps * kChannels,
                                 head.side * kTaps * kChannels,
                                 rows_size,
                                 columns_size,
                                 (kBlock + 2) * kChannels,
                                 has_backward ? 0 : 3 * head.padded() * lanes,
                                 has_backward * rows_size,
                                 has_backward * columns_size,
                                 has_backward * kBlock * kChannels,
                                 has_backward * (kTaps + 1) * kChannels};
        int64_t total = kAlignment / sizeof(Real);
        for (int64_t size : sizes) total += rounded(size);
        memory.resize(total);
        void* start = memory.data();
        size_t space = total * sizeof(Real);
        Real* at = static_cast<Real*>(std::align(kAlignment, sizeof(Real), start, space));
        Real** const places[] = {&bias, &last,      &cells,        &rows,        &columns,  &hidden,
                                 &sums, &rows_back, &columns_back, &hidden_back, &taps_back};
        for (size_t i = 0; i < std::size(sizes); ++i) {
            *places[i] = at;
            at += rounded(sizes[i]);
        }
    }
    static int64_t rounded(int64_t size) {
        constexpr int64_t kStep = kAlignment / sizeof(Real);
        return (size + kStep - 1) / kStep * kStep;
    }
    Real* row(const Head<Real>& head, int64_t row) const {
        return rows + row % head.span * head.middle * kTaps * kChannels;
    }
    Real* row_back(const Head<Real>& head, int64_t y) const { return rows_back + (row(head, y) - rows); }
    Real* sum(const Head<Real>& head, int64_t row) const { return sums + (row + 3) % 3 * head.padded() * lanes; }

    void begin(const Head<Real>& head, int64_t channel) {
        const int64_t count = std::min(kChannels, head.channels - channel);
        std::fill(bias, bias + kChannels, Real{0});
        std::fill(last, last + kTaps * kChannels, Real{0});
        std::fill(cells, cells + head.side * kTaps * kChannels, Real{0});
        std::fill(sums, rows_back, Real{0});
        std::copy_n(head.bias + channel, count, bias);
        for (int64_t tap = 0; tap < kTaps; ++tap)
            std::copy_n(head.last + tap * head.channels + channel, count, last + tap * kChannels);
    }
};

}  // namespace
}  // namespace datasetdm

#define ROWS "depth_head_rows.h"
#include "each_instruction_set.h"

namespace datasetdm {
namespace {

// The layers behind `products`, for logits [B, H, H].
template <typename Real>
Head<Real> head_of(const char* name, const Array<Real>& products, const Array<Real>& bias, const Array<Real>& last,
                   int64_t middle, const Array<Real>& logits, int64_t threads) {
    require(products.ndim() == 5 && products.shape(1) == products.shape(2) && products.shape(3) == kTaps, name,
            ": products must be [B, h, h, 9, C]");
    require(logits.ndim() == 3 && logits.shape(1) == logits.shape(2) && logits.shape(0) == products.shape(0), name,
            ": logits must be [B, H, H] with the batch of the products, ", products.shape(0));
    const int64_t side = products.shape(1), channels = products.shape(4), full = logits.shape(1);
    require(bias.ndim() == 1 && bias.shape(0) == channels, name, ": bias must be [", channels,
            "], one for each channel of the products");
    require(last.ndim() == 2 && last.shape(0) == kTaps && last.shape(1) == channels, name, ": last must be [9, ",
            channels, "]");
    require(threads > 0, name, ": threads is ", threads, ", expected at least 1");
    require_size("depth head: cells", side, side);
    require_size("depth head: middle", middle, middle);
    require_size("depth head: logits", full, full);
    return {side, middle, full, channels, bias.data(), last.data()};
}

template <typename Real>
void require_like(const char* name, const Array<Real>& one, const Array<Real>& other) {
    require(one.ndim() == other.ndim() && std::equal(one.shape(), one.shape() + one.ndim(), other.shape()),
            "depth_head_gradient: ", name, " has another shape than its gradient");
}

}  // namespace

std::vector<int64_t> depth_head_vector_bytes() {
    std::vector<int64_t> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw"))
        found.push_back(64);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(32);
#endif
    found.push_back(16);
    return found;
}

int64_t chosen_vector_bytes(const char* name, int64_t vector_bytes) {
    static const std::vector<int64_t> found = depth_head_vector_bytes();
    if (vector_bytes == 0) return found.front();
    require(std::count(found.begin(), found.end(), vector_bytes), name, ": this CPU has no vectors of ", vector_bytes,
            " bytes");
    return vector_bytes;
}

template <typename Real>
void depth_head_add(const Array<Real>& products, const Array<Real>& bias, const Array<Real>& last, int64_t middle,
                    Array<Real> logits, int64_t threads, int64_t vector_bytes) {
    const Head<Real> head = head_of("depth_head_add", products, bias, last, middle, logits, threads);
    vector_bytes = chosen_vector_bytes("depth_head_add", vector_bytes);
    const int64_t batch = products.shape(0), size = head.side * head.side * kTaps * head.channels, full = head.full;
    const Real* source = products.data();
    Real* target = logits.mutable_data();
    ReleasedGil release;
    // Each thread owns a band of rows and meets the channels in the same order: their number cannot change a sum.
    const int64_t bands = std::min(threads, full);
    std::vector<Scratch<Real>> scratch;
    for (int64_t band = 0; band < bands; ++band) scratch.emplace_back(head, vector_bytes);
    share(bands, bands, [&](int64_t begin, int64_t end) {
        for (int64_t band = begin; band < end; ++band)
            for (int64_t image = 0; image < batch; ++image)
                for (int64_t channel = 0; channel < head.channels; channel += kChannels)
                    WITH_VECTORS(vector_bytes, add_rows, head, scratch[band], source + image * size, channel,
                                 full * band / bands, full * (band + 1) / bands, target + image * full * full);
    });
}

template <typename Real>
void depth_head_gradient(const Array<Real>& products, const Array<Real>& bias, const Array<Real>& last, int64_t middle,
                         const Array<Real>& gradient, Array<Real> to_products, Array<Real> to_bias, Array<Real> to_last,
                         int64_t threads, int64_t vector_bytes) {
    const Head<Real> head = head_of("depth_head_gradient", products, bias, last, middle, gradient, threads);
    require_like("products", products, to_products);
    require_like("bias", bias, to_bias);
    require_like("last", last, to_last);
    vector_bytes = chosen_vector_bytes("depth_head_gradient", vector_bytes);
    const int64_t batch = products.shape(0), size = head.side * head.side * kTaps * head.channels, full = head.full,
                  pitch = full + 2;
    const Real *source = products.data(), *out = gradient.data();
    Real *own = to_products.mutable_data(), *own_bias = to_bias.mutable_data(), *own_last = to_last.mutable_data();
    ReleasedGil release;
    std::vector<Real> padded(batch * pitch * pitch);
    for (int64_t row = 0; row < batch * full; ++row)
        std::copy_n(out + row * full, full, padded.data() + (row + row / full * 2 + 1) * pitch + 1);
    // Some channels of one image are one thread's, and images are added in their order: the number of threads cannot
    // change a sum.
    const int64_t slices = (head.channels + kChannels - 1) / kChannels;
    std::vector<double> totals(batch * slices * (kTaps + 1) * kChannels);
    share(batch * slices, threads, [&](int64_t begin, int64_t end) {
        Scratch<Real> scratch(head, vector_bytes, true);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t image = i / slices, channel = i % slices * kChannels;
            WITH_VECTORS(vector_bytes, slice_gradient, head, scratch, source + image * size, channel,
                         padded.data() + image * pitch * pitch, own + image * size,
                         totals.data() + i * (kTaps + 1) * kChannels);
        }
    });
    for (int64_t c = 0; c < head.channels; ++c)
        for (int64_t tap = 0; tap <= kTaps; ++tap) {
            double total = 0;
            for (int64_t image = 0; image < batch; ++image)
                total += totals[((image * slices + c / kChannels) * (kTaps + 1) + tap) * kChannels + c % kChannels];
            (tap < kTaps ? own_last[tap * head.channels + c] : own_bias[c]) = static_cast<Real>(total);
        }
}

template void depth_head_add<float>(const Array<float>&, const Array<float>&, const Array<float>&, int64_t,
                                    Array<float>, int64_t, int64_t);
template void depth_head_gradient<float>(const Array<float>&, const Array<float>&, const Array<float>&, int64_t,
                                         const Array<float>&, Array<float>, Array<float>, Array<float>, int64_t,
                                         int64_t);
template void depth_head_add<double>(const Array<double>&, const Array<double>&, const Array<double>&, int64_t,
                                     Array<double>, int64_t, int64_t);
template void depth_head_gradient<double>(const Array<double>&, const Array<double>&, const Array<double>&, int64_t,
                                          const Array<double>&, Array<double>, Array<double>, Array<double>, int64_t,
                                          int64_t);

}  // namespace datasetdm
