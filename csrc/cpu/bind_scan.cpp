// The scans for key CPU.
#include "../common/bind_scan.h"

#include "ops.h"
#include "parallel.h"

namespace vim {
namespace {

int64_t work_of(const Scan& scan) { return scan.directions * scan.batch * scan.length * scan.dim; }

// The scan with dt, B and C in float32, where they are in half precision: every block of channels would convert them
// anew. They are then in `rows`. (A backward pass has no memory to spare for them.)
Scan widened(const Scan& scan, const Tensor& like, OptionalTensor& rows) {
  // Those of a bidirectional scan are side by side in x_dbl.
  if (scan.row_element == Element::float32 || scan.directions != 2 || scan.direction[0].dt.channel != 1 ||
      scan.direction[1].dt.channel != 1) {
    return scan;
  }
  const int64_t width = scan.dt_rank + 2 * scan.d_state, tokens = scan.batch * scan.length;
  rows = allocate(like, {2, tokens, width}, ScalarType::Float);
  const Scan wide = on_float_rows(scan, mutable_floats(*rows));
  parallel(tokens, tokens * width / 8,
           [&](int64_t begin, int64_t end) { return kernels().scan_widen(scan, wide, begin, end); });
  return wide;
}

void run_forward(const Scan& given, const Tensor& like) {
  OptionalTensor rows;
  const Scan scan = widened(given, like, rows);
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
