// c = a b + bias, or c += a b, for matrices of any strides.
//
// A tile of c keeps its sums in registers for a block of depth, while it reads some rows of a and a panel of b, which
// is packed for sequential access. Sums run over depth in order, so their bits do not depend on the borders of tasks,
// tiles and blocks.
#pragma once

#include "product_pack.h"

namespace vim {
namespace VIM_ISA {

// The sums of a tile, the vectors of a panel and one number fill the registers: 16 of them, or 32.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int64_t kTileRows = 6, kWideTileRows = 4;
#else
constexpr int64_t kTileRows = 14, kWideTileRows = 9;
#endif

#if defined(__AVX512BF16__)
constexpr bool kMultipliesPairs = true;
#else
constexpr bool kMultipliesPairs = false;
#endif

// Columns of c in panels of two vectors; the last one takes the vector that is left over.
struct Panels {
  int64_t columns, vectors, count;

  explicit VIM_INLINE Panels(const Product& product)
      : columns(product.columns),
        vectors(blocks_in(columns, kLanes)),
        count(larger(smaller(vectors, 1), vectors / 2)) {}
  // Its first column. Beyond the last panel: where a further vector would begin.
  VIM_INLINE int64_t start(int64_t panel) const { return (panel == count ? vectors : 2 * panel) * kLanes; }
};

// A task is a rectangle of c. There are enough of them that a few threads share them out evenly, and they are cut such
// that little is packed twice.
struct ProductTasks {
  int64_t blocks, groups;  // of rows, and of panels

  explicit VIM_INLINE ProductTasks(const Product& product) {
    constexpr int64_t kWork = 1 << 19, kMost = 24;
    const int64_t panels = Panels(product).count, row_blocks = blocks_in(product.rows, kTileRows);
    const int64_t work = product.rows * product.columns * larger(1, product.depth);
    const int64_t wanted = larger(1, smaller(kMost, work / kWork));
    const int64_t pack_row = product.a.column == 1 && product.a.element == Element::float32 ? 1 : 2;
    const int64_t pack_column = product.b.column == 1 ? 1 : 2;
    int64_t least = -1;
    blocks = groups = 0;
    if (product.rows == 0 || panels == 0) return;
    for (int64_t g = 1; g <= panels; ++g) {
      const int64_t b = smaller(row_blocks, blocks_in(wanted, g));
      const int64_t missing = larger(0, wanted - b * g);
      const int64_t cost = (b * product.columns * pack_column + g * product.rows * pack_row) * (1 + missing);
      if (least >= 0 && cost >= least) continue;
      least = cost;
      blocks = b;
      groups = g;
    }
  }
  VIM_INLINE int64_t first_row(const Product& product, int64_t block) const { return product.rows * block / blocks; }
  VIM_INLINE int64_t first_panel(const Panels& panels, int64_t group) const { return panels.count * group / groups; }
};

inline int64_t product_tasks(const Product& product) {
  const ProductTasks tasks(product);
  return tasks.blocks * tasks.groups;
}

template <bool kPairs>
VIM_INLINE vec multiply_add(vec a, vec b, vec c) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return _mm512_dpbf16_ps(c, bits<__m512bh>(a), bits<__m512bh>(b));
#endif
  return fma(a, b, c);
}

// Sums of a tile, which begin as what `start` says and go to `out`.
template <bool kPairs, int kRows, int kVectors>
void multiply_tile(LeftTile a, Panel b, int64_t words, const float* start, int64_t start_row, float* out,
                   int64_t out_row) {
  // Addresses of every third row: the two rows after it are one and two steps on, which an instruction adds itself.
  constexpr int kThirds = (kRows + 2) / 3;
  const char* rows[kThirds];
  vec sums[kRows][kVectors];
  for (int i = 0; i < kThirds; ++i) rows[i] = a.data + 3 * i * a.row;
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(out + r * out_row + v * kLanes, 1);
      sums[r][v] = load(start + r * start_row + v * kLanes);
    }
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < words; ++k, b.data += b.row) {
    vec right[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) right[v] = load(b.data + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float word;
      std::memcpy(&word, rows[r / 3] + r % 3 * a.row, sizeof word);
      const vec left = set1(word);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add<kPairs>(left, right[v], sums[r][v]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kThirds; ++i) rows[i] += a.column;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(out + r * out_row + v * kLanes, sums[r][v]);
  }
}

template <bool kPairs, int kVectors, int kRows = kVectors == 3 ? kWideTileRows : kTileRows>
auto tile_of(int64_t rows) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kPairs, kVectors, kRows - 1>(rows);
  }
  return &multiply_tile<kPairs, kRows, kVectors>;
}

// Rows of float that sums begin as, or go to.
struct Sums {
  float* data;
  int64_t row;
  bool moves;  // on with the rows of c; otherwise every tile has the same rows

  VIM_INLINE Sums at(int64_t first) const { return {moves ? data + first * row : data, row, moves}; }
  VIM_INLINE Sums beside(int64_t column) const { return {data + column, row, moves}; }
};

// How rectangles of c are computed, and the buffers for it.
template <bool kPairs>
struct Multiplication {
  static constexpr int64_t kPer = kPairs ? 2 : 1;
  static constexpr int64_t kDepth = 384;        // words in a block of depth; some panels of it stay in the L2 cache
  static constexpr int64_t kLeftWords = 16384;  // of a block of a, which stays there too
  static constexpr int64_t kMostRows = 1024, kMostPanels = 128 / kLanes;  // at a time
  static constexpr int64_t kFewTiles = 4;                                 // read b as often as packing it would

  const Product& product;
  Panels panels;
  int64_t depth_blocks, words, left_rows;  // of the largest block of depth, and of a block of a
  bool a_in_place, b_in_place;
  float *bias, *packed, *left, *sums;

  explicit Multiplication(const Product& product_)
      : product(product_),
        panels(product_),
        depth_blocks(larger(1, blocks_in(words_in<kPairs>(product.depth), kDepth))),
        words(blocks_in(words_in<kPairs>(product.depth), depth_blocks)),
        left_rows(larger(4, smaller(16, kLeftWords / kTileRows / larger(1, words))) * kTileRows),
        a_in_place(reads_in_place<kPairs>(product.a, product.depth)),
        b_in_place(!kPairs && product.b.element == Element::float32 && product.b.column == 1 &&
                   product.rows <= kFewTiles * kTileRows) {}

  // Buffers for any rectangle.
  void take(Scratch& scratch) {
    const int64_t rows = smaller(product.rows, kMostRows);
    const int64_t width = (2 * smaller(panels.count, kMostPanels) + 1) * kLanes;
    bias = scratch.take(width);
    packed = scratch.take(width * words);
    const int64_t most = smaller(rows, left_rows);
    left = scratch.take(a_in_place ? 0
                                   : larger(left_floats(product.a, most, words, kTileRows),
                                            left_floats(product.a, most, words, kWideTileRows)));
    sums = scratch.take((depth_blocks == 1 ? kTileRows : rows) * width);
  }

  const float* b_at(int64_t depth, int64_t column) const {
    return static_cast<const float*>(product.b.data) + depth * product.b.row + column;
  }

  // Tiles read whole vectors.
  bool is_packed(int64_t panel) const { return !b_in_place || panels.start(panel + 1) > product.columns; }

  void pack(int64_t first_depth, int64_t depth, int64_t first_panel, int64_t last_panel) const {
    const Matrix& b = product.b;
    const int64_t block_words = words_in<kPairs>(depth), chunk = b.column == 1 ? kChunk : larger(1, block_words);
    for (int64_t k = 0; k < block_words; k += chunk) {
      const int64_t numbers = smaller(depth - k * kPer, chunk * kPer);
      float* to = packed;
      for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const int64_t column = panels.start(panel), width = panels.start(panel + 1) - column;
        if (!is_packed(panel)) continue;
        with_element(b.element, [&](auto* type) {
          using T = std::remove_reference_t<decltype(*type)>;
          const T* source = static_cast<const T*>(b.data) + (first_depth + k * kPer) * b.row + column * b.column;
          pack_panel<kPairs>(source, b.row, b.column, numbers, smaller(width, product.columns - column),
                             to + k * width);
        });
        to += width * block_words;
      }
    }
  }

  Left load_left(int64_t first_row, int64_t rows, int64_t first_depth, int64_t depth, int64_t tile_rows) const {
    const Matrix& a = product.a;
    Left result{};
    with_element(a.element, [&](auto* type) {
      using T = std::remove_reference_t<decltype(*type)>;
      const T* source = static_cast<const T*>(a.data) + first_row * a.row + first_depth * a.column;
      if (a_in_place) {
        result = {reinterpret_cast<const char*>(source), a.row * static_cast<int64_t>(sizeof(T)), false};
      } else {
        result = pack_left<kPairs>(a, source, rows, depth, tile_rows, left);
      }
    });
    return result;
  }

  // Sums end in c itself where it has room for whole vectors of float.
  void multiply(int64_t first_row, int64_t rows, int64_t first_panel, int64_t last_panel) const {
    const int64_t column = panels.start(first_panel), width = panels.start(last_panel) - column;
    const int64_t columns = smaller(width, product.columns - column);
    const bool direct = product.c_element == Element::float32 && columns == width;
    if (!product.accumulate) {
      fill_zero(bias, width);
      if (product.bias != nullptr) {
        std::memcpy(bias, product.bias + column, static_cast<size_t>(columns) * sizeof(float));
      }
    }
    const int64_t offset = first_row * product.c_row + column;
    const Sums out = direct ? Sums{static_cast<float*>(product.c) + offset, product.c_row, true}
                            : Sums{sums, width, depth_blocks > 1};
    Pass pass{first_row, first_panel, last_panel};
    for (int64_t block = 0; block < depth_blocks; ++block) {
      const int64_t all_words = words_in<kPairs>(product.depth), first = all_words * block / depth_blocks * kPer;
      const int64_t depth = smaller(product.depth, all_words * (block + 1) / depth_blocks * kPer) - first;
      const bool begins = block == 0, ends = block == depth_blocks - 1;
      const Sums start = begins && !product.accumulate ? Sums{bias, 0, false} : out;
      pass.loads = begins && product.accumulate && !direct;
      pass.stores = ends && !direct;
      pack(first, depth, first_panel, last_panel);
      for (int64_t r = 0; r < rows; r += left_rows) {
        pass.first_row = first_row + r;
        multiply_block(pass, smaller(left_rows, rows - r), first, depth, start.at(r), out.at(r));
      }
    }
  }

  // What else happens to the sums of a pass over the panels: they are loaded from c first, or stored to it at last.
  struct Pass {
    int64_t first_row, first_panel, last_panel;
    bool loads, stores;
  };

  // A block of a, which stays in the cache, by the packed panels.
  void multiply_block(const Pass& pass, int64_t rows, int64_t first_depth, int64_t depth, Sums start, Sums out) const {
    const int64_t block_words = words_in<kPairs>(depth);
    const bool odd = pass.last_panel == panels.count && panels.vectors % 2 == 1 && panels.vectors > 1;
    const int64_t tile_rows = odd && is_tiled(product.a) ? kWideTileRows : kTileRows;
    const Left a = load_left(pass.first_row, rows, first_depth, depth, tile_rows);
    const float* next = packed;
    const int64_t begin = panels.start(pass.first_panel);
    for (int64_t p = pass.first_panel; p < pass.last_panel; ++p) {
      const int64_t column = panels.start(p), width = panels.start(p + 1) - column;
      const bool from_packed = is_packed(p);
      const Panel panel = from_packed ? Panel{next, width} : Panel{b_at(first_depth, column), product.b.row};
      const Sums from = start.beside(column - begin), to = out.beside(column - begin);
      if (width == 3 * kLanes) {
        multiply_panel<3>(pass, a, rows, kWideTileRows, panel, block_words, column, from, to);
      } else if (width == 2 * kLanes) {
        multiply_panel<2>(pass, a, rows, tile_rows, panel, block_words, column, from, to);
      } else {
        multiply_panel<1>(pass, a, rows, tile_rows, panel, block_words, column, from, to);
      }
      if (from_packed) next += width * block_words;
    }
  }

  // A panel for some rows, in tiles of nearly one size: a tile of few rows would wait for its own sums.
  template <int kVectors>
  void multiply_panel(const Pass& pass, const Left& a, int64_t count, int64_t tile_rows, Panel panel,
                      int64_t block_words, int64_t column, Sums start, Sums out) const {
    const int64_t tiles = blocks_in(count, tile_rows);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = count * i / tiles, rows = count * (i + 1) / tiles - first, row = pass.first_row + first;
      const Sums from = start.at(first), to = out.at(first);
      if (pass.loads) {
        move(row, rows, column, kVectors, to, [](auto* c, int64_t n, float* sum) { store(sum, load_some(c, n)); });
      }
      if (pass.stores) prefetch(row, rows, column);
      tile_of<kPairs, kVectors>(rows)(a.at(i, first, rows), panel, block_words, from.data, from.row, to.data, to.row);
      if (pass.stores) {
        move(row, rows, column, kVectors, to, [](auto* c, int64_t n, float* sum) { store_some(c, n, load(sum)); });
      }
    }
  }

  void prefetch(int64_t row, int64_t rows, int64_t column) const {
    const int64_t size = product.c_element == Element::float32 ? 4 : 2;
    const char* c = static_cast<const char*>(product.c) + (row * product.c_row + column) * size;
    for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(c + r * product.c_row * size, 1);
  }

  // Between a tile of c and its sums.
  template <class Function>
  void move(int64_t row, int64_t rows, int64_t column, int64_t vectors, Sums tile, const Function& function) const {
    with_element(product.c_element, [&](auto* type) {
      using T = std::remove_reference_t<decltype(*type)>;
      T* c = static_cast<T*>(product.c) + row * product.c_row + column;
      const int64_t columns = smaller(vectors * kLanes, product.columns - column);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = 0; i < columns; i += kLanes) {
          function(c + r * product.c_row + i, columns - i, tile.data + r * tile.row + i);
        }
      }
    });
  }
};

// Tasks are numbered along the side of c with fewer of them. Those that follow each other and make up a rectangle are
// computed together, so that less is packed twice.
template <bool kPairs>
bool run_product(const Product& product, int64_t begin, int64_t end) {
  using Work = Multiplication<kPairs>;
  const ProductTasks tasks(product);
  Work work(product);
  Scratch scratch;
  work.take(scratch);
  if (!scratch.allocate()) return false;
  work.take(scratch);
  const bool by_rows = tasks.blocks >= tasks.groups;
  const int64_t across = by_rows ? tasks.groups : tasks.blocks;
  while (begin < end) {
    const int64_t line = begin / across, place = begin % across;
    const int64_t lines = place == 0 ? larger(1, (end - begin) / across) : 1;
    const int64_t places = smaller(across - place, end - begin);
    const int64_t block = by_rows ? line : place, blocks = by_rows ? lines : places;
    const int64_t group = by_rows ? place : line, groups = by_rows ? places : lines;
    const int64_t last_row = tasks.first_row(product, block + blocks);
    const int64_t last_panel = tasks.first_panel(work.panels, group + groups);
    for (int64_t p = tasks.first_panel(work.panels, group); p < last_panel; p += Work::kMostPanels) {
      const int64_t until = smaller(last_panel, p + Work::kMostPanels);
      for (int64_t row = tasks.first_row(product, block); row < last_row; row += Work::kMostRows) {
        work.multiply(row, smaller(Work::kMostRows, last_row - row), p, until);
      }
    }
    begin += lines * places;
  }
  return true;
}

inline bool product_run(const Product& product, int64_t begin, int64_t end) {
  if constexpr (kMultipliesPairs) {
    if (product.a.element == Element::bfloat16) return run_product<true>(product, begin, end);
  }
  return run_product<false>(product, begin, end);
}

}  // namespace VIM_ISA
}  // namespace vim
