// Boolean masks <-> COCO run-length strings: runs in column-major order, zeros first (the format of pycocotools).
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

namespace datasetdm {

using Masks = pybind11::array_t<uint8_t, pybind11::array::c_style>;
using Runs = pybind11::array_t<int64_t, pybind11::array::c_style>;

pybind11::tuple rle_encode(const Masks& masks);
Masks rle_decode(const std::string& counts, int64_t height, int64_t width);
Runs rle_to_runs(const std::string& counts, int64_t height, int64_t width);
std::string rle_from_runs(const Runs& runs, int64_t height, int64_t width);

}  // namespace datasetdm
