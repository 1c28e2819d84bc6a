#include "products.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bfloat.h"
#include "sharing.h"
#include "timing.h"

namespace datasetdm {
namespace {

float* scratch(int64_t count) {
    static thread_local KeptFloats kept;
    return kept.of(count);
}

}  // namespace
}  // namespace datasetdm

#define WITH_DOTS
#define ROWS "products_rows.h"
#include "each_instruction_set.h"

namespace datasetdm {

void multiply(const Product& product, const float* x, int64_t rows, const float* residual, float* out,
              int64_t vector_bytes) {
    WITH_VECTORS(vector_bytes, multiply_all, product, x, rows, residual, out);
}

void multiply_shared(const Product& product, const float* x, int64_t rows, const float* residual, float* out,
                     int64_t threads, int64_t vector_bytes) {
    const Timed timed(Work::linear);
    share(rows, threads, [&](int64_t first, int64_t last) {
        const int64_t place = first * product.outputs;
        multiply(product, x + first * product.inner, last - first, residual ? residual + place : nullptr, out + place,
                 vector_bytes);
    });
}

}  // namespace datasetdm
