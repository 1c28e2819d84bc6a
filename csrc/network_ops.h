// What lies between the convolutions and matrix products of the networks on a CPU: attention, the norms and the gated
// unit, each in one pass. Tensors come as data pointers with the strides of their outer axes, in elements; the
// innermost axis is contiguous. Arithmetic is fp32 whatever the storage, 0 for fp32 and 1 for bf16, and for attention 2
// for fp32 that it may round to bf16 before it multiplies; every call writes each element of its target. `vector_bytes`
// 0 takes the widest instructions of this CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "bfloat.h"

namespace datasetdm {

struct Strides {  // of [images, heads, rows, width]
    int64_t image, head, row;
};

// softmax(q k^T * scale) v for `queries` rows against `keys` rows of each image and head.
void attention_cpu(int64_t storage, uintptr_t q, std::vector<int64_t> q_strides, uintptr_t k,
                   std::vector<int64_t> k_strides, uintptr_t v, std::vector<int64_t> v_strides, uintptr_t out,
                   std::vector<int64_t> out_strides, int64_t images, int64_t heads, int64_t queries, int64_t keys,
                   int64_t width, double scale, int64_t threads, int64_t vector_bytes);

// The same for one image in fp32, of queries that do not see keys whose `logits` [keys, queries] are of a sigmoid below
// one half, unless all are.
void masked_attention_cpu(uintptr_t q, const std::vector<int64_t>& q_strides, uintptr_t k,
                          const std::vector<int64_t>& k_strides, uintptr_t v, const std::vector<int64_t>& v_strides,
                          uintptr_t logits, uintptr_t out, const std::vector<int64_t>& out_strides, int64_t heads,
                          int64_t queries, int64_t keys, int64_t width, double scale, int64_t threads,
                          int64_t vector_bytes);

// Normalised groups of the channels-last image [images, cells, channels], with SiLU after it where asked.
void group_norm_cpu(int64_t storage, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t images,
                    int64_t cells, int64_t channels, int64_t groups, double eps, bool has_silu, int64_t threads,
                    int64_t vector_bytes);

// Normalised rows of x [rows, channels].
void layer_norm_cpu(int64_t storage, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows,
                    int64_t channels, double eps, int64_t threads, int64_t vector_bytes);

// The first half of each row of x [rows, 2 channels] times the exact GELU of the second.
void geglu_cpu(int64_t storage, uintptr_t x, uintptr_t out, int64_t rows, int64_t channels, int64_t threads,
               int64_t vector_bytes);

}  // namespace datasetdm
