// Vectors of float for kernels that are compiled once per instruction set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "scalar.h"

namespace vim {
namespace VIM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
using vec = __m512;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
using vec = __m256;
#elif defined(__x86_64__)
constexpr int kLanes = 4;
using vec = __m128;
#else
constexpr int kLanes = 4;
typedef float vec __attribute__((vector_size(16)));
#endif

typedef int32_t ivec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes)));
typedef uint16_t hvec __attribute__((vector_size(2 * kLanes)));

// ---- loads, stores and arithmetic ------------------------------------------------------------------------------

VIM_INLINE vec set1(float x) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(x);
#elif defined(__AVX2__)
  return _mm256_set1_ps(x);
#elif defined(__x86_64__)
  return _mm_set1_ps(x);
#else
  return vec{x, x, x, x};
#endif
}

VIM_INLINE vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

VIM_INLINE void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// a b + c. Where there is no intrinsic the compiler contracts (-ffp-contract=fast) if the processor can.
VIM_INLINE vec fma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// c - a b
VIM_INLINE vec fnma(vec a, vec b, vec c) {
#if defined(__AVX512F__)
  return _mm512_fnmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fnmadd_ps(a, b, c);
#else
  return c - a * b;
#endif
}

// The second operand where either is NaN: clamping with a constant in front lets NaN through.
VIM_INLINE vec max2(vec a, vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

VIM_INLINE vec min2(vec a, vec b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

VIM_INLINE vec abs(vec x) { return bits<vec>(bits<ivec>(x) & 0x7fffffff); }

// Whether a comparison holds in any lane.
template <class Mask>
VIM_INLINE bool any(Mask mask) {
  const ivec lanes = bits<ivec>(mask);
  int32_t all = 0;
  for (int i = 0; i < kLanes; ++i) all |= lanes[i];
  return all != 0;
}

// ---- half precision --------------------------------------------------------------------------------------------

VIM_INLINE vec load(const bfloat16* p) {
  hvec raw;
  std::memcpy(&raw, p, sizeof raw);
  return bits<vec>(__builtin_convertvector(raw, uvec) << 16);
}

VIM_INLINE void store(bfloat16* p, vec v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(v);  // numbers that are not normal become zero
#else
  const uvec raw = bits<uvec>(v);
  const uvec rounded = (raw + 0x7fff + ((raw >> 16) & 1)) >> 16;
  const uvec is_nan = bits<uvec>(v != v);
  const hvec half = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), hvec);
#endif
  std::memcpy(p, &half, sizeof half);
}

VIM_INLINE vec load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
#endif
}

VIM_INLINE void store(float16* p, vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) from_float(lanes[i], p + i);
#endif
}

// The first `count` numbers, zero beyond them; nothing beyond them is read.
template <class T>
VIM_INLINE vec load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p);
  } else {
    const __m256i raw = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p);
    T items[kLanes];
    std::memcpy(items, &raw, sizeof items);
    return load(items);
  }
#else
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
  return load(lanes);
#endif
}

template <class T>
VIM_INLINE void store_some(T* p, int64_t count, vec v) {
  if (count >= kLanes) return store(p, v);
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) from_float(lanes[i], p + i);
}

// ---- sums over lanes -------------------------------------------------------------------------------------------

VIM_INLINE float sum_lanes(vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
#endif
}

// Lane i of the result is the sum over the lanes of v[i]. Each step folds two vectors into one: half of the lanes of
// each, picked by a blend, plus the other half, moved to the same places.
VIM_INLINE vec sum_each(const vec (&v)[kLanes]) {
#if defined(__AVX512F__)
  const __m512i swap4 = _mm512_setr_epi32(4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  vec u[8], w[4];
  for (int i = 0; i < 8; ++i) {
    u[i] = _mm512_mask_blend_ps(0xff00, v[i], v[i + 8]) + _mm512_shuffle_f32x4(v[i], v[i + 8], 0x4e);
  }
  for (int i = 0; i < 4; ++i) {
    w[i] = _mm512_mask_blend_ps(0xf0f0, u[i], u[i + 4]) + _mm512_permutex2var_ps(u[i], swap4, u[i + 4]);
  }
  const vec x = _mm512_mask_blend_ps(0xcccc, w[0], w[1]) + _mm512_shuffle_ps(w[0], w[1], 0x4e);
  const vec y = _mm512_mask_blend_ps(0xcccc, w[2], w[3]) + _mm512_shuffle_ps(w[2], w[3], 0x4e);
  return _mm512_shuffle_ps(x, y, 0x88) + _mm512_shuffle_ps(x, y, 0xdd);
#elif defined(__AVX2__)
  vec u[4];
  for (int i = 0; i < 4; ++i) {
    u[i] = _mm256_blend_ps(v[i], v[i + 4], 0xf0) + _mm256_permute2f128_ps(v[i], v[i + 4], 0x21);
  }
  const vec x = _mm256_blend_ps(u[0], u[1], 0xcc) + _mm256_shuffle_ps(u[0], u[1], 0x4e);
  const vec y = _mm256_blend_ps(u[2], u[3], 0xcc) + _mm256_shuffle_ps(u[2], u[3], 0x4e);
  return _mm256_shuffle_ps(x, y, 0x88) + _mm256_shuffle_ps(x, y, 0xdd);
#elif defined(__x86_64__)
  const vec x = _mm_shuffle_ps(v[0], v[1], 0x44) + _mm_shuffle_ps(v[0], v[1], 0xee);
  const vec y = _mm_shuffle_ps(v[2], v[3], 0x44) + _mm_shuffle_ps(v[2], v[3], 0xee);
  return _mm_shuffle_ps(x, y, 0x88) + _mm_shuffle_ps(x, y, 0xdd);
#else
  vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
  return out;
#endif
}

// Lane j of v[i] and lane i of v[j] change places.
VIM_INLINE void transpose(vec (&v)[kLanes]) {
#if defined(__AVX512F__)
  vec t[16];
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 numbers in each quarter of four vectors
    const vec a = _mm512_unpacklo_ps(v[i], v[i + 1]), b = _mm512_unpackhi_ps(v[i], v[i + 1]);
    const vec c = _mm512_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm512_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // then the quarters
    const vec a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const vec c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    v[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    v[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    v[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    v[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
#elif defined(__AVX2__)
  vec t[8];
  for (int i = 0; i < 8; i += 4) {  // 4 x 4 numbers in each half of four vectors
    const vec a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const vec c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {  // then the halves
    v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
#elif defined(__x86_64__)
  _MM_TRANSPOSE4_PS(v[0], v[1], v[2], v[3]);
#else
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = kept;
    }
  }
#endif
}

// ---- exponentials ----------------------------------------------------------------------------------------------

VIM_INLINE vec round_to_int(vec x) {
#if defined(__AVX512F__)
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // Adding 1.5 2^23 drops the fraction; callers clamp x to the range in which that holds.
  const vec magic = set1(0x1.8p23f);
  return (x + magic) - magic;
#endif
}

// x 2^n for an integral n in [-126, 128]
VIM_INLINE vec scale_by_power(vec x, vec n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(x, n);
#else
  return x * bits<vec>((__builtin_convertvector(n, ivec) + 127) << 23);
#endif
}

#if !defined(__AVX512F__)
// 2^x to about 1 ulp for any x; below 2^-126 the result is 0 or subnormal.
VIM_INLINE vec exp2_any(vec x) {
  const vec clamped = min2(set1(128.0f), max2(set1(-126.0f), x));
  const vec n = round_to_int(clamped);
  const vec r = clamped - n;
  vec p = fma(set1(0.00015353362f), r, set1(0.0013398875f));
  p = fma(p, r, set1(0.00961843692f));
  p = fma(p, r, set1(0.0555033237f));
  p = fma(p, r, set1(0.240226477f));
  p = fma(p, r, set1(0.693147182f));
  p = scale_by_power(fma(p, r, set1(1.0f)), n);
  return bits<vec>(bits<ivec>(p) & ~bits<ivec>(x < set1(-126.0f)));
}
#endif

// Decay2(step, rate) is 2^(step rate / kRateUnits) to about 1 ulp (2 for AVX-512), 2^0 = 1 exactly; NearDecay2 is the
// same where |step rate / kRateUnits| < kNearDecay, and faster. Objects, so that their constants stay in registers.
constexpr float kNearDecay = 120.0f;

#if defined(__AVX512F__)
constexpr float kRateUnits = 1.0f;

// 2^x = 2^floor(x) 2^(k/32) 2^r with r in [0, 1/32): the middle factor is looked up in two registers, the last one
// needs two terms. On processors with more than two vector pipes this moves work off the multipliers.
struct Decay2 {
  vec low, high, magic, c1, c2;

  VIM_INLINE Decay2() {
    alignas(64) static const float powers[32] = {
        1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
        1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
        1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
        1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};
    low = load(powers);
    high = load(powers + 16);
    magic = set1(0x1.8p18f);  // its last bit is worth 1/32
    c1 = set1(0.693123758f);
    c2 = set1(0.242652699f);
  }

  VIM_INLINE vec operator()(vec step, vec rate) const {
    const vec x = step * rate;
    const vec shifted = _mm512_add_round_ps(x, magic, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const vec r = _mm512_reduce_ps(x, 0x59);  // x - floor(32 x) / 32
    const vec power = _mm512_permutex2var_ps(low, _mm512_castps_si512(shifted), high);
    return _mm512_scalef_ps(fma(fma(c2, r, c1), r, set1(1.0f)) * power, x);
  }
};
using NearDecay2 = Decay2;  // vscalef knows no bounds

#else
#if defined(__AVX2__)
constexpr float kRateUnits = 8.0f;

// 2^(n/8 + r/8) with r in [-1/2, 1/2]: n and r come from a sum with 1.5 2^23 and two fused products, 2^(n/8) from a
// table of eight and an addition to its exponent, the rest is a cubic.
struct NearDecay2 {
  vec powers, magic, c1, c2, c3;

  VIM_INLINE NearDecay2() {
    // The bits of 2^(k/8), less k 2^20: adding n 2^20 puts n / 8, rounded down, into the exponent and cancels the rest.
    alignas(32) static const uint32_t table[8] = {0x3f800000u,
                                                  0x3f8b95c2u - (1u << 20),
                                                  0x3f9837f0u - (2u << 20),
                                                  0x3fa5fed7u - (3u << 20),
                                                  0x3fb504f3u - (4u << 20),
                                                  0x3fc5672au - (5u << 20),
                                                  0x3fd744fdu - (6u << 20),
                                                  0x3feac0c7u - (7u << 20)};
    powers = _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(table)));
    magic = set1(0x1.8p23f);
    c1 = set1(0.0866433975f);
    c2 = set1(0.00375403f);
    c3 = set1(0.00010842f);
  }

  // 2^(n/8) for n in [-1008, 1023], given as magic + n
  VIM_INLINE vec power(vec shifted) const {
    const ivec index = bits<ivec>(shifted);
    return bits<vec>(bits<ivec>(_mm256_permutevar8x32_ps(powers, bits<__m256i>(index))) + (index << 20));
  }

  VIM_INLINE vec operator()(vec step, vec rate) const {
    const vec shifted = fma(step, rate, magic);
    const vec r = _mm256_fmsub_ps(step, rate, shifted - magic);
    const vec scale = power(shifted);
    return fma(fma(fma(c3, r, c2), r, c1) * r, scale, scale);
  }
};
#else
constexpr float kRateUnits = 1.0f;

struct NearDecay2 {
  VIM_INLINE vec operator()(vec step, vec rate) const {
    const vec magic = set1(0x1.8p23f), x = step * rate;
    const vec shifted = x + magic;
    const vec r = x - (shifted - magic);
    vec p = fma(set1(0.00015353362f), r, set1(0.0013398875f));
    p = fma(p, r, set1(0.00961843692f));
    p = fma(p, r, set1(0.0555033237f));
    p = fma(p, r, set1(0.240226477f));
    p = fma(p, r, set1(0.693147182f));
    p = fma(p, r, set1(1.0f));
    return bits<vec>(bits<ivec>(p) + (bits<ivec>(shifted) << 23));
  }
};
#endif

struct Decay2 {
  VIM_INLINE vec operator()(vec step, vec rate) const { return exp2_any(step * rate * set1(1.0f / kRateUnits)); }
};
#endif

// e^x to about 1 ulp of the result: the argument is reduced with ln 2 in two parts. AVX2 saturates at the largest and
// the smallest normal number, which suffices where the result is added to 1 or multiplied.
VIM_INLINE vec exp(vec x) {
#if defined(__AVX512F__)
  const Decay2 table;
  const vec clamped = min2(set1(89.0f), max2(set1(-104.0f), x));
  const vec shifted = fma(clamped, set1(1.44269504f), table.magic);  // in units of 1/32
  const vec n = shifted - table.magic;
  const vec r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), clamped));
  const vec power = _mm512_permutex2var_ps(table.low, _mm512_castps_si512(shifted), table.high);
  vec p = fma(set1(0.166666667f), r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  return _mm512_scalef_ps(fma(p * r, power, power), n);
#elif defined(__AVX2__)
  const NearDecay2 table;
  const vec clamped = min2(set1(88.67f), max2(set1(-87.3f), x));
  const vec shifted = fma(clamped, set1(8 * 1.44269504f), table.magic);  // in units of 1/8
  const vec n = shifted - table.magic;
  const vec r = fnma(n, set1(-2.12194440e-4f / 8), fnma(n, set1(0.693359375f / 8), clamped));
  const vec p = fma(fma(set1(0.166687f), r, set1(0.500065f)) * r, r, r);
  const vec power = table.power(shifted);
  return fma(p, power, power);
#else
  const vec clamped = min2(set1(88.8f), max2(set1(-104.0f), x));
  const vec n = round_to_int(clamped * set1(1.44269504f));
  const vec r = fnma(n, set1(-2.12194440e-4f), fnma(n, set1(0.693359375f), clamped));
  vec p = fma(set1(0.00138146128f), r, set1(0.00836871006f));
  p = fma(p, r, set1(0.041668389f));
  p = fma(p, r, set1(0.166665211f));
  p = fma(p, r, set1(0.49999994f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  // In two factors: 2^n alone would leave the normal numbers below 2^-126.
  const vec half = round_to_int(n * set1(0.5f));
  return scale_by_power(scale_by_power(p, half), n - half);
#endif
}

// log(1 + e) for e in [0, 1], to about 1 ulp also for tiny e: 2 artanh(e / (2 + e)).
VIM_INLINE vec log1p_unit(vec e) {
  const vec s = e / (e + set1(2.0f));
  const vec q = s * s;
  vec p = fma(set1(0.140059963f), q, set1(0.140009016f));
  p = fma(p, q, set1(0.200107634f));
  p = fma(p, q, set1(0.333332092f));
  const vec twice = s + s;
  return fma(twice * q, p, twice);
}

VIM_INLINE vec sigmoid(vec x) { return set1(1.0f) / (set1(1.0f) + exp(-x)); }

VIM_INLINE vec silu(vec x) { return x / (set1(1.0f) + exp(-x)); }

// log(1 + e^x), and its derivative where `slope` is given.
VIM_INLINE vec softplus(vec x, vec* slope = nullptr) {
  const vec e = exp(-abs(x));
  if (slope != nullptr) {
    const vec one = set1(1.0f);
    *slope = (x < vec{} ? e : one) / (one + e);
  }
  return max2(vec{}, x) + log1p_unit(e);
}

}  // namespace VIM_ISA
}  // namespace vim
