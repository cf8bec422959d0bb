// The part of the CUDA runtime that the compiled host code of csrc/cuda/*.cu calls, for
// tests/ptx_cuda_support.py: a launch goes to a callback instead of a GPU.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "launch.h"

namespace {
struct Size {
  unsigned x, y, z;
};
using Launch = int (*)(
    const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
    size_t shared);
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> known;
  return known;
}
Launch on_launch = nullptr;
// For a program that brings its own memory: malloc, free, copy and set, of device memory by its
// address.
struct Memory {
  uint64_t (*allocate)(size_t bytes);
  void (*release)(uint64_t address);
  void (*copy)(uint64_t device, void* host, size_t bytes, int to_device);
  void (*fill)(uint64_t device, int byte, size_t bytes);
};
Memory memory = {};
int multiprocessors = 3, is_capturing = 0;

int launch(const void* function, Size grid, Size block, void** arguments, size_t shared) {
  const auto found = kernels().find(function);
  if (found == kernels().end() || !on_launch) return 98;  // cudaErrorInvalidDeviceFunction
  const unsigned g[] = {grid.x, grid.y, grid.z}, b[] = {block.x, block.y, block.z};
  return on_launch(found->second.c_str(), g, b, arguments, shared);
}
}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(
    void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
unsigned __cudaPopCallConfiguration(void*, void*, size_t*, void*) { return 1; }
int cudaLaunchKernel(const void* f, Size grid, Size block, void** arguments, size_t shared, void*) {
  return launch(f, grid, block, arguments, shared);
}
int __cudaLaunchKernel(
    const void* f, Size grid, Size block, void** arguments, size_t shared, void*) {
  return launch(f, grid, block, arguments, shared);
}
int cudaGetLastError() { return 0; }
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaDeviceGetAttribute(int* value, int, int) {  // cudaDevAttrMultiProcessorCount
  *value = multiprocessors;
  return 0;
}
const char* cudaGetErrorName(int) { return "cudaErrorStub"; }
const char* cudaGetErrorString(int) { return "a launch was refused"; }
int cudaStreamIsCapturing(void*, int* status) {
  *status = is_capturing;
  return 0;
}
int cudaStreamGetId(void* stream, unsigned long long* id) {
  *id = reinterpret_cast<uintptr_t>(stream);
  return 0;
}
int cudaMalloc(void** address, size_t bytes) {
  *address = reinterpret_cast<void*>(memory.allocate(bytes));
  return 0;
}
int cudaFree(void* address) {
  if (address) memory.release(reinterpret_cast<uint64_t>(address));
  return 0;
}
int cudaMemset(void* address, int byte, size_t bytes) {
  if (bytes) memory.fill(reinterpret_cast<uint64_t>(address), byte, bytes);
  return 0;
}
int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {  // cudaMemcpyHostToDevice is 1
  void* host = kind == 1 ? const_cast<void*>(from) : to;
  if (bytes) memory.copy(reinterpret_cast<uint64_t>(kind == 1 ? to : from), host, bytes, kind == 1);
  return 0;
}
int cudaDeviceSynchronize() { return 0; }

static dip::CudaForm form_of(int bits) {  // CudaForm's members, the first in the lowest bit
  return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
}

// For Python.
void stub_on_launch(Launch callback) { on_launch = callback; }
void stub_on_memory(Memory callbacks) { memory = callbacks; }
void stub_set(int count, int capturing) { multiprocessors = count, is_capturing = capturing; }
// The launcher asks once for the number of multiprocessors and keeps the answer.
const char* stub_perturb(const dip::PerturbArgs* a, int form, void* partials, void* stream) {
  return dip::perturb_cuda(*a, form_of(form), partials, stream);
}
int64_t stub_scratch(const dip::PerturbArgs* a, int form) {
  return dip::perturb_cuda_scratch(*a, form_of(form));
}
}
