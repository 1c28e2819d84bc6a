// Included by each_instruction_set.h.
// One thread's share of each operation. Rows are widened to fp32 in scratch memory, so the arithmetic is written once for both storages.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

#include "vectors.h"
typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
constexpr int64_t kQueries = VECTOR_BYTES == 64 ? 8 : VECTOR_BYTES == 32 ? 6 : 4;  // that share one load of keys or values; with ...
constexpr int64_t kVectors = VECTOR_BYTES == 64 ? 3 : 2;                           // ... of sums each they fill the registers
constexpr int64_t kKeys = 256;                                                     // at once: so many stay near with their values ...
constexpr int64_t kGroup = 32 * kQueries;                                          // ... for so many queries

INLINE Vector all(float value) { return value - Vector{}; }
INLINE Vector larger(const Vector& a, const Vector& b) { return a > b ? a : b; }
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

// 2^x for x <= 127, to 1e-7; below -126 it stays at 2^-126, which no sum with 1 in it can tell from 0.
INLINE void power_of_two(Vector& x) {
    const Vector clamped = larger(x, all(-126.0f));
    const Vector shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the lowest bits now hold the nearest whole number
    const Vector r = clamped - (shifted - 12582912.0f);
    Vector y = all(1.32647484e-3f);
    y = y * r + 9.671513e-3f;
    y = y * r + 5.55073369e-2f;
    y = y * r + 2.40222421e-1f;
    y = y * r + 6.93146978e-1f;
    y = y * r + 1.0f;
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

// x times the standard normal distribution's share below x: erf as 1 - exp(-z^2) times a polynomial in 1 / (1 + 0.56 z), fitted to 2e-9.
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
INLINE void narrow(const float* from, Bfloat* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[i].bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // a NaN stays one
    }
}

// Products of kQueries rows of `left` with kCount vectors of columns of `right`, which lie `apart`. They replace the target, or are added to what
// its rows count for by their `share`.
template <int64_t kCount>
INLINE void multiply_rows(const float* left, int64_t left_pitch, int64_t inner, const float* right, int64_t right_pitch, int64_t apart, const float* share,
                          float* target, int64_t target_pitch) {
    Vector sums[kQueries][kCount];
    for (int64_t row = 0; row < kQueries; ++row)
        for (int64_t j = 0; j < kCount; ++j) sums[row][j] = share ? load(target + row * target_pitch + j * kLanes) * share[row] : Vector{};
    for (int64_t i = 0; i < inner; ++i) {
        Vector values[kCount];
        for (int64_t j = 0; j < kCount; ++j) values[j] = load(right + i * right_pitch + j * apart);
        for (int64_t row = 0; row < kQueries; ++row)
            for (int64_t j = 0; j < kCount; ++j) sums[row][j] += left[row * left_pitch + i] * values[j];
    }
    for (int64_t row = 0; row < kQueries; ++row)
        for (int64_t j = 0; j < kCount; ++j) store(target + row * target_pitch + j * kLanes, sums[row][j]);
}

INSTRUCTIONS inline void multiply(const float* left, int64_t left_pitch, int64_t inner, const float* right, int64_t right_pitch, int64_t apart,
                                  const float* share, float* target, int64_t columns, int64_t target_pitch) {
    const int64_t count = columns / kLanes;
    int64_t j = 0;
    if constexpr (kVectors == 3)
        for (; count - j >= 3 && count - j != 4; j += 3)  // four are two and two
            multiply_rows<3>(left, left_pitch, inner, right + j * apart, right_pitch, apart, share, target + j * kLanes, target_pitch);
    for (; count - j >= 2; j += 2)
        multiply_rows<2>(left, left_pitch, inner, right + j * apart, right_pitch, apart, share, target + j * kLanes, target_pitch);
    if (j < count) multiply_rows<1>(left, left_pitch, inner, right + j * apart, right_pitch, apart, share, target + j * kLanes, target_pitch);
}

// The scores of some keys as powers of two of what `scale` makes of them, relative to each row's `highest` so far, and their sums, a vector a row;
// `share` becomes what all before them now counts for. Each stage is done for all rows before the next: their folds then overlap.
INSTRUCTIONS inline void softmax(float* scores, int64_t keys, int64_t columns, float scale, float* highest, float* total, float* share) {
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
    for (int64_t row = 0; row < kQueries; ++row) {
        float* score = scores + row * columns;
        Vector sum = load(total + row * kLanes) * share[row];
        for (int64_t key = 0; key < columns; key += kLanes) {
            Vector power = load(score + key) * scale - highest[row];
            power_of_two(power);
            sum += power;
            store(score + key, power);
        }
        store(total + row * kLanes, sum);
    }
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

// Some keys after the others, with each row's highest score, sum and answer so far.
template <typename Stored>
INSTRUCTIONS void attend(const Attention<Stored>& all_of, int64_t pair) {
    const int64_t image = pair / all_of.heads, head = pair % all_of.heads, width = all_of.width, keys = all_of.keys;
    const int64_t key_columns = (keys + kLanes - 1) / kLanes * kLanes, value_columns = (width + kLanes - 1) / kLanes * kLanes;
    const int64_t group = std::min(kGroup, (all_of.queries + kQueries - 1) / kQueries * kQueries);
    const auto start = [&](const Strides& strides) { return image * strides.image + head * strides.head; };
    const Stored *q = all_of.q + start(all_of.q_strides), *k = all_of.k + start(all_of.k_strides), *v = all_of.v + start(all_of.v_strides);
    Stored* out = all_of.out + start(all_of.out_strides);
    // A vector of keys lies transposed, so that they are multiplied side by side.
    float* turned = scratch(key_columns * width + keys * value_columns + group * (width + value_columns + kLanes + 1) + kQueries * kKeys + width);
    float *values = turned + key_columns * width, *rows = values + keys * value_columns, *sums = rows + group * width;
    float *total = sums + group * value_columns, *highest = total + group * kLanes, *scores = highest + group, *one = scores + kQueries * kKeys;
    const float scale = static_cast<float>(all_of.scale) * kLog2E;
    for (int64_t key = 0; key < keys; ++key) {
        float* column = turned + key / kLanes * kLanes * width + key % kLanes;
        widen(k + key * all_of.k_strides.row, one, width);
        for (int64_t i = 0; i < width; ++i) column[i * kLanes] = one[i];
        widen(v + key * all_of.v_strides.row, values + key * value_columns, width);
        std::fill(values + key * value_columns + width, values + (key + 1) * value_columns, 0.0f);
    }
    for (int64_t query = 0; query < all_of.queries; query += group) {
        const int64_t count = std::min(group, all_of.queries - query), whole = (count + kQueries - 1) / kQueries * kQueries;
        for (int64_t row = 0; row < whole; ++row)  // the last rows are repeated, so that every block is a whole one
            widen(q + (query + std::min(row, count - 1)) * all_of.q_strides.row, rows + row * width, width);
        std::fill(total, total + whole * kLanes, 0.0f);
        std::fill(highest, highest + whole, -std::numeric_limits<float>::max());
        for (int64_t key = 0; key < keys; key += kKeys) {
            const int64_t here = std::min(kKeys, keys - key), columns = (here + kLanes - 1) / kLanes * kLanes;
            for (int64_t row = 0; row < whole; row += kQueries) {
                float share[kQueries];
                multiply(rows + row * width, width, width, turned + key * width, kLanes, width * kLanes, nullptr, scores, columns, columns);
                for (int64_t own = 0; all_of.logits && own < kQueries; ++own) {
                    const float* logits = all_of.logits + query + std::min(row + own, count - 1);
                    if (sees_any(logits, all_of.queries, keys)) leave_out(logits + key * all_of.queries, all_of.queries, here, scores + own * columns);
                }
                softmax(scores, here, columns, scale, highest + row, total + row * kLanes, share);
                multiply(scores, columns, here, values + key * value_columns, value_columns, kLanes, key ? share : nullptr, sums + row * value_columns,
                         value_columns, value_columns);
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

#ifdef HAS_DOTS
// The processor's products of bf16 pairs, added in fp32: twice the rate. Pairs lie along the summed axis: of channels for the scores, of keys after.
template <int64_t kVectors>
INLINE void multiply_pairs(const int32_t* left, int64_t left_pitch, int64_t pairs, const int32_t* right, int64_t right_pitch, float* target,
                           int64_t target_pitch) {
    Vector sums[kQueries][kVectors];
    for (int64_t row = 0; row < kQueries; ++row)
        for (int64_t j = 0; j < kVectors; ++j) sums[row][j] = Vector{};
    for (int64_t i = 0; i < pairs; ++i) {
        __m512bh values[kVectors];
        for (int64_t j = 0; j < kVectors; ++j) __builtin_memcpy(&values[j], right + i * right_pitch + j * kLanes, sizeof values[j]);
        for (int64_t row = 0; row < kQueries; ++row) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(left[row * left_pitch + i]);
            for (int64_t j = 0; j < kVectors; ++j) sums[row][j] = (Vector)_mm512_dpbf16_ps((__m512)sums[row][j], pair, values[j]);
        }
    }
    for (int64_t row = 0; row < kQueries; ++row)
        for (int64_t j = 0; j < kVectors; ++j) store(target + row * target_pitch + j * kLanes, sums[row][j]);
}

INSTRUCTIONS inline void multiply_all_pairs(const int32_t* left, int64_t pairs, const int32_t* right, int64_t columns, float* target) {
    int64_t column = 0;
    for (; column + 2 * kLanes <= columns; column += 2 * kLanes) multiply_pairs<2>(left, pairs, pairs, right + column, columns, target + column, columns);
    if (column < columns) multiply_pairs<1>(left, pairs, pairs, right + column, columns, target + column, columns);
}

INSTRUCTIONS inline int32_t paired(uint16_t first, uint16_t second) { return static_cast<int32_t>(first | static_cast<uint32_t>(second) << 16); }

INSTRUCTIONS inline void attend(const Attention<Bfloat>& all_of, int64_t pair) {
    const int64_t image = pair / all_of.heads, head = pair % all_of.heads, width = all_of.width, keys = all_of.keys;
    const int64_t key_columns = (keys + kLanes - 1) / kLanes * kLanes, value_columns = (width + kLanes - 1) / kLanes * kLanes;
    const int64_t width_pairs = (width + 1) / 2, key_pairs = key_columns / 2;
    const auto start = [&](const Strides& strides) { return image * strides.image + head * strides.head; };
    const Bfloat *q = all_of.q + start(all_of.q_strides), *k = all_of.k + start(all_of.k_strides), *v = all_of.v + start(all_of.v_strides);
    Bfloat* out = all_of.out + start(all_of.out_strides);
    float* scores = scratch(width_pairs * key_columns + key_pairs * value_columns + kQueries * (width_pairs + key_pairs + key_columns + value_columns));
    float* sums = scores + kQueries * key_columns;
    int32_t* turned = reinterpret_cast<int32_t*>(sums + kQueries * value_columns);
    int32_t *values = turned + width_pairs * key_columns, *rows = values + key_pairs * value_columns, *shares = rows + kQueries * width_pairs;
    std::memset(turned, 0, (width_pairs * key_columns + key_pairs * value_columns + kQueries * width_pairs) * sizeof(int32_t));
    for (int64_t key = 0; key < keys; ++key) {
        const Bfloat *from = k + key * all_of.k_strides.row, *value = v + key * all_of.v_strides.row;
        for (int64_t i = 0; i < width_pairs; ++i) turned[i * key_columns + key] = paired(from[2 * i].bits, 2 * i + 1 < width ? from[2 * i + 1].bits : 0);
        uint16_t* half = reinterpret_cast<uint16_t*>(values + key / 2 * value_columns) + key % 2;
        for (int64_t i = 0; i < width; ++i) half[2 * i] = value[i].bits;
    }
    const float scale = static_cast<float>(all_of.scale) * kLog2E;
    float total[kQueries * kLanes], highest[kQueries], share[kQueries];
    for (int64_t query = 0; query < all_of.queries; query += kQueries) {
        const int64_t count = std::min(kQueries, all_of.queries - query);
        for (int64_t row = 0; row < kQueries; ++row)  // the last rows are repeated, so that every block is a whole one
            std::memcpy(rows + row * width_pairs, q + (query + std::min(row, count - 1)) * all_of.q_strides.row, width * sizeof(Bfloat));
        multiply_all_pairs(rows, width_pairs, turned, key_columns, scores);
        std::fill(total, total + kQueries * kLanes, 0.0f);
        std::fill(highest, highest + kQueries, -std::numeric_limits<float>::max());
        softmax(scores, keys, key_columns, scale, highest, total, share);
        for (int64_t i = 0; i < kQueries * key_columns; i += kLanes) {
            const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)load(scores + i));
            __builtin_memcpy(reinterpret_cast<uint16_t*>(shares) + i, &narrowed, sizeof narrowed);
        }
        multiply_all_pairs(shares, key_pairs, values, value_columns, sums);
        for (int64_t row = 0; row < count; ++row) {
            float* sum = sums + row * value_columns;
            const float inverse = 1 / sum_of(load(total + row * kLanes));
            for (int64_t i = 0; i < value_columns; ++i) sum[i] *= inverse;
            narrow(sum, out + (query + row) * all_of.out_strides.row, width);
        }
    }
}
#endif

// Sums over cells of each channel, or of its squared distance from `centre`.
INSTRUCTIONS inline void add_cells(const float* x, int64_t pitch, int64_t cells, int64_t channels, const float* centre, bool is_squared, float* sums) {
    std::fill(sums, sums + channels, 0.0f);
    for (int64_t cell = 0; cell < cells; ++cell, x += pitch)
        if (is_squared)
            for (int64_t c = 0; c < channels; ++c) sums[c] += (x[c] - centre[c]) * (x[c] - centre[c]);
        else
            for (int64_t c = 0; c < channels; ++c) sums[c] += x[c];
}

// The first `channels` of every cell in fp32: where they are, or else in `wide`.
template <typename Stored>
INSTRUCTIONS const float* widened(const Stored* stored, int64_t pitch, int64_t cells, int64_t channels, float* wide) {
    if constexpr (std::is_same_v<Stored, float>) {
        return stored;
    } else {
        for (int64_t cell = 0; cell < cells; ++cell) widen(stored + cell * pitch, wide + cell * channels, channels);
        return wide;
    }
}

template <typename Stored>
INSTRUCTIONS void normalise_groups(const GroupNorm<Stored>& norm, int64_t image, int64_t first_group, int64_t last_group) {
    constexpr bool is_wide = std::is_same_v<Stored, float>;
    constexpr int64_t kCells = 256;  // of a block, which stays in the cache
    const int64_t cells = norm.cells, width = norm.channels / norm.groups, groups = last_group - first_group, channels = groups * width;
    const int64_t padded = (channels + kLanes - 1) / kLanes * kLanes, pitch = is_wide ? norm.channels : channels;
    float *sums = scratch((is_wide ? 0 : kCells * channels) + 5 * padded), *centre = sums + padded, *scale = centre + padded, *shift = scale + padded, *row = shift + padded, *wide = row + padded;
    const Stored* stored = norm.x + image * cells * norm.channels + first_group * width;
    const auto block = [&](int64_t cell, int64_t count) { return widened(stored + cell * norm.channels, norm.channels, count, channels, wide); };
    widen(norm.weight + first_group * width, scale, channels);
    widen(norm.bias + first_group * width, shift, channels);
    // Long sums would lose digits: each block has sums of its own, of squares around its own means, and they are joined in double precision.
    std::vector<double> totals(channels, 0.0), squares(channels, 0.0);
    for (int64_t cell = 0; cell < cells; cell += kCells) {
        const int64_t count = std::min(kCells, cells - cell);
        const float* x = block(cell, count);
        add_cells(x, pitch, count, channels, centre, false, sums);
        for (int64_t c = 0; c < channels; ++c) centre[c] = sums[c] / count;
        add_cells(x, pitch, count, channels, centre, true, row);
        for (int64_t c = 0; c < channels; ++c) {
            totals[c] += sums[c];
            squares[c] += row[c] + static_cast<double>(sums[c]) * sums[c] / count;
        }
    }
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t start = group * width, end = start + width;
        const double size = static_cast<double>(cells) * width;
        const double mean = std::accumulate(totals.begin() + start, totals.begin() + end, 0.0) / size;
        const double variance = std::max(std::accumulate(squares.begin() + start, squares.begin() + end, 0.0) / size - mean * mean, 0.0);
        const float inverse = static_cast<float>(1 / std::sqrt(variance + norm.eps));
        for (int64_t c = start; c < end; ++c) {
            scale[c] *= inverse;
            shift[c] -= static_cast<float>(mean) * scale[c];
        }
    }
    Stored* out = norm.out + image * cells * norm.channels + first_group * width;
    const float* x = nullptr;
    for (int64_t cell = 0; cell < cells; ++cell, x += pitch, out += norm.channels) {
        if (cell % kCells == 0) x = block(cell, std::min(kCells, cells - cell));
        float* target = row;
        if constexpr (is_wide) target = out;
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
            Vector y = load(x + c) * load(scale + c) + load(shift + c);
            if (norm.has_silu) silu(y);
            store(target + c, y);
        }
        if (c < channels) {
            Vector y{};
            for (int64_t lane = 0; c + lane < channels; ++lane) y[lane] = x[c + lane] * scale[c + lane] + shift[c + lane];
            if (norm.has_silu) silu(y);
            store(row + c, y);
        }
        if constexpr (is_wide)
            std::copy(row + c, row + channels, out + c);
        else
            narrow(row, out, channels);
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
            const float rest = sum_of(total[row]) / channels;  // what rounding kept from the mean of numbers far from zero
            inverse[row] = 1 / std::sqrt(sum_of(squares[row]) / channels - rest * rest + static_cast<float>(norm.eps));
            mean[row] += rest;
        }
        for (int64_t row = 0; row < count; ++row) {
            const float* x = values[row];
            float *own = rows + row * padded, *target = own;
            Stored* out = norm.out + (i + row) * channels;
            if constexpr (std::is_same_v<Stored, float>)
                if (x != own) target = out;
            for (int64_t c = 0; c < padded; c += kLanes) store(target + c, (load(x + c) - mean[row]) * inverse[row] * load(weight + c) + load(bias + c));
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
