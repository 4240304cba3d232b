// dt_proj by a warp's tensor cores: eight tokens and 64 channels at a time, where weights and activations are bfloat16.
// For large ranks this takes the place of a read of shared memory and four multiplications for every four ranks.
#pragma once

#include "tiles.h"

namespace vim {
namespace VIM_ISA {

// The weights stay in shared memory in the order in which multiply_add takes them: each lane reads what it has written.
// Lane 4 g + t computes tokens 2 t and 2 t + 1 for channels 8 g to 8 g + 7: rows g and g + 8 of tile m are channels
// 8 g + 2 m and 8 g + 2 m + 1.
template <int kRank>
class Projection {
  static_assert(kRank % 16 == 0, "a product has a depth of 16");
  static constexpr int kDepths = kRank / 16, kTiles = 4;

 public:
  static constexpr int kChannels = 64;        // of the warp
  static constexpr int kRow = kChannels + 4;  // of a token's results; rows start in different banks
  static constexpr int kWeightBytes = kTiles * kDepths * kWarp * static_cast<int>(sizeof(uint4));
  static constexpr int kBytes = kWeightBytes + kTile * kRow * static_cast<int>(sizeof(float));  // of shared memory

  Projection() = default;
  VIM_DEVICE Projection(char* memory, int lane)
      : lane_(lane),
        weights_(reinterpret_cast<uint4*>(memory) + lane),
        results_(reinterpret_cast<float*>(memory + kWeightBytes)) {}

  // Keeps the weights, (dim, kRank), of channels from `first` on. Those from `end` on are the last one before.
  VIM_DEVICE void load(const bfloat16* weight, int first, int end) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kDepths; ++k) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t channel = smaller(first + lane_ / 4 * 8 + 2 * m + i % 2, end - 1);
          pairs[i] = pair(weight + channel * kRank, k, i / 2);
        }
        weights_[(m * kDepths + k) * kWarp] = {pairs[0], pairs[1], pairs[2], pairs[3]};
      }
    }
  }

  // Computes kTile tokens, whose dt are in rows of `stride` numbers. Other lanes see the results after a barrier.
  VIM_DEVICE void project(const bfloat16* rows, int stride) const {
    const bfloat16* row = rows + lane_ / 4 * stride;
    uint2 dt[kDepths];
#pragma unroll
    for (int k = 0; k < kDepths; ++k) dt[k] = {pair(row, k, 0), pair(row, k, 1)};
    float sums[2][2 * kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float tile[4] = {};
#pragma unroll
      for (int k = 0; k < kDepths; ++k) multiply_add(tile, weights_[(m * kDepths + k) * kWarp], dt[k]);
#pragma unroll
      for (int token = 0; token < 2; ++token) {
        sums[token][2 * m] = tile[token];
        sums[token][2 * m + 1] = tile[2 + token];
      }
    }
#pragma unroll
    for (int token = 0; token < 2; ++token) {
      float4* to = reinterpret_cast<float4*>(results_ + (lane_ % 4 * 2 + token) * kRow + lane_ / 4 * 8);
      to[0] = {sums[token][0], sums[token][1], sums[token][2], sums[token][3]};
      to[1] = {sums[token][4], sums[token][5], sums[token][6], sums[token][7]};
    }
  }

  // The result for a token and this lane's two channels
  VIM_DEVICE void read(int token, float (&result)[2]) const {
    load_channels<2>(results_ + token * kRow + 2 * lane_, result);
  }

 private:
  // Two neighbouring ranks of a row, as this lane has them in the k-th product
  VIM_DEVICE uint32_t pair(const bfloat16* row, int k, int half) const {
    return *reinterpret_cast<const uint32_t*>(row + 16 * k + 8 * half + lane_ % 4 * 2);
  }

  int lane_;
  uint4* weights_;  // this lane's, kWarp apart
  float* results_;  // (kTile, kRow)
};

}  // namespace VIM_ISA
}  // namespace vim
