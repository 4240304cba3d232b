// What bindings ask of the kernels of any device: plain pointers, sizes and strides (in elements). Nothing here knows
// torch.
#pragma once

#include <cstdint>

namespace vim {

enum class Element { float32, bfloat16, float16 };

// A contiguous weight, null where there is none. GPUs read any element type, the same for all weights of an op; the
// CPU's kernels read float32 alone.
struct Weight {
  const void* data = nullptr;
  Element element = Element::float32;

  const float* floats() const { return static_cast<const float*>(data); }
};

// The gradient of one, likewise
struct WeightGrad {
  void* data = nullptr;
  Element element = Element::float32;

  float* floats() const { return static_cast<float*>(data); }
};

// An activation (batch, token, channel) with any strides; its element type is said elsewhere. `data` may be null.
struct Activation {
  void* data = nullptr;
  int64_t batch = 0, token = 0, channel = 0;
};

// B or C of a scan: one row of d_state numbers a token, shared by the channels of a group; or, where `constant` is
// given, (dim, d_state) in float32.
struct StateMap {
  void* data = nullptr;
  int64_t batch = 0, group = 0, state = 0, token = 0;
  int64_t channels_per_group = 1;
  const float* constant = nullptr;
};

// One direction of a scan. Null pointers leave a term out.
struct ScanDirection {
  Activation u;
  Activation delta;  // given, or else delta = dt dt_weight^T
  Activation dt;     // (batch, token, rank)
  Weight dt_weight;  // (dim, dt_rank)
  Weight bias;       // (dim,)
  Weight A;          // (dim, d_state): A, or log(-A) with A_is_log
  Weight D;          // (dim,)
  StateMap B, C;
  bool reverse = false;
  const float* initial_state = nullptr;  // (batch, dim, d_state), or null for 0
  float* checkpoints = nullptr;          // (batch, chunks, d_state, dim)
  float* last_state = nullptr;           // (batch, dim, d_state)
};

// y = scale (sum of the directions) silu(z)
struct Scan {
  Element element = Element::float32;
  Element row_element = Element::float32;  // of dt, B and C
  int64_t batch = 0, length = 0, dim = 0, d_state = 0, dt_rank = 0;
  bool softplus = false, A_is_log = false;
  float scale = 1;
  int64_t checkpoint_every = 0;
  int directions = 1;
  ScanDirection direction[2];
  Activation z, y;
  const int32_t* seq_idx = nullptr;  // (batch, length), or null; the state restarts from 0 where it changes

  // Whether scans that begin at 0 and do not restart can take the place of this one.
  bool is_plain() const { return direction[0].initial_state == nullptr && seq_idx == nullptr; }
};

struct ScanDirectionGrads {
  Activation du;
  Activation ddelta;             // where delta is given
  Activation ddt;                // where it is projected
  StateMap dB, dC;               // same kind as B and C; `constant` is unused, see dB_constant
  float* dB_constant = nullptr;  // (dim, d_state)
  float* dC_constant = nullptr;
  WeightGrad ddt_weight;               // (dim, dt_rank)
  WeightGrad dbias;                    // (dim,)
  WeightGrad dA;                       // (dim, d_state), of A_log with A_is_log
  WeightGrad dD;                       // (dim,)
  const float* dlast_state = nullptr;  // (batch, dim, d_state) contiguous
  float* dinitial_state = nullptr;     // (batch, dim, d_state)
};

struct ScanBackward {
  Scan scan;
  Activation dy, dz;
  Activation y;  // where given, gets the forward pass's result; may be dy's memory
  ScanDirectionGrads grads[2];
};

// Depthwise convolution, one or two directions. Taps are packed by pack_taps.
struct ConvDirection {
  Weight weight;  // (dim, width)
  Weight bias;    // (dim,) or null
  int64_t width = 0;
  bool reverse = false;
  Activation out, dout;
  WeightGrad dweight, dbias;
};

struct Conv {
  Element element = Element::float32;
  int64_t batch = 0, length = 0, dim = 0;
  bool silu = false;
  int directions = 1;
  ConvDirection direction[2];
  Activation x, dx;
  const int32_t* seq_idx = nullptr;  // (batch, length), or null; filters see zeros beyond where it changes
  int64_t batch_groups = 1;          // backward, as in ScanPartition
  float* partials = nullptr;         // backward: [batch group][block][taps and bias][kLanes]
};

// r = x + residual; y = r / sqrt(mean(r^2) + eps) weight, over rows. Everything but x has contiguous rows.
struct Norm {
  Element element = Element::float32;    // of x, and of dy in the backward pass
  Element y_element = Element::float32;  // of y
  int64_t rows = 0, dim = 0;
  float eps = 0;
  const void* x = nullptr;
  int64_t x_row = 0;
  const float* residual = nullptr;
  Weight weight;
  void* y = nullptr;
  float* r = nullptr;  // the forward pass of the CPU leaves it out where it is null
  // Backward: dy and dr may be null; dr is the gradient of r that arrives, total the one that leaves.
  const void* dy = nullptr;
  const float* dr = nullptr;
  float* total = nullptr;
  WeightGrad dweight;
  int64_t row_groups = 1;
  float* partials = nullptr;  // (row group, dim)
};

}  // namespace vim
