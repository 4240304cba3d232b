// The scans for key CPU.
#include "../common/bind_scan.h"

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
}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { vim::implement_scans(m, ""); }
