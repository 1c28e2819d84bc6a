// Included by each_instruction_set.h.
// Channels run fastest everywhere: both resizes then read whole vectors with one weight each, and no lane ever needs
// its neighbour.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

template <typename Real>
struct Lanes {
    typedef Real Vector __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int64_t kLanes = VECTOR_BYTES / sizeof(Real);
    static constexpr int64_t kVectors = kChannels / kLanes;
};

// Row `row` of the products resized to middle x middle, into target [middle, 9, kChannels]; channels beyond the slice
// are zero.
template <typename Real>
INSTRUCTIONS void resize_row(const Head<Real>& head, const Real* products, int64_t channel, int64_t row, Real* cells,
                             Real* target) {
    using Vector = typename Lanes<Real>::Vector;
    const Place<Real> down = head.to_middle[row];
    const int64_t count = std::min(kChannels, head.channels - channel), pitch = head.side * kTaps * head.channels;
    const Real *low = products + down.low * pitch + channel, *high = products + down.high * pitch + channel;
    for (int64_t i = 0; i < head.side * kTaps; ++i, low += head.channels, high += head.channels)
        for (int64_t c = 0; c < count; ++c)
            cells[i * kChannels + c] = down.weight_low * low[c] + down.weight_high * high[c];
    constexpr int64_t kStep = kTaps * Lanes<Real>::kVectors;
    const Vector* source = reinterpret_cast<const Vector*>(cells);
    Vector* answer = reinterpret_cast<Vector*>(target);
    for (int64_t x = 0; x < head.middle; ++x) {
        const Place<Real> across = head.to_middle[x];
        for (int64_t i = 0; i < kStep; ++i)
            answer[x * kStep + i] = across.weight_low * source[across.low * kStep + i] +
                                    across.weight_high * source[across.high * kStep + i];
    }
}

// The three rows of taps at image row y, each resized down to it, added into target [middle, 3, kChannels]: one sum a
// column of taps.
template <typename Real>
INSTRUCTIONS void combine_rows(const Head<Real>& head, const Scratch<Real>& scratch, int64_t y, Real* target) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr int64_t kStep = 3 * Lanes<Real>::kVectors;
    const Vector *low[3], *high[3];
    Real weight_low[3], weight_high[3];
    for (int64_t tap = 0; tap < 3; ++tap) {
        const Place<Real> down = head.to_full[y * 3 + tap];
        low[tap] = reinterpret_cast<const Vector*>(scratch.row(head, down.low)) + tap * kStep;
        high[tap] = reinterpret_cast<const Vector*>(scratch.row(head, down.high)) + tap * kStep;
        weight_low[tap] = down.weight_low;
        weight_high[tap] = down.weight_high;
    }
    Vector* answer = reinterpret_cast<Vector*>(target);
    for (int64_t x = 0; x < head.middle; ++x)
        for (int64_t i = 0; i < kStep; ++i) {
            const int64_t at = x * 3 * kStep + i;
            answer[x * kStep + i] = weight_low[0] * low[0][at] + weight_high[0] * high[0][at] +
                                    weight_low[1] * low[1][at] + weight_high[1] * high[1][at] +
                                    weight_low[2] * low[2][at] + weight_high[2] * high[2][at];
        }
}

// Hidden pixels start .. start + count of one row, [count, kChannels]; zero outside the image, as the second
// convolution pads.
template <typename Real>
INSTRUCTIONS void hidden_pixels(const Head<Real>& head, const Real* columns, const Real* bias, int64_t start,
                                int64_t count, Real* target) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr int64_t kVectors = Lanes<Real>::kVectors;
    const Vector *source = reinterpret_cast<const Vector*>(columns), *base = reinterpret_cast<const Vector*>(bias);
    Vector* answer = reinterpret_cast<Vector*>(target);
    for (int64_t i = 0; i < count; ++i, answer += kVectors) {
        const int64_t x = start + i;
        if (x < 0 || x >= head.full) {
            std::memset(answer, 0, kVectors * sizeof(Vector));
            continue;
        }
        const Place<Real>* across = &head.to_full[x * 3];
        for (int64_t v = 0; v < kVectors; ++v) {
            Vector sum = base[v];
            for (int64_t tap = 0; tap < 3; ++tap) {
                sum += across[tap].weight_low * source[(across[tap].low * 3 + tap) * kVectors + v];
                sum += across[tap].weight_high * source[(across[tap].high * 3 + tap) * kVectors + v];
            }
            answer[v] = sum < 0 ? Vector{} : sum;  // a NaN stays one
        }
    }
}

// The second convolution of one block of hidden pixels [kBlock + 2, kChannels], added to the three rows it reaches,
// lane by lane.
template <typename Real>
INSTRUCTIONS void reach_rows(const Real* hidden, const Real* last, int64_t start, Real* const sums[3]) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr int64_t kVectors = Lanes<Real>::kVectors;
    const Vector *source = reinterpret_cast<const Vector*>(hidden), *weight = reinterpret_cast<const Vector*>(last);
    Vector* rows[3];
    for (int64_t row = 0; row < 3; ++row) rows[row] = reinterpret_cast<Vector*>(sums[row]) + start;
    for (int64_t x = 0; x < kBlock; x += kPixels) {
        Vector sum[3][kPixels];
        for (int64_t row = 0; row < 3; ++row)
            for (int64_t i = 0; i < kPixels; ++i) sum[row][i] = rows[row][x + i];
        for (int64_t v = 0; v < kVectors; ++v)
            for (int64_t tap = 0; tap < 3; ++tap) {
                Vector pixel[kPixels];
                for (int64_t i = 0; i < kPixels; ++i) pixel[i] = source[(x + i + tap) * kVectors + v];
                for (int64_t row = 0; row < 3; ++row) {
                    const Vector w = weight[(row * 3 + tap) * kVectors + v];
                    for (int64_t i = 0; i < kPixels; ++i) sum[row][i] += w * pixel[i];
                }
            }
        for (int64_t row = 0; row < 3; ++row)
            for (int64_t i = 0; i < kPixels; ++i) rows[row][x + i] = sum[row][i];
    }
}

// Adds rows first .. last of one image's logits for the channels from `channel` on.
template <typename Real>
INSTRUCTIONS void add_rows(const Head<Real>& head, Scratch<Real>& scratch, const Real* products, int64_t channel,
                           int64_t first, int64_t last, Real* logits) {
    constexpr int64_t kLanes = Lanes<Real>::kLanes;
    scratch.begin(head, channel);
    int64_t ready =
        head.to_full[std::max<int64_t>(first - 1, 0) * 3].low;  // rows of the middle resolution below it are of no use
    for (int64_t y = first - 1; y <= last; ++y) {
        // Hidden row y meets row 0 of the second convolution's taps at image row y + 1, row 1 at y, row 2 at y - 1.
        Real* const sums[3] = {scratch.sum(head, y + 1), scratch.sum(head, y), scratch.sum(head, y - 1)};
        if (y >= 0 && y < head.full) {
            for (; ready <= head.to_full[y * 3 + 2].high; ++ready)
                resize_row(head, products, channel, ready, scratch.cells, scratch.row(head, ready));
            combine_rows(head, scratch, y, scratch.columns);
            for (int64_t x = 0; x < head.full; x += kBlock) {
                hidden_pixels(head, scratch.columns, scratch.bias, x - 1, kBlock + 2, scratch.hidden);
                reach_rows(scratch.hidden, scratch.last, x, sums);
            }
        }
        if (y - 1 >= first)
            for (int64_t x = 0; x < head.full; ++x) {
                Real total = 0;
                for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[2][x * kLanes + lane];
                logits[(y - 1) * head.full + x] += total;
            }
        std::memset(sums[2], 0, head.padded() * kLanes * sizeof(Real));
    }
}

// Backwards through one block of a hidden row [count, kChannels], whose pixels start at `start`: `rows` are those of
// the padded gradient of the logits before, at and after it. Adds to `taps_back`, writes the gradient of the pixels
// before the ReLU.
template <typename Real>
INSTRUCTIONS void hidden_gradient(const Real* hidden, const Real* last, const Real* const rows[3], int64_t start,
                                  int64_t count, Real* taps_back, Real* hidden_back) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr int64_t kVectors = Lanes<Real>::kVectors;
    const Vector *source = reinterpret_cast<const Vector*>(hidden), *weight = reinterpret_cast<const Vector*>(last);
    Vector *totals = reinterpret_cast<Vector*>(taps_back), *answer = reinterpret_cast<Vector*>(hidden_back);
    for (int64_t v = 0; v < kVectors; ++v) {
        Vector own[kTaps], sums[kTaps + 1];
        for (int64_t tap = 0; tap < kTaps; ++tap) own[tap] = weight[tap * kVectors + v];
        for (int64_t tap = 0; tap <= kTaps; ++tap) sums[tap] = totals[tap * kVectors + v];
        for (int64_t i = 0; i < count; ++i) {
            const Vector shown = source[i * kVectors + v];
            Vector back{};
            for (int64_t tap = 0; tap < kTaps; ++tap) {
                const Real out = rows[2 - tap / 3][start + i + 2 - tap % 3];
                back += own[tap] * out;
                sums[tap] += shown * out;
            }
            back = shown <= 0 ? Vector{} : back;
            sums[kTaps] += back;
            answer[i * kVectors + v] = back;
        }
        for (int64_t tap = 0; tap <= kTaps; ++tap) totals[tap * kVectors + v] = sums[tap];
    }
}

// `hidden_pixels` backwards: adds to the gradient [middle, 3, kChannels] of its columns.
template <typename Real>
INSTRUCTIONS void add_to_columns(const Head<Real>& head, const Real* hidden_back, int64_t start, int64_t count,
                                 Real* columns_back) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr int64_t kVectors = Lanes<Real>::kVectors;
    const Vector* source = reinterpret_cast<const Vector*>(hidden_back);
    Vector* answer = reinterpret_cast<Vector*>(columns_back);
    for (int64_t i = 0; i < count; ++i, source += kVectors)
        for (int64_t tap = 0; tap < 3; ++tap) {
            const Place<Real> across = head.to_full[(start + i) * 3 + tap];
            for (int64_t v = 0; v < kVectors; ++v) {
                answer[(across.low * 3 + tap) * kVectors + v] += across.weight_low * source[v];
                answer[(across.high * 3 + tap) * kVectors + v] += across.weight_high * source[v];
            }
        }
}

// `combine_rows` backwards: adds to the gradients of the rows that image row y was made of.
template <typename Real>
INSTRUCTIONS void add_to_rows(const Head<Real>& head, const Scratch<Real>& scratch, int64_t y) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr int64_t kStep = 3 * Lanes<Real>::kVectors;
    const Vector* source = reinterpret_cast<const Vector*>(scratch.columns_back);
    for (int64_t tap = 0; tap < 3; ++tap) {
        const Place<Real> down = head.to_full[y * 3 + tap];
        Vector* low = reinterpret_cast<Vector*>(scratch.row_back(head, down.low)) + tap * kStep;
        Vector* high = reinterpret_cast<Vector*>(scratch.row_back(head, down.high)) + tap * kStep;
        for (int64_t x = 0; x < head.middle; ++x)
            for (int64_t i = 0; i < kStep; ++i) {
                low[x * 3 * kStep + i] += down.weight_low * source[x * kStep + i];
                high[x * 3 * kStep + i] += down.weight_high * source[x * kStep + i];
            }
    }
}

// `resize_row` backwards: adds the gradient of one row to that of the products, and clears it for the row that takes
// its place.
template <typename Real>
INSTRUCTIONS void add_to_products(const Head<Real>& head, Scratch<Real>& scratch, int64_t channel, int64_t row,
                                  Real* to_products) {
    using Vector = typename Lanes<Real>::Vector;
    constexpr int64_t kStep = kTaps * Lanes<Real>::kVectors;
    Vector *source = reinterpret_cast<Vector*>(scratch.row_back(head, row)),
           *cells = reinterpret_cast<Vector*>(scratch.cells);
    std::memset(cells, 0, head.side * kStep * sizeof(Vector));
    for (int64_t x = 0; x < head.middle; ++x) {
        const Place<Real> across = head.to_middle[x];
        for (int64_t i = 0; i < kStep; ++i) {
            cells[across.low * kStep + i] += across.weight_low * source[x * kStep + i];
            cells[across.high * kStep + i] += across.weight_high * source[x * kStep + i];
        }
    }
    std::memset(source, 0, head.middle * kStep * sizeof(Vector));
    const Place<Real> down = head.to_middle[row];
    const int64_t count = std::min(kChannels, head.channels - channel), pitch = head.side * kTaps * head.channels;
    Real *low = to_products + down.low * pitch + channel, *high = to_products + down.high * pitch + channel;
    for (int64_t i = 0; i < head.side * kTaps; ++i, low += head.channels, high += head.channels)
        for (int64_t c = 0; c < count; ++c) {
            low[c] += down.weight_low * scratch.cells[i * kChannels + c];
            high[c] += down.weight_high * scratch.cells[i * kChannels + c];
        }
}

// The gradients of one image's products for the channels from `channel` on, and their share `totals` [10, kChannels] in
// those of `last` and of the bias; `padded` [H + 2, H + 2] is the gradient of the logits with zeros around it.
template <typename Real>
INSTRUCTIONS void slice_gradient(const Head<Real>& head, Scratch<Real>& scratch, const Real* products, int64_t channel,
                                 const Real* padded, Real* to_products, double* totals) {
    const int64_t cells = head.side * head.side * kTaps, count = std::min(kChannels, head.channels - channel),
                  pitch = head.full + 2;
    for (int64_t i = 0; i < cells; ++i) std::fill_n(to_products + i * head.channels + channel, count, Real{0});
    scratch.begin(head, channel);
    std::fill(scratch.rows_back, scratch.columns_back, Real{0});
    int64_t ready = head.to_full[0].low, left = ready;
    for (int64_t y = 0; y < head.full; ++y) {
        for (; ready <= head.to_full[y * 3 + 2].high; ++ready)
            resize_row(head, products, channel, ready, scratch.cells, scratch.row(head, ready));
        combine_rows(head, scratch, y, scratch.columns);
        std::fill(scratch.columns_back, scratch.hidden_back, Real{0});
        std::fill_n(scratch.taps_back, (kTaps + 1) * kChannels, Real{0});
        const Real* const rows[3] = {padded + y * pitch, padded + (y + 1) * pitch, padded + (y + 2) * pitch};
        for (int64_t x = 0; x < head.full; x += kBlock) {
            const int64_t pixels = std::min(kBlock, head.full - x);
            hidden_pixels(head, scratch.columns, scratch.bias, x, pixels, scratch.hidden);
            hidden_gradient(scratch.hidden, scratch.last, rows, x, pixels, scratch.taps_back, scratch.hidden_back);
            add_to_columns(head, scratch.hidden_back, x, pixels, scratch.columns_back);
        }
        add_to_rows(head, scratch, y);
        for (int64_t i = 0; i < (kTaps + 1) * kChannels; ++i) totals[i] += scratch.taps_back[i];
        const int64_t past = y + 1 < head.full ? head.to_full[(y + 1) * 3].low : ready;
        for (; left < past; ++left) add_to_products(head, scratch, channel, left, to_products);
    }
}

}  // namespace WITH_INSTRUCTIONS
}  // namespace datasetdm
