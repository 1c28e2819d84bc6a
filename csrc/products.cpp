#include "products.h"

#include <algorithm>

#define ROWS "products_rows.h"
#include "each_instruction_set.h"

namespace datasetdm {

void multiply(const Product& product, const float* x, int64_t rows, const float* residual, float* out, int64_t vector_bytes) {
    WITH_VECTORS(vector_bytes, multiply_all, product, x, rows, residual, out);
}

}  // namespace datasetdm
