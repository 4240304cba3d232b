// What the forward and the backward pass of a scan do alike, for one block of channels and one chunk of tokens.
#pragma once

#include "staging.h"

namespace vim {
namespace VIM_ISA {

constexpr int64_t kTokens = 64;  // of a chunk: its buffers stay in the first-level cache

constexpr int kStatesAtOnce = 16;
// Whether they stay in registers for a chunk. Where there are 16 registers they go through the first-level cache at
// every token, which costs less than a second pass over the tokens.
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr bool kStatesInRegisters = false;
#else
constexpr bool kStatesInRegisters = true;
#endif
constexpr int kFewStates = 4;

VIM_INLINE int64_t chunk_tokens(const Scan& scan) { return larger(1, smaller(kTokens, scan.length)); }

// The channels that share both B and C: a block must not reach across.
VIM_INLINE int64_t segment_size(const Scan& scan) {
  int64_t a = scan.direction[0].B.channels_per_group, b = scan.direction[0].C.channels_per_group;
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

VIM_INLINE Blocks scan_blocks(const Scan& scan) { return Blocks(scan.dim, segment_size(scan)); }

// Weights and buffers of one block.
struct BlockBuffers {
  float *A, *rate, *dt_weight, *bias, *D, *B_constant, *C_constant;  // rows of kLanes
  float* near_step;                                 // from this step on, a lane's fastest decay is no longer near
  float *u, *z, *delta, *drive, *raw, *dt, *B, *C;  // rows of a chunk
  float* state;

  void take(Scratch& scratch, const Scan& scan, int64_t states) {
    const int64_t tokens = chunk_tokens(scan);
    A = scratch.take(states * kLanes);
    rate = scratch.take(states * kLanes);
    near_step = scratch.take(kLanes);
    dt_weight = scratch.take(scan.dt_rank * kLanes);
    bias = scratch.take(kLanes);
    D = scratch.take(kLanes);
    B_constant = scratch.take(states * kLanes);
    C_constant = scratch.take(states * kLanes);
    float** const buffers[] = {&u, &z, &delta, &drive, &raw};
    for (float** rows : buffers) *rows = scratch.take(tokens * kLanes);
    dt = scratch.take(tokens * scan.dt_rank + kLanes);
    B = scratch.take(tokens * states + kLanes);
    C = scratch.take(tokens * states + kLanes);
    state = scratch.take(states * kLanes);
  }

  void pack(const Scan& scan, const ScanDirection& side, Block block, int64_t states) {
    pack_weight(side.A.floats(), scan.d_state, states, block, A);
    vec fastest{};
    for (int64_t n = 0; n < states; ++n) {
      vec decay = load(A + n * kLanes);
      // A state that only pads the count has no decay either way: its drive is zero.
      if (scan.A_is_log) decay = -exp(decay);
      store(A + n * kLanes, decay);
      const vec log2_decay = decay * set1(1.44269504f);
      store(rate + n * kLanes, log2_decay * set1(kRateUnits));
      fastest = max2(fastest, abs(log2_decay));
    }
    store(near_step, set1(kNearDecay) / fastest);
    if (side.delta.data == nullptr) pack_weight(side.dt_weight.floats(), scan.dt_rank, scan.dt_rank, block, dt_weight);
    pack_or_zero(side.bias.floats(), 1, 1, block, bias);
    pack_or_zero(side.D.floats(), 1, 1, block, D);
    if (side.B.constant != nullptr) pack_weight(side.B.constant, scan.d_state, states, block, B_constant);
    if (side.C.constant != nullptr) pack_weight(side.C.constant, scan.d_state, states, block, C_constant);
  }

 private:
  static void pack_or_zero(const float* weight, int64_t items, int64_t padded, Block block, float* out) {
    if (weight == nullptr) {
      fill_zero(out, padded * kLanes);
    } else {
      pack_weight(weight, items, padded, block, out);
    }
  }
};

// Tokens [first, first + count) of one batch element.
struct Chunk {
  int64_t b, first, count;
};

// Where B, C and dt of a chunk are: rows in token order.
struct ChunkRows {
  Rows B, C, dt;
};

VIM_INLINE Rows load_map(const Scan& scan, const StateMap& map, const Chunk& chunk, Block block, int64_t states,
                         float* buffer) {
  if (map.constant != nullptr) return {buffer, 0};
  const int64_t group = block.channel / map.channels_per_group;
  const int64_t offset = chunk.b * map.batch + group * map.group + chunk.first * map.token;
  return load_rows(scan.row_element, map.data, offset, map.token, map.state, chunk.count, scan.d_state, states, buffer);
}

// Loads u, delta or dt, B and C of a chunk. `next` is the distance to the next chunk, in tokens.
inline ChunkRows load_chunk(const Scan& scan, const ScanDirection& side, const Chunk& chunk, Block block,
                            int64_t states, int64_t next, BlockBuffers& buffers) {
  ChunkRows rows{};
  load_block(scan.element, side.u, chunk.b, chunk.first, chunk.count, block, next, buffers.u);
  rows.B = load_map(scan, side.B, chunk, block, states, buffers.B);
  rows.C = load_map(scan, side.C, chunk, block, states, buffers.C);
  if (side.delta.data != nullptr) {
    load_block(scan.element, side.delta, chunk.b, chunk.first, chunk.count, block, next, buffers.raw);
  } else {
    const int64_t offset = chunk.b * side.dt.batch + chunk.first * side.dt.token;
    rows.dt = load_rows(scan.row_element, side.dt.data, offset, side.dt.token, side.dt.channel, chunk.count,
                        scan.dt_rank, scan.dt_rank, buffers.dt);
  }
  return rows;
}

// raw = dt dt_weight^T, four tokens at a time so that a weight is loaded once for all of them.
inline void project_dt(const float* dt_weight, int64_t dt_rank, Rows dt, int64_t count, float* raw) {
  int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    const float* row = dt.data + t * dt.stride;
    vec sums[4] = {};
    for (int64_t r = 0; r < dt_rank; ++r) {
      const vec weight = load(dt_weight + r * kLanes);
      for (int k = 0; k < 4; ++k) sums[k] = fma(weight, set1(row[k * dt.stride + r]), sums[k]);
    }
    for (int k = 0; k < 4; ++k) store(raw + (t + k) * kLanes, sums[k]);
  }
  for (; t < count; ++t) {
    vec sum{};
    for (int64_t r = 0; r < dt_rank; ++r) {
      sum = fma(load(dt_weight + r * kLanes), set1(dt.data[t * dt.stride + r]), sum);
    }
    store(raw + t * kLanes, sum);
  }
}

// delta and drive = delta u of a chunk, and y = D u, on top of what is there with `add_y`. `slope`, where given, gets
// the derivative of delta by its raw value. Returns whether every decay of the chunk is near.
inline bool step_sizes(const Scan& scan, const ScanDirection& side, const ChunkRows& rows, int64_t count,
                       BlockBuffers& buffers, bool add_y, float* y, float* slope) {
  if (side.delta.data == nullptr) project_dt(buffers.dt_weight, scan.dt_rank, rows.dt, count, buffers.raw);
  // Copies of the pointers: for all the compiler knows, a store through one changes the others.
  const float *input = buffers.u, *raw = buffers.raw;
  float *delta = buffers.delta, *drive = buffers.drive;
  const vec bias = load(buffers.bias), skip = load(buffers.D);
  const bool with_softplus = scan.softplus;
  vec largest{};
  for (int64_t t = 0; t < count * kLanes; t += kLanes) {
    const vec u = load(input + t);
    vec step = load(raw + t) + bias;
    vec derivative = set1(1.0f);
    if (with_softplus) step = softplus(step, slope == nullptr ? nullptr : &derivative);
    largest = max2(largest, abs(step));
    store(delta + t, step);
    store(drive + t, step * u);
    store(y + t, fma(skip, u, add_y ? load(y + t) : vec{}));
    if (slope != nullptr) store(slope + t, derivative);
  }
  return !any(largest >= load(buffers.near_step));
}

// A chunk in scan order: everything points at the first token that the scan meets, and `step` is 1 or -1.
struct Steps {
  int64_t count, step;
  const float *delta, *drive;
  float* y;
  Rows B, C;
};

VIM_INLINE Steps in_scan_order(const BlockBuffers& buffers, const ChunkRows& rows, float* y, int64_t count,
                               bool reverse) {
  const int64_t first = reverse ? count - 1 : 0, step = reverse ? -1 : 1;
  return {count,
          step,
          buffers.delta + first * kLanes,
          buffers.drive + first * kLanes,
          y + first * kLanes,
          {rows.B.data + first * rows.B.stride, step * rows.B.stride},
          {rows.C.data + first * rows.C.stride, step * rows.C.stride}};
}

// Runs kStates states through a chunk and adds what they give to y. All states of a token are independent, which is
// what keeps the pipes full.
template <class Decay, int kStates, bool kConstantB, bool kConstantC>
void run_states(const Steps& steps, const float* rates, const float* B_constant, const float* C_constant, int64_t n0,
                float* state) {
  const Decay decay_of;
  constexpr bool kInRegisters = kStatesInRegisters || kStates < kStatesAtOnce;
  vec registers[kInRegisters ? kStates : 1];
  float* rows = state + n0 * kLanes;
  for (int n = 0; kInRegisters && n < kStates; ++n) registers[n] = load(rows + n * kLanes);
  const float* rate = rates + n0 * kLanes;
  const float *delta = steps.delta, *drive = steps.drive;
  const float *B = steps.B.data + n0, *C = steps.C.data + n0;
  float* y = steps.y;
  const int64_t row = steps.step * kLanes;
  for (int64_t i = 0; i < steps.count; ++i) {
    const vec step = load(delta), input = load(drive);
    vec sums[2] = {load(y), vec{}};
#pragma GCC unroll 16
    for (int n = 0; n < kStates; ++n) {
      const vec decay = decay_of(step, load(rate + n * kLanes));
      const vec b = kConstantB ? load(B_constant + (n0 + n) * kLanes) : set1(B[n]);
      const vec c = kConstantC ? load(C_constant + (n0 + n) * kLanes) : set1(C[n]);
      const vec h = fma(decay, kInRegisters ? registers[n] : load(rows + n * kLanes), input * b);
      sums[n % 2] = fma(h, c, sums[n % 2]);
      if (kInRegisters) {
        registers[n] = h;
      } else {
        store(rows + n * kLanes, h);
      }
    }
    store(y, sums[0] + sums[1]);
    delta += row;
    drive += row;
    y += row;
    B += steps.B.stride;
    C += steps.C.stride;
  }
  for (int n = 0; kInRegisters && n < kStates; ++n) store(rows + n * kLanes, registers[n]);
}

// All states of a block through a chunk; `states` is a multiple of kFewStates.
template <class Decay>
void run_all_states_by(const Steps& steps, const ScanDirection& side, const BlockBuffers& buffers, int64_t states,
                       float* state) {
  const float *rate = buffers.rate, *B = buffers.B_constant, *C = buffers.C_constant;
  const bool constant_B = side.B.constant != nullptr, constant_C = side.C.constant != nullptr;
  int64_t n = 0;
  if (!constant_B && !constant_C) {
    for (; n + kStatesAtOnce <= states; n += kStatesAtOnce) {
      run_states<Decay, kStatesAtOnce, false, false>(steps, rate, B, C, n, state);
    }
  }
  const auto run =
      constant_B
          ? (constant_C ? run_states<Decay, kFewStates, true, true> : run_states<Decay, kFewStates, true, false>)
          : (constant_C ? run_states<Decay, kFewStates, false, true> : run_states<Decay, kFewStates, false, false>);
  for (; n < states; n += kFewStates) run(steps, rate, B, C, n, state);
}

inline void run_all_states(const Steps& steps, const ScanDirection& side, const BlockBuffers& buffers, int64_t states,
                           bool near, float* state) {
  const auto run = near ? run_all_states_by<NearDecay2> : run_all_states_by<Decay2>;
  run(steps, side, buffers, states, state);
}

// Tokens of a chunk that belong to one sequence: `count` places in scan order, from `first` on. A run `restarts` if the
// token before it belongs to another sequence, or else continues with the state so far.
struct Run {
  int64_t first, count;
  bool restarts;
};

VIM_INLINE bool restarts_at(const Scan& scan, bool reverse, const Chunk& chunk, int64_t place) {
  const int64_t token = chunk.first + (reverse ? chunk.count - 1 - place : place), before = token + (reverse ? 1 : -1);
  if (scan.seq_idx == nullptr || before < 0 || before >= scan.length) return false;
  const int32_t* row = scan.seq_idx + chunk.b * scan.length;
  return row[token] != row[before];
}

// The run that begins at a place.
inline Run run_from(const Scan& scan, bool reverse, const Chunk& chunk, int64_t first) {
  int64_t end = scan.seq_idx == nullptr ? chunk.count : first + 1;
  while (end < chunk.count && !restarts_at(scan, reverse, chunk, end)) ++end;
  return {first, end - first, restarts_at(scan, reverse, chunk, first)};
}

// The run that ends before a place.
inline Run run_before(const Scan& scan, bool reverse, const Chunk& chunk, int64_t end) {
  int64_t first = scan.seq_idx == nullptr ? 0 : end - 1;
  while (first > 0 && !restarts_at(scan, reverse, chunk, first)) --first;
  return {first, end - first, restarts_at(scan, reverse, chunk, first)};
}

VIM_INLINE Steps part_of(const Steps& steps, Run run) {
  const int64_t lanes = run.first * steps.step * kLanes;
  return {run.count,
          steps.step,
          steps.delta + lanes,
          steps.drive + lanes,
          steps.y + lanes,
          {steps.B.data + run.first * steps.B.stride, steps.B.stride},
          {steps.C.data + run.first * steps.C.stride, steps.C.stride}};
}

// All states of a block through the sequences of a chunk.
inline void run_sequences(const Scan& scan, const ScanDirection& side, const Chunk& chunk, const Steps& steps,
                          const BlockBuffers& buffers, int64_t states, bool near, float* state) {
  for (int64_t first = 0; first < chunk.count;) {
    const Run run = run_from(scan, side.reverse, chunk, first);
    if (run.restarts) fill_zero(state, states * kLanes);
    run_all_states(part_of(steps, run), side, buffers, states, near, state);
    first += run.count;
  }
}

}  // namespace VIM_ISA
}  // namespace vim
