// Batched masks -> the places where they change value, on the CPU or on the GPU that holds them; mask_rle.h makes strings of these.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace datasetdm {

// starts [N * W + 1], places, areas [N], extents [N, 4] as mask_columns.h describes them: the reference of the two CUDA entries.
pybind11::tuple mask_changes(const pybind11::array_t<uint8_t, pybind11::array::c_style>& masks);

void mask_starts_cuda(uintptr_t masks, int64_t count, int64_t height, int64_t width, uintptr_t starts, uintptr_t areas, uintptr_t extents, uintptr_t stream);
void mask_places_cuda(uintptr_t masks, int64_t count, int64_t height, int64_t width, uintptr_t starts, uintptr_t places, uintptr_t stream);

}  // namespace datasetdm
