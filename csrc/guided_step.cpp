#include "guided_step.h"

#include <vector>

#include "check.h"
#include "device.h"
#include "guided_value.h"
#include "released_gil.h"

namespace py = pybind11;

namespace datasetdm {

Numbers guided_step(const Numbers& output, const Numbers& latents, const Numbers& history, const Numbers& numbers) {
    require(latents.ndim() == 1 && output.ndim() == 2 && history.ndim() == 2 && numbers.ndim() == 1,
            "guided_step: expected output [1 or 2, S], latents [S], history [M, S] and numbers [5 + M]");
    const int64_t size = latents.size(), slots = history.shape(0);
    const int64_t rows = output.shape(0);
    require((rows == 1 || rows == 2) && output.shape(1) == size, "guided_step: output is [", rows, ", ",
            output.shape(1), "], expected [1 or 2, ", size, "]");
    require(history.shape(1) == size, "guided_step: history has ", history.shape(1), " values a slot, expected ", size);
    require(numbers.size() == kFixedNumbers + slots, "guided_step: ", numbers.size(), " numbers, expected ",
            kFixedNumbers + slots, " for ", slots, " slots");
    Numbers next(std::vector<py::ssize_t>{2, size});
    const float *from = output.data(), *latent = latents.data(), *earlier = history.data(), *number = numbers.data();
    const float* with_text = from + (rows - 1) * size;
    float* target = next.mutable_data();
    ReleasedGil release;
    for (int64_t i = 0; i < size; ++i) {
        const Stepped stepped = guided_value(from[i], with_text[i], latent[i], earlier + i, slots, size, number);
        target[i] = stepped.latent;
        target[size + i] = stepped.entry;
    }
    return next;
}

void guided_step_cuda(uintptr_t output, int64_t output_bytes, bool is_bfloat, uintptr_t latents, uintptr_t history,
                      int64_t slots, uintptr_t numbers, uintptr_t next, int64_t size, uintptr_t stream, int64_t rows) {
    require(output_bytes == 4 || output_bytes == 2, "guided_step_cuda: output_bytes is ", output_bytes,
            ", expected 4 or 2");
    require(size > 0 && slots >= 0, "guided_step_cuda: ", size, " values and ", slots,
            " slots, expected at least 1 and 0");
    require(rows == 1 || rows == 2, "guided_step_cuda: rows is ", rows, ", expected 1 or 2");
    require(output && latents && numbers && next && (history || !slots),
            "guided_step_cuda: a pointer is null; pass data_ptr() of tensors on the GPU");
    DATASETDM_LAUNCH(
        "guided_step_cuda",
        datasetdm_guided_step(reinterpret_cast<const void*>(output),
                              output_bytes == 4 ? 0
                              : is_bfloat       ? 2
                                                : 1,
                              reinterpret_cast<const float*>(latents), reinterpret_cast<const float*>(history), slots,
                              reinterpret_cast<const float*>(numbers), reinterpret_cast<float*>(next), size,
                              reinterpret_cast<void*>(stream), rows));
}

}  // namespace datasetdm
