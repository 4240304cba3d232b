// The scans for key CPU.
#include "../common/bind_scan.h"

#include "run.h"

namespace vim {

Scan with_float_rows(const Scan& scan, const Tensor& like, OptionalTensor& rows) {
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

namespace {

int64_t work_of(const Scan& scan) { return scan.directions * scan.batch * scan.length * scan.dim; }

void run_forward(const Scan& given, const Tensor& like) {
  OptionalTensor rows;
  const Scan scan = with_float_rows(given, like, rows);
  parallel(kernels().scan_tasks(scan), work_of(scan),
           [&](int64_t begin, int64_t end) { return kernels().scan_forward(scan, begin, end); });
}

void run_backward(const ScanBackward& backward, const Tensor& like) {
  ScanBackwardTasks k{backward, {}, nullptr, nullptr};
  k.partition = kernels().scan_partition(k.scan);
  const Tensor shared = allocate(like, {k.partition.shared_floats}, ScalarType::Float);
  const Tensor weights = allocate(like, {k.partition.weight_floats}, ScalarType::Float);
  k.shared = mutable_floats(shared);
  k.weights = mutable_floats(weights);
  run_scan_backward(k);
}

}  // namespace

void run_scan_backward(const ScanBackwardTasks& k) {
  const Kernels& table = kernels();
  parallel(k.partition.batch_groups * k.partition.block_groups, 3 * work_of(k.scan),
           [&](int64_t begin, int64_t end) { return table.scan_backward(k, begin, end); });
  parallel(k.partition.blocks, k.partition.weight_floats / 16,
           [&](int64_t begin, int64_t end) { return table.scan_reduce_weights(k, begin, end); });
  parallel(k.scan.batch * k.scan.length, k.partition.shared_floats / 16,
           [&](int64_t begin, int64_t end) { return table.scan_reduce_shared(k, begin, end); });
}

}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { vim::implement_scans(m, ""); }
