// Tiles of tokens in shared memory, for a group of threads that scans a sequence in either direction. Tiles hold tokens
// in scan order, so that addresses do not depend on the direction.
#pragma once

#include "scan_math.h"

namespace vim {
namespace VIM_ISA {

constexpr int kTile = 8;  // tokens
constexpr int kUnit = 4;  // tokens that are computed together; half a tile
constexpr int kStates = 16;

// A run of tokens, from a multiple of kUnit to another or to the end of the sequence.
struct Range {
  int bottom, top;  // top is a multiple of kUnit and may exceed the length
  bool reverse;

  VIM_DEVICE int units() const { return (top - bottom) / kUnit; }
  // The token at a place of the walk; places beyond the run give tokens that are not `inside`.
  VIM_DEVICE int token(int place) const { return reverse ? top - 1 - place : bottom + place; }
};

// The threads of one direction, and their channels.
struct Walkers {
  int thread, threads, group;
  int b, channel, end;  // of the channels of the group
  int length;

  VIM_DEVICE void sync() const { sync_group(group, threads); }
};

// Layout of a tile in shared memory: for each warp, kTile rows of its channels.
template <int kChannels>
struct TileLayout {
  static constexpr int kRow = kWarp * kChannels;
  VIM_DEVICE static int offset(int row, int column) {
    return column / kRow * kTile * kRow + row * kRow + column % kRow;
  }
  VIM_DEVICE static int own(int thread) { return offset(0, thread * kChannels); }
};

// Copies an activation's tiles to shared memory, one after the other. Tokens outside the sequence and channels beyond
// the last are zero. With `vectors`, a thread copies 16 bytes at a time.
template <class T, int kChannels>
class TileStream {
 public:
  VIM_DEVICE TileStream(const Walkers& walkers, const Activation& x, bool vectors, const Range& range)
      : walkers_(walkers), x_(x), vectors_(vectors), range_(range) {
    if (!vectors) return;
    const int per_row = walkers.threads / kRows, row = walkers.thread / per_row;
    const int column = walkers.thread % per_row * kItems;
    // A token that is never inside the sequence
    token_ = walkers.channel + column < walkers.end ? range.token(row) : INT32_MIN / 2;
    at_ = base() + token_ * x.token + column;
    target_ = TileLayout<kChannels>::offset(row, column);
  }

  // Starts copying the next tile; `place` is where its first token is in the walk.
  VIM_DEVICE void stage(int place, T* tile) {
    if (!vectors_) return stage_each(place, tile);
    const int64_t step = range_.reverse ? -x_.token : x_.token;
    const int direction = range_.reverse ? -1 : 1;
#pragma unroll
    for (int q = 0; q < kTile; q += kRows) {
      const bool valid = static_cast<unsigned>(token_ + direction * q) < static_cast<unsigned>(walkers_.length);
      copy_async<16>(tile + target_ + q * TileLayout<kChannels>::kRow, at_ + q * step, valid);
    }
    token_ += direction * kTile;
    at_ += kTile * step;
  }

 private:
  static constexpr int kItems = 16 / sizeof(T), kRows = kItems / kChannels;

  VIM_DEVICE const T* base() const {
    return static_cast<const T*>(x_.data) + walkers_.b * x_.batch + walkers_.channel * x_.channel;
  }

  VIM_DEVICE void stage_each(int place, T* tile) const {
    const int columns = walkers_.threads * kChannels;
    // Neighbouring threads read neighbouring numbers.
    const bool along_tokens = x_.channel != 1 && x_.token == 1;
    const T zero{};
    for (int i = walkers_.thread; i < kTile * columns; i += walkers_.threads) {
      const int q = along_tokens ? i % kTile : i / columns, column = along_tokens ? i / kTile : i % columns;
      const int token = range_.token(place + q);
      const bool valid = token >= 0 && token < walkers_.length && walkers_.channel + column < walkers_.end;
      tile[TileLayout<kChannels>::offset(q, column)] = valid ? base()[token * x_.token + column * x_.channel] : zero;
    }
  }

  const Walkers& walkers_;
  const Activation& x_;
  const bool vectors_;
  const Range& range_;
  int token_, target_;
  const T* at_;
};

// Rows of a tile: dt, padded to a multiple of four, then B and C of sixteen states each.
struct RowLayout {
  int ranks, padded;

  VIM_INLINE explicit RowLayout(int64_t dt_rank)
      : ranks(static_cast<int>(dt_rank)), padded(static_cast<int>(round_up(dt_rank, 4))) {}
  VIM_INLINE int size() const { return padded + 2 * kStates; }
};

// Copies rows of tiles whose dt, B and C lie side by side in memory, four values at a time: for a rank that the
// compiler knows. A thread stays in one row of the tiles.
template <class T, int kRank>
class WholeRowStream {
 public:
  VIM_DEVICE WholeRowStream(const Walkers& walkers, const ScanDirection& side, const Range& range)
      : length_(walkers.length),
        per_row_(walkers.threads / kTile),
        step_((range.reverse ? -kTile : kTile) * side.dt.token),
        direction_(range.reverse ? -kTile : kTile) {
    const int row = walkers.thread / per_row_;
    first_ = walkers.thread % per_row_;
    token_ = range.token(row);
    at_ = static_cast<const T*>(side.dt.data) + walkers.b * side.dt.batch + token_ * side.dt.token + 4 * first_;
    target_ = row * kSize + 4 * first_;
  }

  VIM_DEVICE void stage(int, T* rows) {
    const bool inside = static_cast<unsigned>(token_) < static_cast<unsigned>(length_);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      const int i = k * per_row_;
      if (first_ + i < kSize / 4) copy_async<4 * sizeof(T)>(rows + target_ + 4 * i, at_ + 4 * i, inside);
    }
    token_ += direction_;
    at_ += step_;
  }

 private:
  static constexpr int kSize = kRank + 2 * kStates;
  static constexpr int kMost = (kSize / 4 * kTile + kWarp - 1) / kWarp;  // vectors of a thread where a warp is all

  const int length_, per_row_;  // threads of a row
  const int64_t step_;
  const int direction_;
  int first_, token_, target_;
  const T* at_;
};

// Copies dt, B and C of tiles to shared memory without conversion. With `vectors`, it copies four values at a time, and
// dt, B and C must have the same token stride.
template <class T, int kRank>
class RowStream {
 public:
  VIM_DEVICE RowStream(const Walkers& walkers, const Scan& scan, const ScanDirection& side, const RowLayout& layout,
                       bool vectors, const Range& range)
      : walkers_(walkers),
        side_(side),
        layout_(layout),
        vectors_(vectors),
        range_(range),
        states_(static_cast<int>(scan.d_state)) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = walkers.thread + k * walkers.threads;
      token_[k] = vectors && i < kTile * per_row() ? range.token(i / per_row()) : INT32_MIN / 2;
      at_[k] = source(i % per_row() * 4, token_[k]);
    }
  }

  VIM_DEVICE void stage(int place, T* rows) {
    if (!vectors_) return stage_each(place, rows, 0);
    const int64_t step = range_.reverse ? -side_.B.token : side_.B.token;
    const int direction = range_.reverse ? -1 : 1;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = walkers_.thread + k * walkers_.threads;
      if (i < kTile * per_row()) {
        copy_async<4 * sizeof(T)>(rows + 4 * i, at_[k],
                                  static_cast<unsigned>(token_[k]) < static_cast<unsigned>(walkers_.length));
      }
      token_[k] += direction * kTile;
      at_[k] += kTile * step;
    }
    if (kAhead * walkers_.threads < kTile * per_row()) stage_rest(place, rows);
  }

 private:
  // Vectors of a tile whose addresses a thread keeps in registers; there are more only for one warp and many ranks.
  static constexpr int kAll = kRank > 0 ? (kTile * ((kRank + 3) / 4 + 2 * kStates / 4) + kWarp - 1) / kWarp : 2;
  static constexpr int kAhead = kAll < 3 ? kAll : 3;

  VIM_DEVICE int size() const { return kRank > 0 ? (kRank + 3) / 4 * 4 + 2 * kStates : layout_.size(); }
  VIM_DEVICE int per_row() const { return size() / 4; }

  VIM_DEVICE const T* source(int item, int token) const {
    const int padded = size() - 2 * kStates, state = (item - padded) % kStates;
    if (item < padded) {
      return static_cast<const T*>(side_.dt.data) + walkers_.b * side_.dt.batch + token * side_.dt.token +
             item * side_.dt.channel;
    }
    const StateMap& map = item < padded + kStates ? side_.B : side_.C;
    return static_cast<const T*>(map.data) + walkers_.b * map.batch +
           walkers_.channel / map.channels_per_group * map.group + token * map.token + state * map.state;
  }

  VIM_DEVICE void stage_rest(int place, T* rows) const {
    for (int i = walkers_.thread + kAhead * walkers_.threads; i < kTile * per_row(); i += walkers_.threads) {
      const int token = range_.token(place + i / per_row());
      copy_async<4 * sizeof(T)>(rows + 4 * i, source(i % per_row() * 4, token), token >= 0 && token < walkers_.length);
    }
  }

  VIM_DEVICE void stage_each(int place, T* rows, int first) const {
    const int padded = size() - 2 * kStates;
    const T zero{};
    for (int i = walkers_.thread + first; i < kTile * size(); i += walkers_.threads) {
      const int item = i % size(), token = range_.token(place + i / size());
      const bool exists = item < padded ? item < layout_.ranks : (item - padded) % kStates < states_;
      rows[i] = exists && token >= 0 && token < walkers_.length ? *source(item, token) : zero;
    }
  }

  const Walkers& walkers_;
  const ScanDirection& side_;
  const RowLayout& layout_;
  const bool vectors_;
  const Range& range_;
  const int states_;
  int token_[kAhead];
  const T* at_[kAhead];
};

// Four contiguous values
VIM_DEVICE float4 widen(const float* x) { return *reinterpret_cast<const float4*>(x); }

template <class T>
VIM_DEVICE float4 widen(const T* x) {
  const uint2 raw = *reinterpret_cast<const uint2*>(x);
  const T a{static_cast<uint16_t>(raw.x)}, b{static_cast<uint16_t>(raw.x >> 16)};
  const T c{static_cast<uint16_t>(raw.y)}, d{static_cast<uint16_t>(raw.y >> 16)};
  return {to_float(a), to_float(b), to_float(c), to_float(d)};
}

// A thread's own channels of a row
template <int kChannels>
VIM_DEVICE void load_channels(const float* row, float (&out)[kChannels]) {
  if constexpr (kChannels == 2) {
    const float2 both = *reinterpret_cast<const float2*>(row);
    out[0] = both.x;
    out[1] = both.y;
  } else {
    out[0] = row[0];
  }
}

template <int kChannels, class T>
VIM_DEVICE void load_channels(const T* row, float (&out)[kChannels]) {
  if constexpr (kChannels == 2) {
    const uint32_t raw = *reinterpret_cast<const uint32_t*>(row);
    out[0] = to_float(T{static_cast<uint16_t>(raw)});
    out[1] = to_float(T{static_cast<uint16_t>(raw >> 16)});
  } else {
    out[0] = to_float(row[0]);
  }
}

// Writes a thread's channels, which are contiguous.
template <int kChannels>
VIM_DEVICE void store_channels(float* target, const float (&x)[kChannels]) {
  if constexpr (kChannels == 2) {
    *reinterpret_cast<float2*>(target) = {x[0], x[1]};
  } else {
    *target = x[0];
  }
}

template <int kChannels, class T>
VIM_DEVICE void store_channels(T* target, const float (&x)[kChannels]) {
  T out[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) from_float(x[c], &out[c]);
  if constexpr (kChannels == 2) {
    *reinterpret_cast<uint32_t*>(target) = out[0].raw | static_cast<uint32_t>(out[1].raw) << 16;
  } else {
    *target = out[0];
  }
}

}  // namespace VIM_ISA
}  // namespace vim
