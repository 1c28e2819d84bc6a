#include "outlines.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "released_gil.h"

namespace datasetdm {

namespace {

// A joint bilateral filter (Petschnigg et al. 2004) guided by the image: labels become the weighted majority of their
// neighbourhood, depths its weighted mean. Weights fall as 1 / (1 + ratio)^2, which is cheaper than a Gaussian.
constexpr int64_t kReach = 4;  // pixels to each side; a cell of the decoders' masks is 3.2
constexpr int kRounds = 2;
constexpr float kColour = 1.0f / 400;  // two colours of this squared distance, 400, have a quarter of the weight
constexpr float kNear = 1.0f / 40;     // and so have two places of a squared distance of 40
constexpr float kAtEdge = 1.0f / 128;  // weight of a pixel at an edge
constexpr float kStep = 1.15f;         // ratio of depths in a neighbourhood from which there is a step
constexpr float kSlope = 0.1f;         // relative difference from a pixel to the next at which its weight is a quarter
constexpr float kLeast = 1e-3f;        // the weight on a steep slope

using Values = std::vector<float>;  // of all pixels, row by row; labels too, as whole numbers

struct Neighbour {
    int64_t down, right;
    float near;
};

float fall_off(float ratio) { return 1 / ((1 + ratio) * (1 + ratio)); }

// Every other pixel around one, as on a chessboard: those between them say much the same.
std::vector<Neighbour> chessboard() {
    std::vector<Neighbour> found;
    for (int64_t down = -kReach; down <= kReach; ++down)
        for (int64_t right = -kReach; right <= kReach; ++right)
            if ((down + right) % 2 == 0)
                found.push_back({down, right, fall_off(static_cast<float>(down * down + right * right) * kNear)});
    return found;
}

struct Image {
    int64_t height, width;
    Values red, green, blue;

    Image(int64_t rows, int64_t columns, const uint8_t* pixels)
        : height(rows), width(columns), red(rows * columns), green(red), blue(red) {
        for (size_t at = 0; at < red.size(); ++at)
            red[at] = pixels[3 * at], green[at] = pixels[3 * at + 1], blue[at] = pixels[3 * at + 2];
    }

    // How alike the colours of `count` pixels are to those of others, times a share of each of the others.
    void weigh(int64_t here, int64_t there, int64_t count, float near, const Values& share,
               float* __restrict weights) const {
        const float *r = red.data(), *g = green.data(), *b = blue.data(), *shares = share.data();
        for (int64_t k = 0; k < count; ++k) {
            const float dr = r[here + k] - r[there + k], dg = g[here + k] - g[there + k],
                        db = b[here + k] - b[there + k];
            const float apart = 1 + (dr * dr + dg * dg + db * db) * kColour;
            weights[k] = near * shares[there + k] / (apart * apart);
        }
    }

    // Calls body(first of them, first of their neighbours, how many, weights) for the neighbours of the pixels
    // first..last of a row.
    template <typename Body>
    void for_neighbours(int64_t y, int64_t first, int64_t last, const Values& share, const Body& body) const {
        static const std::vector<Neighbour> neighbours = chessboard();
        Values weights(last - first);
        for (const Neighbour& one : neighbours) {
            if (y + one.down < 0 || y + one.down >= height) continue;
            const int64_t from = std::max(first, -one.right), to = std::min(last, width - one.right);
            const int64_t here = y * width + from, there = here + one.down * width + one.right;
            if (from >= to) continue;
            weigh(here, there, to - from, one.near, share, weights.data());
            body(here, there, to - from, weights.data());
        }
    }

    // Calls body(y, first, last) for each run of chosen pixels in a row.
    template <typename Body>
    void for_runs(const std::vector<uint8_t>& is_chosen, const Body& body) const {
        for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0, first; x < width;) {
                while (x < width && !is_chosen[y * width + x]) ++x;
                for (first = x; x < width && is_chosen[y * width + x];) ++x;
                if (first < x) body(y, first, x);
            }
    }

    // The lowest or highest value within a square around each pixel.
    template <typename Better>
    Values around(const Values& plane, int64_t reach, const Better& better) const {
        Values rows(plane);
        for (int64_t y = 0; y < height; ++y)
            for (int64_t shift = 1; shift <= std::min(reach, width - 1); ++shift) {
                const float* from = plane.data() + y * width;
                float* __restrict to = rows.data() + y * width;
                for (int64_t x = shift; x < width; ++x) to[x] = better(to[x], from[x - shift]);
                for (int64_t x = shift; x < width; ++x) to[x - shift] = better(to[x - shift], from[x]);
            }
        Values found(rows);
        for (int64_t y = 0; y < height; ++y)
            for (int64_t v = std::max<int64_t>(y - reach, 0); v <= std::min(y + reach, height - 1); ++v) {
                const float* from = rows.data() + v * width;
                float* __restrict to = found.data() + y * width;
                for (int64_t x = 0; x < width; ++x) to[x] = better(to[x], from[x]);
            }
        return found;
    }
    Values lowest(const Values& plane, int64_t reach) const {
        return around(plane, reach, [](float a, float b) { return a < b ? a : b; });
    }
    Values highest(const Values& plane, int64_t reach) const {
        return around(plane, reach, [](float a, float b) { return a > b ? a : b; });
    }
};

// The label with most votes around a pixel; its own where no other has more.
float winner(const Image& image, const Values& labels, const Values& share, int64_t y, int64_t x) {
    std::vector<std::pair<float, float>> votes{{labels[y * image.width + x], 0.0f}};
    image.for_neighbours(y, x, x + 1, share, [&](int64_t, int64_t there, int64_t, const float* weight) {
        const auto is_same = [&](const auto& vote) { return vote.first == labels[there]; };
        auto found = std::find_if(votes.begin(), votes.end(), is_same);
        if (found == votes.end()) found = votes.insert(votes.end(), {labels[there], 0.0f});
        found->second += *weight;
    });
    return std::max_element(votes.begin(), votes.end(),
                            [](const auto& a, const auto& b) { return a.second < b.second; })
        ->first;
}

void vote(const Image& image, const Values& before, Values& after) {
    const Values low = image.lowest(before, 1), high = image.highest(before, 1);
    Values is_edge(before.size()), share(before.size());
    for (size_t at = 0; at < before.size(); ++at)
        is_edge[at] = low[at] != high[at], share[at] = low[at] != high[at] ? kAtEdge : 1;
    const Values near = image.highest(is_edge, kReach - 1);
    Values own(before.size()), all(before.size());
    image.for_runs({near.begin(), near.end()}, [&](int64_t y, int64_t first, int64_t last) {
        image.for_neighbours(y, first, last, share,
                             [&](int64_t here, int64_t there, int64_t count, const float* weights) {
                                 const float* labels = before.data();
                                 float* __restrict sums = all.data() + here, * __restrict owns = own.data() + here;
                                 for (int64_t k = 0; k < count; ++k) {
                                     sums[k] += weights[k];
                                     owns[k] += labels[here + k] == labels[there + k] ? weights[k] : 0;
                                 }
                             });
        for (int64_t x = first, at = y * image.width + first; x < last; ++x, ++at)
            if (own[at] < all[at] - own[at]) after[at] = winner(image, before, share, y, x);
    });
}

void average(const Image& image, const Values& before, Values& after) {
    Values known(before), share(before.size()), sum(before.size()), total(before.size());
    std::replace_if(
        known.begin(), known.end(), [](float metres) { return !(metres > 0); }, std::numeric_limits<float>::max());
    const Values low = image.lowest(known, 1), high = image.highest(before, 1);
    const Values nearest = image.lowest(known, kReach), farthest = image.highest(before, kReach);
    std::vector<uint8_t> is_step(before.size());
    for (size_t at = 0; at < before.size(); ++at) {
        const float slope = (high[at] / low[at] - 1) / kSlope;
        share[at] = before[at] > 0 ? fall_off(slope * slope) + kLeast : 0;
        is_step[at] = before[at] > 0 && farthest[at] >= kStep * nearest[at];
    }
    image.for_runs(is_step, [&](int64_t y, int64_t first, int64_t last) {
        image.for_neighbours(y, first, last, share,
                             [&](int64_t here, int64_t there, int64_t count, const float* weights) {
                                 const float* metres = before.data() + there;
                                 float* __restrict sums = sum.data() + here, * __restrict totals = total.data() + here;
                                 for (int64_t k = 0; k < count; ++k)
                                     sums[k] += weights[k] * metres[k], totals[k] += weights[k];
                             });
        for (int64_t at = y * image.width + first; at < y * image.width + last; ++at) after[at] = sum[at] / total[at];
    });
}

template <typename Value, typename Round>
Plane<Value> follow(const char* name, const Plane<Value>& plane, const Plane<uint8_t>& image, const Round& round) {
    require(plane.ndim() == 2, name, ": labels have ", plane.ndim(), " dimensions, expected 2: [H, W]");
    const int64_t height = plane.shape(0), width = plane.shape(1);
    require_size(name, height, width);
    require(image.ndim() == 3 && image.shape(0) == height && image.shape(1) == width && image.shape(2) == 3, name,
            ": the image is not [", height, ", ", width, ", 3] as its labels");
    Plane<Value> found(std::vector<pybind11::ssize_t>{height, width});
    const Value* source = plane.data();
    const uint8_t* pixels = image.data();
    Value* target = found.mutable_data();
    {
        ReleasedGil release;
        const Image planes(height, width, pixels);
        Values before(source, source + height * width), after(before);
        for (int k = 0; k < kRounds; ++k) {
            round(planes, before, after);
            before = after;
        }
        std::copy(after.begin(), after.end(), target);
    }
    return found;
}

}  // namespace

Plane<uint8_t> outlines_of_labels(const Plane<uint8_t>& labels, const Plane<uint8_t>& image) {
    Plane<uint8_t> found = follow("outlines_of_labels", labels, image, vote);
    const uint8_t* before = labels.data();
    uint8_t* after = found.mutable_data();
    std::array<int64_t, 256> had{}, has{};
    for (int64_t at = 0; at < found.size(); ++at) ++had[before[at]], ++has[after[at]];
    for (int64_t at = 0; at < found.size(); ++at)
        if (2 * has[before[at]] < had[before[at]]) after[at] = before[at];
    return found;
}

Plane<float> outlines_of_depth(const Plane<float>& metres, const Plane<uint8_t>& image) {
    return follow("outlines_of_depth", metres, image, average);
}

}  // namespace datasetdm
