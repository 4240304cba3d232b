// One table of kernels; compiled once per instruction set, with VIM_ISA naming it and the compiler's flags enabling it.
#include "kernels.h"

#include "conv.h"
#include "norm.h"
#include "product.h"
#include "scan_forward.h"
#include "scan_reduce.h"

#define VIM_TEXT_(x) #x
#define VIM_TEXT(x) VIM_TEXT_(x)
#define VIM_JOIN_(a, b) a##b
#define VIM_JOIN(a, b) VIM_JOIN_(a, b)

namespace vim {

const Kernels& VIM_JOIN(kernels_, VIM_ISA)() {
  using namespace VIM_ISA;
  static const Kernels table = {
      VIM_TEXT(VIM_ISA),   kLanes,          &scan_widen,    &scan_tasks,
      &scan_forward,       &scan_partition, &scan_backward, &scan_reduce_weights,
      &scan_reduce_shared, &conv_tasks,     &conv_forward,  &conv_partial_floats,
      &conv_backward,      &conv_reduce,    &norm_forward,  &norm_backward,
      &norm_reduce,        &product_tasks,  &product_run,
  };
  return table;
}

}  // namespace vim
