// What the CUDA entries share on the C++ side: whether this build has them, and how a failed launch becomes a
// RuntimeError.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "released_gil.h"

extern "C" int datasetdm_cuda_device_count(int* count);
extern "C" const char* datasetdm_cuda_error(int code);  // of the CUDA code, not 0, that a launcher returned

namespace datasetdm {

int cuda_device_count();
bool built_with_cuda();

#ifdef DATASETDM_WITH_CUDA

// Runs a launcher without the GIL; it returns a CUDA error code, 0 for success.
template <typename Launch>
void launch(const char* name, Launch launcher) {
    int code;
    {
        ReleasedGil release;
        code = launcher();
    }
    if (code) throw std::runtime_error(std::string(name) + ": " + datasetdm_cuda_error(code));
}
#define DATASETDM_LAUNCH(name, call) ::datasetdm::launch(name, [&] { return call; })

#else

// Only the name is used: the launchers do not exist in a build without CUDA.
#define DATASETDM_LAUNCH(name, call)             \
    throw std::runtime_error(std::string(name) + \
                             ": this build has no CUDA code; install nvcc and build again with DATASETDM_CUDA=1")

#endif

}  // namespace datasetdm
