// Products of tensors, as the bindings start them.
#pragma once

#include "parallel.h"

namespace vim {

inline Matrix matrix(const Tensor& x, int64_t row, int64_t column = 1, int64_t offset = 0) {
  const auto* bytes = static_cast<const char*>(x.const_data_ptr());
  return {*element_of(x), bytes + offset * static_cast<int64_t>(x.element_size()), row, column};
}

inline Matrix transposed(const Matrix& m) { return {m.element, m.data, m.column, m.row}; }

// Rows of numbers side by side, where a product goes.
struct Target {
  Element element;
  void* data;
  int64_t row;
};

inline Target target(const Tensor& x, int64_t row, int64_t offset = 0) {
  auto* bytes = static_cast<char*>(x.mutable_data_ptr());
  return {*element_of(x), bytes + offset * static_cast<int64_t>(x.element_size()), row};
}

inline Product product(int64_t rows, int64_t depth, int64_t columns, const Matrix& a, const Matrix& b, const Target& c,
                       const float* bias = nullptr, bool accumulate = false) {
  Product p;
  p.rows = rows;
  p.depth = depth;
  p.columns = columns;
  p.a = a;
  p.b = b;
  p.bias = bias;
  p.c_element = c.element;
  p.c = c.data;
  p.c_row = c.row;
  p.accumulate = accumulate;
  return p;
}

// Products that do not depend on each other, in one region.
template <class Products>
void multiply_all(const Products& products) {
  const Kernels& table = kernels();
  int64_t tasks = 0, work = 0;
  // A multiplication takes about a 256th of a scan's channel-step.
  for (const Product& p : products) {
    tasks += table.product_tasks(p);
    work += p.rows * p.depth * p.columns / 256;
  }
  parallel(tasks, work, [&](int64_t begin, int64_t end) {
    bool ok = true;
    int64_t first = 0;
    for (const Product& p : products) {
      const int64_t count = table.product_tasks(p);
      const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, count);
      if (from < to) ok = table.product_run(p, from, to) && ok;
      first += count;
    }
    return ok;
  });
}

inline void multiply(std::initializer_list<Product> products) { multiply_all(products); }

}  // namespace vim
