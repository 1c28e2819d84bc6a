// Included by each_instruction_set.h.

namespace datasetdm {
namespace WITH_INSTRUCTIONS {

#include "vectors.h"
constexpr int64_t kVectors = VECTOR_BYTES == 16 ? 4 : 2;                         // of columns that are worked on at once
constexpr int64_t kRows = VECTOR_BYTES == 64 ? 12 : VECTOR_BYTES == 32 ? 6 : 2;  // with kVectors sums each they fill the registers
constexpr int64_t kColumns = kVectors * kLanes;

// kCount rows of `x` times the columns from `column` on.
template <int64_t kCount>
INLINE void multiply_rows(const Product& product, const float* x, int64_t column, const float* residual, float* out) {
    const int64_t inner = product.inner, outputs = product.outputs;
    const float* panel = product.weight + column / kProductPanel * inner * kProductPanel;
    Vector sums[kCount][kVectors];
    for (int64_t row = 0; row < kCount; ++row)
        for (int64_t j = 0; j < kVectors; ++j) sums[row][j] = Vector{};
    for (int64_t i = 0; i < inner; ++i) {
        Vector values[kVectors];
        for (int64_t j = 0; j < kVectors; ++j)
            values[j] = load(panel + (j * kLanes / kProductPanel * inner + i) * kProductPanel + j * kLanes % kProductPanel);
#pragma GCC unroll 12
        for (int64_t row = 0; row < kCount; ++row)
            for (int64_t j = 0; j < kVectors; ++j) sums[row][j] += x[row * inner + i] * values[j];
    }
    const int64_t width = std::min(kColumns, outputs - column);
    if (width == kColumns) {
        for (int64_t row = 0; row < kCount; ++row)
            for (int64_t j = 0; j < kVectors; ++j) {
                const int64_t at = row * outputs + column + j * kLanes;
                Vector sum = sums[row][j];
                if (product.bias) sum += load(product.bias + column + j * kLanes);
                if (residual) sum += load(residual + at);
                store(out + at, sum);
            }
        return;
    }
    for (int64_t row = 0; row < kCount; ++row) {
        float cells[kColumns];
        for (int64_t j = 0; j < kVectors; ++j) store(cells + j * kLanes, sums[row][j]);
        for (int64_t j = 0; j < width; ++j) {
            const int64_t at = row * outputs + column + j;
            out[at] = cells[j] + (product.bias ? product.bias[column + j] : 0.0f) + (residual ? residual[at] : 0.0f);
        }
    }
}

template <int64_t kCount>
INSTRUCTIONS void multiply_last(int64_t count, const Product& product, const float* x, int64_t column, const float* residual, float* out) {
    if (count == kCount)
        multiply_rows<kCount>(product, x, column, residual, out);
    else if constexpr (kCount > 1)
        multiply_last<kCount - 1>(count, product, x, column, residual, out);
}

INSTRUCTIONS inline void multiply_all(const Product& product, const float* x, int64_t rows, const float* residual, float* out) {
    for (int64_t column = 0; column < product.outputs; column += kColumns) {
        int64_t row = 0;
        const auto beside = [&](const float* values) { return values ? values + row * product.outputs : nullptr; };
        for (; row + kRows <= rows; row += kRows)
            multiply_rows<kRows>(product, x + row * product.inner, column, beside(residual), out + row * product.outputs);
        if (row < rows) multiply_last<kRows - 1>(rows - row, product, x + row * product.inner, column, beside(residual), out + row * product.outputs);
    }
}

}  // namespace WITH_INSTRUCTIONS
}  // namespace datasetdm
