// vim::product_, for key CPU: a product of matrices of any strides.
#include "../common/binding.h"
#include "parallel.h"

namespace vim {
namespace {

// A multiplication takes about a 256th of a scan's channel-step.
int64_t work_of(const Product& product) { return product.rows * product.depth * product.columns / 256; }

Matrix matrix_of(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && element_of(x).has_value(), "vim: ", name,
                  " must be a matrix in float32 or half precision");
  check_memory(name, x);
  return {*element_of(x), x.const_data_ptr(), x.stride(0), x.stride(1)};
}

Product product_of(const Tensor& a, const Tensor& b, const Tensor& c) {
  Product product;
  product.a = matrix_of("a", a);
  product.b = matrix_of("b", b);
  const Matrix out = matrix_of("c", c);
  product.rows = a.size(0);
  product.depth = a.size(1);
  product.columns = b.size(1);
  STD_TORCH_CHECK(b.size(0) == product.depth, "vim: b has ", b.size(0), " rows, and a ", product.depth, " columns");
  check_sizes("c", c, {product.rows, product.columns});
  STD_TORCH_CHECK(out.column == 1 || product.columns <= 1, "vim: the numbers of a row of c must lie side by side");
  product.c_element = out.element;
  product.c = c.mutable_data_ptr();
  product.c_row = out.row;
  return product;
}

void run(const Product& product) {
  parallel(kernels().product_tasks(product), work_of(product),
           [&](int64_t begin, int64_t end) { return kernels().product_run(product, begin, end); });
}

// c = a b + bias, or c += a b
void multiply(const Tensor& a, const Tensor& b, const OptionalTensor& bias, bool accumulate, Tensor c) {
  Product product = product_of(a, b, c);
  STD_TORCH_CHECK(is_float(bias) && !(accumulate && bias.has_value()),
                  "vim: bias must be float32, and absent where c accumulates");
  check_sizes("bias", bias, {product.columns});
  const OptionalTensor dense_bias = dense(bias);
  product.bias = floats(dense_bias);
  product.accumulate = accumulate;
  run(product);
}

}  // namespace
}  // namespace vim

STABLE_TORCH_LIBRARY_FRAGMENT(vim, m) {
  m.def("product_(Tensor a, Tensor b, Tensor? bias, bool accumulate, Tensor(c!) c) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { m.impl("product_", TORCH_BOX(&vim::multiply)); }
