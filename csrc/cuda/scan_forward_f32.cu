// The kernels of forward_kernel.h for float.
#include "forward_kernel.h"

namespace vim {
namespace VIM_ISA {

void run_walks(const ForwardPlan& plan, const ScanTuning& tuning, Stream stream, float*) {
  if (plan.scan.direction[0].delta.data != nullptr) return run_walks<float, 1, kGiven>(plan, tuning, stream);
  const bool two = tuning.channels == 2 && in_pairs(plan, 4);
  two ? run_walks<float, 2, 0>(plan, tuning, stream) : run_walks<float, 1, 0>(plan, tuning, stream);
}

void run_ends(const ForwardPlan& plan, Stream stream, float*) {
  plan.scan.direction[0].delta.data != nullptr ? run_ends<float, kGiven>(plan, stream)
                                               : run_ends<float, 0>(plan, stream);
}

}  // namespace VIM_ISA
}  // namespace vim
