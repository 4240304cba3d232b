// y = x weight^T + bias, for a weight that was packed before.
//
// Packed, kPanel output columns lie side by side for one number of depth after the other, so that a tile of kTileRows
// rows and kPanel columns keeps its sums in registers and reads what it needs in order: two vectors of a panel and one
// number of each row for 2 kTileRows fused products. A sum runs over depth in order, whatever the tasks and threads.
#pragma once

#include "staging.h"

namespace vim {
namespace VIM_ISA {

constexpr int64_t kPanel = 2 * kLanes;
// The sums of a tile, two vectors of a panel and one number fill the registers: 16 of them, or 32.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 14;
#endif

VIM_INLINE int64_t product_panels(const Product& product) { return blocks_in(product.columns, kPanel); }

// A task multiplies a block of rows, which stays in the second-level cache, by a few panels. Blocks are of nearly one
// size, and there are several of them even for few rows, so that threads share them out evenly.
struct ProductTasks {
  static constexpr int64_t kPanels = 2;
  int64_t blocks, across;  // of rows, and tasks side by side

  explicit VIM_INLINE ProductTasks(const Product& product) {
    constexpr int64_t kFewRows = 48, kNumbers = 131072;
    const int64_t most = larger(kFewRows, smaller(product.rows / 2, kNumbers / larger(1, product.depth)));
    blocks = blocks_in(product.rows, most);
    across = blocks_in(product_panels(product), kPanels);
  }
  VIM_INLINE int64_t first_row(const Product& product, int64_t block) const { return product.rows * block / blocks; }
};

inline int64_t product_tasks(const Product& product) {
  const ProductTasks tasks(product);
  return tasks.blocks * tasks.across;
}

// Tasks are panels.
inline bool product_pack(const Product& product, const Unpacked& weight, float* packed, int64_t begin, int64_t end) {
  with_element(weight.element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, columns = smaller(kPanel, product.columns - first);
      const T* source = static_cast<const T*>(weight.data) + first * weight.column;
      float* target = packed + first * product.depth;
      if (columns < kPanel) fill_zero(target, product.depth * kPanel);
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t k = 0; k < product.depth; ++k) {
          target[k * kPanel + c] = to_float(source[c * weight.column + k * weight.depth]);
        }
      }
    }
  });
  return true;
}

// The sums of a tile, which start as `bias`, to rows of kPanel numbers.
template <int kRows>
void multiply_tile(const float* x, int64_t x_row, const float* panel, int64_t depth, const float* bias, float* out,
                   int64_t out_row) {
  const float* rows[kRows];
  vec sums[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    rows[r] = x + r * x_row;
    sums[r][0] = load(bias);
    sums[r][1] = load(bias + kLanes);
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const vec left = load(panel), right = load(panel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const vec number = set1(rows[r][k]);
      sums[r][0] = fma(number, left, sums[r][0]);
      sums[r][1] = fma(number, right, sums[r][1]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    store(out + r * out_row, sums[r][0]);
    store(out + r * out_row + kLanes, sums[r][1]);
  }
}

template <int kRows = kTileRows>
auto tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kRows - 1>(rows);
  }
  return &multiply_tile<kRows>;
}

// A panel, for rows in tiles of nearly one size: a tile of few rows would wait for its own sums. Where y is not float32
// or has no room for the panel, a tile goes through a buffer.
template <class T>
void multiply_panel(Rows x, int64_t count, const float* panel, int64_t depth, const float* bias, T* y, int64_t y_row,
                    int64_t columns) {
  const int64_t tiles = blocks_in(count, kTileRows);
  float buffer[kTileRows * kPanel];
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t first = count * i / tiles, rows = count * (i + 1) / tiles - first;
    const float* from = x.data + first * x.stride;
    T* to = y + first * y_row;
    if constexpr (std::is_same_v<T, float>) {
      if (columns == kPanel) {
        tile_of(rows)(from, x.stride, panel, depth, bias, to, y_row);
        continue;
      }
    }
    tile_of(rows)(from, x.stride, panel, depth, bias, buffer, kPanel);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; c += kLanes) {
        store_some(to + r * y_row + c, columns - c, load(buffer + r * kPanel + c));
      }
    }
  }
}

inline bool product_forward(const Product& product, int64_t begin, int64_t end) {
  const ProductTasks tasks(product);
  const int64_t depth = product.depth, across = tasks.across;
  const bool converts = product.element != Element::float32;
  Scratch scratch;
  const auto take = [&](float*& bias, float*& rows) {
    bias = scratch.take(kPanel);
    rows = scratch.take(converts ? blocks_in(product.rows, larger(1, tasks.blocks)) * depth + kLanes : 0);
  };
  float *bias, *converted;
  take(bias, converted);
  if (!scratch.allocate()) return false;
  take(bias, converted);
  with_element(product.element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    Rows rows{};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / across, first = tasks.first_row(product, block);
      const int64_t count = tasks.first_row(product, block + 1) - first;
      if (task == begin || task % across == 0) {
        const int64_t offset = first * product.x_row;
        rows = load_rows(product.element, product.x, offset, product.x_row, 1, count, depth, depth, converted);
      }
      const int64_t first_panel = task % across * ProductTasks::kPanels;
      const int64_t last_panel = smaller(product_panels(product), first_panel + ProductTasks::kPanels);
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t column = panel * kPanel, columns = smaller(kPanel, product.columns - column);
        fill_zero(bias, kPanel);
        if (product.bias != nullptr) {
          std::memcpy(bias, product.bias + column, static_cast<size_t>(columns) * sizeof(float));
        }
        T* y = static_cast<T*>(product.y) + first * product.columns + column;
        multiply_panel(rows, count, product.weight + column * depth, depth, bias, y, product.columns, columns);
      }
    }
  });
  return true;
}

}  // namespace VIM_ISA
}  // namespace vim
