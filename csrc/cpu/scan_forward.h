// The scans of one or two directions. A task is one block of channels of one batch element and does both directions,
// so that they are merged, gated and written without a pass of their own.
//
// A chunk takes three loops (step sizes, recurrence, gate): in one loop the latencies of softplus, recurrence and gate
// would add up for every token.
#pragma once

#include "scan_block.h"

namespace vim {
namespace VIM_ISA {

// Copies dt, B and C, which are contiguous in rows, to rows of float.
inline bool scan_widen(const Scan& from, const Scan& to, int64_t begin, int64_t end) {
  const int64_t width = from.dt_rank + 2 * from.d_state;
  with_element(from.row_element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int d = 0; d < from.directions; ++d) {
      const Activation &source = from.direction[d].dt, &target = to.direction[d].dt;
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / from.length, t = row % from.length;
        const T* in = static_cast<const T*>(source.data) + b * source.batch + t * source.token;
        float* out = static_cast<float*>(target.data) + b * target.batch + t * target.token;
        for (int64_t i = 0; i < width; i += kLanes) store_some(out + i, width - i, load_some(in + i, width - i));
      }
    }
  });
  return true;
}

inline int64_t scan_tasks(const Scan& scan) { return scan.batch * scan_blocks(scan).count(); }

struct ForwardBuffers : BlockBuffers {
  float* y;

  void take(Scratch& scratch, const Scan& scan, int64_t states) {
    BlockBuffers::take(scratch, scan, states);
    // The first direction's result waits for the second one.
    y = scratch.take((scan.directions == 2 ? scan.length : chunk_tokens(scan)) * kLanes);
  }
};

VIM_INLINE void finish_chunk(const Scan& scan, const Chunk& chunk, Block block, int64_t next, float* z, float* y) {
  const vec scale = set1(scan.scale);
  if (scan.z.data != nullptr) {
    load_block(scan.element, scan.z, chunk.b, chunk.first, chunk.count, block, next, z);
    for (int64_t t = 0; t < chunk.count; ++t) {
      store(y + t * kLanes, scale * load(y + t * kLanes) * silu(load(z + t * kLanes)));
    }
  } else if (scan.scale != 1.0f) {
    for (int64_t t = 0; t < chunk.count; ++t) store(y + t * kLanes, scale * load(y + t * kLanes));
  }
  store_block(scan.element, scan.y, chunk.b, chunk.first, chunk.count, block, y);
}

inline void forward_direction(const Scan& scan, int d, int64_t b, Block block, int64_t states,
                              ForwardBuffers& buffers) {
  const ScanDirection& side = scan.direction[d];
  const bool last = d + 1 == scan.directions;
  const int64_t every = side.checkpoints == nullptr ? larger(1, scan.length) : scan.checkpoint_every;
  const int64_t saved = blocks_in(scan.length, every), size = smaller(chunk_tokens(scan), every);
  buffers.pack(scan, side, block, states);
  if (side.initial_state != nullptr) {
    pack_weight(side.initial_state + b * scan.dim * scan.d_state, scan.d_state, states, block, buffers.state);
  } else {
    fill_zero(buffers.state, states * kLanes);
  }
  for (int64_t i = 0; i < saved; ++i) {
    const int64_t save = side.reverse ? saved - 1 - i : i;
    if (side.checkpoints != nullptr) {
      float* target = side.checkpoints + (b * saved + save) * scan.d_state * scan.dim;
      store_lanes(buffers.state, scan.d_state, scan.dim, block, target);
    }
    const int64_t begin = save * every, tokens = smaller(every, scan.length - begin);
    const int64_t chunks = blocks_in(tokens, size);
    for (int64_t j = 0; j < chunks; ++j) {
      const int64_t offset = (side.reverse ? chunks - 1 - j : j) * size;
      const Chunk chunk{b, begin + offset, smaller(size, tokens - offset)};
      const int64_t next = side.reverse ? -size : size;
      float* y = scan.directions == 2 ? buffers.y + chunk.first * kLanes : buffers.y;
      const ChunkRows rows = load_chunk(scan, side, chunk, block, states, next, buffers);
      const bool near = step_sizes(scan, side, rows, chunk.count, buffers, d > 0, y, nullptr);
      const Steps steps = in_scan_order(buffers, rows, y, chunk.count, side.reverse);
      run_sequences(scan, side, chunk, steps, buffers, states, near, buffers.state);
      if (last) finish_chunk(scan, chunk, block, next, buffers.z, y);
    }
  }
  if (side.last_state != nullptr) {
    unpack_weight(buffers.state, scan.d_state, block, side.last_state + b * scan.dim * scan.d_state);
  }
}

inline bool scan_forward(const Scan& scan, int64_t begin, int64_t end) {
  const Blocks blocks = scan_blocks(scan);
  const int64_t states = round_up(scan.d_state, kFewStates);
  Scratch scratch;
  ForwardBuffers buffers;
  buffers.take(scratch, scan, states);
  if (!scratch.allocate()) return false;
  buffers.take(scratch, scan, states);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / blocks.count();
    const Block block = blocks.at(task % blocks.count());
    for (int d = 0; d < scan.directions; ++d) forward_direction(scan, d, b, block, states, buffers);
  }
  return true;
}

}  // namespace VIM_ISA
}  // namespace vim
