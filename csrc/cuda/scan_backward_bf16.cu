// The kernels of backward_kernel.h for bfloat16.
#include "backward_kernel.h"

namespace vim {
namespace VIM_ISA {

void run_backward(const BackwardPlan& plan, Stream stream, bool adjoint, bfloat16*) {
  run_backward<bfloat16, 12, 24, 48>(plan, stream, adjoint);
}

}  // namespace VIM_ISA
}  // namespace vim
