// The norm for key CPU.
#include "../common/bind_norm.h"

#include "run.h"

namespace vim {
namespace {

// A channel of a row costs about a tenth of a scan's channel-step.
int64_t work_of(const Norm& norm) { return norm.rows * norm.dim / 10; }

void run_forward(const Norm& norm, const Tensor&) {
  parallel(norm.rows, work_of(norm),
           [&](int64_t begin, int64_t end) { return kernels().norm_forward(norm, begin, end); });
}

void run_backward(Norm& norm, const Tensor& like) { run_norm_backward(norm, like); }

bool reads_any_weight() { return false; }

}  // namespace

void run_norm_backward(Norm& norm, const Tensor& like) {
  // Fixed by the shape, so that sums have one order for any number of threads.
  norm.row_groups = std::clamp<int64_t>(norm.rows / 16, 1, 64);
  const Tensor partials = allocate(like, {norm.row_groups * norm.dim}, ScalarType::Float);
  norm.partials = mutable_floats(partials);
  const Kernels& table = kernels();
  parallel(norm.row_groups, 2 * work_of(norm),
           [&](int64_t begin, int64_t end) { return table.norm_backward(norm, begin, end); });
  parallel(norm.dim, norm.row_groups * norm.dim / 10,
           [&](int64_t begin, int64_t end) { return table.norm_reduce(norm, begin, end); });
}

}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { vim::implement_norm(m, ""); }
