// The kernel of the fast backward scan whose main loops scripts/check_cuda_compiles.sh counts: bfloat16, dt_rank 12.
#include "backward_kernel.h"

namespace vim {
namespace VIM_ISA {

template __global__ void scan_backward_kernel<bfloat16, 12>(const __grid_constant__ BackwardPlan);

}  // namespace VIM_ISA
}  // namespace vim
