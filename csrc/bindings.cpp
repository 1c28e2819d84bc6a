#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "blocks.h"
#include "depth_head.h"
#include "device.h"
#include "guided_step.h"
#include "mask_rle.h"
#include "network_ops.h"
#include "outlines.h"
#include "png.h"
#include "query_transformer.h"
#include "released_gil.h"
#include "tiled_attention.h"
#include "tiled_convolution.h"
#include "timing.h"
#include "unet.h"
#include "winograd.h"

namespace py = pybind11;
using namespace py::literals;
using WithoutGil = py::call_guard<datasetdm::ReleasedGil>;

template <typename Block>
void add_step(py::class_<datasetdm::Step> step) {
    step.def(py::init([](const Block& block, bool joins, bool keeps, bool parts) {
                 return datasetdm::Step{block, joins, keeps, parts};
             }),
             "block"_a, "joins"_a = false, "keeps"_a = false, "parts"_a = false);
}

template <typename Real>
void add_depth_head(py::module_& m) {
    m.def("depth_head_add", &datasetdm::depth_head_add<Real>, "products"_a.noconvert(), "bias"_a.noconvert(),
          "last"_a.noconvert(), "middle"_a, "logits"_a.noconvert(), "threads"_a, "vector_bytes"_a = 0);
    m.def("depth_head_gradient", &datasetdm::depth_head_gradient<Real>, "products"_a.noconvert(), "bias"_a.noconvert(),
          "last"_a.noconvert(), "middle"_a, "gradient"_a.noconvert(), "to_products"_a.noconvert(),
          "to_bias"_a.noconvert(), "to_last"_a.noconvert(), "threads"_a, "vector_bytes"_a = 0);
}

PYBIND11_MODULE(_C, m) {
    // pybind11 asks for NumPy's functions once, and lets other threads run meanwhile: at the first call an interpreter
    // that ends then would end the process, see released_gil.h.
    try {
        py::dtype::of<uint8_t>();
    } catch (const py::error_already_set&) {  // a call that takes an array says so
    }
    m.attr("built_with_cuda") = datasetdm::built_with_cuda();
    m.def("cuda_device_count", &datasetdm::cuda_device_count);
    m.def("depth_head_vector_bytes", &datasetdm::depth_head_vector_bytes);
    add_depth_head<float>(m);
    add_depth_head<double>(m);
    m.def("attention", &datasetdm::attention_cpu, WithoutGil(), "storage"_a, "q"_a, "q_strides"_a, "k"_a, "k_strides"_a,
          "v"_a, "v_strides"_a, "out"_a, "out_strides"_a, "images"_a, "heads"_a, "queries"_a, "keys"_a, "width"_a,
          "scale"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("multiplies_tiles", &datasetdm::multiplies_tiles);
    m.def("tiled_attention", &datasetdm::tiled_attention_cpu, WithoutGil(), "q"_a, "q_strides"_a, "k"_a, "k_strides"_a,
          "v"_a, "v_strides"_a, "out"_a, "out_strides"_a, "images"_a, "heads"_a, "queries"_a, "keys"_a, "width"_a,
          "scale"_a, "threads"_a);
    m.def("tiled_convolution", &datasetdm::tiled_convolution_cpu, WithoutGil(), "x"_a, "weight"_a, "bias"_a,
          "residual"_a, "out"_a, "images"_a, "height"_a, "width"_a, "channels"_a, "outputs"_a, "side"_a, "threads"_a);
    m.def("group_norm", &datasetdm::group_norm_cpu, WithoutGil(), "storage"_a, "x"_a, "weight"_a, "bias"_a, "out"_a,
          "images"_a, "cells"_a, "channels"_a, "groups"_a, "eps"_a, "has_silu"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("layer_norm", &datasetdm::layer_norm_cpu, WithoutGil(), "storage"_a, "x"_a, "weight"_a, "bias"_a, "out"_a,
          "rows"_a, "channels"_a, "eps"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("geglu", &datasetdm::geglu_cpu, WithoutGil(), "storage"_a, "x"_a, "out"_a, "rows"_a, "channels"_a,
          "threads"_a, "vector_bytes"_a = 0);
    m.def("winograd", &datasetdm::winograd_cpu, WithoutGil(), "x"_a, "weight"_a, "bias"_a, "residual"_a, "out"_a,
          "images"_a, "height"_a, "width"_a, "channels"_a, "outputs"_a, "is_doubled"_a, "storage"_a, "threads"_a,
          "vector_bytes"_a = 0);
    m.def("winograd_taps", &datasetdm::winograd_taps_cpu, WithoutGil(), "x"_a, "taps"_a, "bias"_a, "residual"_a,
          "out"_a, "memory"_a, "images"_a, "height"_a, "width"_a, "channels"_a, "outputs"_a, "is_doubled"_a,
          "storage"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("winograd_memory", &datasetdm::winograd_memory, "images"_a, "height"_a, "width"_a, "channels"_a, "storage"_a,
          "threads"_a);
    m.def("winograd_gradient", &datasetdm::winograd_gradient, WithoutGil(), "x"_a, "out"_a, "weight"_a, "images"_a,
          "height"_a, "width"_a, "channels"_a, "outputs"_a, "threads"_a, "vector_bytes"_a = 0);
    m.def("winograd_weight", &datasetdm::winograd_weight, WithoutGil(), "plain"_a, "weight"_a, "channels"_a,
          "outputs"_a, "threads"_a, "vector_bytes"_a = 0);
    py::class_<datasetdm::Norm>(m, "Norm").def(
        py::init([](uintptr_t weight, uintptr_t bias, int64_t channels, int64_t groups, double eps) {
            return datasetdm::Norm{weight, bias, channels, groups, eps};
        }),
        "weight"_a, "bias"_a, "channels"_a, "groups"_a, "eps"_a);
    py::class_<datasetdm::Linear>(m, "Linear")
        .def(py::init<uintptr_t, uintptr_t, int64_t, int64_t, bool>(), "weight"_a, "bias"_a, "inner"_a, "outputs"_a,
             "is_paired"_a = false);
    py::class_<datasetdm::Convolution>(m, "Convolution")
        .def(py::init<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>(), "weight"_a,
             "bias"_a, "transformed"_a, "channels"_a, "outputs"_a, "taps"_a, "stride"_a, "padding"_a,
             "is_paired"_a = false)
        .def("run", &datasetdm::Convolution::run, WithoutGil(), "x"_a, "bias"_a, "residual"_a, "out"_a, "images"_a,
             "height"_a, "width"_a, "threads"_a, "vector_bytes"_a = 0);
    py::class_<datasetdm::Upsample>(m, "Upsample")
        .def(py::init<const datasetdm::Convolution&>(), "convolution"_a)
        .def("run", &datasetdm::Upsample::run, WithoutGil(), "x"_a, "out"_a, "images"_a, "height"_a, "width"_a,
             "threads"_a, "vector_bytes"_a = 0);
    py::class_<datasetdm::Resnet>(m, "Resnet")
        .def(py::init<const datasetdm::Norm&, const datasetdm::Convolution&, const datasetdm::Norm&,
                      const datasetdm::Convolution&, std::optional<datasetdm::Convolution>>(),
             "norm1"_a, "conv1"_a, "norm2"_a, "conv2"_a, "shortcut"_a)
        .def("run", &datasetdm::Resnet::run, WithoutGil(), "x"_a, "bias"_a, "out"_a, "images"_a, "height"_a, "width"_a,
             "threads"_a, "vector_bytes"_a = 0);
    using datasetdm::Linear;
    using datasetdm::Norm;
    py::class_<datasetdm::Transformer>(m, "Transformer")
        .def(py::init<const Norm&, const Norm&, const Norm&, const Norm&, const Linear&, const Linear&, const Linear&,
                      const Linear&, const Linear&, const Linear&, const Linear&, const Linear&, int64_t>(),
             "norm"_a, "norm1"_a, "norm2"_a, "norm3"_a, "entry"_a, "self_qkv"_a, "self_out"_a, "text_q"_a, "text_out"_a,
             "wide"_a, "narrow"_a, "exit"_a, "heads"_a)
        .def("before",
             py::overload_cast<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>(
                 &datasetdm::Transformer::before, py::const_),
             WithoutGil(), "x"_a, "hidden"_a, "query"_a, "images"_a, "cells"_a, "threads"_a, "vector_bytes"_a = 0)
        .def("after",
             py::overload_cast<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>(
                 &datasetdm::Transformer::after, py::const_),
             WithoutGil(), "x"_a, "hidden"_a, "attended"_a, "out"_a, "images"_a, "cells"_a, "threads"_a,
             "vector_bytes"_a = 0);
    const auto step = py::class_<datasetdm::Step>(m, "Step");
    add_step<datasetdm::Convolution>(step);
    add_step<datasetdm::Upsample>(step);
    add_step<datasetdm::Resnet>(step);
    add_step<datasetdm::Transformer>(step);
    py::class_<datasetdm::UNet>(m, "UNet")
        .def(py::init<const datasetdm::Convolution&, const std::vector<datasetdm::Step>&, const Norm&,
                      const datasetdm::Convolution&>(),
             "entry"_a, "steps"_a, "norm"_a, "exit"_a)
        .def("sizes", &datasetdm::UNet::sizes, "height"_a, "width"_a)
        .def("run", &datasetdm::UNet::run, WithoutGil(), "latents"_a, "biases"_a, "texts"_a, "out"_a, "outputs"_a,
             "queries"_a, "images"_a, "height"_a, "width"_a, "tokens"_a, "threads"_a, "vector_bytes"_a = 0);
    py::class_<datasetdm::QueryLayer>(m, "QueryLayer")
        .def(py::init([](const Linear& cross_query, const Linear& cross_out, const Linear& self_packed,
                         const Linear& self_out, const Linear& wide, const Linear& narrow, const Norm& cross_norm,
                         const Norm& self_norm, const Norm& feed_norm) {
                 return datasetdm::QueryLayer{cross_query, cross_out,  self_packed, self_out, wide,
                                              narrow,      cross_norm, self_norm,   feed_norm};
             }),
             "cross_query"_a, "cross_out"_a, "self_packed"_a, "self_out"_a, "wide"_a, "narrow"_a, "cross_norm"_a,
             "self_norm"_a, "feed_norm"_a);
    py::class_<datasetdm::QueryTransformer>(m, "QueryTransformer")
        .def(py::init<const std::vector<datasetdm::QueryLayer>&, const std::vector<Linear>&, const Linear&, const Norm&,
                      const std::vector<Linear>&, const Linear&, int64_t>(),
             "layers"_a, "memory"_a, "positions"_a, "norm"_a, "embedding"_a, "classes"_a, "heads"_a)
        .def("run", &datasetdm::QueryTransformer::run, WithoutGil(), "content"_a, "position"_a, "level"_a, "places"_a,
             "features"_a, "cells"_a, "embedded"_a, "logits"_a, "images"_a, "queries"_a, "threads"_a,
             "vector_bytes"_a = 0);
    m.def("take_times", &datasetdm::take_times, "is_on"_a);
    m.def("rle_encode", &datasetdm::rle_encode, "masks"_a.noconvert());
    m.def("rle_decode", &datasetdm::rle_decode, "counts"_a, "height"_a, "width"_a);
    m.def("rle_to_runs", &datasetdm::rle_to_runs, "counts"_a, "height"_a, "width"_a);
    m.def("rle_from_runs", &datasetdm::rle_from_runs, "runs"_a.noconvert(), "height"_a, "width"_a);
    m.def("outlines_of_labels", &datasetdm::outlines_of_labels, "labels"_a.noconvert(), "image"_a.noconvert());
    m.def("outlines_of_depth", &datasetdm::outlines_of_depth, "metres"_a.noconvert(), "image"_a.noconvert());
    m.def("png_encode", &datasetdm::png_encode, "pixels"_a.noconvert(), "palette"_a = std::string());
    m.def("png_encode_words", &datasetdm::png_encode_words, "pixels"_a.noconvert());
    m.def("count_bytes", &datasetdm::count_bytes, "pixels"_a.noconvert());
    m.def("guided_step", &datasetdm::guided_step, "output"_a.noconvert(), "latents"_a.noconvert(),
          "history"_a.noconvert(), "numbers"_a.noconvert());
    m.def("guided_step_cuda", &datasetdm::guided_step_cuda, "output"_a, "output_bytes"_a, "is_bfloat"_a, "latents"_a,
          "history"_a, "slots"_a, "numbers"_a, "next"_a, "size"_a, "stream"_a, "rows"_a = 2);
}
