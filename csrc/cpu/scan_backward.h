// The backward pass of the scans. States are rebuilt chunk by chunk from the saved ones, then swept in reverse.
//
// With g the gradient of a state, taken against scan order, and e = exp(delta A):
//
//     g[l] = C[l] dy[l] + e[l+1] g[l+1]
//     dB[l] = sum over channels of g[l] delta[l] u[l]       dC[l] = sum over channels of dy[l] h[l]
//     ddelta[l] = sum over states of (g e h[l-1] A + g B u)     dA = sum over tokens of g e h[l-1] delta
//
// A task is a run of channel blocks of a run of batch elements; it goes through both directions of a block, because dz
// needs y of both. What all channels share (dt, B, C) is summed in the task's own rows (`shared`), what all tokens
// share (weights) in the block's own rows (`weights`); a second pass, in scan_reduce.h, adds them up.
#pragma once

#include "scan_block.h"

namespace vim {
namespace VIM_ISA {

// As many states at once as make one full vector of sums for dB and one half each for dB and dC.
constexpr int kSwept = kLanes / 2;

VIM_INLINE int64_t swept_states(const Scan& scan) { return round_up(scan.d_state, larger(kSwept, kFewStates)); }

// Rows of kLanes floats of a block and direction in the partial of the weights' gradients.
struct WeightRows {
  int64_t A, B, C, dt_weight, bias, D, count;

  explicit VIM_INLINE WeightRows(const Scan& scan) {
    const int64_t states = swept_states(scan);
    A = 0;
    B = A + states;
    C = B + (scan.direction[0].B.constant != nullptr ? states : 0);
    dt_weight = C + (scan.direction[0].C.constant != nullptr ? states : 0);
    bias = dt_weight + scan.dt_rank;
    D = bias + 1;
    count = D + 1;
  }
};

VIM_INLINE int64_t shared_dt(const Scan& scan) { return round_up(scan.dt_rank, kLanes); }

inline ScanPartition scan_partition(const Scan& scan) {
  constexpr int64_t kBatchGroups = 64, kTasks = 16;
  const Blocks blocks = scan_blocks(scan);
  const int64_t element = scan.element == Element::float32 ? 4 : 2;
  ScanPartition p{};
  p.blocks = blocks.count();
  p.row = shared_dt(scan) + 2 * swept_states(scan);
  p.rows = WeightRows(scan).count;
  const int64_t block_floats = p.blocks * scan.directions * p.rows * kLanes;
  const int64_t token_floats = scan.directions * blocks.segments * p.row;
  // The workspace stays below 1.5 times u: at most 0.4 for the weights' partials and 1 for the shared ones.
  const int64_t u_bytes = scan.length * scan.dim * element;
  p.batch_groups = smaller(smaller(scan.batch, kBatchGroups), scan.batch * u_bytes / larger(1, 10 * block_floats));
  p.batch_groups = larger(1, p.batch_groups);
  p.block_groups = 1;
  while (blocks.segments == 1 && p.batch_groups * p.block_groups < kTasks && 2 * p.block_groups <= p.blocks &&
         2 * p.block_groups * token_floats * 4 <= scan.dim * element) {
    p.block_groups *= 2;
  }
  p.shared_floats = p.block_groups * scan.batch * scan.length * token_floats;
  p.weight_floats = p.batch_groups * block_floats;
  return p;
}

// First row of a token's partial.
VIM_INLINE float* shared_rows(const ScanBackwardTasks& k, int64_t block_group, int d, int64_t b, int64_t segment) {
  const Scan& scan = k.scan;
  const int64_t segments = scan_blocks(scan).segments;
  const int64_t index = ((block_group * scan.directions + d) * scan.batch + b) * segments + segment;
  return k.shared + index * scan.length * k.partition.row;
}

VIM_INLINE float* weight_rows(const ScanBackwardTasks& k, int64_t batch_group, int64_t block, int d) {
  const int64_t index = (batch_group * k.partition.blocks + block) * k.scan.directions + d;
  return k.weights + index * k.partition.rows * kLanes;
}

struct BackwardBuffers : BlockBuffers {
  float *y, *slope, *dout, *dy, *dstep, *drive_sum, *du;
  float *states, *decays;  // of kSwept states of a chunk, in scan order; states start with the entry state
  float *carry, *entry;    // gradient of the state, and the states in which chunks are entered
  float* dt_weight_rows;   // (channel, rank), padded
  float* zeros;            // the state in which a sequence starts

  void take(Scratch& scratch, const Scan& scan) {
    const int64_t tokens = chunk_tokens(scan), states_ = swept_states(scan);
    BlockBuffers::take(scratch, scan, states_);
    y = scratch.take((scan.directions == 2 ? scan.length : tokens) * kLanes);
    float** const buffers[] = {&slope, &dout, &dy, &dstep, &drive_sum, &du};
    for (float** rows : buffers) *rows = scratch.take(tokens * kLanes);
    states = scratch.take((tokens + 1) * kSwept * kLanes);
    decays = scratch.take(tokens * kSwept * kLanes);
    carry = scratch.take(states_ * kLanes);
    entry = scratch.take((blocks_in(scan.checkpoint_every, tokens) + 1) * states_ * kLanes);
    dt_weight_rows = scratch.take(kLanes * shared_dt(scan));
    zeros = scratch.take(states_ * kLanes);
  }
};

// Rebuilds kSwept states of a chunk, keeps them and their decays, and adds what they give to y.
template <class Decay, bool kConstantB, bool kConstantC>
void rebuild_states(const Steps& steps, const BlockBuffers& weights, int64_t n0, const float* entry, float* states,
                    float* decays) {
  const Decay decay_of;
  vec h[kSwept];
  for (int n = 0; n < kSwept; ++n) {
    h[n] = load(entry + (n0 + n) * kLanes);
    store(states + n * kLanes, h[n]);
  }
  const float* rate = weights.rate + n0 * kLanes;
  const float *delta = steps.delta, *drive = steps.drive, *B = steps.B.data + n0, *C = steps.C.data + n0;
  float* y = steps.y;
  for (int64_t i = 0; i < steps.count; ++i) {
    states += kSwept * kLanes;
    const vec step = load(delta), input = load(drive);
    vec sums[2] = {load(y), vec{}};
#pragma GCC unroll 8
    for (int n = 0; n < kSwept; ++n) {
      const vec decay = decay_of(step, load(rate + n * kLanes));
      const vec b = kConstantB ? load(weights.B_constant + (n0 + n) * kLanes) : set1(B[n]);
      const vec c = kConstantC ? load(weights.C_constant + (n0 + n) * kLanes) : set1(C[n]);
      h[n] = fma(decay, h[n], input * b);
      sums[n % 2] = fma(h[n], c, sums[n % 2]);
      store(decays + n * kLanes, decay);
      store(states + n * kLanes, h[n]);
    }
    store(y, sums[0] + sums[1]);
    decays += kSwept * kLanes;
    delta += steps.step * kLanes;
    drive += steps.step * kLanes;
    y += steps.step * kLanes;
    B += steps.B.stride;
    C += steps.C.stride;
  }
}

template <class Decay>
auto choose_rebuild(bool constant_B, bool constant_C) {
  return constant_B ? (constant_C ? rebuild_states<Decay, true, true> : rebuild_states<Decay, true, false>)
                    : (constant_C ? rebuild_states<Decay, false, true> : rebuild_states<Decay, false, false>);
}

// Goes through kSwept states of a chunk against scan order. `dy`, `dstep` and `drive_sum` point at the last token that
// the scan meets, and so does `shared`, at this group of states; the sums over states are added to the latter three.
template <bool kConstantB, bool kConstantC>
void sweep_states(const Steps& steps, const BlockBuffers& weights, int64_t n0, const float* states, const float* decays,
                  const float* dy, float* dstep, float* drive_sum, float* shared, int64_t shared_row, float* carry,
                  float* dA, float* dB_constant, float* dC_constant) {
  vec g[kSwept], sum_A[kSwept];
  for (int n = 0; n < kSwept; ++n) {
    g[n] = load(carry + (n0 + n) * kLanes);
    sum_A[n] = load(dA + (n0 + n) * kLanes);
  }
  const int64_t last = steps.count - 1, row = steps.step * kLanes;
  const float *delta = steps.delta + last * row, *drive = steps.drive + last * row;
  const float *B = steps.B.data + n0 + last * steps.B.stride, *C = steps.C.data + n0 + last * steps.C.stride;
  const float* A = weights.A + n0 * kLanes;
  for (int64_t i = last; i >= 0; --i) {
    const float* before = states + i * kSwept * kLanes;
    const float* after = before + kSwept * kLanes;
    const float* decay = decays + i * kSwept * kLanes;
    const vec step = load(delta), input = load(drive), gradient = load(dy);
    vec through_decay = load(dstep), through_drive = load(drive_sum);
    vec products[kLanes];
#pragma GCC unroll 8
    for (int n = 0; n < kSwept; ++n) {
      const vec b = kConstantB ? load(weights.B_constant + (n0 + n) * kLanes) : set1(B[n]);
      const vec c = kConstantC ? load(weights.C_constant + (n0 + n) * kLanes) : set1(C[n]);
      const vec dh = fma(gradient, c, g[n]);
      products[n] = dh * input;
      products[kSwept + n] = gradient * load(after + n * kLanes);
      through_drive = fma(dh, b, through_drive);
      g[n] = dh * load(decay + n * kLanes);
      const vec dlog = g[n] * load(before + n * kLanes);
      through_decay = fma(dlog, load(A + n * kLanes), through_decay);
      sum_A[n] = fma(dlog, step, sum_A[n]);
      if (kConstantB) {
        float* sum = dB_constant + (n0 + n) * kLanes;
        store(sum, load(sum) + products[n]);
        products[n] = vec{};
      }
      if (kConstantC) {
        float* sum = dC_constant + (n0 + n) * kLanes;
        store(sum, load(sum) + products[kSwept + n]);
        products[kSwept + n] = vec{};
      }
    }
    store(dstep, through_decay);
    store(drive_sum, through_drive);
    if (!kConstantB || !kConstantC) store(shared, load(shared) + sum_each(products));
    delta -= row;
    drive -= row;
    dy -= row;
    dstep -= row;
    drive_sum -= row;
    shared -= steps.step * shared_row;
    B -= steps.B.stride;
    C -= steps.C.stride;
  }
  for (int n = 0; n < kSwept; ++n) {
    store(carry + (n0 + n) * kLanes, g[n]);
    store(dA + (n0 + n) * kLanes, sum_A[n]);
  }
}

// Where one direction of one block adds its sums.
struct Partials {
  float *shared, *weights;
};

// Adds one chunk's part of the gradient of dt_weight: four ranks at a time, in two sums each, so that enough sums are
// under way to hide the latency of an addition.
inline void backward_dt_weight(int64_t dt_rank, const Rows& dt, int64_t count, const float* ddelta, float* ddt_weight) {
  constexpr int kRanks = 4;
  for (int64_t r0 = 0; r0 < dt_rank; r0 += kRanks) {
    // The last group overlaps the one before it, and drops what it has done again.
    const int64_t from = smaller(r0, larger(0, dt_rank - kRanks)), ranks = smaller(kRanks, dt_rank);
    vec sums[2][kRanks] = {};
    int64_t t = 0;
    for (; ranks == kRanks && t + 2 <= count; t += 2) {
      for (int half = 0; half < 2; ++half) {
        const vec gradient = load(ddelta + (t + half) * kLanes);
        const float* row = dt.data + (t + half) * dt.stride + from;
        for (int r = 0; r < kRanks; ++r) sums[half][r] = fma(gradient, set1(row[r]), sums[half][r]);
      }
    }
    for (; t < count; ++t) {
      const float* row = dt.data + t * dt.stride + from;
      for (int64_t r = 0; r < ranks; ++r) sums[0][r] = fma(load(ddelta + t * kLanes), set1(row[r]), sums[0][r]);
    }
    for (int64_t r = r0; r < from + ranks; ++r) {
      float* target = ddt_weight + r * kLanes;
      store(target, load(target) + (sums[0][r - from] + sums[1][r - from]));
    }
  }
}

// Adds one chunk's part of the gradient of dt. Lanes are ranks here: no sum over lanes is needed.
inline void backward_dt(int64_t padded_rank, int64_t count, const float* ddelta, const float* dt_weight_rows,
                        float* shared, int64_t shared_row) {
  constexpr int kAtOnce = 4;
  for (int64_t r0 = 0; r0 < padded_rank; r0 += kLanes) {
    int64_t t = 0;
    for (; t + kAtOnce <= count; t += kAtOnce) {
      float* target = shared + t * shared_row + r0;
      vec sums[kAtOnce];
      for (int k = 0; k < kAtOnce; ++k) sums[k] = load(target + k * shared_row);
      for (int c = 0; c < kLanes; ++c) {
        const vec weight = load(dt_weight_rows + c * padded_rank + r0);
        for (int k = 0; k < kAtOnce; ++k) sums[k] = fma(weight, set1(ddelta[(t + k) * kLanes + c]), sums[k]);
      }
      for (int k = 0; k < kAtOnce; ++k) store(target + k * shared_row, sums[k]);
    }
    for (; t < count; ++t) {
      float* target = shared + t * shared_row + r0;
      vec sum = load(target);
      for (int c = 0; c < kLanes; ++c) {
        sum = fma(load(dt_weight_rows + c * padded_rank + r0), set1(ddelta[t * kLanes + c]), sum);
      }
      store(target, sum);
    }
  }
}

// dy of the scan's own output: what arrives, through scale and gate.
inline void load_dy(const ScanBackwardTasks& k, const Chunk& chunk, Block block, int64_t next,
                    BackwardBuffers& buffers) {
  const Scan& scan = k.scan;
  const vec scale = set1(scan.scale);
  load_block(scan.element, k.dy, chunk.b, chunk.first, chunk.count, block, next, buffers.dout);
  if (scan.z.data != nullptr) {
    load_block(scan.element, scan.z, chunk.b, chunk.first, chunk.count, block, next, buffers.z);
  }
  const float* z = scan.z.data == nullptr ? nullptr : buffers.z;
  float *dout = buffers.dout, *dy = buffers.dy;
  for (int64_t t = 0; t < chunk.count * kLanes; t += kLanes) {
    const vec gradient = scale * load(dout + t);
    store(dout + t, gradient);
    store(dy + t, z == nullptr ? gradient : gradient * silu(load(z + t)));
  }
}

// dz = dout y silu'(z), written over dout; and scale y silu(z) where the caller wants it.
inline void backward_gate(const ScanBackwardTasks& k, const Chunk& chunk, Block block, const float* y,
                          BackwardBuffers& buffers) {
  const vec one = set1(1.0f);
  const float* gates = buffers.z;
  float* dout = buffers.dout;
  for (int64_t t = 0; t < chunk.count * kLanes; t += kLanes) {
    const vec z = load(gates + t), gate = sigmoid(z);
    store(dout + t, load(dout + t) * load(y + t) * gate * fma(z, one - gate, one));
  }
  store_block(k.scan.element, k.dz, chunk.b, chunk.first, chunk.count, block, dout);
  if (k.y.data == nullptr) return;
  const vec scale = set1(k.scan.scale);
  for (int64_t t = 0; t < chunk.count * kLanes; t += kLanes) {
    store(dout + t, scale * load(y + t) * silu(load(gates + t)));
  }
  store_block(k.scan.element, k.y, chunk.b, chunk.first, chunk.count, block, dout);
}

// du, ddelta and the gradients of bias and D, from the sums over states.
inline void backward_step(const Scan& scan, int64_t count, BackwardBuffers& buffers, float* weights) {
  const WeightRows rows(scan);
  const vec skip = load(buffers.D);
  float *bias = weights + rows.bias * kLanes, *D = weights + rows.D * kLanes;
  vec dbias = load(bias), dD = load(D);
  const float *input = buffers.u, *gradient = buffers.dy, *drive_sums = buffers.drive_sum, *delta = buffers.delta;
  const float* slope = buffers.slope;
  float *du = buffers.du, *dstep = buffers.dstep;
  for (int64_t t = 0; t < count * kLanes; t += kLanes) {
    const vec u = load(input + t), dy = load(gradient + t), drive_sum = load(drive_sums + t);
    const vec ddelta = fma(drive_sum, u, load(dstep + t)) * load(slope + t);
    store(du + t, fma(drive_sum, load(delta + t), skip * dy));
    store(dstep + t, ddelta);
    dbias = dbias + ddelta;
    dD = fma(dy, u, dD);
  }
  store(bias, dbias);
  store(D, dD);
}

inline void backward_chunk(const ScanBackwardTasks& k, int d, const Chunk& chunk, Block block, const float* entry,
                           Partials partials, BackwardBuffers& buffers) {
  const Scan& scan = k.scan;
  const ScanDirection& side = scan.direction[d];
  const ScanDirectionGrads& grads = k.grads[d];
  const int64_t states = swept_states(scan), count = chunk.count;
  const int64_t next = side.reverse ? chunk_tokens(scan) : -chunk_tokens(scan);
  float* y = scan.directions == 2 ? buffers.y + chunk.first * kLanes : buffers.y;
  const ChunkRows rows = load_chunk(scan, side, chunk, block, states, next, buffers);
  load_dy(k, chunk, block, next, buffers);
  const bool near = step_sizes(scan, side, rows, count, buffers, d > 0, y, buffers.slope);
  fill_zero(buffers.dstep, count * kLanes);
  fill_zero(buffers.drive_sum, count * kLanes);

  const bool B = side.B.constant != nullptr, C = side.C.constant != nullptr;
  const auto rebuild = near ? choose_rebuild<NearDecay2>(B, C) : choose_rebuild<Decay2>(B, C);
  const auto sweep = B ? (C ? sweep_states<true, true> : sweep_states<true, false>)
                       : (C ? sweep_states<false, true> : sweep_states<false, false>);
  const Steps steps = in_scan_order(buffers, rows, y, count, side.reverse);
  const WeightRows weight_row(scan);
  const int64_t row = k.partition.row;
  float* shared = partials.shared + chunk.first * row;
  for (int64_t n0 = 0; n0 < states; n0 += kSwept) {
    for (int64_t end = count; end > 0;) {
      const Run run = run_before(scan, side.reverse, chunk, end);
      const Steps own = part_of(steps, run);
      const int64_t last = side.reverse ? count - end : end - 1;
      rebuild(own, buffers, n0, run.restarts ? buffers.zeros : entry, buffers.states, buffers.decays);
      sweep(own, buffers, n0, buffers.states, buffers.decays, buffers.dy + last * kLanes, buffers.dstep + last * kLanes,
            buffers.drive_sum + last * kLanes, shared + last * row + shared_dt(scan) + 2 * n0, row, buffers.carry,
            partials.weights + weight_row.A * kLanes, partials.weights + weight_row.B * kLanes,
            partials.weights + weight_row.C * kLanes);
      if (run.restarts) fill_zero(buffers.carry + n0 * kLanes, kSwept * kLanes);
      end = run.first;
    }
  }
  backward_step(scan, count, buffers, partials.weights);
  store_block(scan.element, grads.du, chunk.b, chunk.first, count, block, buffers.du);
  if (side.delta.data != nullptr) {
    store_block(scan.element, grads.ddelta, chunk.b, chunk.first, count, block, buffers.dstep);
  } else {
    backward_dt_weight(scan.dt_rank, rows.dt, count, buffers.dstep, partials.weights + weight_row.dt_weight * kLanes);
    backward_dt(shared_dt(scan), count, buffers.dstep, buffers.dt_weight_rows, shared, row);
  }
  if (scan.z.data != nullptr && d + 1 == scan.directions) backward_gate(k, chunk, block, y, buffers);
}

// The tokens between two saved states, in chunks; the states in which all but the first are entered are found first.
inline void backward_saved_chunk(const ScanBackwardTasks& k, int d, int64_t b, int64_t save, Block block,
                                 Partials partials, BackwardBuffers& buffers) {
  const Scan& scan = k.scan;
  const ScanDirection& side = scan.direction[d];
  const int64_t every = scan.checkpoint_every, saved = blocks_in(scan.length, every), states = swept_states(scan);
  const int64_t begin = save * every, tokens = smaller(every, scan.length - begin);
  const int64_t size = smaller(chunk_tokens(scan), tokens), chunks = blocks_in(tokens, size);
  const auto chunk_at = [&](int64_t j) {
    const int64_t offset = (side.reverse ? chunks - 1 - j : j) * size;
    return Chunk{b, begin + offset, smaller(size, tokens - offset)};
  };
  load_lanes(side.checkpoints + (b * saved + save) * scan.d_state * scan.dim, scan.d_state, states, scan.dim, block,
             buffers.entry);
  for (int64_t j = 0; j + 1 < chunks; ++j) {
    const Chunk chunk = chunk_at(j);
    float* state = buffers.entry + (j + 1) * states * kLanes;
    const ChunkRows rows = load_chunk(scan, side, chunk, block, states, 0, buffers);
    // y is not needed: du is free
    const bool near = step_sizes(scan, side, rows, chunk.count, buffers, false, buffers.du, nullptr);
    std::memcpy(state, state - states * kLanes, static_cast<size_t>(states * kLanes) * sizeof(float));
    const Steps steps = in_scan_order(buffers, rows, buffers.du, chunk.count, side.reverse);
    run_sequences(scan, side, chunk, steps, buffers, states, near, state);
  }
  for (int64_t j = chunks - 1; j >= 0; --j) {
    backward_chunk(k, d, chunk_at(j), block, buffers.entry + j * states * kLanes, partials, buffers);
  }
}

inline void backward_direction(const ScanBackwardTasks& k, int d, int64_t b, Block block, Partials partials,
                               BackwardBuffers& buffers) {
  const Scan& scan = k.scan;
  const ScanDirection& side = scan.direction[d];
  const int64_t states = swept_states(scan), padded = shared_dt(scan);
  buffers.pack(scan, side, block, states);
  if (side.delta.data == nullptr) {
    fill_zero(buffers.dt_weight_rows, kLanes * padded);
    for (int64_t c = 0; c < block.lanes; ++c) {
      std::memcpy(buffers.dt_weight_rows + c * padded, side.dt_weight.floats() + (block.channel + c) * scan.dt_rank,
                  static_cast<size_t>(scan.dt_rank) * sizeof(float));
    }
  }
  fill_zero(buffers.zeros, states * kLanes);
  fill_zero(buffers.carry, states * kLanes);
  if (k.grads[d].dlast_state != nullptr) {
    pack_weight(k.grads[d].dlast_state + b * scan.dim * scan.d_state, scan.d_state, states, block, buffers.carry);
  }
  const int64_t saved = blocks_in(scan.length, scan.checkpoint_every);
  for (int64_t i = 0; i < saved; ++i) {
    backward_saved_chunk(k, d, b, side.reverse ? i : saved - 1 - i, block, partials, buffers);
  }
  if (k.grads[d].dinitial_state != nullptr) {
    unpack_weight(buffers.carry, scan.d_state, block, k.grads[d].dinitial_state + b * scan.dim * scan.d_state);
  }
}

inline bool scan_backward(const ScanBackwardTasks& k, int64_t begin, int64_t end) {
  const Scan& scan = k.scan;
  const ScanPartition& p = k.partition;
  const Blocks blocks = scan_blocks(scan);
  Scratch scratch;
  BackwardBuffers buffers;
  buffers.take(scratch, scan);
  if (!scratch.allocate()) return false;
  buffers.take(scratch, scan);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch_group = task / p.block_groups, block_group = task % p.block_groups;
    const int64_t first_b = scan.batch * batch_group / p.batch_groups;
    const int64_t last_b = scan.batch * (batch_group + 1) / p.batch_groups;
    const int64_t first = p.blocks * block_group / p.block_groups, last = p.blocks * (block_group + 1) / p.block_groups;
    for (int64_t i = first; i < last; ++i) {
      fill_zero(weight_rows(k, batch_group, i, 0), scan.directions * p.rows * kLanes);
    }
    for (int64_t b = first_b; b < last_b; ++b) {
      for (int d = 0; d < scan.directions; ++d) {
        fill_zero(shared_rows(k, block_group, d, b, 0), blocks.segments * scan.length * p.row);
      }
      for (int64_t i = first; i < last; ++i) {
        for (int d = 0; d < scan.directions; ++d) {
          const Partials partials{shared_rows(k, block_group, d, b, blocks.segment_of(i)),
                                  weight_rows(k, batch_group, i, d)};
          backward_direction(k, d, b, blocks.at(i), partials, buffers);
        }
      }
    }
  }
  return true;
}

}  // namespace VIM_ISA
}  // namespace vim
