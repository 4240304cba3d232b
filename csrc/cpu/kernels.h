// The CPU kernels as bindings see them: one table of functions per instruction set.
#pragma once

#include <cstdint>

#include "../common/arguments.h"

namespace vim {

// How a backward pass is cut into tasks. It depends on shapes only, never on the number of threads, and every sum has
// one order: the results are the same bits for any number of threads.
struct ScanPartition {
  int64_t blocks;         // channel blocks of kLanes channels that share B and C
  int64_t block_groups;   // runs of blocks; each sums its own partial of the gradients that all channels share
  int64_t batch_groups;   // runs of batch elements; each sums its own partial of the weights' gradients
  int64_t row;            // floats of a token's row in the shared partial: dt, then B and C
  int64_t rows;           // rows of kLanes floats in a block's partial of the weights' gradients
  int64_t shared_floats;  // workspace, in floats
  int64_t weight_floats;
};

struct ScanBackwardTasks : ScanBackward {
  ScanPartition partition;
  float* shared = nullptr;   // partials of what all channels share
  float* weights = nullptr;  // partials of the weights' gradients
};

// A bidirectional scan whose dt, B and C are in `rows`, float (directions, batch, token, dt_rank + 2 d_state).
inline Scan on_float_rows(const Scan& scan, float* rows) {
  const int64_t width = scan.dt_rank + 2 * scan.d_state, batch = scan.length * width;
  Scan wide = scan;
  wide.row_element = Element::float32;
  for (int d = 0; d < scan.directions; ++d, rows += scan.batch * batch) {
    ScanDirection& side = wide.direction[d];
    side.dt = {rows, batch, width, 1};
    side.B = {rows + scan.dt_rank, batch, 0, 1, width, scan.dim, nullptr};
    side.C = {rows + scan.dt_rank + scan.d_state, batch, 0, 1, width, scan.dim, nullptr};
  }
  return wide;
}

// A matrix as a product reads it: strides in elements.
struct Matrix {
  Element element = Element::float32;
  const void* data = nullptr;
  int64_t row = 0, column = 0;
};

// c = a b + bias, or c += a b with `accumulate`: (rows, depth) by (depth, columns), sums in float32. Tables with
// bfloat16 products round b to bfloat16 where a is.
struct Product {
  int64_t rows = 0, depth = 0, columns = 0;
  Matrix a, b;                  // b.row is the step along depth
  const float* bias = nullptr;  // (columns,) or null; never with accumulate
  Element c_element = Element::float32;
  void* c = nullptr;
  int64_t c_row = 0;  // stride of rows; the columns of c are contiguous
  bool accumulate = false;
};

// Functions over a range of tasks return false when memory runs out.
struct Kernels {
  const char* name;
  int lanes;
  bool (*scan_widen)(const Scan& from, const Scan& to, int64_t begin, int64_t end);  // batch x length tasks
  int64_t (*scan_tasks)(const Scan&);
  bool (*scan_forward)(const Scan&, int64_t begin, int64_t end);
  ScanPartition (*scan_partition)(const Scan&);
  bool (*scan_backward)(const ScanBackwardTasks&, int64_t begin, int64_t end);  // batch_groups x block_groups tasks
  bool (*scan_reduce_weights)(const ScanBackwardTasks&, int64_t begin, int64_t end);  // blocks tasks
  bool (*scan_reduce_shared)(const ScanBackwardTasks&, int64_t begin, int64_t end);   // batch x length tasks
  int64_t (*conv_tasks)(const Conv&);
  bool (*conv_forward)(const Conv&, int64_t begin, int64_t end);
  int64_t (*conv_partial_floats)(const Conv&);
  bool (*conv_backward)(const Conv&, int64_t begin, int64_t end);  // batch_groups x blocks tasks
  bool (*conv_reduce)(const Conv&, int64_t begin, int64_t end);    // blocks tasks
  bool (*norm_forward)(const Norm&, int64_t begin, int64_t end);   // rows tasks
  bool (*norm_backward)(const Norm&, int64_t begin, int64_t end);  // row_groups tasks
  bool (*norm_reduce)(const Norm&, int64_t begin, int64_t end);    // dim tasks
  int64_t (*product_tasks)(const Product&);
  bool (*product_run)(const Product&, int64_t begin, int64_t end);
};

const Kernels& kernels_baseline();
#if defined(__x86_64__)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512bf16();
#endif

// The fastest table this processor runs; VIM_CPU_CAPABILITY=baseline, avx2, avx512 or avx512bf16 asks for at most that.
const Kernels& kernels();

}  // namespace vim
