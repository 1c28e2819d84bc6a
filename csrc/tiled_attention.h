// Attention in bf16 on CPUs that multiply tiles (AMX): softmax(q k^T * scale) v, block by block of keys as
// FlashAttention-2 does (Dao 2023). Scores, their exponentials and sums are fp32; weights are rounded to bf16.
#pragma once

#include <cstdint>
#include <vector>

namespace datasetdm {

// Whether this CPU multiplies tiles of bf16 and the system lets this process do so.
bool multiplies_tiles();

// Arguments as of attention_cpu; `width` is even.
void tiled_attention_cpu(uintptr_t q, const std::vector<int64_t>& q_strides, uintptr_t k,
                         const std::vector<int64_t>& k_strides, uintptr_t v, const std::vector<int64_t>& v_strides,
                         uintptr_t out, const std::vector<int64_t>& out_strides, int64_t images, int64_t heads,
                         int64_t queries, int64_t keys, int64_t width, double scale, int64_t threads);

}  // namespace datasetdm
