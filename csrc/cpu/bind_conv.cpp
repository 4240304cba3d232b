// The convolutions for key CPU.
#include "../common/bind_conv.h"

#include "run.h"

namespace vim {
namespace {

// A tap costs about a fifteenth of a scan's channel-step, and so does SiLU.
int64_t work_of(const Conv& conv) { return conv.directions * conv.batch * conv.length * conv.dim / 8; }

void run_forward(const Conv& conv, const Tensor&) {
  parallel(kernels().conv_tasks(conv), work_of(conv),
           [&](int64_t begin, int64_t end) { return kernels().conv_forward(conv, begin, end); });
}

void run_backward(Conv& conv, const Tensor& like) { run_conv_backward(conv, like); }

}  // namespace

void run_conv_backward(Conv& conv, const Tensor& like) {
  const Kernels& table = kernels();
  const int64_t blocks = (conv.dim + table.lanes - 1) / table.lanes;
  // Fixed by the shape, so that sums have one order for any number of threads.
  conv.batch_groups = std::max<int64_t>(1, std::min<int64_t>(conv.batch, 64 / std::max<int64_t>(1, blocks)));
  const Tensor partials = allocate(like, {table.conv_partial_floats(conv)}, ScalarType::Float);
  conv.partials = mutable_floats(partials);
  parallel(conv.batch_groups * blocks, 3 * work_of(conv),
           [&](int64_t begin, int64_t end) { return table.conv_backward(conv, begin, end); });
  parallel(blocks, conv.batch_groups * conv.dim,
           [&](int64_t begin, int64_t end) { return table.conv_reduce(conv, begin, end); });
}

}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { vim::implement_convolutions(m, ""); }
