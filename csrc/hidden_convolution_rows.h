// Included by each_instruction_set.h.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

template <typename Real>
struct Vectors {
    typedef Real Vector __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int64_t kLanes = VECTOR_BYTES / sizeof(Real);

    INSTRUCTIONS static Vector load(const Real* from) {
        Vector answer;
        __builtin_memcpy(&answer, from, sizeof answer);
        return answer;
    }
    INSTRUCTIONS static void store(Real* to, const Vector& value) { __builtin_memcpy(to, &value, sizeof value); }
};

// Rows first .. last of one image's answer, in `sums` [last - first, pitch]; `three` holds as many rows of one channel, each with a zero
// before it and zeros behind.
template <typename Real>
INSTRUCTIONS void convolve_rows(const Wide<Real>& wide, const Real* hidden, int64_t first, int64_t last, Real* three, Real* sums) {
    using Lanes = Vectors<Real>;
    const int64_t width = wide.width, pitch = wide.pitch;
    std::fill(sums, sums + (last - first) * pitch, Real{0});
    for (int64_t c = 0; c < wide.channels; ++c) {
        const Real bias = wide.bias[c], *plane = hidden + c * wide.height * width;
        typename Lanes::Vector weight[kTaps];
        for (int64_t tap = 0; tap < kTaps; ++tap) weight[tap] = wide.last[tap * wide.channels + c] - typename Lanes::Vector{};
        for (int64_t y = first - 1; y <= last; ++y) {
            Real* own = three + (y + 3) % 3 * pitch;
            std::fill(own, own + pitch, Real{0});
            if (y >= 0 && y < wide.height)
                for (int64_t x = 0; x < width; ++x) {
                    const Real sum = plane[y * width + x] + bias;
                    own[x + 1] = sum < 0 ? Real{0} : sum;  // a NaN stays one
                }
            if (y <= first) continue;
            const Real* const rows[3] = {three + (y + 1) % 3 * pitch, three + (y + 2) % 3 * pitch, own};
            Real* target = sums + (y - 1 - first) * pitch;
            for (int64_t x = 0; x < width; x += Lanes::kLanes) {
                auto sum = Lanes::load(target + x);
                for (int64_t tap = 0; tap < kTaps; ++tap) sum += weight[tap] * Lanes::load(rows[tap / 3] + x + tap % 3);
                Lanes::store(target + x, sum);
            }
        }
    }
}

// The gradients of one channel over all images; `padded` [B, height + 2, pitch] is that of the answer with zeros around it.
template <typename Real>
INSTRUCTIONS void channel_gradient(const Wide<Real>& wide, const Real* hidden, const Real* padded, int64_t c, Real* to_hidden, Real* to_bias,
                                   Real* to_last) {
    using Lanes = Vectors<Real>;
    const int64_t width = wide.width, pitch = wide.pitch, cells = wide.height * width, whole = width / Lanes::kLanes * Lanes::kLanes;
    const Real bias = wide.bias[c];
    Real weight[kTaps];
    double totals[kTaps + 1] = {};
    for (int64_t tap = 0; tap < kTaps; ++tap) weight[tap] = wide.last[tap * wide.channels + c];
    for (int64_t image = 0; image < wide.batch; ++image) {
        const Real *plane = hidden + (image * wide.channels + c) * cells, *around = padded + image * (wide.height + 2) * pitch;
        Real* answer = to_hidden + (image * wide.channels + c) * cells;
        typename Lanes::Vector sums[kTaps + 1] = {};
        for (int64_t y = 0; y < wide.height; ++y, plane += width, answer += width) {
            for (int64_t x = 0; x < whole; x += Lanes::kLanes) {
                const auto value = Lanes::load(plane + x) + bias;
                const auto shown = value < 0 ? typename Lanes::Vector{} : value;
                typename Lanes::Vector back{};
                for (int64_t tap = 0; tap < kTaps; ++tap) {
                    const auto out = Lanes::load(around + (y + 2 - tap / 3) * pitch + x + 2 - tap % 3);
                    back += weight[tap] * out;
                    sums[tap] += shown * out;
                }
                back = value <= 0 ? typename Lanes::Vector{} : back;
                sums[kTaps] += back;
                Lanes::store(answer + x, back);
            }
            for (int64_t x = whole; x < width; ++x) {
                const Real value = plane[x] + bias, shown = value < 0 ? Real{0} : value;
                Real back = 0;
                for (int64_t tap = 0; tap < kTaps; ++tap) {
                    const Real out = around[(y + 2 - tap / 3) * pitch + x + 2 - tap % 3];
                    back += weight[tap] * out;
                    totals[tap] += shown * out;
                }
                answer[x] = value <= 0 ? Real{0} : back;
                totals[kTaps] += answer[x];
            }
        }
        for (int64_t i = 0; i <= kTaps; ++i)
            for (int64_t lane = 0; lane < Lanes::kLanes; ++lane) totals[i] += sums[i][lane];
    }
    for (int64_t tap = 0; tap < kTaps; ++tap) to_last[tap * wide.channels + c] = static_cast<Real>(totals[tap]);
    to_bias[c] = static_cast<Real>(totals[kTaps]);
}

}  // namespace WITH_INSTRUCTIONS
}  // namespace datasetdm
