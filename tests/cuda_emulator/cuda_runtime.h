// A CUDA runtime of one CPU thread, for tests: csrc/cuda/*.cu compiled by g++ run here, block by block, to the letter of their source.
// It stands where <cuda_runtime.h> would. A CUDA thread is a fiber; it runs until it waits at a barrier or a shuffle. The order in
// which fibers are resumed is a setting, so that a missing barrier shows as a result that depends on it.
// Out-of-bounds and misaligned accesses are left to -fsanitize=address,undefined.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One block at a time: a static is shared by its threads. Its bounds are checked; it is not cleared between blocks.
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
namespace emulator {
inline const void* first_read = nullptr;  // the first address that a launch loads from through __ldg
}
template <class T>
T __ldg(const T* p) {
  if (!emulator::first_read) emulator::first_read = p;
  return *p;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- fibers ------------------------------------------------------------------------------------------------------------

namespace emulator {

constexpr size_t kStack = 256 * 1024;
enum class Order { kForward, kBackward, kShuffled };  // from kShuffled on: the number of a shuffle

inline Order order = Order::kForward;
inline int multiprocessors = 3;
inline int launches = 0;
inline std::set<const void*> launched;  // the kernels among them
inline bool is_capturing = false;  // every stream
inline bool is_queueing = false;   // a launch waits for run_queued

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 thread;
  int barriers = 0, shuffles = 0;  // passed or waited at
  bool at_barrier = false, done = false;
  uint64_t lane_value = 0;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;  // of the block; reused by the next
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline void (*body)(void*) = nullptr;
inline void* body_argument = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;

inline void start_switch(void** fake, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, size);
#else
  (void)fake, (void)stack, (void)size;
#endif
}
inline void finish_switch(void* fake, const void** stack, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, stack, size);
#else
  (void)fake, (void)stack, (void)size;
#endif
}

inline void wait() {
  Fiber* self = current;
  void* fake = nullptr;
  start_switch(&fake, scheduler_stack, scheduler_stack_size);
  swapcontext(&self->context, &scheduler);
  finish_switch(fake, nullptr, nullptr);
}

inline void enter() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_stack_size);
  body(body_argument);
  current->done = true;
  start_switch(nullptr, scheduler_stack, scheduler_stack_size);
  setcontext(&scheduler);
}

inline void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.thread;
  void* fake = nullptr;
  start_switch(&fake, fiber.stack.get(), kStack);
  swapcontext(&scheduler, &fiber.context);
  finish_switch(fake, nullptr, nullptr);
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::abort();
}

struct Random {
  uint64_t state = 88172645463325252u + 2654435761u * static_cast<unsigned>(order);
  size_t below(size_t n) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % n;
  }
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[below(i)]);
  }
};

inline void run_block(size_t count) {
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  for (size_t i = 0; i < count; ++i) {
    Fiber& f = *fibers[i];
    f.barriers = f.shuffles = 0;
    f.at_barrier = f.done = false;
    f.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  Random random;
  std::vector<size_t> turn(count);
  for (size_t i = 0; i < count; ++i) turn[i] = order == Order::kBackward ? count - 1 - i : i;
  for (;;) {
    if (order >= Order::kShuffled) random.shuffle(turn);
    size_t done = 0, waiting = 0;
    for (size_t i : turn) {
      Fiber& f = *fibers[i];
      if (!f.done && !f.at_barrier) resume(f);
      done += f.done, waiting += !f.done && f.at_barrier;
    }
    if (done == count) return;
    // CUDA lets an exited thread count as arrived.
    if (done + waiting == count)
      for (size_t i = 0; i < count; ++i) fibers[i]->at_barrier = false;
  }
}

// The 32 lanes of the calling thread's warp all arrive before one goes on.
inline void wait_for_warp() {
  const size_t threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
  const size_t self = (size_t{threadIdx.z} * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const size_t first = self / 32 * 32, last = std::min(threads, first + 32);
  const int mine = ++current->shuffles;
  for (int turns = 0;; ++turns) {
    bool all = true;
    for (size_t i = first; i < last; ++i) {
      if (fibers[i]->done && fibers[i]->shuffles < mine) fail("a lane named in a shuffle's mask has left the kernel");
      all = all && fibers[i]->shuffles >= mine;
    }
    if (all) return;
    if (turns > 100) fail("a lane named in a shuffle's mask never arrives");
    wait();
  }
}

inline int lane() { return static_cast<int>(((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) % 32); }

}  // namespace emulator

inline void __syncthreads() {
  ++emulator::current->barriers;
  emulator::current->at_barrier = true;
  emulator::wait();
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta) {
  static_assert(sizeof(T) <= 8);
  if (mask != 0xFFFFFFFFu) emulator::fail("only full masks are emulated");
  emulator::Fiber* self = emulator::current;
  std::memcpy(&self->lane_value, &value, sizeof(T));
  const size_t at = (size_t{threadIdx.z} * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  emulator::wait_for_warp();
  T result = value;
  if (emulator::lane() + delta < 32 && at + delta < emulator::fibers.size())
    std::memcpy(&result, &emulator::fibers[at + delta]->lane_value, sizeof(T));
  emulator::wait_for_warp();
  return result;
}

// ---- runtime -----------------------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor };
struct cudaFuncAttributes {};

namespace emulator {
inline cudaError_t next_error = cudaSuccess;  // what the next launch reports
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "cudaErrorEmulated"; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors : 7;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 12040;
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulator::is_capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return cudaSuccess;
}
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*) {
  return emulator::next_error;
}

// Memory is the host's: the address sanitizer knows its extent.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* memory, int byte, size_t bytes) {
  if (bytes) std::memset(memory, byte, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

namespace emulator {

struct Launch {
  dim3 grid, block;
  std::shared_ptr<void> argument;
  void (*body)(void*);
  std::vector<unsigned> blocks;  // still to run, the next one last

  bool run_next() {  // whether any are left
    const unsigned b = blocks.back();
    blocks.pop_back();
    emulator::body = body;
    body_argument = argument.get();
    blockDim = block, gridDim = grid, blockIdx = dim3(b % grid.x, b / grid.x);
    run_block(size_t{block.x} * block.y * block.z);
    return !blocks.empty();
  }
};

inline std::map<cudaStream_t, std::vector<Launch>> queues;  // of a stream, the first launch last

// Blocks of the streams' launches in a random order; those of one stream one launch after the other.
inline void run_queued() {
  Random random;
  while (!queues.empty()) {
    const auto queue = std::next(queues.begin(), static_cast<long>(random.below(queues.size())));
    if (!queue->second.back().run_next()) queue->second.pop_back();
    if (queue->second.empty()) queues.erase(queue);
  }
}

}  // namespace emulator

template <class P>
cudaError_t cudaLaunchKernel(void (*kernel)(P), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t stream) {
  if (emulator::next_error != cudaSuccess) return emulator::next_error;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (!threads || threads > 1024 || !grid.x || !grid.y || grid.y > 65535) return cudaErrorInvalidConfiguration;
  using Call = std::pair<void (*)(P), P>;
  emulator::Launch launch{grid, block, std::make_shared<Call>(kernel, *static_cast<P*>(arguments[0])), nullptr, {}};
  launch.body = [](void* p) { static_cast<Call*>(p)->first(static_cast<Call*>(p)->second); };
  for (unsigned i = grid.x * grid.y; i > 0; --i) launch.blocks.push_back(i - 1);
  if (emulator::order == emulator::Order::kBackward) std::reverse(launch.blocks.begin(), launch.blocks.end());
  if (emulator::order >= emulator::Order::kShuffled) emulator::Random().shuffle(launch.blocks);
  ++emulator::launches;
  emulator::launched.insert(reinterpret_cast<const void*>(kernel));
  if (emulator::is_queueing) {
    auto& queue = emulator::queues[stream];
    queue.insert(queue.begin(), std::move(launch));
    return cudaSuccess;
  }
  while (launch.run_next()) continue;
  return cudaSuccess;
}
