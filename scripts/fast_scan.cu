// The kernels whose main loops scripts/check_cuda_compiles.sh counts: two channels a thread, bfloat16.
#include "forward_kernel.h"

namespace vim {
namespace VIM_ISA {

template __global__ void scan_forward_kernel<bfloat16, 2, 12>(const __grid_constant__ ForwardPlan);
template __global__ void scan_forward_kernel<bfloat16, 2, 24>(const __grid_constant__ ForwardPlan);
template __global__ void scan_forward_kernel<bfloat16, 2, 48>(const __grid_constant__ ForwardPlan);

}  // namespace VIM_ISA
}  // namespace vim
