// The last passes of the scans' backward: sums of partials in a fixed order, one thread per number.
#include "scan_math.h"
#include "vector.h"
#include "workspace.h"

namespace vim {
namespace VIM_ISA {

namespace {

constexpr int kThreads = 256;

Geometry one_thread_each(int64_t count) { return {static_cast<unsigned>(blocks_in(count, kThreads)), kThreads, 0}; }

// The number that a thread makes, in a flat order
VIM_DEVICE int64_t flat_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// ---- weights ---------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) scan_sum_weights_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const WeightRows rows(scan);
  const int64_t i = flat_index(), channel = i % scan.dim, row = i / scan.dim % rows.count;
  const int d = static_cast<int>(i / scan.dim / rows.count);
  if (d >= scan.directions) return;
  const bool of_dt = row >= rows.dt;
  if (of_dt && passes.ddt_weight != nullptr) return;  // is in there
  float sum = 0.0f;
  const int64_t parts = scan.batch * passes.sizes.segments;
#pragma unroll 8
  for (int64_t part = 0; part < parts; ++part) sum += weight_row(passes, d, part, row)[channel];
  const ScanDirectionGrads& grads = passes.k.grads[d];
  if (row < rows.bias) {
    const float chain = scan.A_is_log ? decay_rate(scan, scan.direction[d], channel, row) : 1.0f;
    write_gradient(grads.dA, channel * scan.d_state + row, sum * chain);
  } else if (row == rows.bias) {
    write_gradient(grads.dbias, channel, sum);
  } else if (row == rows.D) {
    write_gradient(grads.dD, channel, sum);
  } else if (row < rows.C) {
    grads.dB_constant[channel * scan.d_state + row - rows.B] = sum;
  } else if (!of_dt) {
    grads.dC_constant[channel * scan.d_state + row - rows.C] = sum;
  } else {
    write_gradient(grads.ddt_weight, channel * scan.dt_rank + row - rows.dt, sum);
  }
}

__global__ void __launch_bounds__(kThreads)
    scan_write_dt_weight_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const int64_t i = flat_index(), size = scan.dim * scan.dt_rank;
  if (i < scan.directions * size) write_gradient(passes.k.grads[i / size].ddt_weight, i % size, passes.ddt_weight[i]);
}

// ---- maps ------------------------------------------------------------------------------------------------------

VIM_INLINE int64_t map_items(const Scan& scan, const StateMap& map) {
  return map.data == nullptr ? 0 : scan.dim / map.channels_per_group * scan.d_state;
}

// The sum of what `count` blocks from the first on have in a token's row.
VIM_DEVICE float sum_blocks(const ScanBackwardPasses& passes, int64_t first, int64_t count, int d, int64_t b,
                            int64_t token, int64_t at) {
  float sum = 0.0f;
  for (int64_t block = first; block < first + count; ++block) sum += map_row(passes, block, d, b, token)[at];
  return sum;
}

// dB (offset 0) or dC (offset d_state) of one group and state
template <class T>
VIM_DEVICE void sum_map(const ScanBackwardPasses& passes, const StateMap& map, int64_t offset, int d, int64_t b,
                        int64_t token, int64_t item) {
  const Scan& scan = passes.k.scan;
  const int64_t group = item / scan.d_state, n = item % scan.d_state;
  const int64_t per_group = passes.sizes.blocks * map.channels_per_group / scan.dim;
  const float sum = sum_blocks(passes, group * per_group, per_group, d, b, token, offset + n);
  from_float(sum, static_cast<T*>(map.data) + b * map.batch + group * map.group + token * map.token + n * map.state);
}

template <class T>
__global__ void __launch_bounds__(kThreads) scan_sum_maps_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const ScanDirectionGrads& first = passes.k.grads[0];
  const int64_t ranks = first.ddt.data == nullptr ? 0 : scan.dt_rank;
  const int64_t B = ranks + map_items(scan, first.dB), items = B + map_items(scan, first.dC);
  const int64_t i = flat_index(), item = i % items, token = i / items % scan.length;
  const int64_t b = i / items / scan.length % scan.batch;
  const int d = static_cast<int>(i / items / scan.length / scan.batch);
  if (d >= scan.directions) return;
  const ScanDirectionGrads& grads = passes.k.grads[d];
  if (item < ranks) {
    const float ddt = passes.ddt != nullptr
                          ? passes.ddt[((d * scan.batch + b) * scan.length + token) * ranks + item]
                          : sum_blocks(passes, 0, passes.sizes.blocks, d, b, token, 2 * scan.d_state + item);
    write<T>(grads.ddt, b, token, item, ddt);
  } else if (item < B) {
    sum_map<T>(passes, grads.dB, 0, d, b, token, item - ranks);
  } else {
    sum_map<T>(passes, grads.dC, scan.d_state, d, b, token, item - B);
  }
}

// The same where a token's dt, B and C, and their gradients, are one row: a thread sums four numbers of it.
template <class T>
__global__ void __launch_bounds__(kThreads) scan_sum_rows_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const unsigned quads = static_cast<unsigned>(passes.sizes.row) / 4, length = static_cast<unsigned>(scan.length);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, item = i % quads * 4, token = i / quads % length;
  const unsigned b = i / quads / length % static_cast<unsigned>(scan.batch);
  const unsigned d = i / quads / length / static_cast<unsigned>(scan.batch);
  if (d >= static_cast<unsigned>(scan.directions)) return;
  const float* at = map_row(passes, 0, static_cast<int>(d), b, token) + item;
  const int64_t next = scan.directions * scan.batch * scan.length * passes.sizes.row;
  Floats<4> sum = filled<4>(0);
#pragma unroll 6
  for (int64_t block = 0; block < passes.sizes.blocks; ++block) {
    const Floats<4> part = load_floats<4>(at + block * next);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum[k] += part[k];
  }
  // dB and dC come first in the sums, dt's gradient in the row.
  const Activation& row = passes.k.grads[d].ddt;
  const unsigned maps = 2 * static_cast<unsigned>(scan.d_state);
  const unsigned column = item < maps ? static_cast<unsigned>(scan.dt_rank) + item : item - maps;
  store_floats(sum, static_cast<T*>(row.data) + b * row.batch + token * row.token + column);
}

// Whether that kernel can do it: everything in fours, and counted in 32 bits.
bool has_rows(const ScanBackwardPasses& passes) {
  const Scan& scan = passes.k.scan;
  const int64_t element = scan.element == Element::float32 ? 4 : 2;
  bool rows = passes.sizes.steps == 0 && scan.dt_rank > 0 && scan.dt_rank % 4 == 0 && scan.d_state % 4 == 0 &&
              scan.directions * scan.batch * scan.length * passes.sizes.row / 4 < (int64_t{1} << 31);
  for (int d = 0; d < scan.directions; ++d) {
    const ScanDirectionGrads& grads = passes.k.grads[d];
    const auto follows = [&](const StateMap& map, int64_t column) {
      return map.data == static_cast<char*>(grads.ddt.data) + column * element && map.state == 1 &&
             map.channels_per_group == scan.dim && map.token == grads.ddt.token && map.batch == grads.ddt.batch;
    };
    rows = rows && grads.ddt.data != nullptr && aligned(grads.ddt, element, 4 * element) &&
           follows(grads.dB, scan.dt_rank) && follows(grads.dC, scan.dt_rank + scan.d_state);
  }
  return rows;
}

// ---- dt --------------------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads) scan_widen_dt_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const int64_t i = flat_index(), r = i % scan.dt_rank, token = i / scan.dt_rank % scan.length;
  const int64_t b = i / scan.dt_rank / scan.length % scan.batch;
  const int d = static_cast<int>(i / scan.dt_rank / scan.length / scan.batch);
  if (d < scan.directions) passes.dt[i] = read<T>(scan.direction[d].dt, b, token, r);
}

__global__ void __launch_bounds__(kThreads)
    scan_stack_dt_weight_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const int64_t i = flat_index(), size = scan.dim * scan.dt_rank;
  if (i < scan.directions * size) passes.dt_weight[i] = read_or_zero(scan.direction[i / size].dt_weight, i % size);
}

}  // namespace

void scan_sum_weights(const ScanBackwardPasses& passes, Stream stream) {
  const Scan& scan = passes.k.scan;
  const int64_t count = scan.directions * WeightRows(scan).count * scan.dim;
  launch(scan_sum_weights_kernel, one_thread_each(count), stream, passes);
  if (passes.ddt_weight == nullptr) return;
  launch(scan_write_dt_weight_kernel, one_thread_each(scan.directions * scan.dim * scan.dt_rank), stream, passes);
}

void scan_widen_dt(const ScanBackwardPasses& passes, Stream stream) {
  const Scan& scan = passes.k.scan;
  const int64_t numbers = scan.directions * scan.batch * scan.length * scan.dt_rank;
  with_element(scan.element, [&](auto* type) {
    launch(scan_widen_dt_kernel<std::remove_pointer_t<decltype(type)>>, one_thread_each(numbers), stream, passes);
  });
  launch(scan_stack_dt_weight_kernel, one_thread_each(scan.directions * scan.dim * scan.dt_rank), stream, passes);
}

void scan_sum_maps(const ScanBackwardPasses& passes, Stream stream) {
  const Scan& scan = passes.k.scan;
  const ScanDirectionGrads& grads = passes.k.grads[0];
  const int64_t ranks = grads.ddt.data == nullptr ? 0 : scan.dt_rank;
  const int64_t items = ranks + map_items(scan, grads.dB) + map_items(scan, grads.dC);
  with_element(scan.element, [&](auto* type) {
    if (has_rows(passes)) {
      const int64_t quads = scan.directions * scan.batch * scan.length * passes.sizes.row / 4;
      return launch(scan_sum_rows_kernel<std::remove_pointer_t<decltype(type)>>, one_thread_each(quads), stream,
                    passes);
    }
    launch(scan_sum_maps_kernel<std::remove_pointer_t<decltype(type)>>,
           one_thread_each(scan.directions * scan.batch * scan.length * items), stream, passes);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
