// Between tensors of any element type and strides and dense float buffers, kLanes channels wide.
#pragma once

#include <cstdlib>
#include <type_traits>

#include "../common/simd.h"
#include "kernels.h"

namespace vim {
namespace VIM_ISA {

VIM_INLINE void fill_zero(float* p, int64_t n) {
  if (n > 0) std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// One allocation per call of a kernel, cut into buffers that start on cache lines. Requests are made twice: the first
// pass measures, the second returns the buffers.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  float* take(int64_t floats) {
    const int64_t start = used_;
    used_ += round_up(floats, 16);
    return base_ == nullptr ? nullptr : base_ + start;
  }

  // Ends the measuring; false when there is not enough memory.
  bool allocate() {
    memory_ = std::malloc(static_cast<size_t>(used_) * sizeof(float) + 64);
    if (memory_ == nullptr) return false;
    base_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
    used_ = 0;
    return true;
  }

 private:
  void* memory_ = nullptr;
  float* base_ = nullptr;
  int64_t used_ = 0;
};

// A block of channels: `lanes` of them, from `channel` on.
struct Block {
  int64_t channel;
  int64_t lanes;
};

// Channels in blocks that do not cross a multiple of `segment`.
struct Blocks {
  int64_t segment, segments, per_segment;

  VIM_INLINE Blocks(int64_t dim, int64_t segment_)
      : segment(segment_), segments(dim / larger(segment_, 1)), per_segment(blocks_in(segment_, kLanes)) {}
  VIM_INLINE int64_t count() const { return segments * per_segment; }
  VIM_INLINE int64_t segment_of(int64_t block) const { return block / per_segment; }
  VIM_INLINE Block at(int64_t block) const {
    const int64_t offset = block % per_segment * kLanes;
    return {segment_of(block) * segment + offset, smaller(kLanes, segment - offset)};
  }
};

// Rows of channels from channels whose tokens are side by side, a square of kLanes by kLanes at a time: out[t][c] is
// source[c * channel + t], zero where there is no channel. Rows are `row` floats apart.
template <class T>
VIM_INLINE void load_square(const T* source, int64_t channel, int64_t tokens, int64_t channels, float* out,
                            int64_t row) {
  vec square[kLanes];
  for (int c = 0; c < kLanes; ++c) square[c] = c < channels ? load_some(source + c * channel, tokens) : vec{};
  transpose(square);
  for (int t = 0; t < kLanes; ++t) {
    if (t < tokens) store(out + t * row, square[t]);
  }
}

template <class T>
void load_squares(const T* source, int64_t channel, int64_t tokens, int64_t channels, float* out, int64_t row) {
  int64_t t = 0;
  // Full squares apart: with constant sizes they stay in registers.
  for (; channels >= kLanes && t + kLanes <= tokens; t += kLanes) {
    load_square(source + t, channel, kLanes, kLanes, out + t * row, row);
  }
  for (; t < tokens; t += kLanes) load_square(source + t, channel, tokens - t, channels, out + t * row, row);
}

// The other way, from rows of kLanes channels.
template <class T>
VIM_INLINE void store_square(T* target, int64_t channel, int64_t tokens, int64_t channels, const float* in) {
  vec square[kLanes];
  for (int t = 0; t < kLanes; ++t) square[t] = t < tokens ? load(in + t * kLanes) : vec{};
  transpose(square);
  for (int c = 0; c < kLanes; ++c) {
    if (c < channels) store_some(target + c * channel, tokens, square[c]);
  }
}

template <class T>
void store_squares(T* target, int64_t channel, int64_t tokens, int64_t channels, const float* in) {
  int64_t t = 0;
  for (; channels >= kLanes && t + kLanes <= tokens; t += kLanes) {
    store_square(target + t, channel, kLanes, kLanes, in + t * kLanes);
  }
  for (; t < tokens; t += kLanes) store_square(target + t, channel, tokens - t, channels, in + t * kLanes);
}

template <class T>
void load_block_as(const T* source, int64_t token, int64_t channel, int64_t tokens, int64_t lanes, int64_t ahead,
                   float* out) {
  if (channel == 1 && lanes == kLanes) {
    for (int64_t t = 0; t < tokens; ++t) {
      __builtin_prefetch(source + t * token + ahead);
      store(out + t * kLanes, load(source + t * token));
    }
    return;
  }
  if (token == 1) return load_squares(source, channel, tokens, lanes, out, kLanes);
  for (int64_t c = 0; c < kLanes; ++c) {
    for (int64_t t = 0; t < tokens; ++t) {
      out[t * kLanes + c] = c < lanes ? to_float(source[t * token + c * channel]) : 0.0f;
    }
  }
}

// Tokens [first, first + tokens) of a block, zero in missing lanes, to out[tokens][kLanes]. `next` says how many tokens
// on the next request will begin, so that its cache lines can be asked for.
inline void load_block(Element element, const Activation& x, int64_t b, int64_t first, int64_t tokens, Block block,
                       int64_t next, float* out) {
  const int64_t offset = b * x.batch + first * x.token + block.channel * x.channel;
  with_element(element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    load_block_as(static_cast<const T*>(x.data) + offset, x.token, x.channel, tokens, block.lanes, next * x.token, out);
  });
}

template <class T>
void store_block_as(T* target, int64_t token, int64_t channel, int64_t tokens, int64_t lanes, const float* in) {
  if (channel == 1 && lanes == kLanes) {
    for (int64_t t = 0; t < tokens; ++t) store(target + t * token, load(in + t * kLanes));
    return;
  }
  if (token == 1) return store_squares(target, channel, tokens, lanes, in);
  for (int64_t c = 0; c < lanes; ++c) {
    for (int64_t t = 0; t < tokens; ++t) from_float(in[t * kLanes + c], target + t * token + c * channel);
  }
}

inline void store_block(Element element, const Activation& x, int64_t b, int64_t first, int64_t tokens, Block block,
                        const float* in) {
  const int64_t offset = b * x.batch + first * x.token + block.channel * x.channel;
  with_element(element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    store_block_as(static_cast<T*>(x.data) + offset, x.token, x.channel, tokens, block.lanes, in);
  });
}

// A few numbers per token (dt, B or C), as rows of float.
struct Rows {
  const float* data;
  int64_t stride;
};

template <class T>
Rows load_rows_as(const T* source, int64_t token, int64_t item, int64_t tokens, int64_t items, int64_t padded,
                  float* out) {
  if (item == 1) {
    for (int64_t t = 0; t < tokens; ++t) {
      // The last vector of a row may reach into the next one, which is written after it.
      for (int64_t i = 0; i < padded; i += kLanes) {
        store(out + t * padded + i, load_some(source + t * token + i, larger(0, items - i)));
      }
    }
  } else if (token == 1) {
    // Here the last square of a row reaches into the next one, so that it is written first.
    for (int64_t i = (padded - 1) / kLanes * kLanes; i >= 0; i -= kLanes) {
      load_squares(source + i * item, item, tokens, larger(0, items - i), out + i, padded);
    }
  } else {
    for (int64_t i = 0; i < padded; ++i) {
      for (int64_t t = 0; t < tokens; ++t) {
        out[t * padded + i] = i < items ? to_float(source[t * token + i * item]) : 0.0f;
      }
    }
  }
  return {out, padded};
}

// Rows of `items` numbers, zero from there to `padded`; used in place where they are dense floats already. `out` has
// room for kLanes numbers more.
inline Rows load_rows(Element element, const void* data, int64_t offset, int64_t token, int64_t item, int64_t tokens,
                      int64_t items, int64_t padded, float* out) {
  if (element == Element::float32 && item == 1 && items == padded) {
    return {static_cast<const float*>(data) + offset, token};
  }
  Rows rows{};
  with_element(element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    rows = load_rows_as(static_cast<const T*>(data) + offset, token, item, tokens, items, padded, out);
  });
  return rows;
}

// A weight (dim, items) as items rows of a block's lanes, zero in missing lanes and from `items` to `padded`.
inline void pack_weight(const float* weight, int64_t items, int64_t padded, Block block, float* out) {
  if (block.lanes < kLanes || items < padded) fill_zero(out, padded * kLanes);
  for (int64_t c = 0; c < block.lanes; ++c) {
    const float* row = weight + (block.channel + c) * items;
    for (int64_t i = 0; i < items; ++i) out[i * kLanes + c] = row[i];
  }
}

inline void unpack_weight(const float* in, int64_t items, Block block, float* weight) {
  for (int64_t c = 0; c < block.lanes; ++c) {
    for (int64_t i = 0; i < items; ++i) weight[(block.channel + c) * items + i] = in[i * kLanes + c];
  }
}

// Rows of a block's lanes inside rows of `dim` numbers, such as a saved state (d_state, dim).
inline void load_lanes(const float* source, int64_t rows, int64_t padded, int64_t dim, Block block, float* out) {
  if (block.lanes < kLanes || rows < padded) fill_zero(out, padded * kLanes);
  for (int64_t n = 0; n < rows; ++n) {
    std::memcpy(out + n * kLanes, source + n * dim + block.channel, static_cast<size_t>(block.lanes) * sizeof(float));
  }
}

inline void store_lanes(const float* in, int64_t rows, int64_t dim, Block block, float* target) {
  for (int64_t n = 0; n < rows; ++n) {
    std::memcpy(target + n * dim + block.channel, in + n * kLanes, static_cast<size_t>(block.lanes) * sizeof(float));
  }
}

}  // namespace VIM_ISA
}  // namespace vim
