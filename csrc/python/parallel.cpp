#include "python/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

// Torch's pool waits in ways that the thread sanitizer does not see, so that it is told of them: what was done before
// pass_on(place) has happened for who has called take_over(place) afterwards.
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace lipcore {
namespace {

#ifdef __SANITIZE_THREAD__
void pass_on(void* place) { __tsan_release(place); }
void take_over(void* place) { __tsan_acquire(place); }
#else
void pass_on(void*) {}
void take_over(void*) {}
#endif

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeBody body, void* context);
using NumThreads = int32_t (*)(uint32_t* out);

ParallelFor g_parallel_for = nullptr;
NumThreads g_num_threads = nullptr;
std::atomic<bool> g_forked{false};

struct Queue {
  std::atomic<int64_t> next{0};
  int64_t count;
  void (*body)(int64_t, void*);
  void* context;
};

// Every range that torch hands to a thread becomes a worker that takes items until none is left: dynamic scheduling on
// top of a pool that only splits statically. Two cores that are not equally fast then finish together.
void work(int64_t, int64_t, void* context) {
  take_over(context);
  auto* queue = static_cast<Queue*>(context);
  for (int64_t i; (i = queue->next.fetch_add(1, std::memory_order_relaxed)) < queue->count;)
    queue->body(i, queue->context);
  pass_on(context);
}

}  // namespace

bool use_torch_threads(const char* path) {
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  auto parallel = reinterpret_cast<ParallelFor>(dlsym(library, "torch_parallel_for"));
  auto threads = reinterpret_cast<NumThreads>(dlsym(library, "torch_get_num_threads"));
  if (!parallel || !threads) return false;
  if (!g_parallel_for) pthread_atfork(nullptr, nullptr, [] { g_forked.store(true); });
  g_parallel_for = parallel;
  g_num_threads = threads;
  return true;
}

int pool_size() {
  uint32_t threads = 1;
  if (!g_num_threads || g_forked.load(std::memory_order_relaxed) || g_num_threads(&threads) != 0) return 1;
  return static_cast<int>(threads);
}

void parallel_for(int64_t count, bool parallel, void (*body)(int64_t, void*), void* context) {
  const int threads = parallel && count > 1 ? pool_size() : 1;
  if (threads > 1) {
    Queue queue{{0}, count, body, context};
    pass_on(&queue);
    const bool ran = g_parallel_for(0, threads, 1, &work, &queue) == 0;
    take_over(&queue);
    if (ran) return;
    work(0, 0, &queue);  // the pool refused: what it left undone is done here
    return;
  }
  for (int64_t i = 0; i < count; ++i) body(i, context);
}

}  // namespace lipcore
