// Included by each_instruction_set.h.
// Channels run fastest everywhere, so that both transforms are sums of whole vectors.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

#include "vectors.h"
#include "pairs.h"
constexpr int64_t kVectors = VECTOR_BYTES == 16 ? 4 : 2;  // of columns that a product works on at once
constexpr int64_t kRows = VECTOR_BYTES == 64   ? 12
                          : VECTOR_BYTES == 32 ? 6
                                               : 2;  // with kVectors sums each they fill the registers

// B^T of Lavin & Gray (2016): six values of a row or column of a tile to the six that are multiplied.
INLINE void input_transform(const Vector* d, int64_t step, Vector* v) {
    const Vector even = d[4 * step] - 2.25f * d[2 * step], odd = 0.5f * d[3 * step] - 1.125f * d[step];
    const Vector far_even = d[4 * step] - 0.25f * d[2 * step], far_odd = 1.5f * d[3 * step] - 0.375f * d[step];
    v[0] = 0.5625f * d[0] - 2.5f * d[2 * step] + d[4 * step];
    v[1] = even + odd;
    v[2] = even - odd;
    v[3] = far_even + far_odd;
    v[4] = far_even - far_odd;
    v[5] = 0.5625f * d[step] - 2.5f * d[3 * step] + d[5 * step];
}

// A^T: six products to the four results of a row or column.
INLINE void output_transform(const Vector* m, int64_t step, Vector* y) {
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

// Where sums are exact, halves of the last place are common, and whether a product is rounded before it is added
// decides which way these go. As PyTorch multiplied these matrices, the first four rows were fused; so an image stays
// the same to the bit.
template <bool is_fused>
INLINE Wide sum_of_three(const double* factors, const Wide& first, const Wide& second, const Wide& third) {
    Wide sum = factors[0] * first;
    rounded(sum);
    if constexpr (is_fused) {
        for (int64_t k = 0; k < VECTOR_BYTES / 8; ++k)
            sum[k] = __builtin_fma(factors[2], third[k], __builtin_fma(factors[1], second[k], sum[k]));
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
                for (int64_t tap = 0; tap < 9; ++tap)
                    __builtin_memcpy(&cells[tap], &taps[tap][part * VECTOR_BYTES / 8], sizeof(Wide));
                for (int64_t column = 0; column < 3; ++column) {
                    for (int64_t row = 0; row < 4; ++row)
                        half[row][column] =
                            sum_of_three<true>(kG[row], cells[column], cells[3 + column], cells[6 + column]);
                    for (int64_t row = 4; row < kSide; ++row)
                        half[row][column] =
                            sum_of_three<false>(kG[row], cells[column], cells[3 + column], cells[6 + column]);
                }
                for (int64_t row = 0; row < kSide; ++row)
                    for (int64_t column = 0; column < kSide; ++column) {
                        const Wide sum = sum_of_three<false>(kG[column], half[row][0], half[row][1], half[row][2]);
                        float* target =
                            work.target +
                            (((row * kSide + column) * work.panels + panel) * work.channels + channel) * kPanel +
                            part * VECTOR_BYTES / 8;
                        for (int64_t k = 0; k < VECTOR_BYTES / 8; ++k) target[k] = static_cast<float>(sum[k]);
                    }
            }
        }
    }
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

// How a number of a transformed tile is stored, where it lies, and what its products take.
struct PlainTiles {
    typedef float Stored;
    static constexpr int64_t kSteps = 1;  // channels that are multiplied at once
    static constexpr int64_t kAcross = kSide, kWide = kTile, kAll = kPlaces;

    static INLINE int64_t size(int64_t channels) { return channels; }
    static INLINE void put(float* to, const Vector& value) { store(to, value); }
    static INLINE Vector read(const float* weight) { return load(weight); }
    static INLINE void add(Vector& sum, const float* left, const Vector& columns) { sum += *left * columns; }
    static INLINE void into(const Vector* d, Vector* v) { input_transform(d, 1, v); }
    static INLINE void from(const Vector* m, Vector* y) { output_transform(m, 1, y); }
    static INLINE void taps(const Vector& a, const Vector& b, const Vector& c, Vector* t) { from_taps(a, b, c, t); }
};

// Of two results along a row, with the points 0 and +-1.
struct PairedTiles {
    typedef Paired Stored;
    static constexpr int64_t kSteps = 2;
    static constexpr int64_t kAcross = kPairedAcross, kWide = kPairedWide, kAll = kSide * kAcross;

    static INLINE int64_t size(int64_t channels) { return channels / 2 * kPairSize; }
    static INLINE void put(Paired* to, const Vector& value) { store_paired(to, value); }
    static INLINE Factors read(const float* weight) { return factors(reinterpret_cast<const int32_t*>(weight)); }
    static INLINE void add(Vector& sum, const Paired* left, const Factors& columns) { add_product(sum, left, columns); }
    static INLINE void into(const Vector* d, Vector* v) {
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[3] - d[1];
    }
    static INLINE void from(const Vector* m, Vector* y) {
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] + m[3];
    }
    static INLINE void taps(const Vector& a, const Vector& b, const Vector& c, Vector* t) {
        const Vector even = 0.5f * a + 0.5f * c, odd = 0.5f * b;
        t[0] = a;
        t[1] = even + odd;
        t[2] = even - odd;
        t[3] = c;
    }
};

// Channels first .. first + count of one tile, transformed, to where `target` holds them for each of the places, which
// are `pitch` apart.
template <typename Kind, typename Cell>
INSTRUCTIONS void transform_tile(const Winograd<Cell>& work, int64_t tile, int64_t first, int64_t count,
                                 typename Kind::Stored* target, int64_t pitch) {
    const Tile place = work.tile(tile);
    const int64_t shift = work.is_doubled, height = work.height >> shift, width = work.width >> shift;
    const Cell* cells[kPlaces];
    for (int64_t row = 0; row < kSide; ++row) {
        for (int64_t column = 0; column < Kind::kAcross; ++column) {
            const int64_t y = place.y + row - 1, x = place.x + column - 1;
            const bool is_inside = y >= 0 && y < work.height && x >= 0 && x < work.width;
            cells[row * Kind::kAcross + column] =
                is_inside
                    ? work.x + ((place.image * height + (y >> shift)) * width + (x >> shift)) * work.channels + first
                    : nullptr;
        }
    }
    for (int64_t c = 0; c < count; c += kLanes) {
        Vector half[kPlaces], values[kSide], products[kSide];
        for (int64_t column = 0; column < Kind::kAcross; ++column) {
            for (int64_t row = 0; row < kSide; ++row) {
                const Cell* cell = cells[row * Kind::kAcross + column];
                values[row] = cell ? load(cell + c) : Vector{};
            }
            input_transform(values, 1, products);
            for (int64_t row = 0; row < kSide; ++row) half[row * Kind::kAcross + column] = products[row];
        }
        for (int64_t row = 0; row < kSide; ++row) {
            Kind::into(half + row * Kind::kAcross, products);
            for (int64_t column = 0; column < Kind::kAcross; ++column)
                Kind::put(target + (row * Kind::kAcross + column) * pitch + Kind::size(c), products[column]);
        }
    }
}

// The results of one tile for outputs first .. last from its products m[k * pitch + output - first], with bias and
// residual.
template <typename Kind, typename Cell>
INSTRUCTIONS void finish_tile(const Winograd<Cell>& work, int64_t tile, const float* m, int64_t pitch, int64_t first,
                              int64_t last) {
    const Tile place = work.tile(tile);
    const int64_t rows = std::min(kTile, work.height - place.y), columns = std::min(Kind::kWide, work.width - place.x);
    const int64_t corner = ((place.image * work.height + place.y) * work.width + place.x) * work.outputs;
    for (int64_t c = first; c < last; c += kLanes) {
        Vector half[kTile * kSide], values[kSide], results[kTile];
        for (int64_t column = 0; column < Kind::kAcross; ++column) {
            for (int64_t row = 0; row < kSide; ++row)
                values[row] = load(m + (row * Kind::kAcross + column) * pitch + c - first);
            output_transform(values, 1, results);
            for (int64_t row = 0; row < kTile; ++row) half[row * Kind::kAcross + column] = results[row];
        }
        const Vector bias = load(work.bias + c);
        for (int64_t row = 0; row < rows; ++row) {
            Kind::from(half + row * Kind::kAcross, results);
            for (int64_t column = 0; column < columns; ++column) {
                const int64_t at = corner + (row * work.width + column) * work.outputs + c;
                const Vector result = results[column] + bias;
                store(work.out + at, work.residual ? result + load(work.residual + at) : result);
            }
        }
    }
}

// The four results of a row or column to what their gradient is for the six products: the adjoint of output_transform.
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
INSTRUCTIONS inline void spread_tile(const Winograd<float>& work, int64_t tile, float* target, int64_t pitch) {
    const Tile place = work.tile(tile);
    const int64_t rows = std::min(kTile, work.height - place.y), columns = std::min(kTile, work.width - place.x);
    const int64_t corner = ((place.image * work.height + place.y) * work.width + place.x) * work.outputs;
    for (int64_t c = 0; c < work.outputs; c += kLanes) {
        Vector half[kSide * kTile], results[kTile], products[kSide];
        for (int64_t column = 0; column < kTile; ++column) {
            for (int64_t row = 0; row < kTile; ++row)
                results[row] = row < rows && column < columns
                                   ? load(work.out + corner + (row * work.width + column) * work.outputs + c)
                                   : Vector{};
            to_products(results, 1, products);
            for (int64_t row = 0; row < kSide; ++row) half[row * kTile + column] = products[row];
        }
        for (int64_t row = 0; row < kSide; ++row) {
            to_products(half + row * kTile, 1, products);
            for (int64_t column = 0; column < kSide; ++column)
                store(target + (row * kSide + column) * pitch + c, products[column]);
        }
    }
}

constexpr int64_t kWide = kPanel / kLanes;  // vectors of a panel
constexpr int64_t kDeep = 8 / kWide;        // channels whose sums for one panel hide how long a sum takes

// Channels kDeep times one panel of outputs, summed over `tiles` and added to the target.
INLINE void multiply_tiles(const float* left, int64_t left_pitch, const float* right, int64_t right_pitch,
                           int64_t tiles, float* target, int64_t target_pitch) {
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
INSTRUCTIONS inline void gather(const Winograd<float>& work, float* target, int64_t tiles, int64_t first,
                                int64_t last) {
    const int64_t start = first * kPanel, depth = (last - first) * kPanel, step = std::min(kTiles, tiles);
    const int64_t left_pitch = step * depth + kApart, pitch = step * work.outputs + kApart;
    float *left = scratch(kPlaces * (left_pitch + pitch)), *right = left + kPlaces * left_pitch;
    for (int64_t place = 0; place < kPlaces; ++place)
        std::fill_n(target + (place * work.channels + start) * work.outputs, depth * work.outputs, 0.0f);
    for (int64_t begin = 0; begin < tiles; begin += step) {
        const int64_t count = std::min(step, tiles - begin);
        for (int64_t tile = 0; tile < count; ++tile) {
            transform_tile<PlainTiles>(work, begin + tile, start, depth, left + tile * depth, left_pitch);
            spread_tile(work, begin + tile, right + tile * work.outputs, pitch);
        }
        for (int64_t place = 0; place < kPlaces; ++place)
            for (int64_t output = 0; output < work.outputs; output += kPanel)
                for (int64_t channel = 0; channel < depth; channel += kDeep)
                    multiply_tiles(
                        left + place * left_pitch + channel, depth, right + place * pitch + output, work.outputs, count,
                        target + (place * work.channels + start + channel) * work.outputs + output, work.outputs);
    }
}

// kRows rows of `left` times one panel of the weight, added to what the target holds where `is_added`.
template <typename Kind>
INLINE void multiply_rows(const typename Kind::Stored* left, int64_t left_pitch, int64_t inner, const float* panels,
                          int64_t panel, float* target, int64_t target_pitch, bool is_added) {
    Vector sums[kRows][kVectors];
    for (int64_t row = 0; row < kRows; ++row)
        for (int64_t j = 0; j < kVectors; ++j)
            sums[row][j] = is_added ? load(target + row * target_pitch + j * kLanes) : Vector{};
    for (int64_t i = 0; i < inner / Kind::kSteps; ++i) {
        decltype(Kind::read(panels)) values[kVectors];
        for (int64_t j = 0; j < kVectors; ++j)
            values[j] = Kind::read(panels + j * kLanes / kPanel * panel + i * kPanel + j * kLanes % kPanel);
#pragma GCC unroll 12
        for (int64_t row = 0; row < kRows; ++row)
            for (int64_t j = 0; j < kVectors; ++j)
                Kind::add(sums[row][j], left + row * left_pitch + Kind::size(i * Kind::kSteps), values[j]);
    }
    for (int64_t row = 0; row < kRows; ++row)
        for (int64_t j = 0; j < kVectors; ++j) store(target + row * target_pitch + j * kLanes, sums[row][j]);
}

// Tiles first .. last.
template <typename Kind, typename Cell>
INSTRUCTIONS void convolve(const Winograd<Cell>& work, int64_t first, int64_t last) {
    const int64_t step = std::min(kTiles, (last - first + kRows - 1) / kRows * kRows),
                  inner = std::min(kChannels, work.channels);
    const int64_t width = (work.outputs + kVectors * kLanes - 1) / (kVectors * kLanes) * kVectors * kLanes;
    const int64_t left_pitch = step * Kind::size(inner) + kApart, pitch = step * width + kApart,
                  panel = work.channels / Kind::kSteps * kPanel;
    float *memory = scratch(Kind::kAll * (left_pitch + pitch)), *products = memory + Kind::kAll * left_pitch;
    auto* left = reinterpret_cast<typename Kind::Stored*>(memory);
    for (int64_t start = first; start < last; start += step) {
        const int64_t count = std::min(step, last - start), rows = (count + kRows - 1) / kRows * kRows;
        for (int64_t channel = 0; channel < work.channels; channel += inner) {
            const int64_t depth = std::min(inner, work.channels - channel), size = Kind::size(depth);
            for (int64_t tile = 0; tile < count; ++tile)
                transform_tile<Kind>(work, start + tile, channel, depth, left + tile * size, left_pitch);
            for (int64_t place = 0; place < Kind::kAll; ++place)
                for (int64_t output = 0; output < width; output += kVectors * kLanes)
                    for (int64_t row = 0; row < rows; row += kRows)
                        multiply_rows<Kind>(left + place * left_pitch + row * size, size, depth,
                                            work.weight + (place * work.panels() + output / kPanel) * panel +
                                                channel / Kind::kSteps * kPanel,
                                            panel, products + place * pitch + row * width + output, width, channel > 0);
        }
        for (int64_t tile = 0; tile < count; ++tile)
            finish_tile<Kind>(work, start + tile, products + tile * width, pitch, 0, work.outputs);
    }
}

INSTRUCTIONS inline void convolve_in(const Winograd<float>& work, bool is_rounded, int64_t first, int64_t last) {
    if (is_rounded)
        convolve<PairedTiles>(work, first, last);
    else
        convolve<PlainTiles>(work, first, last);
}
INSTRUCTIONS inline void convolve_in(const Winograd<Bfloat>& work, bool, int64_t first, int64_t last) {
    convolve<PairedTiles>(work, first, last);
}

template <typename Kind, typename Cell>
INSTRUCTIONS void transform_tiles(const Winograd<Cell>& work, int64_t tile, int64_t first, int64_t last, float* left,
                                  const Shares& shares) {
    for (int64_t part = 0; part < shares.parts; ++part)
        for (int64_t i = first; i < last; ++i)
            transform_tile<Kind>(work, tile + i, part * kTapChannels,
                                 std::min(kTapChannels, work.channels - part * kTapChannels),
                                 reinterpret_cast<typename Kind::Stored*>(left + part * kPlaces * shares.left_pitch) +
                                     i * Kind::size(kTapChannels),
                                 shares.left_pitch);
}

// Nine taps, `pitch` apart, to all places.
template <typename Kind, typename Read, typename Write>
INLINE void transform_taps(int64_t pitch, const Read& read, const Write& write) {
    Vector half[3][kSide], places[kSide];
    for (int64_t column = 0; column < 3; ++column)
        from_taps(read(column * pitch), read((column + 3) * pitch), read((column + 6) * pitch), half[column]);
    for (int64_t row = 0; row < kSide; ++row) {
        Kind::taps(half[0][row], half[1][row], half[2][row], places);
        for (int64_t column = 0; column < Kind::kAcross; ++column) write(row * Kind::kAcross + column, places[column]);
    }
}

// `count` channels of one panel to target[place * kWeightPitch + channel * 16].
INSTRUCTIONS inline void transform_panel(PlainTiles, const float* taps, int64_t pitch, int64_t count, float* target) {
    for (int64_t at = 0; at < count * kPanel; at += kLanes)
        transform_taps<PlainTiles>(
            pitch, [&](int64_t tap) INSTRUCTIONS { return load(taps + tap + at); },
            [&](int64_t place, const Vector& value) INSTRUCTIONS { store(target + place * kWeightPitch + at, value); });
}

// The same of pairs of channels.
INSTRUCTIONS inline void transform_panel(PairedTiles, const float* taps, int64_t pitch, int64_t count, float* target) {
    for (int64_t at = 0; at < count / 2 * kPanel; at += kLanes) {
        Vector first[kPlaces];
        const auto both = [&](int64_t tap)
                              INSTRUCTIONS { return unpaired(reinterpret_cast<const int32_t*>(taps) + tap + at); };
        transform_taps<PairedTiles>(
            pitch, [&](int64_t tap) INSTRUCTIONS { return both(tap).first; },
            [&](int64_t place, const Vector& value) INSTRUCTIONS { first[place] = value; });
        transform_taps<PairedTiles>(
            pitch, [&](int64_t tap) INSTRUCTIONS { return both(tap).second; },
            [&](int64_t place, const Vector& value) INSTRUCTIONS {
                store_both(reinterpret_cast<int32_t*>(target) + place * kWeightPitch + at, first[place], value);
            });
    }
}

// Panels 2 first .. 2 last for `count` tiles, whose transformed cells are `left`; the weight of `work` are its taps.
template <typename Kind, typename Cell>
INSTRUCTIONS void convolve_panels(const Winograd<Cell>& work, int64_t tile, int64_t count, const float* left,
                                  const Shares& shares, int64_t first, int64_t last, float* weight) {
    constexpr int64_t kWidth = 2 * kPanel, kOne = kTapChannels / Kind::kSteps * kPanel;
    const int64_t channels = work.channels, panel = channels / Kind::kSteps * kPanel, pitch = shares.products_pitch,
                  size = Kind::size(kTapChannels);
    float* products = weight + kPlaces * kWeightPitch;
    for (int64_t two = first; two < last; ++two) {
        for (int64_t part = 0; part < shares.parts; ++part) {
            const int64_t channel = part * kTapChannels, depth = std::min(kTapChannels, channels - channel);
            for (int64_t half = 0; half < 2; ++half)
                transform_panel(Kind(), work.weight + (two * 2 + half) * 9 * panel + channel / Kind::kSteps * kPanel,
                                panel, depth, weight + half * kOne);
            for (int64_t place = 0; place < Kind::kAll; ++place) {
                const auto* rows =
                    reinterpret_cast<const typename Kind::Stored*>(left + (part * kPlaces + place) * shares.left_pitch);
                for (int64_t column = 0; column < kWidth; column += kVectors * kLanes)
                    for (int64_t row = 0; row < count; row += kRows)
                        multiply_rows<Kind>(rows + row * size, size, depth,
                                            weight + place * kWeightPitch + column / kPanel * kOne, kOne,
                                            products + place * pitch + row * kWidth + column, kWidth, channel > 0);
            }
        }
        for (int64_t i = 0; i < count; ++i)
            finish_tile<Kind>(work, tile + i, products + i * kWidth, pitch, two * kWidth,
                              std::min((two + 1) * kWidth, work.outputs));
    }
}

// The two halves of a call from taps, in the form of its images.
INSTRUCTIONS inline void transform_part(const Winograd<float>& work, int64_t tile, int64_t first, int64_t last,
                                        float* left, const Shares& shares) {
    transform_tiles<PlainTiles>(work, tile, first, last, left, shares);
}
INSTRUCTIONS inline void transform_part(const Winograd<Bfloat>& work, int64_t tile, int64_t first, int64_t last,
                                        float* left, const Shares& shares) {
    transform_tiles<PairedTiles>(work, tile, first, last, left, shares);
}
INSTRUCTIONS inline void convolve_part(const Winograd<float>& work, int64_t tile, int64_t count, const float* left,
                                       const Shares& shares, int64_t first, int64_t last, float* weight) {
    convolve_panels<PlainTiles>(work, tile, count, left, shares, first, last, weight);
}
INSTRUCTIONS inline void convolve_part(const Winograd<Bfloat>& work, int64_t tile, int64_t count, const float* left,
                                       const Shares& shares, int64_t first, int64_t last, float* weight) {
    convolve_panels<PairedTiles>(work, tile, count, left, shares, first, last, weight);
}

}  // namespace WITH_INSTRUCTIONS
}  // namespace datasetdm
