// The kernels of backward_kernel.h for float.
#include "backward_kernel.h"

namespace vim {
namespace VIM_ISA {

void run_backward(const BackwardPlan& plan, Stream stream, bool adjoint, float*) {
  run_backward<float, 12, 24>(plan, stream, adjoint);
}

}  // namespace VIM_ISA
}  // namespace vim
