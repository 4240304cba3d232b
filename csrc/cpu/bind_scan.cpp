// The scans for key CPU.
#include "../common/bind_scan.h"

#include "ops.h"
#include "parallel.h"

namespace vim {
namespace {

int64_t work_of(const Scan& scan) { return scan.directions * scan.batch * scan.length * scan.dim; }

void run_forward(const Scan& scan, const Tensor&) {
  parallel(kernels().scan_tasks(scan), work_of(scan),
           [&](int64_t begin, int64_t end) { return kernels().scan_forward(scan, begin, end); });
}

void run_backward(const ScanBackward& backward, const Tensor& like) {
  const Kernels& table = kernels();
  ScanBackwardTasks k{backward, {}, nullptr, nullptr};
  k.partition = table.scan_partition(k.scan);
  const Tensor shared = allocate(like, {k.partition.shared_floats}, ScalarType::Float);
  const Tensor weights = allocate(like, {k.partition.weight_floats}, ScalarType::Float);
  k.shared = mutable_floats(shared);
  k.weights = mutable_floats(weights);
  const int64_t work = work_of(k.scan);
  parallel(k.partition.batch_groups * k.partition.block_groups, 3 * work,
           [&](int64_t begin, int64_t end) { return table.scan_backward(k, begin, end); });
  parallel(k.partition.blocks, k.partition.weight_floats / 16,
           [&](int64_t begin, int64_t end) { return table.scan_reduce_weights(k, begin, end); });
  parallel(k.scan.batch * k.scan.length, k.partition.shared_floats / 16,
           [&](int64_t begin, int64_t end) { return table.scan_reduce_shared(k, begin, end); });
}

}  // namespace

Tensor on_cpu::bidirectional_scan(const Tensor& u, const Tensor& x_dbl, const Tensor& dt_weight, const Tensor& dt_bias,
                                  const Tensor& A_log, const Tensor& D, const Tensor& u_b, const Tensor& x_dbl_b,
                                  const Tensor& dt_weight_b, const Tensor& dt_bias_b, const Tensor& A_b_log,
                                  const Tensor& D_b, const Tensor& z, double scale) {
  return std::get<0>(vim::bidirectional_scan(u, x_dbl, dt_weight, dt_bias, A_log, D, u_b, x_dbl_b, dt_weight_b,
                                             dt_bias_b, A_b_log, D_b, z, scale, 0));
}

}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { vim::implement_scans(m, ""); }
