// The kernels of forward_kernel.h for bfloat16.
#include "forward_kernel.h"

namespace vim {
namespace VIM_ISA {

void run_walks(const ForwardPlan& plan, const ScanTuning& tuning, Stream stream, bfloat16*) {
  if (plan.scan.direction[0].delta.data != nullptr) return run_walks<bfloat16, 1, kGiven>(plan, tuning, stream);
  const bool two = tuning.channels == 2 && in_pairs(plan, 2);
  const int64_t rank = in_vectors(plan) ? plan.scan.dt_rank : 0;
  if (two && rank == 12) return run_walks<bfloat16, 2, 12>(plan, tuning, stream);
  if (two && rank == 24) return run_walks<bfloat16, 2, 24>(plan, tuning, stream);
  const bool narrow = plan.scan.direction[0].dt_weight.element == Element::bfloat16;
  if (two && rank == 48 && narrow) return run_walks<bfloat16, 2, 48>(plan, tuning, stream);
  if (!two && rank == 12) return run_walks<bfloat16, 1, 12>(plan, tuning, stream);
  two ? run_walks<bfloat16, 2, 0>(plan, tuning, stream) : run_walks<bfloat16, 1, 0>(plan, tuning, stream);
}

void run_ends(const ForwardPlan& plan, Stream stream, bfloat16*) {
  plan.scan.direction[0].delta.data != nullptr ? run_ends<bfloat16, kGiven>(plan, stream)
                                               : run_ends<bfloat16, 0>(plan, stream);
}

}  // namespace VIM_ISA
}  // namespace vim
