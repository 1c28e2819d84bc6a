#include "device.h"

namespace datasetdm {

#ifdef DATASETDM_WITH_CUDA

int cuda_device_count() {
    int count = 0;
    return datasetdm_cuda_device_count(&count) ? 0 : count;
}

bool built_with_cuda() { return true; }

#else

int cuda_device_count() { return 0; }

bool built_with_cuda() { return false; }

#endif

}  // namespace datasetdm
