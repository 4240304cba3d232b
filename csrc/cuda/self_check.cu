// A check that this library's kernels can run, called once before the first use.
#include "device.h"

namespace vim {
namespace cuda {

__global__ void problem_kernel() {}

}  // namespace cuda
}  // namespace vim

// Returns the reason why kernels cannot run on the current device, or null. The code may be built for other
// architectures, or by a toolkit newer than the driver.
extern "C" __attribute__((visibility("default"))) const char* vim_cuda_problem() {
#if defined(__CUDACC__)
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(vim::cuda::problem_kernel));
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
#else
  return nullptr;
#endif
}
