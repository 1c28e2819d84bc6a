#include "hidden_convolution.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "depth_head.h"
#include "released_gil.h"
#include "sharing.h"

namespace py = pybind11;

namespace datasetdm {
namespace {

constexpr int64_t kTaps = 9;
constexpr int64_t kRows = 32;       // of the answer that a thread sums up at once: at 512 pixels they stay in its second-level cache
constexpr int64_t kWidest = 64 / 4;  // numbers in the widest vector

// A wide map and the layers behind it.
template <typename Real>
struct Wide {
    int64_t batch, channels, height, width, pitch;  // pitch: of rows with a zero before them and whole vectors behind
    const Real *bias, *last;
};

}  // namespace
}  // namespace datasetdm

#define ROWS "hidden_convolution_rows.h"
#include "each_instruction_set.h"

namespace datasetdm {
namespace {

template <typename Real>
Wide<Real> wide_map(const char* name, const Array<Real>& hidden, const Array<Real>& bias, const Array<Real>& last, const Array<Real>& plane,
                    int64_t threads) {
    require(hidden.ndim() == 4, name, ": hidden must be [B, C, H, W]");
    const int64_t batch = hidden.shape(0), channels = hidden.shape(1), height = hidden.shape(2), width = hidden.shape(3);
    require(bias.ndim() == 1 && bias.shape(0) == channels, name, ": bias must be [", channels, "], one for each channel of hidden");
    require(last.ndim() == 2 && last.shape(0) == kTaps && last.shape(1) == channels, name, ": last must be [9, ", channels, "]");
    require(plane.ndim() == 3 && plane.shape(0) == batch && plane.shape(1) == height && plane.shape(2) == width, name, ": the plane must be [", batch,
            ", ", height, ", ", width, "]");
    require(threads > 0, name, ": threads is ", threads, ", expected at least 1");
    require_size(name, height, width);
    return {batch, channels, height, width, (width + 2 + kWidest) / kWidest * kWidest + kWidest, bias.data(), last.data()};
}

template <typename Real>
void require_like(const char* name, const Array<Real>& one, const Array<Real>& other) {
    require(one.ndim() == other.ndim() && std::equal(one.shape(), one.shape() + one.ndim(), other.shape()), name, " has another shape than its gradient");
}

}  // namespace

template <typename Real>
void hidden_convolution(const Array<Real>& hidden, const Array<Real>& bias, const Array<Real>& last, Array<Real> out, int64_t threads,
                        int64_t vector_bytes) {
    const Wide<Real> wide = wide_map("hidden_convolution", hidden, bias, last, out, threads);
    vector_bytes = chosen_vector_bytes("hidden_convolution", vector_bytes);
    const Real* source = hidden.data();
    Real* target = out.mutable_data();
    ReleasedGil release;
    // A row of the answer is one thread's and meets the channels in their order, so the number of threads cannot change a sum.
    const int64_t bands = (wide.height + kRows - 1) / kRows;
    share(wide.batch * bands, threads, [&](int64_t begin, int64_t end) {
        std::vector<Real> three(3 * wide.pitch), sums(kRows * wide.pitch);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t image = i / bands, first = i % bands * kRows, past = std::min(first + kRows, wide.height);
            WITH_VECTORS(vector_bytes, convolve_rows, wide, source + image * wide.channels * wide.height * wide.width, first, past, three.data(), sums.data());
            for (int64_t y = first; y < past; ++y)
                std::copy_n(sums.data() + (y - first) * wide.pitch, wide.width, target + (image * wide.height + y) * wide.width);
        }
    });
}

template <typename Real>
void hidden_convolution_gradient(const Array<Real>& hidden, const Array<Real>& bias, const Array<Real>& last, const Array<Real>& gradient,
                                 Array<Real> to_hidden, Array<Real> to_bias, Array<Real> to_last, int64_t threads, int64_t vector_bytes) {
    const Wide<Real> wide = wide_map("hidden_convolution_gradient", hidden, bias, last, gradient, threads);
    require_like("hidden_convolution_gradient: hidden", hidden, to_hidden);
    require_like("hidden_convolution_gradient: bias", bias, to_bias);
    require_like("hidden_convolution_gradient: last", last, to_last);
    vector_bytes = chosen_vector_bytes("hidden_convolution_gradient", vector_bytes);
    const Real *source = hidden.data(), *out = gradient.data();
    Real *own = to_hidden.mutable_data(), *own_bias = to_bias.mutable_data(), *own_last = to_last.mutable_data();
    ReleasedGil release;
    std::vector<Real> padded(wide.batch * (wide.height + 2) * wide.pitch);
    for (int64_t row = 0; row < wide.batch * wide.height; ++row)
        std::copy_n(out + row * wide.width, wide.width, padded.data() + (row + row / wide.height * 2 + 1) * wide.pitch + 1);
    // A channel is one thread's, so the number of threads cannot change a sum.
    share(wide.channels, threads, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) WITH_VECTORS(vector_bytes, channel_gradient, wide, source, padded.data(), c, own, own_bias, own_last);
    });
}

template void hidden_convolution<float>(const Array<float>&, const Array<float>&, const Array<float>&, Array<float>, int64_t, int64_t);
template void hidden_convolution<double>(const Array<double>&, const Array<double>&, const Array<double>&, Array<double>, int64_t, int64_t);
template void hidden_convolution_gradient<float>(const Array<float>&, const Array<float>&, const Array<float>&, const Array<float>&, Array<float>,
                                                 Array<float>, Array<float>, int64_t, int64_t);
template void hidden_convolution_gradient<double>(const Array<double>&, const Array<double>&, const Array<double>&, const Array<double>&, Array<double>,
                                                  Array<double>, Array<double>, int64_t, int64_t);

}  // namespace datasetdm
