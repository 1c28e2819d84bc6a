#include <pybind11/pybind11.h>

#include "mask_pack.h"
#include "mask_rle.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, m) {
    m.attr("built_with_cuda") = datasetdm::built_with_cuda();
    m.def("cuda_device_count", &datasetdm::cuda_device_count);
    m.def("rle_encode", &datasetdm::rle_encode, "masks"_a.noconvert());
    m.def("rle_decode", &datasetdm::rle_decode, "counts"_a, "height"_a, "width"_a);
    m.def("rle_to_runs", &datasetdm::rle_to_runs, "counts"_a, "height"_a, "width"_a);
    m.def("rle_from_runs", &datasetdm::rle_from_runs, "runs"_a.noconvert(), "height"_a, "width"_a);
    m.def("threshold_masks", &datasetdm::threshold_masks, "logits"_a.noconvert(), "threshold"_a);
    m.def("threshold_masks_cuda", &datasetdm::threshold_masks_cuda, "logits"_a, "count"_a, "height"_a, "width"_a, "threshold"_a, "masks"_a, "areas"_a, "stream"_a);
}
