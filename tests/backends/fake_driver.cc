// A driver of CUDA for tests of backends/native/ort_kernels.cc: memory is the host's, a launch is written down.
//
// FAKE_LOG names the file; FAKE_ARGUMENTS says what is passed, a letter each: p a pointer, i 32 bits, l 64 bits.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int) { return *device = 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = reinterpret_cast<void*>(1), 0; }
int cuCtxGetCurrent(void** context) { return *context = nullptr, 0; }
int cuCtxSetCurrent(void*) { return 0; }
int cuModuleLoadData(void** module, const void* data) { return *module = const_cast<void*>(data), 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  bool elf = std::memcmp(module, "\x7f" "ELF", 4) == 0;
  *function = const_cast<char*>(name);
  return elf ? 0 : 200;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  *pointer = reinterpret_cast<unsigned long long>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return 0;
}
int cuMemFree_v2(unsigned long long pointer) { return std::free(reinterpret_cast<void*>(pointer)), 0; }
int cuMemcpyHtoD_v2(unsigned long long target, const void* source, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(target), source, bytes);
  return 0;
}
int cuMemcpyDtoH_v2(void* target, unsigned long long source, size_t bytes) {
  std::memcpy(target, reinterpret_cast<void*>(source), bytes);
  return 0;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** arguments, void**) {
  FILE* log = std::fopen(std::getenv("FAKE_LOG"), "a");
  std::fprintf(log, "%s %u %u %u %u %u %d", static_cast<char*>(function), x, y, z, threads, shared, stream != nullptr);
  float* last = nullptr;
  for (const char* kind = std::getenv("FAKE_ARGUMENTS"); *kind; ++kind, ++arguments) {
    if (*kind == 'i') std::fprintf(log, " %d", *static_cast<int32_t*>(*arguments));
    if (*kind == 'l') std::fprintf(log, " %ld", static_cast<long>(*static_cast<int64_t*>(*arguments)));
    if (*kind == 'p') last = *static_cast<float**>(*arguments);
  }
  std::fprintf(log, " %d\n", *static_cast<void**>(*arguments) == nullptr);
  std::fclose(log);
  last[0] = 42;  // the result, so that it is seen who computed it
  return 0;
}
}
