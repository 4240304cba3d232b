// The second pass of the scans' backward: adds the partials of the first one, in a fixed order.
#pragma once

#include "scan_backward.h"

namespace vim {
namespace VIM_ISA {

inline bool scan_reduce_weights(const ScanBackwardTasks& k, int64_t begin, int64_t end) {
  const Scan& scan = k.scan;
  const WeightRows rows(scan);
  Scratch scratch;
  float* sums = scratch.take(rows.count * kLanes);
  if (!scratch.allocate()) return false;
  sums = scratch.take(rows.count * kLanes);
  for (int64_t i = begin; i < end; ++i) {
    const Block block = scan_blocks(scan).at(i);
    for (int d = 0; d < scan.directions; ++d) {
      const ScanDirectionGrads& grads = k.grads[d];
      fill_zero(sums, rows.count * kLanes);
      for (int64_t group = 0; group < (scan.batch > 0 ? k.partition.batch_groups : 0); ++group) {
        const float* partial = weight_rows(k, group, i, d);
        for (int64_t r = 0; r < rows.count * kLanes; r += kLanes) store(sums + r, load(sums + r) + load(partial + r));
      }
      if (scan.A_is_log) {
        for (int64_t c = 0; c < block.lanes; ++c) {
          const float* A_log = scan.direction[d].A.floats() + (block.channel + c) * scan.d_state;
          for (int64_t n = 0; n < scan.d_state; ++n) sums[(rows.A + n) * kLanes + c] *= -__builtin_expf(A_log[n]);
        }
      }
      unpack_weight(sums + rows.A * kLanes, scan.d_state, block, grads.dA.floats());
      if (grads.dB_constant) unpack_weight(sums + rows.B * kLanes, scan.d_state, block, grads.dB_constant);
      if (grads.dC_constant) unpack_weight(sums + rows.C * kLanes, scan.d_state, block, grads.dC_constant);
      if (grads.ddt_weight.data)
        unpack_weight(sums + rows.dt_weight * kLanes, scan.dt_rank, block, grads.ddt_weight.floats());
      if (grads.dbias.data) unpack_weight(sums + rows.bias * kLanes, 1, block, grads.dbias.floats());
      if (grads.dD.data) unpack_weight(sums + rows.D * kLanes, 1, block, grads.dD.floats());
    }
  }
  return true;
}

// Sums the partials of one token over block groups and over the segments [first, last).
VIM_INLINE void sum_shared(const ScanBackwardTasks& k, int d, int64_t b, int64_t t, int64_t first, int64_t last,
                           float* sums) {
  const int64_t row = k.partition.row;
  fill_zero(sums, row);
  for (int64_t group = 0; group < k.partition.block_groups; ++group) {
    for (int64_t segment = first; segment < last; ++segment) {
      const float* partial = shared_rows(k, group, d, b, segment) + t * row;
      for (int64_t i = 0; i < row; i += kLanes) store(sums + i, load(sums + i) + load(partial + i));
    }
  }
}

// dB (half 0) or dC (half 1) of one token.
template <class T>
void write_map(const ScanBackwardTasks& k, int d, int64_t b, int64_t t, const StateMap& map, int half, float* sums) {
  const Scan& scan = k.scan;
  const int64_t segments = map.channels_per_group / segment_size(scan);
  for (int64_t group = 0; group < scan.dim / map.channels_per_group; ++group) {
    sum_shared(k, d, b, t, group * segments, (group + 1) * segments, sums);
    T* target = static_cast<T*>(map.data) + b * map.batch + group * map.group + t * map.token;
    for (int64_t n = 0; n < scan.d_state; ++n) {
      const int64_t swept = n / kSwept * 2 * kSwept + half * kSwept + n % kSwept;
      from_float(sums[shared_dt(scan) + swept], target + n * map.state);
    }
  }
}

inline bool scan_reduce_shared(const ScanBackwardTasks& k, int64_t begin, int64_t end) {
  const Scan& scan = k.scan;
  Scratch scratch;
  float* sums = scratch.take(k.partition.row);
  if (!scratch.allocate()) return false;
  sums = scratch.take(k.partition.row);
  with_element(scan.element, [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / scan.length, t = i % scan.length;
      for (int d = 0; d < scan.directions; ++d) {
        const ScanDirectionGrads& grads = k.grads[d];
        if (grads.dB.data != nullptr) write_map<T>(k, d, b, t, grads.dB, 0, sums);
        if (grads.dC.data != nullptr) write_map<T>(k, d, b, t, grads.dC, 1, sums);
        if (grads.ddt.data != nullptr) {
          sum_shared(k, d, b, t, 0, 1, sums);
          T* target = static_cast<T*>(grads.ddt.data) + b * grads.ddt.batch + t * grads.ddt.token;
          for (int64_t r = 0; r < scan.dt_rank; ++r) from_float(sums[r], target + r * grads.ddt.channel);
        }
      }
    }
  });
  return true;
}

}  // namespace VIM_ISA
}  // namespace vim
