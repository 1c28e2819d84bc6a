// For .cu files: the device of the data is made current for the launch and the caller's put back after it.
#pragma once

namespace datasetdm {

struct DeviceGuard {
    int before = 0;
    cudaError_t code;

    explicit DeviceGuard(const void* data) {
        cudaPointerAttributes attributes{};
        code = cudaGetDevice(&before);
        if (code == cudaSuccess) code = cudaPointerGetAttributes(&attributes, data);
        if (code == cudaSuccess && attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
            code = cudaErrorInvalidDevicePointer;
        if (code == cudaSuccess) code = cudaSetDevice(attributes.device);
    }
    ~DeviceGuard() { cudaSetDevice(before); }
};

}  // namespace datasetdm
