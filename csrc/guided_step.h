// Classifier-free guidance and one sampler update, read and written once; callable from graph engines by pointer and
// stream.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace datasetdm {

using Numbers = pybind11::array_t<float, pybind11::array::c_style>;

// output [2, S] (without text, with it) or [1, S] (of a model without guidance), latents [S], history [M, S] (earlier
// entries, newest first; one of weight zero is not read), numbers [5 + M]: guidance, sample, both of the entry, the
// weight of this call's entry, then those of the earlier ones. Returns the next latents and this call's entry [2, S].
Numbers guided_step(const Numbers& output, const Numbers& latents, const Numbers& history, const Numbers& numbers);

// The same on the GPU; the numbers lie there too, so one captured graph serves every call. `output_bytes` 4 is fp32, 2
// is fp16, or bf16 where `is_bfloat`, in 1 or 2 `rows`; latents, history and `next` are fp32. `next` [2, S] may begin
// at `latents`: each value is read before it is written.
void guided_step_cuda(uintptr_t output, int64_t output_bytes, bool is_bfloat, uintptr_t latents, uintptr_t history,
                      int64_t slots, uintptr_t numbers, uintptr_t next, int64_t size, uintptr_t stream, int64_t rows);

}  // namespace datasetdm

// Returns a CUDA error code, 0 for success. `kind` of the output: 0 fp32, 1 fp16, 2 bf16.
extern "C" int datasetdm_guided_step(const void* output, int kind, const float* latents, const float* history,
                                     int64_t slots, const float* numbers, float* next, int64_t size, void* stream,
                                     int64_t rows);
