// Fibers and their scheduler; see emulation.h.
#include "emulation.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace vim::emulation {

Machine machine;

namespace {

// ---- fibers ----------------------------------------------------------------------------------------------------

constexpr size_t kStackBytes = 256 * 1024;

// Memory for stacks, with a page between them that nobody may touch.
class Stacks {
 public:
  char* at(size_t i) {
    while (stacks_.size() <= i) stacks_.push_back(make());
    return stacks_[i];
  }

 private:
  static char* make() {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: not enough memory for the stacks of a block");
    mprotect(memory, page, PROT_NONE);
    return static_cast<char*>(memory) + page;
  }

  std::vector<char*> stacks_;
};

#if defined(__x86_64__) || defined(__aarch64__)

// Stores the registers that a function must keep and the stack pointer at *from, and takes up what `to` stored.
extern "C" void vim_switch_stack(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type vim_switch_stack, @function
vim_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vim_switch_stack, .-vim_switch_stack
)");
constexpr size_t kSaved = 6;        // registers below the return address
constexpr size_t kFrame = kSaved + 2;  // and an empty word, so that the stack is aligned as after a call
constexpr size_t kReturn = kSaved;
#else
asm(R"(
.text
.type vim_switch_stack, %function
vim_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size vim_switch_stack, .-vim_switch_stack
)");
constexpr size_t kFrame = 20;
constexpr size_t kReturn = 11;
#endif

void* make_context(char* stack, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(stack + kStackBytes) - kFrame;
  std::fill(frame, frame + kFrame, nullptr);
  frame[kReturn] = reinterpret_cast<void*>(entry);
  return frame;
}

void switch_context(void** from, void* to) { vim_switch_stack(from, to); }

#else

void* make_context(char* stack, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(stack);
  getcontext(context);
  const size_t used = (sizeof(ucontext_t) + 63) / 64 * 64;
  context->uc_stack.ss_sp = stack + used;
  context->uc_stack.ss_size = kStackBytes - used;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void switch_context(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

#endif

// ---- scheduler -------------------------------------------------------------------------------------------------

std::mutex one_launch;
Stacks stacks;
void* scheduler_context = nullptr;
const std::function<void()>* body = nullptr;
int order = 0;
int64_t launches = 0;

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

// Back to the scheduler, until it picks this thread again.
void give_way(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(thread.done ? nullptr : &fake, scheduler_stack, scheduler_stack_bytes);
#endif
  switch_context(&thread.context, scheduler_context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void go_on(Thread& thread, [[maybe_unused]] const char* stack) {
  machine.thread = &thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, stack, kStackBytes);
#endif
  switch_context(&scheduler_context, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void arrive(Barrier& barrier) {
  if (++barrier.arrived >= barrier.members) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
}

// Threads that have ended are not waited for at a block's barrier; a warp must stay together to its end.
void leave(Barrier& barrier) {
  --barrier.members;
  if (barrier.arrived > 0 && barrier.arrived >= barrier.members) {
    barrier.arrived = 0;
    ++barrier.passed;
  }
}

void thread_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  (*body)();
  Thread& thread = *machine.thread;
  thread.done = true;
  leave(machine.barrier);
  give_way(thread);
  std::abort();  // a thread that is done is not picked again
}

bool can_run(const Thread& thread) {
  return !thread.done && (thread.waits_for == nullptr || thread.waits_for->passed != thread.passed);
}

size_t visited(size_t step, size_t threads, uint64_t pass) {
  if (order == 0) return step;
  if (order == 1) return threads - 1 - step;
  // Neighbours far apart, and other ones in every pass. All are visited: 7919 is a prime above their number.
  return static_cast<size_t>((step * 7919 + pass * 104729) % threads);
}

// Blocks follow the order of threads: forwards, backwards, or neighbours far apart. Of two primes one does not divide the
// number of blocks, and visits them all.
size_t visited_block(size_t step, size_t blocks) {
  if (order == 1 || order == 4) return blocks - 1 - step;
  if (order == 2) return step * (blocks % 7919 == 0 ? 104729 : 7919) % blocks;
  return step;
}

// Whether the thread could go on; `done` counts those that have ended.
bool advance(std::vector<Thread>& threads, size_t i, size_t& done) {
  if (!can_run(threads[i])) return false;
  go_on(threads[i], stacks.at(i));
  if (machine.fault != nullptr) throw std::runtime_error(machine.fault);
  if (threads[i].done) ++done;
  return true;
}

// A warp until it waits for another one. In turns, all warps are equally far, and none meets what another has yet to do.
bool run_warp(std::vector<Thread>& threads, size_t first, size_t& done) {
  bool progress = false;
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = first; i < first + kLanes; ++i) moved |= advance(threads, i, done);
    progress |= moved;
  }
  return progress;
}

void run_block(std::vector<Thread>& threads) {
  size_t done = 0;
  for (uint64_t pass = 0; done < threads.size(); ++pass) {
    bool progress = false;
    for (size_t step = 0; step < threads.size(); ++step) {
      if (order < 3) {
        progress |= advance(threads, visited(step, threads.size(), pass), done);
      } else if (step % kLanes == 0) {
        progress |= run_warp(threads, order == 3 ? step : threads.size() - kLanes - step, done);
      }
    }
    if (!progress) throw std::runtime_error("emulation: threads wait at a barrier that others never reach");
  }
}

// Exactly so many bytes, all of them NaN, aligned as on a GPU.
struct SharedMemory {
  explicit SharedMemory(size_t bytes) : memory(std::malloc(std::max<size_t>(bytes, 1))) {
    if (memory == nullptr) throw std::runtime_error("emulation: not enough memory");
    std::memset(memory, 0xff, bytes);
  }
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory() { std::free(memory); }
  void* memory;
};

}  // namespace

bool rounds_badly = false;

void wait(Barrier& barrier) {
  Thread& thread = *machine.thread;
  thread.waits_for = &barrier;
  thread.passed = barrier.passed;
  arrive(barrier);
  while (!can_run(thread)) give_way(thread);
  thread.waits_for = nullptr;
}

void arrive_copies(uint64_t pending) {
  Thread& thread = *machine.thread;
  const auto under_way = [&](const Copy& copy) { return copy.group + pending >= thread.copy_group; };
  for (const Copy& copy : thread.copies) {
    if (under_way(copy)) continue;
    if (copy.valid) {
      std::memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
    } else {
      std::memset(copy.target, 0, static_cast<size_t>(copy.bytes));
    }
  }
  const auto rest = std::stable_partition(thread.copies.begin(), thread.copies.end(), under_way);
  thread.copies.erase(rest, thread.copies.end());
}

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const size_t count = size_t{block.x} * block.y * block.z;
  if (count % kLanes != 0 || count > 1024) throw std::runtime_error("emulation: a block must be 1 to 32 whole warps");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulation: a grid has at most 65535 blocks in y and z");
  if (shared_bytes > 99 * 1024) throw std::runtime_error("emulation: a block has at most 99 KB of shared memory");
  ++launches;
  body = &kernel;
  machine.block_size = block;
  machine.grid_size = grid;
  machine.fault = nullptr;
  std::vector<Thread> threads(count);
  std::vector<Warp> warps(count / kLanes);
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  for (size_t step = 0; step < blocks; ++step) {
    const size_t n = visited_block(step, blocks);
    const SharedMemory shared(shared_bytes);
    machine.shared = static_cast<char*>(shared.memory);
    machine.block_index = dim3(static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                               static_cast<unsigned>(n / grid.x / grid.y));
    machine.barrier = Barrier{static_cast<int>(count), 0, 0};
    for (Barrier& group : machine.groups) group = Barrier();
    for (Warp& warp : warps) warp.barrier = Barrier{kLanes, 0, 0};
    for (size_t i = 0; i < count; ++i) {
      threads[i] = Thread();
      threads[i].index = dim3(static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                              static_cast<unsigned>(i / block.x / block.y));
      threads[i].lane = static_cast<int>(i % kLanes);
      threads[i].warp = &warps[i / kLanes];
#if defined(__SANITIZE_ADDRESS__)
      // The frames of the thread that was here before never returned.
      __asan_unpoison_memory_region(stacks.at(i), kStackBytes);
#endif
      threads[i].context = make_context(stacks.at(i), thread_main);
    }
    run_block(threads);
  }
}

}  // namespace vim::emulation

// Whether approximate instructions are as wrong as a GPU's may be.
extern "C" __attribute__((visibility("default"))) void vim_emulation_rounding(int badly) {
  vim::emulation::rounds_badly = badly != 0;
}

// The order in which the threads of a block, and the blocks, are visited: 0 ascending, 1 descending, 2 another one in
// every pass; or its warps one after the other, each as far as it gets: 3 the first one first, 4 the last one first.
extern "C" __attribute__((visibility("default"))) void vim_emulation_order(int order) {
  vim::emulation::order = order;
}

// Kernels started so far
extern "C" __attribute__((visibility("default"))) int64_t vim_emulation_launches() { return vim::emulation::launches; }
