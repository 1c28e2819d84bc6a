#include "mask_changes.h"

#include <algorithm>
#include <vector>

#include "check.h"
#include "device.h"
#include "mask_columns.h"

namespace py = pybind11;

namespace datasetdm {

py::tuple mask_changes(const py::array_t<uint8_t, py::array::c_style>& masks) {
    require(masks.ndim() == 3, "mask_changes: masks have ", masks.ndim(), " dimensions, expected 3: [N, H, W]");
    const int64_t count = masks.shape(0), height = masks.shape(1), width = masks.shape(2);
    require_size("mask_changes", height, width);
    py::array_t<int64_t> starts(count * width + 1), areas(count);
    py::array_t<int32_t> extents(std::vector<py::ssize_t>{count, 4});
    const uint8_t* source = masks.data();
    int64_t *start = starts.mutable_data(), *area = areas.mutable_data();
    int32_t* extent = extents.mutable_data();
    std::vector<int32_t> found;
    {
        py::gil_scoped_release release;
        start[0] = 0;
        for (int64_t n = 0; n < count; ++n, extent += 4) {
            area[n] = 0;
            extent[0] = extent[1] = INT32_MAX;
            extent[2] = extent[3] = -1;
            for (int64_t x = 0; x < width; ++x) {
                const Column column = read_column(source + n * height * width, height, width, x);
                start[n * width + x + 1] = start[n * width + x] + column.changes;
                if (!column.area) continue;
                area[n] += column.area;
                extent[0] = std::min(extent[0], static_cast<int32_t>(x));
                extent[1] = std::min(extent[1], column.top);
                extent[2] = std::max(extent[2], static_cast<int32_t>(x));
                extent[3] = std::max(extent[3], column.bottom);
            }
        }
        found.resize(start[count * width]);
        for (int64_t i = 0; i < count * width; ++i)
            if (start[i + 1] > start[i]) write_column(source + i / width * height * width, height, width, i % width, found.data() + start[i]);
    }
    return py::make_tuple(starts, py::array_t<int32_t>(static_cast<py::ssize_t>(found.size()), found.data()), areas, extents);
}

void mask_starts_cuda(uintptr_t masks, int64_t count, int64_t height, int64_t width, uintptr_t starts, uintptr_t areas, uintptr_t extents, uintptr_t stream) {
    require(count > 0, "mask_starts_cuda: count is ", count, ", expected at least 1");
    require_size("mask_starts_cuda", height, width);
    require(masks && starts && areas && extents, "mask_starts_cuda: a pointer is null; pass data_ptr() of tensors on the GPU");
    DATASETDM_LAUNCH("mask_starts_cuda",
                     datasetdm_mask_starts(reinterpret_cast<const uint8_t*>(masks), count, height, width, reinterpret_cast<int64_t*>(starts),
                                           reinterpret_cast<int64_t*>(areas), reinterpret_cast<int32_t*>(extents), reinterpret_cast<void*>(stream)));
}

void mask_places_cuda(uintptr_t masks, int64_t count, int64_t height, int64_t width, uintptr_t starts, uintptr_t places, uintptr_t stream) {
    require(count > 0, "mask_places_cuda: count is ", count, ", expected at least 1");
    require_size("mask_places_cuda", height, width);
    require(masks && starts && places, "mask_places_cuda: a pointer is null; pass data_ptr() of tensors on the GPU, and call it only where there are changes");
    DATASETDM_LAUNCH("mask_places_cuda",
                     datasetdm_mask_places(reinterpret_cast<const uint8_t*>(masks), count, height, width, reinterpret_cast<const int64_t*>(starts),
                                           reinterpret_cast<int32_t*>(places), reinterpret_cast<void*>(stream)));
}

}  // namespace datasetdm
