// The last passes of the scans' backward: sums of partials in a fixed order, one thread per number.
#include "scan_math.h"
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
  float sum = 0.0f;
  for (int64_t b = 0; b < scan.batch; ++b) sum += weight_row(passes, d, b, row)[channel];
  const ScanDirectionGrads& grads = passes.k.grads[d];
  if (row < rows.bias) {
    const float chain = scan.A_is_log ? decay_rate(scan, scan.direction[d], channel, row) : 1.0f;
    grads.dA[channel * scan.d_state + row] = sum * chain;
  } else if (row == rows.bias) {
    if (grads.dbias != nullptr) grads.dbias[channel] = sum;
  } else if (row == rows.D) {
    if (grads.dD != nullptr) grads.dD[channel] = sum;
  } else if (row < rows.C) {
    grads.dB_constant[channel * scan.d_state + row - rows.B] = sum;
  } else {
    grads.dC_constant[channel * scan.d_state + row - rows.C] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    scan_write_dt_weight_kernel(const __grid_constant__ ScanBackwardPasses passes) {
  const Scan& scan = passes.k.scan;
  const int64_t i = flat_index(), size = scan.dim * scan.dt_rank;
  if (i < scan.directions * size) passes.k.grads[i / size].ddt_weight[i % size] = passes.ddt_weight[i];
}

// ---- maps ------------------------------------------------------------------------------------------------------

VIM_INLINE int64_t map_items(const Scan& scan, const StateMap& map) {
  return map.data == nullptr ? 0 : scan.dim / map.channels_per_group * scan.d_state;
}

// dB (offset 0) or dC (offset d_state) of one group and state
template <class T>
VIM_DEVICE void sum_map(const ScanBackwardPasses& passes, const StateMap& map, int64_t offset, int d, int64_t b,
                        int64_t token, int64_t item) {
  const Scan& scan = passes.k.scan;
  const int64_t group = item / scan.d_state, n = item % scan.d_state;
  const int64_t per_group = passes.sizes.blocks * map.channels_per_group / scan.dim;
  float sum = 0.0f;
  for (int64_t block = group * per_group; block < (group + 1) * per_group; ++block) {
    sum += map_row(passes, block, d, b, token)[offset + n];
  }
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
    write<T>(grads.ddt, b, token, item, passes.ddt[((d * scan.batch + b) * scan.length + token) * ranks + item]);
  } else if (item < B) {
    sum_map<T>(passes, grads.dB, 0, d, b, token, item - ranks);
  } else {
    sum_map<T>(passes, grads.dC, scan.d_state, d, b, token, item - B);
  }
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
  if (i < scan.directions * size) passes.dt_weight[i] = scan.direction[i / size].dt_weight[i % size];
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
    launch(scan_sum_maps_kernel<std::remove_pointer_t<decltype(type)>>,
           one_thread_each(scan.directions * scan.batch * scan.length * items), stream, passes);
  });
}

}  // namespace VIM_ISA
}  // namespace vim
