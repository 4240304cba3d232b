// float32 values of weights in any element type.
#pragma once

#include <memory>

#include "../common/binding.h"
#include "../common/scalar.h"

namespace vim {

// For one call: a weight's own memory where it is dense float32 already, a copy otherwise.
class FloatWeights {
 public:
  const float* operator()(const Tensor& weight) {
    if (is_float(weight)) {
      kept_.push_back(dense(weight));
      return floats(kept_.back());
    }
    const Tensor source = dense(weight);
    const int64_t count = source.numel();
    converted_.emplace_back(new float[static_cast<size_t>(count)]);
    float* out = converted_.back().get();
    baseline::with_element(*element_of(source), [&](auto* type) {
      using T = std::remove_reference_t<decltype(*type)>;
      const T* in = static_cast<const T*>(source.const_data_ptr());
      for (int64_t i = 0; i < count; ++i) out[i] = baseline::to_float(in[i]);
    });
    return out;
  }

  const float* operator()(const OptionalTensor& weight) { return weight.has_value() ? (*this)(*weight) : nullptr; }

 private:
  std::vector<Tensor> kept_;
  std::vector<std::unique_ptr<float[]>> converted_;
};

}  // namespace vim
