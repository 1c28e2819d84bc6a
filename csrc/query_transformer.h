// The transformer of a decoder whose queries read the image through their own last masks, on a CPU in one call: of
// small layers, which take less time than calls of a library would.
#pragma once

#include <cstdint>
#include <vector>

#include "blocks.h"

namespace datasetdm {

struct QueryLayer {
    Linear cross_query, cross_out, self_packed, self_out, wide, narrow;
    Norm cross_norm, self_norm, feed_norm;
};

struct QueryTransformer {
    std::vector<QueryLayer> layers;
    std::vector<Linear> memory;  // of each level: the keys of all layers that read it, then their values
    Linear positions;  // of each layer: what positions add to its queries over the level, to its own queries and to its
                       // own keys
    Norm norm;
    std::vector<Linear> embedding;  // from a normed query to the channels of the mask features, with ReLU between
    Linear classes;
    int64_t heads;

    QueryTransformer(const std::vector<QueryLayer>& layers, const std::vector<Linear>& memory, const Linear& positions,
                     const Norm& norm, const std::vector<Linear>& embedding, const Linear& classes, int64_t heads);

    // `content` and `position` are [images, queries, channels]. Of each level `cells` are given as `level` [images,
    // cells, channels], what their places add to the keys of its layers, `places` [cells, layers * channels], and the
    // mask features there, `features` [images, cells, width]. Gives `embedded` [images, queries, width] and `logits`
    // [images, queries, classes].
    void run(uintptr_t content, uintptr_t position, const std::vector<uintptr_t>& level,
             const std::vector<uintptr_t>& places, const std::vector<uintptr_t>& features,
             const std::vector<int64_t>& cells, uintptr_t embedded, uintptr_t logits, int64_t images, int64_t queries,
             int64_t threads, int64_t vector_bytes) const;
};

}  // namespace datasetdm
