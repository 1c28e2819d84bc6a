#include "products.h"

#include <algorithm>

#include "sharing.h"
#include "timing.h"

#define ROWS "products_rows.h"
#include "each_instruction_set.h"

namespace datasetdm {

void multiply(const Product& product, const float* x, int64_t rows, const float* residual, float* out, int64_t vector_bytes) {
    WITH_VECTORS(vector_bytes, multiply_all, product, x, rows, residual, out);
}

void multiply_shared(const Product& product, const float* x, int64_t rows, const float* residual, float* out, int64_t threads, int64_t vector_bytes) {
    const Timed timed(Work::linear);
    share(rows, threads, [&](int64_t first, int64_t last) {
        const int64_t place = first * product.outputs;
        multiply(product, x + first * product.inner, last - first, residual ? residual + place : nullptr, out + place, vector_bytes);
    });
}

}  // namespace datasetdm
