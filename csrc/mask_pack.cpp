#include "mask_pack.h"

#include "check.h"
#include "device.h"

namespace py = pybind11;

namespace datasetdm {

py::tuple threshold_masks(const py::array_t<float, py::array::c_style>& logits, float threshold) {
    require(logits.ndim() == 3, "threshold_masks: logits have ", logits.ndim(), " dimensions, expected 3: [N, H, W]");
    const int64_t count = logits.shape(0), pixels = logits.shape(1) * logits.shape(2);
    py::array_t<uint8_t> masks({logits.shape(0), logits.shape(1), logits.shape(2)});
    py::array_t<int64_t> areas(count);
    const float* source = logits.data();
    uint8_t* target = masks.mutable_data();
    int64_t* area = areas.mutable_data();
    {
        py::gil_scoped_release release;
        for (int64_t n = 0; n < count; ++n) {
            int64_t set = 0;
            for (int64_t i = n * pixels; i < (n + 1) * pixels; ++i) {
                target[i] = source[i] > threshold;
                set += target[i];
            }
            area[n] = set;
        }
    }
    return py::make_tuple(masks, areas);
}

void threshold_masks_cuda(uintptr_t logits, int64_t count, int64_t height, int64_t width, float threshold, uintptr_t masks, uintptr_t areas, uintptr_t stream) {
    require(count >= 0, "threshold_masks_cuda: count is ", count, ", expected 0 or more");
    require_size("threshold_masks_cuda", height, width);
    if (count == 0) return;
    require(logits && masks && areas, "threshold_masks_cuda: a pointer is null; pass data_ptr() of tensors on the GPU");
    DATASETDM_LAUNCH("threshold_masks_cuda",
                     datasetdm_threshold_masks(reinterpret_cast<const float*>(logits), count, height * width, threshold, reinterpret_cast<uint8_t*>(masks),
                                               reinterpret_cast<int64_t*>(areas), reinterpret_cast<void*>(stream)));
}

}  // namespace datasetdm
