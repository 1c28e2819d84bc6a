// Marks a function that the C++ reference and the CUDA kernel both call: what they say is then written once.
#pragma once

#ifdef __CUDACC__
#define DATASETDM_BOTH __host__ __device__
#else
#define DATASETDM_BOTH
#endif
