// Matrix products with a weight that lies in panels, as every linear layer of a small network and the convolutions that
// are written as one.
#pragma once

#include <cstdint>

#include "bfloat.h"

namespace datasetdm {

constexpr int64_t kProductPanel = 16;  // outputs that lie side by side in the weight

struct Product {
    const float *weight, *bias;  // [panels, inner, 16] with an even number of panels, the last ones filled up with
                                 // zeros; [outputs] or null
    int64_t inner, outputs;
    bool is_paired = false;  // the weight is of bf16 pairs, [panels, (inner + 1) / 2, 16, 2], and so are the rows
                             // rounded; sums are fp32

    int64_t storage() const { return is_paired ? kRounded : kFp32; }  // for what else multiplies between such products
};

// out [rows, outputs] = x [rows, inner] times the weight, plus its bias and, where it is not null, `residual` [rows,
// outputs], which may be `out`. A row's sums do not depend on the rows beside it.
void multiply(const Product& product, const float* x, int64_t rows, const float* residual, float* out,
              int64_t vector_bytes);

// The same, its rows shared by threads.
void multiply_shared(const Product& product, const float* x, int64_t rows, const float* residual, float* out,
                     int64_t threads, int64_t vector_bytes);

}  // namespace datasetdm
