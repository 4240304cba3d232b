// Runs every CPU kernel over awkward shapes without torch, for scripts/sanitize.sh: buffers have exactly the size that
// a tensor would have and outputs start as NaN; one thread and several must give the same bits. With an argument it
// times the kernels instead.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/kernels.h"

using namespace vim;

namespace {

const Kernels* table = nullptr;
int threads = 1;
int failures = 0;

void parallel(int64_t tasks, const std::function<bool(int64_t, int64_t)>& run);

// Numbers of one element type; an exact heap block, so that a read beyond it is seen.
struct Buffer {
  Element element = Element::float32;
  int64_t size = 0;
  std::unique_ptr<char[]> bytes;

  Buffer() = default;
  Buffer(Element element_, int64_t size_) : element(element_), size(size_), bytes(new char[size_ * item()]) {
    for (int64_t i = 0; i < size; ++i) set(i, std::numeric_limits<float>::quiet_NaN());
  }
  int64_t item() const { return element == Element::float32 ? 4 : 2; }
  void* data() { return bytes.get(); }
  float* floats() { return reinterpret_cast<float*>(bytes.get()); }

  void set(int64_t i, float value) {
    uint32_t raw;
    std::memcpy(&raw, &value, 4);
    uint16_t half = static_cast<uint16_t>(raw >> 16);
    if (element == Element::float16) {
      const bool small = (raw & 0x7fffffff) < 0x38800000u;
      half = value != value ? 0x7e00
                            : static_cast<uint16_t>(((raw >> 16) & 0x8000) |
                                                    (small ? 0 : (((raw & 0x7fffffff) - 0x38000000u) >> 13)));
    }
    if (element == Element::float32) {
      std::memcpy(bytes.get() + 4 * i, &value, 4);
    } else {
      std::memcpy(bytes.get() + 2 * i, &half, 2);
    }
  }

  bool has_nan() const {
    for (int64_t i = 0; i < size; ++i) {
      if (element == Element::float32) {
        float value;
        std::memcpy(&value, bytes.get() + 4 * i, 4);
        if (value != value) return true;
      } else {
        uint16_t half;
        std::memcpy(&half, bytes.get() + 2 * i, 2);
        const uint16_t infinity = element == Element::bfloat16 ? 0x7f80 : 0x7c00;
        if ((half & 0x7fff) > infinity) return true;
      }
    }
    return false;
  }
};

uint32_t seed = 1;

float uniform() {  // in [-1, 1)
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(seed)) / 2147483648.0f;
}

Buffer random(Element element, int64_t size, float scale = 1, float shift = 0) {
  Buffer buffer(element, size);
  for (int64_t i = 0; i < size; ++i) buffer.set(i, shift + scale * uniform());
  return buffer;
}

void parallel(int64_t tasks, const std::function<bool(int64_t, int64_t)>& run) {
  const int64_t pieces = std::min<int64_t>(threads, std::max<int64_t>(tasks, 1));
  std::vector<std::thread> pool;
  for (int64_t i = 1; i < pieces; ++i) pool.emplace_back([=] { run(tasks * i / pieces, tasks * (i + 1) / pieces); });
  run(0, tasks / pieces);
  for (std::thread& thread : pool) thread.join();
}

struct Shape {
  int64_t batch, length, dim, d_state, dt_rank, every;
  Element element;
  bool channel_first;
};

Activation view(Buffer& buffer, const Shape& s, int64_t channels, int64_t row, int64_t offset = 0) {
  Activation x;
  x.data = static_cast<char*>(buffer.data()) + offset * buffer.item();
  if (s.channel_first) {
    x = {buffer.data(), channels * s.length, 1, s.length};
  } else {
    x = {x.data, s.length * row, row, 1};
  }
  return x;
}

// Everything a bidirectional scan needs, forward and backward.
struct ScanCase {
  Shape s;
  Buffer u, x_dbl[2], dt_weight[2], bias[2], A[2], D[2], xz, dy, y, checkpoints;
  Buffer du[2], dx_dbl[2], ddt_weight[2], dbias[2], dA[2], dD[2], dz, shared, weights, rows;
  ScanBackwardTasks k;

  explicit ScanCase(const Shape& shape) : s(shape) {
    const int64_t tokens = s.batch * s.length, row = s.dt_rank + 2 * s.d_state;
    const int64_t chunks = (s.length + s.every - 1) / s.every;
    const auto f = Element::float32;
    u = random(s.element, tokens * s.dim);
    xz = random(s.element, tokens * 2 * s.dim, 3);
    dy = random(s.element, tokens * s.dim);
    y = Buffer(s.element, tokens * s.dim);
    dz = Buffer(s.element, tokens * s.dim);
    checkpoints = Buffer(f, 2 * s.batch * chunks * s.d_state * s.dim);
    Scan& scan = k.scan;
    scan.element = scan.row_element = s.element;
    scan.batch = s.batch;
    scan.length = s.length;
    scan.dim = s.dim;
    scan.d_state = s.d_state;
    scan.dt_rank = s.dt_rank;
    scan.softplus = scan.A_is_log = true;
    scan.scale = 0.5f;
    scan.directions = 2;
    scan.checkpoint_every = s.every;
    Shape last = s;
    last.channel_first = false;
    scan.z = s.channel_first ? view(xz, s, 2 * s.dim, 0) : view(xz, s, s.dim, 2 * s.dim, s.dim);
    scan.y = view(y, last, s.dim, s.dim);
    k.dy = view(dy, s, s.dim, s.dim);
    k.dz = view(dz, last, s.dim, s.dim);
    for (int d = 0; d < 2; ++d) {
      x_dbl[d] = random(s.element, tokens * row);
      dt_weight[d] = random(f, s.dim * s.dt_rank, 0.5f);
      bias[d] = random(f, s.dim, 1, -2);
      A[d] = random(f, s.dim * s.d_state, 1, 1);
      D[d] = random(f, s.dim);
      du[d] = Buffer(s.element, tokens * s.dim);
      dx_dbl[d] = Buffer(s.element, tokens * row);
      ddt_weight[d] = Buffer(f, s.dim * s.dt_rank);
      dbias[d] = Buffer(f, s.dim);
      dA[d] = Buffer(f, s.dim * s.d_state);
      dD[d] = Buffer(f, s.dim);
      const auto split = [&](Buffer& rows, int64_t column) {
        return static_cast<void*>(static_cast<char*>(rows.data()) + column * rows.item());
      };
      ScanDirection& side = scan.direction[d];
      side.u = view(u, s, s.dim, s.dim);
      side.dt = {x_dbl[d].data(), s.length * row, row, 1};
      side.B = {split(x_dbl[d], s.dt_rank), s.length * row, 0, 1, row, s.dim, nullptr};
      side.C = {split(x_dbl[d], s.dt_rank + s.d_state), s.length * row, 0, 1, row, s.dim, nullptr};
      side.dt_weight = {dt_weight[d].floats()};
      side.bias = {bias[d].floats()};
      side.A = {A[d].floats()};
      side.D = {D[d].floats()};
      side.reverse = d == 1;
      side.checkpoints = checkpoints.floats() + d * s.batch * chunks * s.d_state * s.dim;
      ScanDirectionGrads& grads = k.grads[d];
      grads.du = view(du[d], last, s.dim, s.dim);
      grads.ddt = {dx_dbl[d].data(), s.length * row, row, 1};
      grads.dB = {split(dx_dbl[d], s.dt_rank), s.length * row, 0, 1, row, s.dim, nullptr};
      grads.dC = {split(dx_dbl[d], s.dt_rank + s.d_state), s.length * row, 0, 1, row, s.dim, nullptr};
      grads.ddt_weight = {ddt_weight[d].floats()};
      grads.dbias = {dbias[d].floats()};
      grads.dA = {dA[d].floats()};
      grads.dD = {dD[d].floats()};
    }
    rows = Buffer(f, 2 * tokens * row);
    k.partition = table->scan_partition(scan);
    shared = Buffer(f, k.partition.shared_floats);
    weights = Buffer(f, k.partition.weight_floats);
    k.shared = shared.floats();
    k.weights = weights.floats();
  }

  void forward() {
    Scan scan = k.scan;
    if (s.element != Element::float32) {
      scan = on_float_rows(k.scan, rows.floats());
      parallel(s.batch * s.length, [&](int64_t b, int64_t e) { return table->scan_widen(k.scan, scan, b, e); });
    }
    parallel(table->scan_tasks(scan), [&](int64_t b, int64_t e) { return table->scan_forward(scan, b, e); });
  }
  void backward() {
    const ScanPartition& p = k.partition;
    parallel(p.batch_groups * p.block_groups, [&](int64_t b, int64_t e) { return table->scan_backward(k, b, e); });
    parallel(p.blocks, [&](int64_t b, int64_t e) { return table->scan_reduce_weights(k, b, e); });
    parallel(s.batch * s.length, [&](int64_t b, int64_t e) { return table->scan_reduce_shared(k, b, e); });
  }
  std::vector<Buffer*> outputs() {
    std::vector<Buffer*> all{&y, &checkpoints, &dz};
    for (int d = 0; d < 2; ++d) {
      for (Buffer* b : {&du[d], &dx_dbl[d], &ddt_weight[d], &dbias[d], &dA[d], &dD[d]}) all.push_back(b);
    }
    return all;
  }
};

struct ConvCase {
  Shape s;
  int64_t width;
  Buffer x, weight[2], bias[2], out[2], dout[2], dx, dweight[2], dbias[2], partials;
  Conv conv;

  ConvCase(const Shape& shape, int64_t width_) : s(shape), width(width_) {
    const int64_t size = s.batch * s.length * s.dim;
    x = random(s.element, size);
    dx = Buffer(s.element, size);
    conv.element = s.element;
    conv.batch = s.batch;
    conv.length = s.length;
    conv.dim = s.dim;
    conv.silu = true;
    conv.directions = 2;
    conv.x = view(x, s, s.dim, s.dim);
    conv.dx = view(dx, s, s.dim, s.dim);
    conv.batch_groups = std::max<int64_t>(1, std::min<int64_t>(2, s.batch));
    for (int d = 0; d < 2; ++d) {
      const int64_t taps = d == 0 ? width : 4;
      weight[d] = random(Element::float32, s.dim * taps);
      bias[d] = random(Element::float32, s.dim);
      out[d] = Buffer(s.element, size);
      dout[d] = random(s.element, size);
      dweight[d] = Buffer(Element::float32, s.dim * taps);
      dbias[d] = Buffer(Element::float32, s.dim);
      ConvDirection& side = conv.direction[d];
      side = {{weight[d].floats()},
              {bias[d].floats()},
              taps,
              d == 1,
              view(out[d], s, s.dim, s.dim),
              view(dout[d], s, s.dim, s.dim),
              {dweight[d].floats()},
              {dbias[d].floats()}};
    }
    partials = Buffer(Element::float32, table->conv_partial_floats(conv));
    conv.partials = partials.floats();
  }

  void forward() {
    parallel(table->conv_tasks(conv), [&](int64_t b, int64_t e) { return table->conv_forward(conv, b, e); });
  }
  void backward() {
    const int64_t blocks = (s.dim + table->lanes - 1) / table->lanes;
    parallel(conv.batch_groups * blocks, [&](int64_t b, int64_t e) { return table->conv_backward(conv, b, e); });
    parallel(blocks, [&](int64_t b, int64_t e) { return table->conv_reduce(conv, b, e); });
  }
  std::vector<Buffer*> outputs() { return {&dx, &out[0], &out[1], &dweight[0], &dweight[1], &dbias[0], &dbias[1]}; }
};

struct NormCase {
  Buffer x, residual, weight, y, r, dy, dr, total, dweight, partials;
  Norm norm;

  explicit NormCase(const Shape& s) {
    const int64_t rows = s.batch * s.length, size = rows * s.dim;
    const auto f = Element::float32;
    x = random(s.element, size);
    residual = random(f, size);
    weight = random(f, s.dim);
    y = Buffer(s.element, size);
    r = Buffer(f, size);
    dy = random(s.element, size);
    dr = random(f, size);
    total = Buffer(f, size);
    dweight = Buffer(f, s.dim);
    norm.element = norm.y_element = s.element;
    norm.rows = rows;
    norm.dim = s.dim;
    norm.eps = 1e-5f;
    norm.x = x.data();
    norm.x_row = s.dim;
    norm.residual = residual.floats();
    norm.weight = {weight.floats()};
    norm.y = y.data();
    norm.r = r.floats();
    norm.dy = dy.data();
    norm.dr = dr.floats();
    norm.total = total.floats();
    norm.dweight = {dweight.floats()};
    norm.row_groups = std::max<int64_t>(1, std::min<int64_t>(4, rows));
    partials = Buffer(f, norm.row_groups * s.dim);
    norm.partials = partials.floats();
  }

  void forward() {
    parallel(norm.rows, [&](int64_t b, int64_t e) { return table->norm_forward(norm, b, e); });
  }
  void backward() {
    parallel(norm.row_groups, [&](int64_t b, int64_t e) { return table->norm_backward(norm, b, e); });
    parallel(norm.dim, [&](int64_t b, int64_t e) { return table->norm_reduce(norm, b, e); });
  }
  std::vector<Buffer*> outputs() { return {&y, &r, &total, &dweight}; }
};

// A layer's product and the gradients of its input and of its weight. Rows of x and dy lie among others.
struct ProductCase {
  Buffer x, dy, weight, bias, y, dx, dweight, sum;
  Product forward_, input, gradient, accumulated;

  ProductCase(const Shape& s, int64_t depth, int64_t columns) {
    const int64_t rows = s.batch * s.length, x_row = depth + 3, dy_row = columns + 5;
    const Element other = s.channel_first ? s.element : Element::float32;
    x = random(s.element, (rows - 1) * x_row + depth);
    dy = random(s.element, (rows - 1) * dy_row + columns);
    weight = random(other, columns * depth);
    bias = random(Element::float32, columns);
    y = Buffer(s.element, rows * columns);
    dx = Buffer(s.element, rows * depth);
    dweight = Buffer(other, columns * depth);
    sum = random(s.element, columns * depth);
    forward_ = {
        rows,      depth,    columns, {s.element, x.data(), x_row, 1}, {other, weight.data(), 1, depth}, bias.floats(),
        s.element, y.data(), columns};
    input = {rows,      columns,   depth, {s.element, dy.data(), dy_row, 1}, {other, weight.data(), depth, 1}, nullptr,
             s.element, dx.data(), depth};
    gradient = {
        columns, rows,           depth, {s.element, dy.data(), 1, dy_row}, {s.element, x.data(), x_row, 1}, nullptr,
        other,   dweight.data(), depth};
    accumulated = gradient;
    accumulated.c_element = s.element;
    accumulated.c = sum.data();
    accumulated.accumulate = true;
  }

  static void run(const Product& product) {
    parallel(table->product_tasks(product), [&](int64_t b, int64_t e) { return table->product_run(product, b, e); });
  }
  void forward() { run(forward_); }
  void backward() {
    for (const Product* product : {&input, &gradient, &accumulated}) run(*product);
  }
  std::vector<Buffer*> outputs() { return {&y, &dx, &dweight, &sum}; }
};

template <class Case, class... Arguments>
void check(const char* what, const Shape& s, const Arguments&... arguments) {
  std::vector<std::vector<char>> first;
  for (int count : {1, 3}) {
    threads = count;
    seed = 1;
    Case it(s, arguments...);
    it.forward();
    it.backward();
    size_t i = 0;
    for (Buffer* buffer : it.outputs()) {
      const std::vector<char> bytes(buffer->bytes.get(), buffer->bytes.get() + buffer->size * buffer->item());
      const bool same = count == 1 || bytes == first[i];
      if (buffer->has_nan() || !same) {
        std::printf("FAILED %s %s: output %zu %s (batch %ld, length %ld, dim %ld, d_state %ld)\n", table->name, what, i,
                    same ? "holds NaN" : "depends on the number of threads", long(s.batch), long(s.length), long(s.dim),
                    long(s.d_state));
        ++failures;
      }
      if (count == 1) first.push_back(bytes);
      ++i;
    }
  }
}

void check_all() {
  for (Element element : {Element::float32, Element::bfloat16, Element::float16}) {
    for (int64_t length : {1, 7, 64, 65, 130}) {
      for (int64_t dim : {1, 5, 16, 33}) {
        for (bool channel_first : {false, true}) {
          const int64_t d_state = dim == 5    ? 3
                                  : dim == 33 ? 17
                                              : 16,
                        every = length == 65    ? 7
                                : length == 130 ? 100
                                                : 64;
          const Shape s{2, length, dim, d_state, dim == 1 ? 1 : 12, every, element, channel_first};
          check<ScanCase>("scan", s);
          check<ConvCase>("conv", s, length % 3 + 3);
          if (!channel_first) check<NormCase>("norm", s);
          check<ProductCase>("product", s, d_state, dim);
          check<ProductCase>("product", s, length == 7 ? 2500 : 47, dim);
        }
      }
    }
  }
}

// Time of this thread alone: what else the machine does does not count.
double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double seconds(const std::function<void()>& run) {
  std::vector<double> times;
  run();
  for (int i = 0; i < 60; ++i) {
    const double start = thread_seconds();
    run();
    times.push_back(thread_seconds() - start);
  }
  std::nth_element(times.begin(), times.begin() + 30, times.end());
  return times[30];
}

void time_all() {
  for (Element element : {Element::float32, Element::bfloat16}) {
    const Shape s{1, 197, 384, 16, 12, 64, element, false};
    ScanCase scan(s);
    ConvCase conv(s, 4);
    NormCase norm({1, 197, 192, 16, 12, 64, element, false});
    ProductCase in_proj({1, 197, 0, 0, 0, 0, element, false}, 192, 768);
    const double forward = seconds([&] { scan.forward(); }), backward = seconds([&] { scan.backward(); });
    std::printf(
        "%s %s: scan %.1f us, %.3f G channel-steps/s, backward %.2fx; conv %.1f us, backward %.1f us; norm %.1f us, "
        "backward %.1f us; product %.1f us, backward %.1f us\n",
        table->name, element == Element::float32 ? "float32" : "bfloat16", forward * 1e6,
        197 * 384 * 2 / forward * 1e-9, backward / forward, seconds([&] { conv.forward(); }) * 1e6,
        seconds([&] { conv.backward(); }) * 1e6, seconds([&] { norm.forward(); }) * 1e6,
        seconds([&] { norm.backward(); }) * 1e6, seconds([&] { in_proj.forward(); }) * 1e6,
        seconds([&] { in_proj.backward(); }) * 1e6);
  }
}

}  // namespace

int main(int argc, char**) {
  table = &kernels();
  if (argc > 1) {
    time_all();
    return 0;
  }
  check_all();
  std::printf("%s: %d failures\n", table->name, failures);
  return failures != 0;
}
