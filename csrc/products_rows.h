// Included by each_instruction_set.h.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

#include "vectors.h"
#include "pairs.h"
constexpr int64_t kVectors = VECTOR_BYTES == 16 ? 4 : 2;  // of columns that are worked on at once
constexpr int64_t kRows = VECTOR_BYTES == 64   ? 12
                          : VECTOR_BYTES == 32 ? 6
                                               : 2;  // with kVectors sums each they fill the registers
constexpr int64_t kColumns = kVectors * kLanes;

// Rows of numbers, or of pairs, and how the columns from `column` on are read for them.
struct PlainRows {
    const float* x;
    int64_t pitch, steps;

    INLINE Vector read(const float* weight) const { return load(weight); }
    INLINE void add(Vector& sum, int64_t row, int64_t step, const Vector& columns) const {
        sum += x[row * pitch + step] * columns;
    }
};

struct PairedRows {
    const Paired* x;
    int64_t pitch, steps;

    INLINE Factors read(const float* weight) const { return factors(reinterpret_cast<const int32_t*>(weight)); }
    INLINE void add(Vector& sum, int64_t row, int64_t step, const Factors& columns) const {
        add_product(sum, x + row * pitch + step * kPairSize, columns);
    }
};

// kCount rows from `first` on times kWide vectors of the columns from `column` on.
template <int64_t kCount, int64_t kWide, typename Rows>
INLINE void multiply_rows(const Product& product, const Rows& rows, int64_t first, int64_t column,
                          const float* residual, float* out) {
    const int64_t steps = rows.steps, outputs = product.outputs;
    const float* panel = product.weight + column / kProductPanel * steps * kProductPanel;
    Vector sums[kCount][kWide];
    for (int64_t row = 0; row < kCount; ++row)
        for (int64_t j = 0; j < kWide; ++j) sums[row][j] = Vector{};
    for (int64_t i = 0; i < steps; ++i) {
        decltype(rows.read(panel)) values[kWide];
        for (int64_t j = 0; j < kWide; ++j)
            values[j] = rows.read(panel + (j * kLanes / kProductPanel * steps + i) * kProductPanel +
                                  j * kLanes % kProductPanel);
#pragma GCC unroll 12
        for (int64_t row = 0; row < kCount; ++row)
            for (int64_t j = 0; j < kWide; ++j) rows.add(sums[row][j], first + row, i, values[j]);
    }
    const int64_t width = std::min(kWide * kLanes, outputs - column);
    if (width == kWide * kLanes) {
        for (int64_t row = 0; row < kCount; ++row)
            for (int64_t j = 0; j < kWide; ++j) {
                const int64_t at = (first + row) * outputs + column + j * kLanes;
                Vector sum = sums[row][j];
                if (product.bias) sum += load(product.bias + column + j * kLanes);
                if (residual) sum += load(residual + at);
                store(out + at, sum);
            }
        return;
    }
    for (int64_t row = 0; row < kCount; ++row) {
        float cells[kWide * kLanes];
        for (int64_t j = 0; j < kWide; ++j) store(cells + j * kLanes, sums[row][j]);
        for (int64_t j = 0; j < width; ++j) {
            const int64_t at = (first + row) * outputs + column + j;
            out[at] = cells[j] + (product.bias ? product.bias[column + j] : 0.0f) + (residual ? residual[at] : 0.0f);
        }
    }
}

template <int64_t kCount, int64_t kWide, typename Rows>
INSTRUCTIONS void multiply_last(int64_t count, const Product& product, const Rows& rows, int64_t first, int64_t column,
                                const float* residual, float* out) {
    if (count == kCount)
        multiply_rows<kCount, kWide>(product, rows, first, column, residual, out);
    else if constexpr (kCount > 1)
        multiply_last<kCount - 1, kWide>(count, product, rows, first, column, residual, out);
}

template <int64_t kWide, typename Rows>
INSTRUCTIONS void multiply_columns(const Product& product, const Rows& rows, int64_t count, int64_t column,
                                   const float* residual, float* out) {
    int64_t row = 0;
    for (; row + kRows <= count; row += kRows) multiply_rows<kRows, kWide>(product, rows, row, column, residual, out);
    if (row < count) multiply_last<kRows - 1, kWide>(count - row, product, rows, row, column, residual, out);
}

template <typename Rows>
INSTRUCTIONS void multiply_with(const Product& product, const Rows& rows, int64_t count, const float* residual,
                                float* out) {
    int64_t column = 0;
    for (; product.outputs - column > kLanes; column += kColumns)
        multiply_columns<kVectors>(product, rows, count, column, residual, out);
    if (column < product.outputs) multiply_columns<1>(product, rows, count, column, residual, out);
}

INSTRUCTIONS inline void multiply_all(const Product& product, const float* x, int64_t rows, const float* residual,
                                      float* out) {
    if (!product.is_paired) {
        multiply_with(product, PlainRows{x, product.inner, product.inner}, rows, residual, out);
        return;
    }
    const int64_t inner = product.inner, size = paired_size(inner);
    Paired* pairs = reinterpret_cast<Paired*>(scratch(rows * size));
    if (inner % 2)
        for (int64_t row = 0; row < rows; ++row) pair_up(x + row * inner, inner, pairs + row * size);
    else
        pair_up(x, rows * inner, pairs);
    multiply_with(product, PairedRows{pairs, size, (inner + 1) / 2}, rows, residual, out);
}

}  // namespace WITH_INSTRUCTIONS
}  // namespace datasetdm
