// Included by each_instruction_set.h.
// Channels run fastest everywhere, so that both transforms are sums of whole vectors.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

#include "vectors.h"
constexpr int64_t kVectors = VECTOR_BYTES == 16 ? 4 : 2;                       // of columns that a product works on at once
constexpr int64_t kRows = VECTOR_BYTES == 64 ? 12 : VECTOR_BYTES == 32 ? 6 : 2;  // with kVectors sums each they fill the registers

// Six values of a row or column of a tile to the six that are multiplied.
INLINE void into_products(const Vector* d, int64_t step, Vector* v) {
    const Vector even = d[4 * step] - 2.25f * d[2 * step], odd = 0.5f * d[3 * step] - 1.125f * d[step];
    const Vector far_even = d[4 * step] - 0.25f * d[2 * step], far_odd = 1.5f * d[3 * step] - 0.375f * d[step];
    v[0] = 0.5625f * d[0] - 2.5f * d[2 * step] + d[4 * step];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = 0.5625f * d[step] - 2.5f * d[3 * step] + d[5 * step];
}

// Six products to the four results of a row or column.
INLINE void from_products(const Vector* m, int64_t step, Vector* y) {
    const Vector sum = m[step] + m[2 * step], difference = m[step] - m[2 * step];
    const Vector far_sum = m[3 * step] + m[4 * step], far_difference = m[3 * step] - m[4 * step];
    y[0] = m[0] + sum + far_sum;
    y[1] = 0.5f * difference + 1.5f * far_difference;
    y[2] = 0.25f * sum + 2.25f * far_sum;
    y[3] = 0.125f * difference + 3.375f * far_difference + m[5 * step];
}

typedef double Wide __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t kWides = kPanel * 8 / VECTOR_BYTES;  // that hold a number of each output of a panel

// Keeps a compiler from fusing a product with the sum it is for.
INLINE void rounded([[maybe_unused]] Wide& product) {
#if defined(__x86_64__)
    __asm__("" : "+x"(product));
#endif
}

// Where sums are exact, halves of the last place are common, and whether a product is rounded before it is added decides which way these go.
// As PyTorch multiplied these matrices, the first four rows were fused; so an image stays the same to the bit.
template <bool is_fused>
INLINE Wide sum_of_three(const double* factors, const Wide& first, const Wide& second, const Wide& third) {
    Wide sum = factors[0] * first;
    rounded(sum);
    if constexpr (is_fused) {
        for (int64_t k = 0; k < VECTOR_BYTES / 8; ++k) sum[k] = __builtin_fma(factors[2], third[k], __builtin_fma(factors[1], second[k], sum[k]));
        return sum;
    }
    Wide product = factors[1] * second, last = factors[2] * third;
    rounded(product);
    rounded(last);
    return sum + product + last;
}

// Panels first .. last of a weight.
INSTRUCTIONS inline void transform_panels(const Weight& work, int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
        for (int64_t channel = 0; channel < work.channels; ++channel) {
            alignas(64) double taps[9][kPanel] = {};
            if (panel * kPanel < work.outputs)
                for (int64_t output = 0; output < kPanel; ++output)
                    for (int64_t tap = 0; tap < 9; ++tap)
                        taps[tap][output] = work.plain[((panel * kPanel + output) * 9 + tap) * work.channels + channel];
            for (int64_t part = 0; part < kWides; ++part) {
                Wide cells[9], half[kSide][3];
                for (int64_t tap = 0; tap < 9; ++tap) __builtin_memcpy(&cells[tap], &taps[tap][part * VECTOR_BYTES / 8], sizeof(Wide));
                for (int64_t column = 0; column < 3; ++column) {
                    for (int64_t row = 0; row < 4; ++row)
                        half[row][column] = sum_of_three<true>(kTaps[row], cells[column], cells[3 + column], cells[6 + column]);
                    for (int64_t row = 4; row < kSide; ++row)
                        half[row][column] = sum_of_three<false>(kTaps[row], cells[column], cells[3 + column], cells[6 + column]);
                }
                for (int64_t row = 0; row < kSide; ++row)
                    for (int64_t column = 0; column < kSide; ++column) {
                        const Wide sum = sum_of_three<false>(kTaps[column], half[row][0], half[row][1], half[row][2]);
                        float* target =
                            work.target + (((row * kSide + column) * work.panels + panel) * work.channels + channel) * kPanel + part * VECTOR_BYTES / 8;
                        for (int64_t k = 0; k < VECTOR_BYTES / 8; ++k) target[k] = static_cast<float>(sum[k]);
                    }
            }
        }
    }
}

// Channels first .. first + count of one tile, transformed, to target[k * pitch + channel] for each of the 36 places.
INSTRUCTIONS inline void transform_tile(const Winograd& work, int64_t tile, int64_t first, int64_t count, float* target, int64_t pitch) {
    const Tile place = work.tile(tile);
    const int64_t shift = work.is_doubled, height = work.height >> shift, width = work.width >> shift;
    const float* cells[kPlaces];
    for (int64_t row = 0; row < kSide; ++row) {
        for (int64_t column = 0; column < kSide; ++column) {
            const int64_t y = place.y + row - 1, x = place.x + column - 1;
            const bool is_inside = y >= 0 && y < work.height && x >= 0 && x < work.width;
            cells[row * kSide + column] = is_inside ? work.x + ((place.image * height + (y >> shift)) * width + (x >> shift)) * work.channels + first : nullptr;
        }
    }
    for (int64_t c = 0; c < count; c += kLanes) {
        Vector half[kPlaces], values[kSide], products[kSide];
        for (int64_t column = 0; column < kSide; ++column) {
            for (int64_t row = 0; row < kSide; ++row) {
                const float* cell = cells[row * kSide + column];
                values[row] = cell ? load(cell + c) : Vector{};
            }
            into_products(values, 1, products);
            for (int64_t row = 0; row < kSide; ++row) half[row * kSide + column] = products[row];
        }
        for (int64_t row = 0; row < kSide; ++row) {
            into_products(half + row * kSide, 1, products);
            for (int64_t column = 0; column < kSide; ++column) store(target + (row * kSide + column) * pitch + c, products[column]);
        }
    }
}

// The results of one tile for outputs first .. last from its products m[k * pitch + output - first], with bias and residual.
INSTRUCTIONS inline void finish_tile(const Winograd& work, int64_t tile, const float* m, int64_t pitch, int64_t first, int64_t last) {
    const Tile place = work.tile(tile);
    const int64_t rows = std::min(kTile, work.height - place.y), columns = std::min(kTile, work.width - place.x);
    const int64_t corner = ((place.image * work.height + place.y) * work.width + place.x) * work.outputs;
    for (int64_t c = first; c < last; c += kLanes) {
        Vector half[kTile * kSide], values[kSide], results[kTile];
        for (int64_t column = 0; column < kSide; ++column) {
            for (int64_t row = 0; row < kSide; ++row) values[row] = load(m + (row * kSide + column) * pitch + c - first);
            from_products(values, 1, results);
            for (int64_t row = 0; row < kTile; ++row) half[row * kSide + column] = results[row];
        }
        const Vector bias = load(work.bias + c);
        for (int64_t row = 0; row < rows; ++row) {
            from_products(half + row * kSide, 1, results);
            for (int64_t column = 0; column < columns; ++column) {
                const int64_t at = corner + (row * work.width + column) * work.outputs + c;
                const Vector result = results[column] + bias;
                store(work.out + at, work.residual ? result + load(work.residual + at) : result);
            }
        }
    }
}

// The four results of a row or column to what their gradient is for the six products: the adjoint of from_products.
INLINE void to_products(const Vector* y, int64_t step, Vector* m) {
    const Vector even = y[0] + 0.25f * y[2 * step], odd = 0.5f * y[step] + 0.125f * y[3 * step];
    const Vector far_even = y[0] + 2.25f * y[2 * step], far_odd = 1.5f * y[step] + 3.375f * y[3 * step];
    m[0] = y[0];
    m[1] = even + odd;
    m[2] = even - odd;
    m[3] = far_even + far_odd;
    m[4] = far_even - far_odd;
    m[5] = y[3 * step];
}

// The gradient of one tile's results as that of its products, to target[k * pitch + output].
INSTRUCTIONS inline void spread_tile(const Winograd& work, int64_t tile, float* target, int64_t pitch) {
    const Tile place = work.tile(tile);
    const int64_t rows = std::min(kTile, work.height - place.y), columns = std::min(kTile, work.width - place.x);
    const int64_t corner = ((place.image * work.height + place.y) * work.width + place.x) * work.outputs;
    for (int64_t c = 0; c < work.outputs; c += kLanes) {
        Vector half[kSide * kTile], results[kTile], products[kSide];
        for (int64_t column = 0; column < kTile; ++column) {
            for (int64_t row = 0; row < kTile; ++row)
                results[row] = row < rows && column < columns ? load(work.out + corner + (row * work.width + column) * work.outputs + c) : Vector{};
            to_products(results, 1, products);
            for (int64_t row = 0; row < kSide; ++row) half[row * kTile + column] = products[row];
        }
        for (int64_t row = 0; row < kSide; ++row) {
            to_products(half + row * kTile, 1, products);
            for (int64_t column = 0; column < kSide; ++column) store(target + (row * kSide + column) * pitch + c, products[column]);
        }
    }
}

constexpr int64_t kWide = kPanel / kLanes;  // vectors of a panel
constexpr int64_t kDeep = 8 / kWide;        // channels whose sums for one panel hide how long a sum takes

// Channels kDeep times one panel of outputs, summed over `tiles` and added to the target.
INLINE void multiply_tiles(const float* left, int64_t left_pitch, const float* right, int64_t right_pitch, int64_t tiles, float* target,
                           int64_t target_pitch) {
    Vector sums[kDeep][kWide];
    for (int64_t row = 0; row < kDeep; ++row)
        for (int64_t j = 0; j < kWide; ++j) sums[row][j] = load(target + row * target_pitch + j * kLanes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        Vector values[kWide];
        for (int64_t j = 0; j < kWide; ++j) values[j] = load(right + tile * right_pitch + j * kLanes);
#pragma GCC unroll 8
        for (int64_t row = 0; row < kDeep; ++row)
            for (int64_t j = 0; j < kWide; ++j) sums[row][j] += left[tile * left_pitch + row] * values[j];
    }
    for (int64_t row = 0; row < kDeep; ++row)
        for (int64_t j = 0; j < kWide; ++j) store(target + row * target_pitch + j * kLanes, sums[row][j]);
}

// The gradient of the weight for panels first .. last of the channels, over all tiles.
INSTRUCTIONS inline void gather(const Winograd& work, float* target, int64_t tiles, int64_t first, int64_t last) {
    const int64_t start = first * kPanel, depth = (last - first) * kPanel, step = std::min(kTiles, tiles);
    const int64_t left_pitch = step * depth + kApart, pitch = step * work.outputs + kApart;
    float *left = scratch(kPlaces * (left_pitch + pitch)), *right = left + kPlaces * left_pitch;
    for (int64_t place = 0; place < kPlaces; ++place) std::fill_n(target + (place * work.channels + start) * work.outputs, depth * work.outputs, 0.0f);
    for (int64_t begin = 0; begin < tiles; begin += step) {
        const int64_t count = std::min(step, tiles - begin);
        for (int64_t tile = 0; tile < count; ++tile) {
            transform_tile(work, begin + tile, start, depth, left + tile * depth, left_pitch);
            spread_tile(work, begin + tile, right + tile * work.outputs, pitch);
        }
        for (int64_t place = 0; place < kPlaces; ++place)
            for (int64_t output = 0; output < work.outputs; output += kPanel)
                for (int64_t channel = 0; channel < depth; channel += kDeep)
                    multiply_tiles(left + place * left_pitch + channel, depth, right + place * pitch + output, work.outputs, count,
                                   target + (place * work.channels + start + channel) * work.outputs + output, work.outputs);
    }
}

// kRows rows of `left` times one panel of the weight, added to what the target holds where `is_added`.
INLINE void multiply_rows(const float* left, int64_t left_pitch, int64_t inner, const float* panels, int64_t panel, float* target, int64_t target_pitch,
                          bool is_added) {
    Vector sums[kRows][kVectors];
    for (int64_t row = 0; row < kRows; ++row)
        for (int64_t j = 0; j < kVectors; ++j) sums[row][j] = is_added ? load(target + row * target_pitch + j * kLanes) : Vector{};
    for (int64_t i = 0; i < inner; ++i) {
        Vector values[kVectors];
        for (int64_t j = 0; j < kVectors; ++j) values[j] = load(panels + j * kLanes / kPanel * panel + i * kPanel + j * kLanes % kPanel);
#pragma GCC unroll 12
        for (int64_t row = 0; row < kRows; ++row)
            for (int64_t j = 0; j < kVectors; ++j) sums[row][j] += left[row * left_pitch + i] * values[j];
    }
    for (int64_t row = 0; row < kRows; ++row)
        for (int64_t j = 0; j < kVectors; ++j) store(target + row * target_pitch + j * kLanes, sums[row][j]);
}

// Tiles first .. last.
INSTRUCTIONS inline void convolve(const Winograd& work, int64_t first, int64_t last) {
    const int64_t step = std::min(kTiles, (last - first + kRows - 1) / kRows * kRows), inner = std::min(kChannels, work.channels);
    const int64_t width = (work.outputs + kVectors * kLanes - 1) / (kVectors * kLanes) * kVectors * kLanes;
    const int64_t left_pitch = step * inner + kApart, pitch = step * width + kApart, panel = work.channels * kPanel;
    float *left = scratch(kPlaces * (left_pitch + pitch)), *products = left + kPlaces * left_pitch;
    for (int64_t start = first; start < last; start += step) {
        const int64_t count = std::min(step, last - start), rows = (count + kRows - 1) / kRows * kRows;
        for (int64_t channel = 0; channel < work.channels; channel += inner) {
            const int64_t depth = std::min(inner, work.channels - channel);
            for (int64_t tile = 0; tile < count; ++tile) transform_tile(work, start + tile, channel, depth, left + tile * depth, left_pitch);
            for (int64_t place = 0; place < kPlaces; ++place)
                for (int64_t output = 0; output < width; output += kVectors * kLanes)
                    for (int64_t row = 0; row < rows; row += kRows)
                        multiply_rows(left + place * left_pitch + row * depth, depth, depth,
                                      work.weight + (place * work.panels() + output / kPanel) * panel + channel * kPanel, panel,
                                      products + place * pitch + row * width + output, width, channel > 0);
        }
        for (int64_t tile = 0; tile < count; ++tile) finish_tile(work, start + tile, products + tile * width, pitch, 0, work.outputs);
    }
}

INSTRUCTIONS inline void transform_tiles(const Winograd& work, int64_t tile, int64_t first, int64_t last, float* left, const Shares& shares) {
    for (int64_t part = 0; part < shares.parts; ++part)
        for (int64_t i = first; i < last; ++i)
            transform_tile(work, tile + i, part * kTapChannels, std::min(kTapChannels, work.channels - part * kTapChannels),
                           left + part * kPlaces * shares.left_pitch + i * kTapChannels, shares.left_pitch);
}

// Three taps of a row or column to the six values that are multiplied.
INLINE void from_taps(const Vector& a, const Vector& b, const Vector& c, Vector* t) {
    const Vector even = -a - 0.25f * c, odd = 0.5f * b;
    const Vector far_even = (1.0f / 9) * a + 0.25f * c, far_odd = (1.0f / 6) * b;
    t[0] = (16.0f / 9) * a;
    t[1] = even - odd;
    t[2] = even + odd;
    t[3] = far_even + far_odd;
    t[4] = far_even - far_odd;
    t[5] = c;
}

// `count` channels of one panel, whose taps lie `pitch` apart, to target[place * kWeightPitch + channel * 16].
INSTRUCTIONS inline void transform_taps(const float* taps, int64_t pitch, int64_t count, float* target) {
    for (int64_t at = 0; at < count * kPanel; at += kLanes) {
        Vector half[3][kSide], places[kSide];
        for (int64_t column = 0; column < 3; ++column) {
            const float* from = taps + column * pitch + at;
            from_taps(load(from), load(from + 3 * pitch), load(from + 6 * pitch), half[column]);
        }
        for (int64_t row = 0; row < kSide; ++row) {
            from_taps(half[0][row], half[1][row], half[2][row], places);
            for (int64_t column = 0; column < kSide; ++column) store(target + (row * kSide + column) * kWeightPitch + at, places[column]);
        }
    }
}

// Pairs first .. last of panels for `count` tiles, whose transformed cells are `left`; the weight of `work` are its taps.
INSTRUCTIONS inline void convolve_pairs(const Winograd& work, int64_t tile, int64_t count, const float* left, const Shares& shares, int64_t first,
                                        int64_t last, float* weight) {
    constexpr int64_t kWidth = 2 * kPanel, kOne = kTapChannels * kPanel;
    const int64_t channels = work.channels, panel = channels * kPanel, pitch = shares.products_pitch;
    float* products = weight + kPlaces * kWeightPitch;
    for (int64_t pair = first; pair < last; ++pair) {
        for (int64_t part = 0; part < shares.parts; ++part) {
            const int64_t channel = part * kTapChannels, depth = std::min(kTapChannels, channels - channel);
            for (int64_t half = 0; half < 2; ++half)
                transform_taps(work.weight + (pair * 2 + half) * 9 * panel + channel * kPanel, panel, depth, weight + half * kOne);
            for (int64_t place = 0; place < kPlaces; ++place)
                for (int64_t column = 0; column < kWidth; column += kVectors * kLanes)
                    for (int64_t row = 0; row < count; row += kRows)
                        multiply_rows(left + (part * kPlaces + place) * shares.left_pitch + row * kTapChannels, kTapChannels, depth,
                                      weight + place * kWeightPitch + column / kPanel * kOne, kOne, products + place * pitch + row * kWidth + column, kWidth,
                                      channel > 0);
        }
        for (int64_t i = 0; i < count; ++i)
            finish_tile(work, tile + i, products + i * kWidth, pitch, pair * kWidth, std::min((pair + 1) * kWidth, work.outputs));
    }
}

}  // namespace WITH_INSTRUCTIONS
}  // namespace datasetdm
