// vim::pack_weight and vim::packed_linear, for key CPU: products with a weight that is packed once and used often. Their
// schemas are in vim/ops/linear.py and vim/ops/_packed_weights.py.
#include "../common/binding.h"
#include "ops.h"
#include "parallel.h"

namespace vim {
namespace {

// A multiplication takes about a 256th of a scan's channel-step.
int64_t work_of(const Product& product) { return product.rows * product.depth * product.columns / 256; }

int64_t panels_of(int64_t columns) { return (columns + kernels().panel - 1) / kernels().panel; }

// (panels, depth, columns of a panel)
Tensor pack_weight(const Tensor& weight) {
  const auto element = element_of(weight);
  STD_TORCH_CHECK(weight.dim() == 2 && element.has_value(),
                  "vim: weight must be (columns, depth) in float32 or half precision");
  check_memory("weight", weight);
  const int64_t panel = kernels().panel;
  Product product;
  product.columns = weight.size(0);
  product.depth = weight.size(1);
  const Unpacked unpacked{*element, weight.const_data_ptr(), weight.stride(0), weight.stride(1)};
  const Tensor packed = allocate(weight, {panels_of(product.columns), product.depth, panel}, ScalarType::Float);
  parallel(packed.size(0), weight.numel() / 8, [&](int64_t begin, int64_t end) {
    return kernels().product_pack(product, unpacked, mutable_floats(packed), begin, end);
  });
  return packed;
}

// x, once it is known to be there.
const Tensor& checked(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() > 0 && element_of(x).has_value(), "vim: x must be (..., depth) in float32 or half precision");
  check_memory("x", x);
  return x;
}

// What a product reads and writes; the tensors live as long.
struct Operands {
  Tensor rows, y;
  OptionalTensor bias;
  Product product;

  Operands(const Tensor& x, const Tensor& packed, const OptionalTensor& given_bias, int64_t columns)
      : rows(as_rows(checked(x))), y(rows) {
    STD_TORCH_CHECK(is_float(packed) && is_float(given_bias) && packed.is_contiguous(),
                    "vim: packed and bias must be float32, and packed contiguous");
    Sizes sizes = sizes_of(x);
    const int64_t depth = std::exchange(sizes.back(), columns);
    check_sizes("packed", packed, {panels_of(columns), depth, kernels().panel});
    check_sizes("bias", given_bias, {columns});
    bias = dense(given_bias);
    y = allocate(x, sizes);
    product.element = *element_of(x);
    product.rows = columns > 0 ? y.numel() / columns : 0;
    product.depth = depth;
    product.columns = columns;
    product.x = rows.const_data_ptr();
    product.x_row = row_stride(rows);
    product.weight = floats(packed);
    product.bias = floats(bias);
    product.y = y.mutable_data_ptr();
  }
};

}  // namespace

Tensor on_cpu::packed_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t columns) {
  const Operands operands(x, packed, bias, columns);
  const Product& product = operands.product;
  parallel(kernels().product_tasks(product), work_of(product),
           [&](int64_t begin, int64_t end) { return kernels().product_forward(product, begin, end); });
  return operands.y;
}

std::tuple<Tensor, Tensor> on_cpu::packed_linear_pair(const Tensor& x, const Tensor& packed, const Tensor& x_b,
                                                      const Tensor& packed_b, int64_t columns) {
  const Operands first(x, packed, std::nullopt, columns), second(x_b, packed_b, std::nullopt, columns);
  const int64_t tasks = kernels().product_tasks(first.product);
  parallel(tasks + kernels().product_tasks(second.product), work_of(first.product) + work_of(second.product),
           [&](int64_t begin, int64_t end) {
             const auto part = [&](const Product& product, int64_t from, int64_t to) {
               return from >= to || kernels().product_forward(product, from, to);
             };
             return part(first.product, begin, std::min(end, tasks)) &&
                    part(second.product, std::max<int64_t>(begin - tasks, 0), end - tasks);
           });
  return {first.y, second.y};
}

}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&vim::pack_weight));
  m.impl("packed_linear", TORCH_BOX(&vim::on_cpu::packed_linear));
}
