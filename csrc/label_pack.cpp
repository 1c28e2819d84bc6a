#include "label_pack.h"

#include "check.h"
#include "device.h"
#include "label_bytes.h"

namespace py = pybind11;

namespace datasetdm {
namespace {

constexpr int64_t kMostClasses = 256;

void require_classes(const char* name, int64_t classes) {
    require(classes > 0 && classes <= kMostClasses, name, ": ", classes, " classes, expected 1 to ", kMostClasses, ", the range of a byte");
}

}  // namespace

py::tuple pack_labels(const py::array_t<float, py::array::c_style>& scores) {
    require(scores.ndim() == 3, "pack_labels: scores have ", scores.ndim(), " dimensions, expected 3: [B, K, P]");
    const int64_t images = scores.shape(0), classes = scores.shape(1), pixels = scores.shape(2);
    require_classes("pack_labels", classes);
    py::array_t<uint8_t> labels(std::vector<py::ssize_t>{images, pixels});
    py::array_t<float> largest(std::vector<py::ssize_t>{images, pixels});
    const float* source = scores.data();
    uint8_t* label = labels.mutable_data();
    float* score = largest.mutable_data();
    {
        py::gil_scoped_release release;
        for (int64_t b = 0; b < images; ++b)
            for (int64_t p = 0; p < pixels; ++p) {
                const Best best = best_class(source + b * classes * pixels + p, classes, pixels);
                label[b * pixels + p] = best.label;
                score[b * pixels + p] = best.score;
            }
    }
    return py::make_tuple(labels, largest);
}

void pack_labels_cuda(uintptr_t scores, int64_t images, int64_t classes, int64_t pixels, uintptr_t labels, uintptr_t largest, uintptr_t stream) {
    require_classes("pack_labels_cuda", classes);
    require(images > 0 && pixels > 0, "pack_labels_cuda: ", images, " images of ", pixels, " pixels, expected at least one of each");
    require(scores && labels, "pack_labels_cuda: a pointer is null; pass data_ptr() of tensors on the GPU");
    DATASETDM_LAUNCH("pack_labels_cuda", datasetdm_pack_labels(reinterpret_cast<const float*>(scores), images, classes, pixels, reinterpret_cast<uint8_t*>(labels),
                                                               reinterpret_cast<float*>(largest), reinterpret_cast<void*>(stream)));
}

py::array_t<uint8_t> pack_image(const py::array_t<float, py::array::c_style>& decoded) {
    require(decoded.ndim() == 3 && decoded.shape(1) == 3, "pack_image: decoded must be [B, 3, P]");
    const int64_t images = decoded.shape(0), pixels = decoded.shape(2);
    py::array_t<uint8_t> bytes(std::vector<py::ssize_t>{images, pixels, 3});
    const float* source = decoded.data();
    uint8_t* target = bytes.mutable_data();
    py::gil_scoped_release release;
    for (int64_t b = 0; b < images; ++b)
        for (int64_t p = 0; p < pixels; ++p)
            for (int64_t c = 0; c < 3; ++c) target[(b * pixels + p) * 3 + c] = image_byte(source[(b * 3 + c) * pixels + p]);
    return bytes;
}

void pack_image_cuda(uintptr_t decoded, int64_t images, int64_t pixels, uintptr_t bytes, uintptr_t stream) {
    require(images > 0 && pixels > 0, "pack_image_cuda: ", images, " images of ", pixels, " pixels, expected at least one of each");
    require(decoded && bytes, "pack_image_cuda: a pointer is null; pass data_ptr() of tensors on the GPU");
    DATASETDM_LAUNCH("pack_image_cuda", datasetdm_pack_image(reinterpret_cast<const float*>(decoded), images, pixels, reinterpret_cast<uint8_t*>(bytes),
                                                             reinterpret_cast<void*>(stream)));
}

}  // namespace datasetdm
