// Which block of several arrives last: counters, and which of them a launch may use. docs/maths.md,
// section 5.
#pragma once
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "normal.h"

namespace dip {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kTickets = 1 << 17;       // of a device
constexpr int kStreamTickets = 1 << 9;  // more column blocks than a device has room for in two rows

// Zero whenever no kernel counts on them: loaded as zeros with the module, on each device, and a
// full count wraps to zero. Zeroing them at each call would be a launch like the one that they
// save.
__device__ unsigned tickets[kTickets];

// ---- device functions ---------------------------------------------------------------------------

// The old value; then old + 1, or 0 after `last`. Releases what the thread wrote or saw before,
// acquires what others released.
DIP_DEVICE unsigned count_up(unsigned* ticket, unsigned last) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(ticket), "r"(last)
               : "memory");
  return old;
}

// Whether this is the last of the launch's `blocks` blocks to count on `ticket`; then it sees what
// the others wrote before. Every thread of the block calls this: the barriers extend thread 0's
// release and acquire to all of them.
DIP_DEVICE bool is_last_block(unsigned* ticket, unsigned blocks, bool* shared) {
  __syncthreads();
  if (blocks == 1) return true;
  if (threadIdx.x == 0 && threadIdx.y == 0) *shared = count_up(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  return *shared;
}

// ---- launch -------------------------------------------------------------------------------------

// Where `count` tickets lie that no kernel beside the coming one uses; -1 where there are none.
// A stream runs its kernels one by one and keeps its tickets; its id, unlike its handle, never
// comes back. A captured launch may run beside any stream, but not beside itself: its tickets are
// its own for good.
inline int take_tickets(cudaStream_t stream, int count) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, int> of_stream;
  static int taken[kMaxDevices];
  int device = 0;
  unsigned long long id = 0;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  if (count > kStreamTickets || cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices)
    return -1;
  if (cudaStreamIsCapturing(stream, &capture) != cudaSuccess) return -1;
  const bool captured = capture != cudaStreamCaptureStatusNone;
  if (!captured && cudaStreamGetId(stream, &id) != cudaSuccess) return -1;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!captured) {
    const auto found = of_stream.find({device, id});
    if (found != of_stream.end()) return found->second;
    count = kStreamTickets;
  }
  if (taken[device] + count > kTickets) return -1;
  const int first = taken[device];
  taken[device] += count;
  if (!captured) of_stream[{device, id}] = first;
  return first;
}

}  // namespace
}  // namespace dip
