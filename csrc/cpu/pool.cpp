// The caller works on its job like the pool's threads, and waits only for threads that have started a part. A thread
// that is descheduled or wakes late delays nothing but the part it is working on.
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace vim {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// Time that a thread spins before it sleeps: the caller for parts that others work on, a worker for a job.
constexpr microseconds kCallerLooks{20}, kWorkerLooks{200};
// A worker that has waited longer for its last job sleeps at once: its processor belongs to others between jobs.
constexpr microseconds kCloseTogether{1000};
constexpr int64_t kWorkers = 255;
constexpr int kSlots = 16;
// Parts are no smaller than a 16th of a thread's share.
constexpr int64_t kGrainsPerThread = 16;

// ---- the processor ---------------------------------------------------------------------------------------------

// How this thread treats denormals and rounds.
uint64_t floating_point_mode() {
#if defined(__x86_64__)
  return _mm_getcsr();
#elif defined(__aarch64__)
  uint64_t mode;
  __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

void set_floating_point_mode([[maybe_unused]] uint64_t mode) {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<unsigned>(mode));
#elif defined(__aarch64__)
  __asm__ volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The processor that this thread runs on, or `unknown`.
int processor(int unknown) {
#if defined(__linux__)
  const int number = sched_getcpu();
  return number < 0 ? unknown : number;
#else
  return unknown;
#endif
}

// ---- jobs ------------------------------------------------------------------------------------------------------

// The slot of a running job, which jobs reuse one after the other. All fields are atomic because a late thread may read
// the fields of the next job. It does not use them, since its exchange of the ticket fails.
struct alignas(64) Slot {
  // The job's number in the upper half, the number of remaining grains in the lower half. Values never repeat, so a
  // thread whose exchange succeeds has taken grains of the job whose fields it has read.
  std::atomic<uint64_t> ticket{0};
  std::atomic<bool (*)(const void*, int64_t, int64_t)> run{nullptr};
  std::atomic<const void*> context{nullptr};
  std::atomic<int64_t> tasks{0}, grain{0}, useful{1}, threads{1};
  std::atomic<uint64_t> mode{0};

  alignas(64) std::atomic<int64_t> unfinished{0};  // grains
  std::atomic<bool> ok{true}, caller_sleeps{false};
  std::mutex mutex;
  std::condition_variable finished;

  static uint32_t grains_left(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

  void open(const Job& job) {
    const int64_t step = std::max(job.grain, (job.tasks - 1) / (job.useful * kGrainsPerThread) + 1);
    const int64_t grains = (job.tasks - 1) / step + 1;
    run.store(job.run, std::memory_order_relaxed);
    context.store(job.context, std::memory_order_relaxed);
    tasks.store(job.tasks, std::memory_order_relaxed);
    grain.store(step, std::memory_order_relaxed);
    useful.store(job.useful, std::memory_order_relaxed);
    threads.store(job.threads, std::memory_order_relaxed);
    mode.store(floating_point_mode(), std::memory_order_relaxed);
    unfinished.store(grains, std::memory_order_relaxed);
    ok.store(true, std::memory_order_relaxed);
    const uint64_t number = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(number << 32 | static_cast<uint64_t>(grains));
  }

  bool has_work_for(int64_t rank) const {
    return grains_left(ticket.load()) != 0 && rank < threads.load(std::memory_order_relaxed);
  }

  // Takes parts until there are none. The caller's rank is 0.
  void work(int64_t rank) {
    uint64_t seen = ticket.load();
    while (const int64_t left = grains_left(seen)) {
      const auto function = run.load(std::memory_order_relaxed);
      const void* argument = context.load(std::memory_order_relaxed);
      const int64_t size = tasks.load(std::memory_order_relaxed), step = grain.load(std::memory_order_relaxed);
      const int64_t sharers = useful.load(std::memory_order_relaxed);
      const uint64_t callers_mode = mode.load(std::memory_order_relaxed);
      if (rank >= threads.load(std::memory_order_relaxed)) break;
      // Large parts first, small ones last, so that all threads end together.
      const int64_t part = (left - 1) / (2 * sharers) + 1;
      if (!ticket.compare_exchange_weak(seen, seen - static_cast<uint64_t>(part))) continue;
      set_floating_point_mode(callers_mode);  // a worker computes nothing between jobs
      const int64_t begin = std::max<int64_t>(0, size - left * step), end = size - (left - part) * step;
      if (!function(argument, begin, end)) ok.store(false, std::memory_order_relaxed);
      // From here on the slot may be another job's, whose caller it does no harm to wake.
      if (unfinished.fetch_sub(part) == part && caller_sleeps.load()) {
        {
          const std::lock_guard<std::mutex> lock(mutex);
        }
        finished.notify_all();
      }
      seen = ticket.load();
    }
  }

  void wait() {
    const auto start = Clock::now();
    while (unfinished.load() != 0) {
      pause();
      if (Clock::now() - start < kCallerLooks) continue;
      caller_sleeps.store(true);
      std::unique_lock<std::mutex> lock(mutex);
      finished.wait(lock, [this] { return unfinished.load() == 0; });
      caller_sleeps.store(false);
    }
  }
};

// ---- threads ---------------------------------------------------------------------------------------------------

class Pool;

// Whether this thread is at work in a job.
thread_local bool at_work = false;

enum class State { works, looks, sleeps };

struct alignas(64) Worker {
  Pool* pool = nullptr;
  int64_t rank = 0;
  std::atomic<State> state{State::works};
  std::mutex mutex;
  std::condition_variable woken;
};

class Pool {
 public:
  bool run(const Job& job) {
    Slot* slot = take_slot();
    if (slot == nullptr) return job.run(job.context, 0, job.tasks);
    callers_processor_.store(processor(-1), std::memory_order_relaxed);
    slot->open(job);
    start_workers(job.threads - 1);
    wake_workers(job);
    at_work = true;
    slot->work(0);
    at_work = false;
    slot->wait();
    const bool ok = slot->ok.load(std::memory_order_relaxed);
    used_.fetch_and(~(1u << (slot - slots_.data())));
    return ok;
  }

 private:
  std::array<Slot, kSlots> slots_;
  std::array<Worker, kWorkers> workers_;
  std::mutex starting_;
  alignas(64) std::atomic<uint32_t> used_{0};    // slots
  std::atomic<int> callers_processor_{-1};       // of the last job
  alignas(64) std::atomic<int64_t> started_{0};  // workers
  std::atomic<bool> may_start_{true};

  Slot* take_slot() {
    constexpr uint32_t kAll = (1u << kSlots) - 1;
    uint32_t used = used_.load();
    while (used != kAll) {
      const int free = __builtin_ctz(~used);
      if (used_.compare_exchange_weak(used, used | 1u << free)) return &slots_[static_cast<size_t>(free)];
    }
    return nullptr;
  }

  template <class Function>
  void for_used_slots(const Function& function) {
    for (uint32_t used = used_.load(); used != 0; used &= used - 1) {
      function(slots_[static_cast<size_t>(__builtin_ctz(used))]);
    }
  }

  bool has_work_for(int64_t rank) {
    bool found = false;
    for_used_slots([&](Slot& slot) { found = found || slot.has_work_for(rank); });
    return found;
  }

  // If the system refuses more threads, the pool works with fewer.
  void start_workers(int64_t count) {
    if (started_.load() >= count || !may_start_.load()) return;
    const std::lock_guard<std::mutex> lock(starting_);
    // Signals go to the program's threads, except for faults, which go to the thread that causes them.
    sigset_t signals, before;
    sigfillset(&signals);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) sigdelset(&signals, fault);
    pthread_sigmask(SIG_SETMASK, &signals, &before);
    for (int64_t i = started_.load(); i < count && may_start_.load(); ++i) {
      Worker& worker = workers_[static_cast<size_t>(i)];
      worker.pool = this;
      worker.rank = i + 1;
      pthread_t thread;
      if (pthread_create(&thread, nullptr, &Pool::serve, &worker) == 0) {
        pthread_detach(thread);
        started_.store(i + 1);
      } else {
        may_start_.store(false);
      }
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Wake workers until enough are awake. It takes no system call if no worker sleeps.
  void wake_workers(const Job& job) {
    const int64_t candidates = std::min(job.threads - 1, started_.load());
    for (int64_t i = 0, awake = 1; i < candidates && awake < job.useful; ++i) {
      Worker& worker = workers_[static_cast<size_t>(i)];
      State state = worker.state.load();
      const bool wakes = state == State::sleeps && worker.state.compare_exchange_strong(state, State::looks);
      if (wakes) {
        {
          const std::lock_guard<std::mutex> lock(worker.mutex);
        }
        worker.woken.notify_one();
      }
      if (wakes || state == State::looks) ++awake;
    }
  }

  static void* serve(void* worker) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "vim-pool");  // for people who ask `top -H`
#endif
    at_work = true;
    static_cast<Worker*>(worker)->pool->serve(*static_cast<Worker*>(worker));
    return nullptr;
  }

  [[noreturn]] void serve(Worker& self) {
    bool close_together = false;
    for (;;) {
      const auto start = Clock::now();
      self.state.store(State::looks);
      bool found = has_work_for(self.rank);
      // Spinning on the caller's processor would delay its next job.
      while (!found && close_together && Clock::now() - start < kWorkerLooks &&
             processor(-2) != callers_processor_.load(std::memory_order_relaxed)) {
        pause();
        found = has_work_for(self.rank);
      }
      if (!found) sleep(self);
      close_together = Clock::now() - start < kCloseTogether;
      self.state.store(State::works);
      for_used_slots([&](Slot& slot) { slot.work(self.rank); });
    }
  }

  void sleep(Worker& self) {
    self.state.store(State::sleeps);
    // A caller opens its job before it looks for sleepers.
    if (has_work_for(self.rank)) return;
    std::unique_lock<std::mutex> lock(self.mutex);
    self.woken.wait(lock, [&] { return self.state.load() != State::sleeps; });
  }
};

// Never destroyed: workers may look at it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

Pool* pool() {
  Pool* existing = the_pool.load();
  if (existing != nullptr) return existing;
  Pool* fresh = new (std::nothrow) Pool;
  if (fresh == nullptr || the_pool.compare_exchange_strong(existing, fresh)) return fresh;
  delete fresh;
  return existing;
}

// A fork has the thread that forked and no other: the child begins with a pool of its own.
void forget_pool() { the_pool.store(nullptr); }
[[maybe_unused]] const int kForgets = pthread_atfork(nullptr, nullptr, forget_pool);

}  // namespace

bool run_in_pool(const Job& job) {
  if (job.tasks <= 0) return true;
  Job within = job;
  within.threads = std::min(job.threads, kWorkers + 1);
  within.useful = std::min({job.useful, within.threads, (job.tasks - 1) / job.grain + 1});
  Pool* shared = within.useful > 1 && !at_work ? pool() : nullptr;
  return shared != nullptr ? shared->run(within) : job.run(job.context, 0, job.tasks);
}

}  // namespace vim
