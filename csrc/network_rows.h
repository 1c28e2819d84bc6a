// Included by each_instruction_set.h.
// One thread's share of each operation. Rows are widened to fp32 in scratch memory, so the arithmetic is written once
// for both storages.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

#include "vectors.h"
#include "pairs.h"
// Attention is computed in tiles. kQueries queries share one load of keys or values; with kVectors vectors of sums each
// they fill the registers. kKeys keys and their values stay in the nearest cache for kGroup queries.
constexpr int64_t kQueries = VECTOR_BYTES == 64 ? 8 : VECTOR_BYTES == 32 ? 6 : 4;
constexpr int64_t kVectors = VECTOR_BYTES == 64 ? 3 : 2;
constexpr int64_t kKeys = 256;
constexpr int64_t kGroup = 32 * kQueries;

INLINE Vector all(float value) { return value - Vector{}; }
INLINE Vector larger(const Vector& a, const Vector& b) { return a > b ? a : b; }  // b where either is NaN
// Halves are folded onto each other: taking the lanes one by one would cost more than the rest of a short row.
template <typename Fold>
INLINE float folded(const Vector& value, const Fold& fold) {
    float lanes[kLanes];
    store(lanes, value);
    for (int64_t step = kLanes / 2; step; step /= 2)
        for (int64_t lane = 0; lane < step; ++lane) lanes[lane] = fold(lanes[lane], lanes[lane + step]);
    return lanes[0];
}
INLINE float sum_of(const Vector& value) {
    return folded(value, [](float a, float b) { return a + b; });
}
INLINE float largest_of(const Vector& value) {
    return folded(value, [](float a, float b) { return a > b ? a : b; });
}

// 2^x for x <= 127, to 1e-7, or to 8e-5 where it is rounded to bf16; below -126 it stays at 2^-126, which no sum with 1
// in it can tell from 0. A NaN stays one.
template <bool is_rounded = false>
INLINE void power_of_two(Vector& x) {
    const Vector clamped = larger(all(-126.0f), x);
    const Vector shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the lowest bits now hold the nearest whole number
    const Vector r = clamped - (shifted - 12582912.0f);
    Vector y;
    if constexpr (is_rounded) {
        y = 5.517167e-2f * r + 2.4261113e-1f;
        y = y * r + 6.9326099e-1f;
        y = y * r + 9.9992807e-1f;
    } else {
        y = all(1.32647484e-3f);
        y = y * r + 9.671513e-3f;
        y = y * r + 5.55073369e-2f;
        y = y * r + 2.40222421e-1f;
        y = y * r + 6.93146978e-1f;
        y = y * r + 1.0f;
    }
    Integers exponent, bits;
    __builtin_memcpy(&exponent, &shifted, sizeof exponent);
    __builtin_memcpy(&bits, &y, sizeof bits);
    bits += exponent << 23;
    __builtin_memcpy(&x, &bits, sizeof x);
}

constexpr float kLog2E = 1.4426950408889634f;

INLINE void silu(Vector& x) {
    Vector small = larger(x * -kLog2E, all(-126.0f));
    small = small > 126.0f ? all(126.0f) : small;
    power_of_two(small);
    x = x / (1.0f + small);
}

// x times the standard normal distribution's share below x: erf as 1 - exp(-z^2) times a polynomial in 1 / (1 + 0.56
// z), fitted to 2e-9.
INLINE void gelu(Vector& x) {
    const Vector z = (x < 0.0f ? -x : x) * 0.70710678f;
    Vector tail = z * z * -kLog2E;
    power_of_two(tail);
    const Vector t = 1.0f / (1.0f + 0.56f * z);
    Vector y = all(-0.0498156717f);
    y = y * t + 0.25780245f;
    y = y * t + -0.454635228f;
    y = y * t + 0.168487414f;
    y = y * t + 0.221503958f;
    y = y * t + 0.208832385f;
    y = y * t + 0.33390711f;
    y = y * t + 0.313917581f;
    tail *= y * t;  // 1 - erf(z)
    x = 0.5f * x * (x < 0.0f ? tail : 2.0f - tail);
}

// Plain loops over floats would become calls of memcpy, dearer than the few values of one head.
INLINE void copy(const float* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) std::memcpy(to + i, from + i, (count - i) * sizeof(float));
}
INLINE void widen(const float* from, float* to, int64_t count) { copy(from, to, count); }
INLINE void widen(const Bfloat* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
        std::memcpy(to + i, &bits, 4);
    }
}
INLINE void narrow(const float* from, float* to, int64_t count) { copy(from, to, count); }
INLINE void widen(const Rounded* from, float* to, int64_t count) { copy(&from->value, to, count); }
INLINE void narrow(const float* from, Rounded* to, int64_t count) { copy(from, &to->value, count); }
INLINE void narrow(const float* from, Bfloat* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[i].bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // a NaN stays one
    }
}

// How rows are multiplied: as numbers or, where the processor has its products, in bf16 pairs along the summed axis.
struct PlainKeys {
    typedef float Left;
    static constexpr int64_t kSteps = 1;

    static INLINE Vector read(const float* right) { return load(right); }
    static INLINE void add(Vector& sum, const float* left, const Vector& columns) { sum += *left * columns; }
    static INLINE void power(Vector& x) { power_of_two(x); }
    static INLINE void put(float* to, const Vector& values) { store(to, values); }
};

#ifdef HAS_DOTS
struct PairedKeys {
    typedef int32_t Left;
    static constexpr int64_t kSteps = 2;

    static INLINE Factors read(const int32_t* right) { return factors(right); }
    static INLINE void add(Vector& sum, const int32_t* left, const Factors& columns) {
        add_product(sum, left, columns);
    }
    static INLINE void power(Vector& x) { power_of_two<true>(x); }
    static INLINE void put(int32_t* to, const Vector& values) { store_paired(to, values); }
};
#endif

// Products of kQueries rows of `left` with kCount vectors of columns of `right`, which lie `apart`. They replace the
// target, or are added to what its rows count for by their `share`.
template <typename Kind, int64_t kCount, typename Left>
INLINE void multiply_rows(const Left* left, int64_t left_pitch, int64_t steps, const Left* right, int64_t right_pitch,
                          int64_t apart, const float* share, float* target, int64_t target_pitch) {
    Vector sums[kQueries][kCount];
    for (int64_t row = 0; row < kQueries; ++row)
        for (int64_t j = 0; j < kCount; ++j)
            sums[row][j] = share ? load(target + row * target_pitch + j * kLanes) * share[row] : Vector{};
    for (int64_t i = 0; i < steps; ++i) {
        decltype(Kind::read(right)) values[kCount];
        for (int64_t j = 0; j < kCount; ++j) values[j] = Kind::read(right + i * right_pitch + j * apart);
        for (int64_t row = 0; row < kQueries; ++row)
            for (int64_t j = 0; j < kCount; ++j) Kind::add(sums[row][j], left + row * left_pitch + i, values[j]);
    }
    for (int64_t row = 0; row < kQueries; ++row)
        for (int64_t j = 0; j < kCount; ++j) store(target + row * target_pitch + j * kLanes, sums[row][j]);
}

template <typename Kind, typename Left>
INSTRUCTIONS void multiply(const Left* left, int64_t left_pitch, int64_t steps, const Left* right, int64_t right_pitch,
                           int64_t apart, const float* share, float* target, int64_t columns, int64_t target_pitch) {
    const int64_t count = columns / kLanes;
    int64_t j = 0;
    if constexpr (kVectors == 3)
        for (; count - j >= 3 && count - j != 4; j += 3)  // four are two and two
            multiply_rows<Kind, 3>(left, left_pitch, steps, right + j * apart, right_pitch, apart, share,
                                   target + j * kLanes, target_pitch);
    for (; count - j >= 2; j += 2)
        multiply_rows<Kind, 2>(left, left_pitch, steps, right + j * apart, right_pitch, apart, share,
                               target + j * kLanes, target_pitch);
    if (j < count)
        multiply_rows<Kind, 1>(left, left_pitch, steps, right + j * apart, right_pitch, apart, share,
                               target + j * kLanes, target_pitch);
}

// The scores of some keys as powers of two of what `scale` makes of them, relative to each row's `highest` so far, and
// their sums, a vector a row; `share` becomes what all before them now counts for. Each stage is done for all rows
// before the next: their folds then overlap. The powers lie as they are multiplied, from where the scores were on:
// never ahead of those that are still to be read.
template <typename Kind>
INSTRUCTIONS const typename Kind::Left* softmax(float* scores, int64_t keys, int64_t columns, float scale,
                                                float* highest, float* total, float* share) {
    Vector most[kQueries];
    for (int64_t row = 0; row < kQueries; ++row) {
        float* score = scores + row * columns;
        for (int64_t key = keys; key < columns; ++key) score[key] = -std::numeric_limits<float>::max();
        most[row] = load(score);
        for (int64_t key = kLanes; key < columns; key += kLanes) most[row] = larger(most[row], load(score + key));
    }
    for (int64_t row = 0; row < kQueries; ++row) {
        const float before = highest[row];
        highest[row] = std::max(before, largest_of(most[row]) * scale);
        Vector power = all(before - highest[row]);
        power_of_two(power);
        share[row] = power[0];
    }
    auto* powers = reinterpret_cast<typename Kind::Left*>(scores);
    for (int64_t row = 0; row < kQueries; ++row) {
        const int64_t start = row * columns;
        Vector sum = load(total + row * kLanes) * share[row];
        for (int64_t key = start; key < start + columns; key += kLanes) {
            Vector power = load(scores + key) * scale - highest[row];
            Kind::power(power);
            sum += power;
            Kind::put(powers + key / Kind::kSteps, power);
        }
        store(total + row * kLanes, sum);
    }
    return powers;
}

// Below it the sigmoid of a logit rounds to less than one half.
constexpr float kOutside = -1.79e-7f;

// Leaves the scores of `keys` out whose logits [keys, queries] say so, for a query that sees any.
INSTRUCTIONS inline void leave_out(const float* logits, int64_t queries, int64_t keys, float* scores) {
    for (int64_t key = 0; key < keys; ++key)
        if (logits[key * queries] < kOutside) scores[key] = -std::numeric_limits<float>::max();
}

INSTRUCTIONS inline bool sees_any(const float* logits, int64_t queries, int64_t keys) {
    for (int64_t key = 0; key < keys; ++key)
        if (!(logits[key * queries] < kOutside)) return true;
    return false;
}

// A row as it is multiplied.
template <typename Stored>
INLINE void put_row(PlainKeys, const Stored* from, int64_t width, float* to) {
    widen(from, to, width);
}
template <typename Stored>
INLINE void put_values(PlainKeys, const Stored* from, int64_t pitch, int64_t keys, int64_t width, int64_t columns,
                       float* to) {
    for (int64_t key = 0; key < keys; ++key, to += columns) {
        widen(from + key * pitch, to, width);
        std::fill(to + width, to + columns, 0.0f);
    }
}

#ifdef HAS_DOTS
INLINE void round_to(const Bfloat* from, uint16_t* to, int64_t count) { std::memcpy(to, from, count * sizeof *to); }
INLINE void round_to(const Rounded* from, uint16_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        float last[kLanes] = {};
        const float* values = &from[i].value;
        const int64_t here = std::min(kLanes, count - i);
        if (here < kLanes) {
            std::memcpy(last, values, here * sizeof(float));
            values = last;
        }
        const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)load(values));
        std::memcpy(to + i, &narrowed, here * sizeof *to);
    }
}
template <typename Stored>
INLINE void put_row(PairedKeys, const Stored* from, int64_t width, int32_t* to) {
    to[width / 2] = 0;  // of an odd width the last has no partner
    round_to(from, reinterpret_cast<uint16_t*>(to), width);
}
template <typename Stored>
INLINE void put_values(PairedKeys, const Stored* from, int64_t pitch, int64_t keys, int64_t width, int64_t columns,
                       int32_t* to) {
    uint16_t* one = reinterpret_cast<uint16_t*>(row_scratch(columns));
    uint16_t* other = one + columns;
    for (int64_t key = 0; key < keys; key += 2, to += columns) {
        std::fill(one, other + columns, 0);
        round_to(from + key * pitch, one, width);
        if (key + 1 < keys) round_to(from + (key + 1) * pitch, other, width);
        for (int64_t i = 0; i < columns; ++i)
            to[i] = static_cast<int32_t>(one[i] | static_cast<uint32_t>(other[i]) << 16);
    }
}
#endif

// Some keys after the others, with each row's highest score, sum and answer so far.
template <typename Kind, typename Stored>
INSTRUCTIONS void attend_with(const Attention<Stored>& all_of, int64_t pair) {
    typedef typename Kind::Left Left;
    constexpr int64_t kSteps = Kind::kSteps;
    const int64_t image = pair / all_of.heads, head = pair % all_of.heads, width = all_of.width, keys = all_of.keys;
    const int64_t key_columns = (keys + kLanes - 1) / kLanes * kLanes,
                  value_columns = (width + kLanes - 1) / kLanes * kLanes;
    const int64_t width_steps = (width + kSteps - 1) / kSteps, row_size = width / kSteps + 1,
                  key_steps = (keys + kSteps - 1) / kSteps;
    const int64_t group = std::min(kGroup, (all_of.queries + kQueries - 1) / kQueries * kQueries);
    const auto start = [&](const Strides& strides) { return image * strides.image + head * strides.head; };
    const Stored *q = all_of.q + start(all_of.q_strides), *k = all_of.k + start(all_of.k_strides),
                 *v = all_of.v + start(all_of.v_strides);
    Stored* out = all_of.out + start(all_of.out_strides);
    // A vector of keys lies transposed, so that they are multiplied side by side.
    float* sums = scratch(key_columns * width_steps + key_steps * value_columns + (group + 1) * row_size +
                          group * (value_columns + kLanes + 1) + kQueries * kKeys);
    float *total = sums + group * value_columns, *highest = total + group * kLanes, *scores = highest + group;
    Left *turned = reinterpret_cast<Left*>(scores + kQueries * kKeys), *values = turned + key_columns * width_steps;
    Left *rows = values + key_steps * value_columns, *one = rows + group * row_size;
    const float scale = static_cast<float>(all_of.scale) * kLog2E;
    for (int64_t key = 0; key < keys; ++key) {
        Left* column = turned + key / kLanes * kLanes * width_steps + key % kLanes;
        put_row(Kind(), k + key * all_of.k_strides.row, width, one);
        for (int64_t i = 0; i < width_steps; ++i) column[i * kLanes] = one[i];
    }
    put_values(Kind(), v, all_of.v_strides.row, keys, width, value_columns, values);
    for (int64_t query = 0; query < all_of.queries; query += group) {
        const int64_t count = std::min(group, all_of.queries - query),
                      whole = (count + kQueries - 1) / kQueries * kQueries;
        for (int64_t row = 0; row < whole; ++row)  // the last rows are repeated, so that every block is a whole one
            put_row(Kind(), q + (query + std::min(row, count - 1)) * all_of.q_strides.row, width,
                    rows + row * row_size);
        std::fill(total, total + whole * kLanes, 0.0f);
        std::fill(highest, highest + whole, -std::numeric_limits<float>::max());
        for (int64_t key = 0; key < keys; key += kKeys) {
            const int64_t here = std::min(kKeys, keys - key), columns = (here + kLanes - 1) / kLanes * kLanes;
            for (int64_t row = 0; row < whole; row += kQueries) {
                float share[kQueries];
                multiply<Kind>(rows + row * row_size, row_size, width_steps, turned + key * width_steps, kLanes,
                               width_steps * kLanes, nullptr, scores, columns, columns);
                for (int64_t own = 0; all_of.logits && own < kQueries; ++own) {
                    const float* logits = all_of.logits + query + std::min(row + own, count - 1);
                    if (sees_any(logits, all_of.queries, keys))
                        leave_out(logits + key * all_of.queries, all_of.queries, here, scores + own * columns);
                }
                const Left* powers =
                    softmax<Kind>(scores, here, columns, scale, highest + row, total + row * kLanes, share);
                multiply<Kind>(powers, columns / kSteps, (here + kSteps - 1) / kSteps,
                               values + key / kSteps * value_columns, value_columns, kLanes, key ? share : nullptr,
                               sums + row * value_columns, value_columns, value_columns);
            }
        }
        for (int64_t row = 0; row < count; ++row) {
            float* sum = sums + row * value_columns;
            const float inverse = 1 / sum_of(load(total + row * kLanes));
            for (int64_t i = 0; i < value_columns; ++i) sum[i] *= inverse;
            narrow(sum, out + (query + row) * all_of.out_strides.row, width);
        }
    }
}

template <typename Stored>
INSTRUCTIONS void attend(const Attention<Stored>& all_of, int64_t pair) {
#ifdef HAS_DOTS
    if constexpr (!std::is_same_v<Stored, float>) {
        attend_with<PairedKeys>(all_of, pair);
        return;
    }
#endif
    attend_with<PlainKeys>(all_of, pair);
}

INLINE float number(float value) { return value; }
INLINE float number(const Bfloat& value) {
    float wide;
    widen(&value, &wide, 1);
    return wide;
}

// Sums over cells of kCount vectors of channels, or of their squared distance from `centre`, where that is given.
template <int64_t kCount, typename Stored>
INLINE void add_vectors(const Stored* x, int64_t pitch, int64_t cells, const float* centre, float* sums) {
    Vector own[kCount];
    for (int64_t j = 0; j < kCount; ++j) own[j] = Vector{};
    for (int64_t cell = 0; cell < cells; ++cell, x += pitch)
        for (int64_t j = 0; j < kCount; ++j) {
            Vector value = load(x + j * kLanes);
            if (centre) {
                const Vector distance = value - load(centre + j * kLanes);
                own[j] += distance * distance;
            } else {
                own[j] += value;
            }
        }
    for (int64_t j = 0; j < kCount; ++j) store(sums + j * kLanes, own[j]);
}

template <typename Stored>
INSTRUCTIONS void add_cells(const Stored* x, int64_t pitch, int64_t cells, int64_t channels, const float* centre,
                            float* sums) {
    int64_t c = 0;
    const auto from = [&] { return centre ? centre + c : nullptr; };
    for (; c + 4 * kLanes <= channels; c += 4 * kLanes) add_vectors<4>(x + c, pitch, cells, from(), sums + c);
    for (; c + kLanes <= channels; c += kLanes) add_vectors<1>(x + c, pitch, cells, from(), sums + c);
    for (; c < channels; ++c) {
        sums[c] = 0.0f;
        for (int64_t cell = 0; cell < cells; ++cell) {
            const float value = number(x[cell * pitch + c]);
            sums[c] += centre ? (value - centre[c]) * (value - centre[c]) : value;
        }
    }
}

template <typename Stored>
INSTRUCTIONS void normalise_groups(const GroupNorm<Stored>& norm, int64_t image, int64_t first_group,
                                   int64_t last_group) {
    constexpr int64_t kCells = 256;  // of a block, which stays in the cache
    const int64_t cells = norm.cells, pitch = norm.channels, width = pitch / norm.groups,
                  groups = last_group - first_group, channels = groups * width;
    const int64_t padded = (channels + kLanes - 1) / kLanes * kLanes;
    float *sums = scratch(5 * padded), *centre = sums + padded, *squared = centre + padded, *scale = squared + padded,
          *shift = scale + padded;
    const Stored* x = norm.x + image * cells * pitch + first_group * width;
    widen(norm.weight + first_group * width, scale, channels);
    widen(norm.bias + first_group * width, shift, channels);
    // Long sums would lose digits: each block has sums of its own, of squares around its own means, and they are joined
    // in double precision.
    std::vector<double> totals(channels, 0.0), squares(channels, 0.0);
    for (int64_t cell = 0; cell < cells; cell += kCells) {
        const int64_t count = std::min(kCells, cells - cell);
        add_cells(x + cell * pitch, pitch, count, channels, nullptr, sums);
        for (int64_t c = 0; c < channels; ++c) centre[c] = sums[c] / count;
        add_cells(x + cell * pitch, pitch, count, channels, centre, squared);
        for (int64_t c = 0; c < channels; ++c) {
            totals[c] += sums[c];
            squares[c] += squared[c] + static_cast<double>(sums[c]) * sums[c] / count;
        }
    }
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t start = group * width, end = start + width;
        const double size = static_cast<double>(cells) * width;
        const double mean = std::accumulate(totals.begin() + start, totals.begin() + end, 0.0) / size;
        const double variance =
            std::max(std::accumulate(squares.begin() + start, squares.begin() + end, 0.0) / size - mean * mean, 0.0);
        const float inverse = static_cast<float>(1 / std::sqrt(variance + norm.eps));
        for (int64_t c = start; c < end; ++c) {
            scale[c] *= inverse;
            shift[c] -= static_cast<float>(mean) * scale[c];
        }
    }
    Stored* out = norm.out + image * cells * pitch + first_group * width;
    for (int64_t cell = 0; cell < cells; ++cell, x += pitch, out += pitch) {
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
            Vector y = load(x + c) * load(scale + c) + load(shift + c);
            if (norm.has_silu) silu(y);
            store(out + c, y);
        }
        if (c < channels) {
            Vector y{};
            float last[kLanes];
            for (int64_t lane = 0; c + lane < channels; ++lane)
                y[lane] = number(x[c + lane]) * scale[c + lane] + shift[c + lane];
            if (norm.has_silu) silu(y);
            store(last, y);
            narrow(last, out + c, channels - c);
        }
    }
}

// A row in fp32 that is read in whole vectors: where it is, or else in `wide`, followed by zeros.
template <typename Stored>
INSTRUCTIONS const float* in_vectors(const Stored* stored, int64_t channels, int64_t padded, float* wide) {
    if constexpr (std::is_same_v<Stored, float>)
        if (channels == padded) return stored;
    widen(stored, wide, channels);
    std::fill(wide + channels, wide + padded, 0.0f);
    return wide;
}

template <typename Stored>
INSTRUCTIONS void normalise_rows(const LayerNorm<Stored>& norm, int64_t first, int64_t last) {
    constexpr int64_t kRows = 4;  // worked on together, so that their folds overlap
    const int64_t channels = norm.channels, padded = (channels + kLanes - 1) / kLanes * kLanes;
    float *weight = scratch((2 + kRows) * padded), *bias = weight + padded, *rows = bias + padded;
    std::fill(weight, rows, 0.0f);
    widen(norm.weight, weight, channels);
    widen(norm.bias, bias, channels);
    for (int64_t i = first; i < last; i += kRows) {
        const int64_t count = std::min(kRows, last - i);
        const float* values[kRows];  // where they are if they fill whole vectors, or else in `rows`
        float mean[kRows], inverse[kRows];
        Vector total[kRows], squares[kRows];
        for (int64_t row = 0; row < kRows; ++row) {
            const Stored* stored = norm.x + (i + std::min(row, count - 1)) * channels;
            values[row] = in_vectors(stored, channels, padded, rows + row * padded);
            total[row] = Vector{};
            for (int64_t c = 0; c < padded; c += kLanes) total[row] += load(values[row] + c);
        }
        for (int64_t row = 0; row < kRows; ++row) mean[row] = sum_of(total[row]) / channels;
        for (int64_t row = 0; row < kRows; ++row) {
            const float* x = values[row];
            float* own = rows + row * padded;
            std::fill(own + channels, own + padded, mean[row]);  // at no distance, for the sum of squares
            total[row] = squares[row] = Vector{};
            for (int64_t c = 0; c < padded; c += kLanes) {
                const Vector distance = load(x + c) - mean[row];
                total[row] += distance;
                squares[row] += distance * distance;
            }
        }
        for (int64_t row = 0; row < kRows; ++row) {
            const float rest =
                sum_of(total[row]) / channels;  // what rounding kept from the mean of numbers far from zero
            inverse[row] = 1 / std::sqrt(sum_of(squares[row]) / channels - rest * rest + static_cast<float>(norm.eps));
            mean[row] += rest;
        }
        for (int64_t row = 0; row < count; ++row) {
            const float* x = values[row];
            float *own = rows + row * padded, *target = own;
            Stored* out = norm.out + (i + row) * channels;
            if constexpr (std::is_same_v<Stored, float>)
                if (x != own) target = out;
            for (int64_t c = 0; c < padded; c += kLanes)
                store(target + c, (load(x + c) - mean[row]) * inverse[row] * load(weight + c) + load(bias + c));
            if (target == own) narrow(own, out, channels);
        }
    }
}

template <typename Stored>
INSTRUCTIONS void gate_rows(const Geglu<Stored>& gated, int64_t first, int64_t last) {
    const int64_t channels = gated.channels, padded = (channels + kLanes - 1) / kLanes * kLanes;
    float *value = scratch(2 * padded), *gate = value + padded;
    std::fill(value, value + 2 * padded, 0.0f);
    for (int64_t i = first; i < last; ++i) {
        widen(gated.x + 2 * i * channels, value, channels);
        widen(gated.x + (2 * i + 1) * channels, gate, channels);
        for (int64_t c = 0; c < padded; c += kLanes) {
            Vector y = load(gate + c);
            gelu(y);
            store(value + c, load(value + c) * y);
        }
        narrow(value, gated.out + i * channels, channels);
    }
}

}  // namespace WITH_INSTRUCTIONS
}  // namespace datasetdm
