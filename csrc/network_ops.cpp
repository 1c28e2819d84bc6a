#include "network_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "bfloat.h"
#include "check.h"
#include "depth_head.h"
#include "sharing.h"
#include "timing.h"

namespace datasetdm {
namespace {

// fp32 that products may round to bf16.
struct Rounded {
    float value;
};

template <typename Stored>
struct Attention {
    const Stored *q, *k, *v;
    Stored* out;
    Strides q_strides, k_strides, v_strides, out_strides;
    int64_t heads, queries, keys, width;
    double scale;
    const float* logits;  // [keys, queries] of the only image, or null
};

template <typename Stored>
struct GroupNorm {
    const Stored *x, *weight, *bias;
    Stored* out;
    int64_t cells, channels, groups;
    double eps;
    bool has_silu;
};

template <typename Stored>
struct LayerNorm {
    const Stored *x, *weight, *bias;
    Stored* out;
    int64_t channels;
    double eps;
};

template <typename Stored>
struct Geglu {
    const Stored* x;
    Stored* out;
    int64_t channels;
};

float* scratch(int64_t count) {
    static thread_local KeptFloats kept;
    return kept.of(count);
}

float* row_scratch(int64_t count) {
    static thread_local KeptFloats kept;
    return kept.of(count);
}

}  // namespace
}  // namespace datasetdm

#define WITH_DOTS
#define ROWS "network_rows.h"
#include "each_instruction_set.h"

namespace datasetdm {
namespace {

Strides strides_of(const char* name, const std::vector<int64_t>& given) {
    require(given.size() == 3, name, ": ", given.size(), " strides, expected those of image, head and row");
    return {given[0], given[1], given[2]};
}

template <typename Stored>
Stored* at(uintptr_t pointer) {
    require(pointer, "a pointer is null; pass data_ptr() of a CPU tensor");
    return reinterpret_cast<Stored*>(pointer);
}

// Calls work with a value of the storage's type, `vector_bytes` 0 having become the widest of this CPU.
template <typename Work>
void with_storage(const char* name, int64_t storage, int64_t threads, int64_t& vector_bytes, const Work& work) {
    require(threads > 0, name, ": threads is ", threads, ", expected at least 1");
    require(storage == kFp32 || storage == kBf16, name, ": storage is ", storage,
            ", expected 0 for fp32 or 1 for bf16");
    vector_bytes = chosen_vector_bytes(name, vector_bytes);
    if (storage == kFp32)
        work(float{});
    else
        work(Bfloat{});
}

}  // namespace

void attention_cpu(int64_t storage, uintptr_t q, std::vector<int64_t> q_strides, uintptr_t k,
                   std::vector<int64_t> k_strides, uintptr_t v, std::vector<int64_t> v_strides, uintptr_t out,
                   std::vector<int64_t> out_strides, int64_t images, int64_t heads, int64_t queries, int64_t keys,
                   int64_t width, double scale, int64_t threads, int64_t vector_bytes) {
    const Timed timed(Work::attention);
    require(images > 0 && heads > 0 && queries > 0 && keys > 0 && width > 0, "attention: an empty tensor, ", images,
            " images, ", heads, " heads, ", queries, " queries, ", keys, " keys of ", width, " channels");
    const auto work_on = [&](auto kind) {
        using Stored = decltype(kind);
        const Attention<Stored> work{at<const Stored>(q),
                                     at<const Stored>(k),
                                     at<const Stored>(v),
                                     at<Stored>(out),
                                     strides_of("q", q_strides),
                                     strides_of("k", k_strides),
                                     strides_of("v", v_strides),
                                     strides_of("out", out_strides),
                                     heads,
                                     queries,
                                     keys,
                                     width,
                                     scale,
                                     nullptr};
        share(images * heads, threads, [&](int64_t first, int64_t last) {
            for (int64_t pair = first; pair < last; ++pair) WITH_VECTORS(vector_bytes, attend, work, pair);
        });
    };
    if (storage == kRounded) {
        require(threads > 0, "attention: threads is ", threads, ", expected at least 1");
        vector_bytes = chosen_vector_bytes("attention", vector_bytes);
        work_on(Rounded{});
    } else {
        with_storage("attention", storage, threads, vector_bytes, work_on);
    }
}

void masked_attention_cpu(uintptr_t q, const std::vector<int64_t>& q_strides, uintptr_t k,
                          const std::vector<int64_t>& k_strides, uintptr_t v, const std::vector<int64_t>& v_strides,
                          uintptr_t logits, uintptr_t out, const std::vector<int64_t>& out_strides, int64_t heads,
                          int64_t queries, int64_t keys, int64_t width, double scale, int64_t threads,
                          int64_t vector_bytes) {
    const Timed timed(Work::attention);
    const Attention<float> work{at<const float>(q),
                                at<const float>(k),
                                at<const float>(v),
                                at<float>(out),
                                strides_of("q", q_strides),
                                strides_of("k", k_strides),
                                strides_of("v", v_strides),
                                strides_of("out", out_strides),
                                heads,
                                queries,
                                keys,
                                width,
                                scale,
                                at<const float>(logits)};
    share(heads, threads, [&](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; ++head) WITH_VECTORS(vector_bytes, attend, work, head);
    });
}

void group_norm_cpu(int64_t storage, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t images,
                    int64_t cells, int64_t channels, int64_t groups, double eps, bool has_silu, int64_t threads,
                    int64_t vector_bytes) {
    const Timed timed(Work::norm);
    require(images > 0 && cells > 0 && channels > 0, "group_norm: an empty tensor, ", images, " images of ", cells,
            " cells and ", channels, " channels");
    require(groups > 0 && channels % groups == 0, "group_norm: ", channels, " channels do not make ", groups,
            " groups");
    with_storage("group_norm", storage, threads, vector_bytes, [&](auto kind) {
        using Stored = decltype(kind);
        const GroupNorm<Stored> work{at<const Stored>(x),
                                     at<const Stored>(weight),
                                     at<const Stored>(bias),
                                     at<Stored>(out),
                                     cells,
                                     channels,
                                     groups,
                                     eps,
                                     has_silu};
        const int64_t parts =
            std::min((threads + images - 1) / images, groups);  // of an image, where there are more threads than images
        share(images * parts, threads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; ++i) {
                const int64_t part = i % parts;
                WITH_VECTORS(vector_bytes, normalise_groups, work, i / parts, groups * part / parts,
                             groups * (part + 1) / parts);
            }
        });
    });
}

void layer_norm_cpu(int64_t storage, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, int64_t rows,
                    int64_t channels, double eps, int64_t threads, int64_t vector_bytes) {
    const Timed timed(Work::norm);
    require(rows > 0 && channels > 0, "layer_norm: an empty tensor, ", rows, " rows of ", channels, " channels");
    with_storage("layer_norm", storage, threads, vector_bytes, [&](auto kind) {
        using Stored = decltype(kind);
        const LayerNorm<Stored> work{
            at<const Stored>(x), at<const Stored>(weight), at<const Stored>(bias), at<Stored>(out), channels, eps};
        share(rows, threads,
              [&](int64_t first, int64_t last) { WITH_VECTORS(vector_bytes, normalise_rows, work, first, last); });
    });
}

void geglu_cpu(int64_t storage, uintptr_t x, uintptr_t out, int64_t rows, int64_t channels, int64_t threads,
               int64_t vector_bytes) {
    const Timed timed(Work::elementwise);
    require(rows > 0 && channels > 0, "geglu: an empty tensor, ", rows, " rows of twice ", channels, " channels");
    with_storage("geglu", storage, threads, vector_bytes, [&](auto kind) {
        using Stored = decltype(kind);
        const Geglu<Stored> work{at<const Stored>(x), at<Stored>(out), channels};
        share(rows, threads,
              [&](int64_t first, int64_t last) { WITH_VECTORS(vector_bytes, gate_rows, work, first, last); });
    });
}

}  // namespace datasetdm
