// vim::embed_patches for key CPU: the patches of a few rows of the grid are laid side by side, and multiplied.
#include "products.h"
#include "values.h"

namespace vim {
namespace {

struct Grid {
  int64_t channels, rows, columns, patch_rows, patch_columns, stride_rows, stride_columns;

  int64_t patches() const { return rows * columns; }
  int64_t depth() const { return channels * patch_rows * patch_columns; }
};

// Patches [first, last) of an image, (patches, depth), each in the order of the weight's numbers.
template <class T>
void lay_out(const T* image, const Tensor& images, const Grid& grid, int64_t first, int64_t last, T* out) {
  const int64_t channel = images.stride(1), row = images.stride(2), column = images.stride(3);
  for (int64_t patch = first; patch < last; ++patch) {
    const T* corner =
        image + patch / grid.columns * grid.stride_rows * row + patch % grid.columns * grid.stride_columns * column;
    for (int64_t c = 0; c < grid.channels; ++c) {
      for (int64_t i = 0; i < grid.patch_rows; ++i, out += grid.patch_columns) {
        const T* in = corner + c * channel + i * row;
        for (int64_t j = 0; j < grid.patch_columns; ++j) out[j] = in[j * column];
      }
    }
  }
}

// What is added to the patches' products: the position embedding and the bias; and the class tokens, whole.
struct Table {
  const float *bias, *tokens, *pos_embed;
  const std::vector<int64_t>& places;
  int64_t dim;

  template <class T>
  void fill(int64_t place, T* out) const {
    const auto found = std::find(places.begin(), places.end(), place);
    const float* base = found == places.end() ? bias : tokens + (found - places.begin()) * dim;
    for (int64_t c = 0; c < dim; ++c) {
      float value = base == nullptr ? 0.0f : base[c];
      if (pos_embed != nullptr) value += pos_embed[place * dim + c];
      baseline::from_float(value, out + c);
    }
  }
};

void check_inputs(const Tensor& images, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& tokens,
                  const OptionalTensor& pos_embed, const std::vector<int64_t>& places, const Grid& grid) {
  const int64_t dim = weight.size(0), length = grid.patches() + static_cast<int64_t>(places.size());
  check_memory("images", images);
  for (const OptionalTensor* x : {&bias, &tokens, &pos_embed}) check_device("bias, tokens or pos_embed", *x, images);
  check_sizes("weight", weight, {dim, images.size(1), grid.patch_rows, grid.patch_columns});
  check_sizes("bias", bias, {dim});
  check_sizes("tokens", tokens, {static_cast<int64_t>(places.size()), dim});
  check_sizes("pos_embed", pos_embed, {length, dim});
  STD_TORCH_CHECK(tokens.has_value() == !places.empty(), "vim: places and tokens belong together");
  for (size_t i = 0; i < places.size(); ++i) {
    STD_TORCH_CHECK(places[i] >= 0 && places[i] < length && (i == 0 || places[i] > places[i - 1]),
                    "vim: places must ascend within the sequence, got ", places[i]);
  }
}

bool is_floating(const OptionalTensor& x) { return !x.has_value() || element_of(*x).has_value(); }

Tensor embed_patches(const Tensor& images, const Tensor& weight, const OptionalTensor& bias,
                     const OptionalTensor& tokens, const OptionalTensor& pos_embed, std::vector<int64_t> places,
                     std::vector<int64_t> stride, ScalarType dtype) {
  const bool half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  if (!element_of(images).has_value() || !element_of(weight).has_value() || !(half || dtype == ScalarType::Float) ||
      !is_floating(bias) || !is_floating(tokens) || !is_floating(pos_embed)) {
    return std::get<0>(call_op<Tensor>("vim::embed_patches_reference", images, weight, bias, tokens, pos_embed, places,
                                       stride, dtype));
  }
  STD_TORCH_CHECK(
      images.dim() == 4 && weight.dim() == 4 && weight.numel() > 0,
      "vim: images must be (batch, in_chans, height, width), and weight (embed_dim, in_chans, rows, columns)");
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "vim: stride must be two positive integers");
  const int64_t batch = images.size(0), dim = weight.size(0);
  Grid grid{images.size(1), 0, 0, weight.size(2), weight.size(3), stride[0], stride[1]};
  STD_TORCH_CHECK(images.size(2) >= grid.patch_rows && images.size(3) >= grid.patch_columns,
                  "vim: images must be at least as large as a patch");
  grid.rows = (images.size(2) - grid.patch_rows) / stride[0] + 1;
  grid.columns = (images.size(3) - grid.patch_columns) / stride[1] + 1;
  check_inputs(images, weight, bias, tokens, pos_embed, places, grid);
  const int64_t length = grid.patches() + static_cast<int64_t>(places.size());
  const Tensor out = allocate(images, {batch, length, dim}, dtype);
  if (out.numel() == 0) return out;
  FloatWeights values;
  const Table table{values(bias), values(tokens), values(pos_embed), places, dim};
  baseline::with_element(*element_of(out), [&](auto* type) {
    using T = std::remove_reference_t<decltype(*type)>;
    T* rows = static_cast<T*>(out.mutable_data_ptr());
    // A number takes about a sixteenth of a scan's channel-step.
    parallel(batch * length, batch * length * dim / 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) table.fill(i % length, rows + i * dim);
      return true;
    });
  });
  // Some patches at a time: they are as many numbers as the image, or more where patches overlap.
  constexpr int64_t kNumbers = 1 << 20;
  const int64_t depth = grid.depth(), at_once = std::clamp<int64_t>(kNumbers / depth, 1, batch * grid.patches());
  const Tensor weights = dense(weight);
  const Tensor patches = allocate(images, {at_once, depth});
  std::vector<Product> products;
  for (int64_t first = 0; first < batch * grid.patches(); first += at_once) {
    const int64_t last = std::min(first + at_once, batch * grid.patches());
    baseline::with_element(*element_of(images), [&](auto* type) {
      using T = std::remove_reference_t<decltype(*type)>;
      const T* data = static_cast<const T*>(images.const_data_ptr());
      T* target = static_cast<T*>(patches.mutable_data_ptr());
      parallel(last - first, (last - first) * depth / 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t patch = (first + i) % grid.patches();
          lay_out(data + (first + i) / grid.patches() * images.stride(0), images, grid, patch, patch + 1,
                  target + i * depth);
        }
        return true;
      });
    });
    // Patches between class tokens are contiguous in the sequence.
    products.clear();
    for (int64_t i = first; i < last;) {
      const int64_t patch = i % grid.patches();
      int64_t place = patch, end = std::min(last - i, grid.patches() - patch);
      for (const int64_t token : places) {
        if (token <= place) {
          ++place;
        } else {
          end = std::min(end, token - place);
          break;
        }
      }
      const int64_t row = i / grid.patches() * length + place;
      products.push_back(product(end, depth, dim, matrix(patches, depth, 1, (i - first) * depth),
                                 transposed(matrix(weights, depth)), target(out, dim, row * dim), nullptr, true));
      i += end;
    }
    multiply_all(products);
  }
  return out;
}

}  // namespace
}  // namespace vim

STABLE_TORCH_LIBRARY_IMPL(vim, CPU, m) { m.impl("embed_patches", TORCH_BOX(&vim::embed_patches)); }
