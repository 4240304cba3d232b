// Operands of a product as its tiles read them, in words of 32 bits. A word holds one float32 value or, on processors
// with bfloat16 products, two values that are neighbours along depth.
#pragma once

#include "staging.h"

namespace vim {
namespace VIM_ISA {

constexpr int64_t kWord = 4;  // bytes

// Words of depth that are packed at a time across the rows of a matrix: more rows would not stay in the L1 cache.
constexpr int64_t kChunk = 16;

template <bool kPairs>
VIM_INLINE int64_t words_in(int64_t depth) {
  return kPairs ? blocks_in(depth, 2) : depth;
}

#if defined(__AVX512BF16__)
// Numbers that bfloat16 holds.
template <class T>
VIM_INLINE vec load_rounded(const T* p, int64_t count) {
  const vec v = load_some(p, count);
  if constexpr (std::is_same_v<T, bfloat16>) return v;
  const hvec half = bits<hvec>(_mm512_cvtneps_pbh(v));
  return bits<vec>(__builtin_convertvector(half, uvec) << 16);
}
#endif

// kLanes words along depth, of `count` contiguous values; zero beyond them.
template <bool kPairs, class T>
VIM_INLINE vec load_along(const T* p, int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (count >= 2 * kLanes) return load(reinterpret_cast<const float*>(p));
    }
    const vec low = load_some(p, count), high = load_some(p + kLanes, larger(0, count - kLanes));
    return bits<vec>(_mm512_cvtne2ps_pbh(high, low));
  }
#endif
  return load_some(p, count);
}

// One word of each of `count` contiguous rows or columns; zero beyond them. `depth` values remain, `step` apart.
template <bool kPairs, class T>
VIM_INLINE vec load_across(const T* p, int64_t count, int64_t step, int64_t depth) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) {
    const vec low = load_rounded(p, count), high = depth > 1 ? load_rounded(p + step, count) : vec{};
    return bits<vec>((bits<uvec>(low) >> 16) | (bits<uvec>(high) & 0xffff0000u));
  }
#endif
  return load_some(p, count);
}

// What the next chunk will load there.
template <bool kPairs, class T>
VIM_INLINE void prefetch_across(const T* p, int64_t step) {
  constexpr int64_t kAhead = kPairs ? 2 * kChunk : kChunk;
  __builtin_prefetch(p + kAhead * step);
  if constexpr (kPairs) __builtin_prefetch(p + (kAhead + 1) * step);
}

// A vector of values gathered with a stride.
template <class T>
VIM_INLINE vec gather(const T* p, int64_t count, int64_t step) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < smaller(count, kLanes); ++i) lanes[i] = to_float(p[i * step]);
  return load(lanes);
}

// Columns of b as a tile reads them: the words of one place along depth after those of the last.
struct Panel {
  const float* data;
  int64_t row;  // words
};

// Columns of b as panel[word][columns rounded up to vectors], zero in missing columns.
template <bool kPairs, class T>
void pack_panel(const T* source, int64_t row, int64_t column, int64_t depth, int64_t columns, float* panel) {
  constexpr int64_t kPer = kPairs ? 2 : 1;  // numbers in a word
  const int64_t words = words_in<kPairs>(depth), width = round_up(columns, kLanes);
  if (column == 1) {
    for (int64_t k = 0; k < words; ++k) {
      const T* from = source + k * kPer * row;
      for (int64_t c = 0; c < width; c += kLanes) {
        prefetch_across<kPairs>(from + c, row);
        store(panel + k * width + c, load_across<kPairs>(from + c, columns - c, row, depth - k * kPer));
      }
    }
    return;
  }
  for (int64_t c = 0; c < width; c += kLanes) {
    for (int64_t k = 0; k < words; k += kLanes) {
      const T* from = source + k * kPer * row + c * column;
      const int64_t left = depth - k * kPer;
      vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (c + i >= columns) {
          square[i] = vec{};
        } else if (row == 1) {
          __builtin_prefetch(from + (i + kLanes) * column);
          square[i] = load_along<kPairs>(from + i * column, left);
        } else {
          float line[kPer * kLanes];
          for (int64_t j = 0; j < kPer; ++j) {
            store(line + j * kLanes, gather(from + i * column + j * kLanes * row, larger(0, left - j * kLanes), row));
          }
          square[i] = load_along<kPairs>(line, kPer * kLanes);
        }
      }
      transpose(square);
      float* to = panel + k * width + c;
      if (words - k >= kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(to + i * width, square[i]);
      } else {
        for (int i = 0; i < words - k; ++i) store(to + i * width, square[i]);
      }
    }
  }
}

// Rows of a, a tile at a time: `column` bytes between words of a row, `row` bytes between rows of a tile.
struct LeftTile {
  const char* data;
  int64_t row, column;
};

// How tiles find their rows of a.
struct Left {
  const char* data;
  int64_t step;  // bytes from a row to the next one, or from a tile to the next one
  bool tiled;    // the words of a tile's rows are contiguous

  VIM_INLINE LeftTile at(int64_t tile, int64_t first, int64_t rows) const {
    if (tiled) return {data + tile * step, kWord, rows * kWord};
    return {data + first * step, step, kWord};
  }
};

// Whether tiles read a in place. With pairs, an odd last value would be multiplied with the value after it.
template <bool kPairs>
VIM_INLINE bool reads_in_place(const Matrix& a, int64_t depth) {
  return a.column == 1 && a.element == (kPairs ? Element::bfloat16 : Element::float32) && (!kPairs || depth % 2 == 0);
}

// Whether columns of a are contiguous in memory, so that rows of a tile are packed together.
VIM_INLINE bool is_tiled(const Matrix& a) { return a.row == 1 && a.column != 1; }

// Floats from a packed row to the next one, or from a tile to the next one.
VIM_INLINE int64_t left_step(const Matrix& a, int64_t words, int64_t tile_rows) {
  // No power of two: rows would share few lines of the first-level cache.
  return is_tiled(a) ? tile_rows * words + kLanes : round_up(words, kLanes) + kLanes;
}

VIM_INLINE int64_t left_floats(const Matrix& a, int64_t rows, int64_t words, int64_t tile_rows) {
  return (is_tiled(a) ? blocks_in(rows, tile_rows) : rows) * left_step(a, words, tile_rows);
}

// A block of a, starting at `source`, for tiles of nearly one size.
template <bool kPairs, class T>
Left pack_left(const Matrix& a, const T* source, int64_t rows, int64_t depth, int64_t tile_rows, float* packed) {
  constexpr int64_t kPer = kPairs ? 2 : 1;
  const int64_t words = words_in<kPairs>(depth), step = left_step(a, words, tile_rows);
  if (!is_tiled(a)) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = source + r * a.row;
      for (int64_t k = 0; k < words; k += kLanes) {
        const int64_t left = depth - k * kPer;
        if (a.column == 1) {
          store(packed + r * step + k, load_along<kPairs>(from + k * kPer, left));
          continue;
        }
        float line[kPer * kLanes];
        for (int64_t j = 0; j < kPer; ++j) {
          store(line + j * kLanes,
                gather(from + (k * kPer + j * kLanes) * a.column, larger(0, left - j * kLanes), a.column));
        }
        store(packed + r * step + k, load_along<kPairs>(line, kPer * kLanes));
      }
    }
    return {reinterpret_cast<const char*>(packed), step * kWord, false};
  }
  const int64_t tiles = blocks_in(rows, tile_rows);
  for (int64_t chunk = 0; chunk < words; chunk += kChunk) {
    const int64_t last = smaller(words, chunk + kChunk);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = rows * i / tiles, count = rows * (i + 1) / tiles - first;
      float* to = packed + i * step + chunk * count;
      for (int64_t k = chunk; k < last; ++k, to += count) {
        const T* from = source + first + k * kPer * a.column;
        // What a vector writes beyond its rows is written over, or beyond the tile.
        for (int64_t r = 0; r < count; r += kLanes) {
          prefetch_across<kPairs>(from + r, a.column);
          store(to + r, load_across<kPairs>(from + r, rows - first - r, a.column, depth - k * kPer));
        }
      }
    }
  }
  return {reinterpret_cast<const char*>(packed), step * kWord, true};
}

}  // namespace VIM_ISA
}  // namespace vim
