#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "depth_head.h"
#include "device.h"
#include "guided_step.h"
#include "mask_rle.h"
#include "network_ops.h"
#include "png.h"
#include "winograd.h"

namespace py = pybind11;
using namespace py::literals;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_C, m) {
    m.attr("built_with_cuda") = datasetdm::built_with_cuda();
    m.def("cuda_device_count", &datasetdm::cuda_device_count);
    m.def("depth_head_vector_bytes", &datasetdm::depth_head_vector_bytes);
    m.def("depth_head_add", &datasetdm::depth_head_add<float>, "products"_a.noconvert(), "bias"_a.noconvert(), "last"_a.noconvert(), "middle"_a,
          "logits"_a.noconvert(), "threads"_a, "vector_bytes"_a = 0);
    m.def("depth_head_add", &datasetdm::depth_head_add<double>, "products"_a.noconvert(), "bias"_a.noconvert(), "last"_a.noconvert(), "middle"_a,
          "logits"_a.noconvert(), "threads"_a, "vector_bytes"_a = 0);
    m.def("attention", &datasetdm::attention_cpu, WithoutGil(), "storage"_a, "q"_a, "q_strides"_a, "k"_a, "k_strides"_a, "v"_a, "v_strides"_a, "out"_a, "out_strides"_a,
          "images"_a, "heads"_a, "queries"_a, "keys"_a, "width"_a, "scale"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("group_norm", &datasetdm::group_norm_cpu, WithoutGil(), "storage"_a, "x"_a, "weight"_a, "bias"_a, "out"_a, "images"_a, "cells"_a, "channels"_a, "groups"_a, "eps"_a,
          "has_silu"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("layer_norm", &datasetdm::layer_norm_cpu, WithoutGil(), "storage"_a, "x"_a, "weight"_a, "bias"_a, "out"_a, "rows"_a, "channels"_a, "eps"_a, "threads"_a,
          "vector_bytes"_a = 0);
    m.def("geglu", &datasetdm::geglu_cpu, WithoutGil(), "storage"_a, "x"_a, "out"_a, "rows"_a, "channels"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("winograd", &datasetdm::winograd_cpu, WithoutGil(), "x"_a, "weight"_a, "bias"_a, "residual"_a, "out"_a, "images"_a, "height"_a, "width"_a, "channels"_a, "outputs"_a,
          "is_doubled"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("rle_encode", &datasetdm::rle_encode, "masks"_a.noconvert());
    m.def("rle_decode", &datasetdm::rle_decode, "counts"_a, "height"_a, "width"_a);
    m.def("rle_to_runs", &datasetdm::rle_to_runs, "counts"_a, "height"_a, "width"_a);
    m.def("rle_from_runs", &datasetdm::rle_from_runs, "runs"_a.noconvert(), "height"_a, "width"_a);
    m.def("png_encode", &datasetdm::png_encode, "pixels"_a.noconvert(), "palette"_a = std::string());
    m.def("png_encode_words", &datasetdm::png_encode_words, "pixels"_a.noconvert());
    m.def("count_bytes", &datasetdm::count_bytes, "pixels"_a.noconvert());
    m.def("guided_step", &datasetdm::guided_step, "output"_a.noconvert(), "latents"_a.noconvert(), "history"_a.noconvert(), "numbers"_a.noconvert());
    m.def("guided_step_cuda", &datasetdm::guided_step_cuda, "output"_a, "output_bytes"_a, "is_bfloat"_a, "latents"_a, "history"_a, "slots"_a, "numbers"_a, "next"_a,
          "size"_a, "stream"_a);
}
