// What the CUDA bindings share. The same files make the library for GPUs (key CUDA) and, with VIM_EMULATED, the one for
// tests on the host (key CPU, names that end in `_emulated`).
#pragma once

#include "../common/binding.h"

#if !defined(VIM_EMULATED)
#include <torch/csrc/stable/accelerator.h>

// Declared by torch's headers only where USE_CUDA is set, which would also ask for CUDA's own headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace vim {

#if defined(VIM_EMULATED)

#define VIM_DEVICE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m)
constexpr const char* kFamily = "_emulated";

// Makes the device of a tensor the current one for a block, and knows torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor&) {}
  void* stream() const { return nullptr; }
};

#else

#define VIM_DEVICE_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(vim, CUDA, m)
constexpr const char* kFamily = "";

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& x) : guard_(x.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#endif

}  // namespace vim
