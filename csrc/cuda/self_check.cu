// Whether this library's kernels can run at all: asked once, before the first of them is used.
#include "device.h"

namespace vim {
namespace cuda {

__global__ void problem_kernel() {}

}  // namespace cuda
}  // namespace vim

// Why no kernel of this library can run on the current device; null where they can. The code was made for other
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
