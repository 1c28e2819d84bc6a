// Plain CUDA runtime only, linked statically: without a driver the calls return an error code and importing still
// works.
extern "C" int datasetdm_cuda_device_count(int* count) { return cudaGetDeviceCount(count); }

extern "C" const char* datasetdm_cuda_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
