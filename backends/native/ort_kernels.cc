// Operators of onnxruntime that launch compiled kernels of Regauge: domain "regauge.kernels".
//
// Built by backends/ort_library.py; reads "kernels.txt" and the binaries that it names from its own folder. The driver
// is opened at run time. Nothing is registered, and no error given, where there is none: onnxruntime then runs the
// bodies of the model's functions of the same names.

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

namespace {

using Pointer = unsigned long long;  // CUdeviceptr

const OrtApi* ort = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// The functions of the driver that are needed, by their names in libcuda.
struct Driver {
  int (*init)(unsigned);
  int (*device)(int*, int);
  int (*attribute)(int*, int, int);
  int (*retain)(void**, int);
  int (*current)(void**);
  int (*set_current)(void*);
  int (*load)(void**, const void*);
  int (*function)(void**, void*, const char*);
  int (*set_attribute)(void*, int, int);
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*allocate)(Pointer*, size_t);
  int (*release)(Pointer);
  int (*to_device)(Pointer, const void*, size_t);
  int (*to_host)(void*, Pointer, size_t);
  int capability = 0;  // 90 for sm_90

  bool open() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return false;
    bool found = true;
    auto get = [&](auto& target, const char* name) {
      target = reinterpret_cast<std::decay_t<decltype(target)>>(dlsym(library, name));
      found = found && target != nullptr;
    };
    get(init, "cuInit");
    get(device, "cuDeviceGet");
    get(attribute, "cuDeviceGetAttribute");
    get(retain, "cuDevicePrimaryCtxRetain");
    get(current, "cuCtxGetCurrent");
    get(set_current, "cuCtxSetCurrent");
    get(load, "cuModuleLoadData");
    get(function, "cuModuleGetFunction");
    get(set_attribute, "cuFuncSetAttribute");
    get(launch, "cuLaunchKernel");
    get(allocate, "cuMemAlloc_v2");
    get(release, "cuMemFree_v2");
    get(to_device, "cuMemcpyHtoD_v2");
    get(to_host, "cuMemcpyDtoH_v2");
    int number = 0, major = 0, minor = 0;
    if (!found || init(0) != 0 || device(&number, 0) != 0) return false;
    if (attribute(&major, 75, number) != 0 || attribute(&minor, 76, number) != 0) return false;
    capability = 10 * major + minor;
    return true;
  }
};

Driver cuda;

void check_cuda(int code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string(what) + " failed with CUDA error " + std::to_string(code));
}

using Dims = std::vector<int>;  // loops, whose sizes are multiplied

struct Tensor {
  ONNXTensorElementDataType type;
  size_t bytes;  // of an entry
  std::vector<Dims> axes;
};

struct Size {  // of a loop: a number, or the size of an axis of an input over a number
  char kind;
  int64_t number = 1;
  size_t input = 0, axis = 0;
};

struct Argument {
  char kind;  // p: pointer of a tensor, i: 32 bits, l: 64 bits, 1: has to be 1 and is not passed
  bool divisible;
  size_t tensor = 0;
  Dims dims;
};

struct Kernel : OrtCustomOp {
  std::string name, entry, binary, provider;
  unsigned warps = 4, shared = 0;
  std::vector<Size> sizes;
  std::vector<Tensor> reads, writes;
  std::vector<Argument> arguments;
  std::vector<std::pair<int64_t, Dims>> grid;
  mutable void* loaded = nullptr;
  mutable std::mutex loading;

  bool staged() const { return provider == "CPUExecutionProvider"; }
  void* function() const;
  void compute(OrtKernelContext* context) const;
};

int64_t product(const Dims& dims, const std::vector<int64_t>& sizes) {
  int64_t result = 1;
  for (int dim : dims) result *= sizes[dim];
  return result;
}

void* Kernel::function() const {
  std::lock_guard<std::mutex> guard(loading);
  if (loaded != nullptr) return loaded;
  void *context = nullptr, *module = nullptr, *found = nullptr;
  check_cuda(cuda.current(&context), "cuCtxGetCurrent");
  if (context == nullptr) {
    check_cuda(cuda.retain(&context, 0), "cuDevicePrimaryCtxRetain");
    check_cuda(cuda.set_current(context), "cuCtxSetCurrent");
  }
  check_cuda(cuda.load(&module, binary.data()), "cuModuleLoadData");
  check_cuda(cuda.function(&found, module, entry.c_str()), "cuModuleGetFunction");
  if (shared > 48 * 1024) check_cuda(cuda.set_attribute(found, 8, static_cast<int>(shared)), "cuFuncSetAttribute");
  return loaded = found;
}

// Memory of the device for tensors that onnxruntime has on the host.
struct Staging {
  std::vector<Pointer> pointers;
  ~Staging() {
    for (Pointer pointer : pointers) cuda.release(pointer);
  }
  Pointer get(size_t bytes) {
    Pointer pointer = 0;
    check_cuda(cuda.allocate(&pointer, bytes ? bytes : 1), "cuMemAlloc");
    pointers.push_back(pointer);
    return pointer;
  }
};

void Kernel::compute(OrtKernelContext* context) const {
  void* started = function();
  std::vector<std::vector<int64_t>> shapes;
  std::vector<void*> data;
  for (size_t place = 0; place < reads.size(); ++place) {
    const OrtValue* value = nullptr;
    check(ort->KernelContext_GetInput(context, place, &value));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort->GetTensorTypeAndShape(value, &info));
    std::unique_ptr<OrtTensorTypeAndShapeInfo, void (*)(OrtTensorTypeAndShapeInfo*)> owned(
        info, ort->ReleaseTensorTypeAndShapeInfo);
    size_t rank = 0;
    check(ort->GetDimensionsCount(info, &rank));
    shapes.emplace_back(rank);
    check(ort->GetDimensions(info, shapes.back().data(), rank));
    void* pointer = nullptr;
    check(ort->GetTensorMutableData(const_cast<OrtValue*>(value), &pointer));
    data.push_back(pointer);
  }
  std::vector<int64_t> known;
  for (const Size& size : sizes) {
    int64_t number = size.number;
    if (size.kind == 'a') number = shapes.at(size.input).at(size.axis) / size.number;
    known.push_back(number);
  }
  auto shape_of = [&](const Tensor& tensor) {
    std::vector<int64_t> shape;
    for (const Dims& axis : tensor.axes) shape.push_back(product(axis, known));
    return shape;
  };
  for (size_t place = 0; place < reads.size(); ++place)
    if (shapes[place] != shape_of(reads[place]))
      throw std::runtime_error(name + ": input " + std::to_string(place) + " has another shape than its kernel");
  std::vector<size_t> bytes;
  for (const Tensor& tensor : writes) {
    std::vector<int64_t> shape = shape_of(tensor);
    OrtValue* value = nullptr;
    check(ort->KernelContext_GetOutput(context, bytes.size(), shape.data(), shape.size(), &value));
    void* pointer = nullptr;
    check(ort->GetTensorMutableData(value, &pointer));
    data.push_back(pointer);
    size_t total = tensor.bytes;
    for (int64_t extent : shape) total *= static_cast<size_t>(extent);
    bytes.push_back(total);
  }
  Staging staging;
  std::vector<Pointer> pointers;
  for (size_t place = 0; place < data.size(); ++place) {
    if (!staged()) {
      pointers.push_back(reinterpret_cast<Pointer>(data[place]));
    } else if (place >= reads.size()) {
      pointers.push_back(staging.get(bytes[place - reads.size()]));
    } else {
      size_t total = reads[place].bytes;
      for (int64_t extent : shapes[place]) total *= static_cast<size_t>(extent);
      pointers.push_back(staging.get(total));
      check_cuda(cuda.to_device(pointers.back(), data[place], total), "cuMemcpyHtoD");
    }
  }
  std::vector<int64_t> numbers(arguments.size());
  std::vector<void*> passed;
  for (size_t place = 0; place < arguments.size(); ++place) {
    const Argument& argument = arguments[place];
    int64_t number = argument.kind == 'p' ? static_cast<int64_t>(pointers.at(argument.tensor))
                                          : product(argument.dims, known);
    bool wrong = argument.divisible && number % 16 != 0;
    wrong = wrong || (argument.kind == '1' && number != 1) || (argument.kind == 'i' && number > INT32_MAX);
    if (wrong) throw std::runtime_error(name + ": its kernel was compiled for tensors that lie otherwise in memory");
    numbers[place] = number;
    if (argument.kind != '1') passed.push_back(&numbers[place]);  // of 32 bits the lower half is read
  }
  void* scratch = nullptr;  // Triton's kernels take two pointers to scratch memory, which these do not use
  passed.push_back(&scratch);
  passed.push_back(&scratch);
  int64_t programs = 1;
  for (const auto& [per, dims] : grid) programs *= (product(dims, known) + per - 1) / per;
  void* stream = nullptr;
  if (!staged()) check(ort->KernelContext_GetGPUComputeStream(context, &stream));
  if (programs > 0)
    check_cuda(cuda.launch(started, static_cast<unsigned>(programs), 1, 1, 32 * warps, 1, 1, shared, stream,
                           passed.data(), nullptr),
               "cuLaunchKernel");
  if (staged())
    for (size_t place = 0; place < writes.size(); ++place)
      check_cuda(cuda.to_host(data[reads.size() + place], pointers[reads.size() + place], bytes[place]),
                 "cuMemcpyDtoH");
}

// -- what onnxruntime asks of an operator ----------------------------------------------------------------------------

const Kernel* self(const OrtCustomOp* op) { return static_cast<const Kernel*>(op); }

void describe(Kernel* kernel) {
  kernel->version = ORT_API_VERSION;
  kernel->GetName = [](const OrtCustomOp* op) { return self(op)->name.c_str(); };
  kernel->GetExecutionProviderType = [](const OrtCustomOp* op) { return self(op)->provider.c_str(); };
  kernel->GetInputTypeCount = [](const OrtCustomOp* op) { return self(op)->reads.size(); };
  kernel->GetOutputTypeCount = [](const OrtCustomOp* op) { return self(op)->writes.size(); };
  kernel->GetInputType = [](const OrtCustomOp* op, size_t place) { return self(op)->reads[place].type; };
  kernel->GetOutputType = [](const OrtCustomOp* op, size_t place) { return self(op)->writes[place].type; };
  kernel->GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  kernel->GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  kernel->GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  kernel->GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  kernel->GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  kernel->GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  kernel->GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  kernel->GetStartVersion = [](const OrtCustomOp*) { return 1; };
  kernel->GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
  kernel->KernelDestroy = [](void*) {};
  kernel->CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo*, void** made) -> OrtStatus* {
    *made = const_cast<OrtCustomOp*>(op);  // it has no attributes: one kernel serves all nodes
    return nullptr;
  };
  kernel->KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    try {
      self(static_cast<const OrtCustomOp*>(kernel))->compute(context);
      return nullptr;
    } catch (const std::exception& error) {
      return ort->CreateStatus(ORT_EP_FAIL, error.what());
    }
  };
}

// -- kernels.txt -----------------------------------------------------------------------------------------------------

Dims read_dims(std::istream& line) {
  size_t count = 0;
  line >> count;
  Dims dims(count);
  for (int& dim : dims) line >> dim;
  return dims;
}

Tensor read_tensor(std::istream& line) {
  int type = 0;
  size_t rank = 0;
  Tensor tensor;
  line >> type >> tensor.bytes >> rank;
  tensor.type = static_cast<ONNXTensorElementDataType>(type);
  for (size_t axis = 0; axis < rank; ++axis) tensor.axes.push_back(read_dims(line));
  return tensor;
}

std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("there is no file " + path);
  std::ostringstream whole;
  whole << file.rdbuf();
  return whole.str();
}

// The kernels of a folder that run on the device: binaries are for one architecture each.
std::vector<std::unique_ptr<Kernel>> read_kernels(const std::string& folder, const std::string& provider) {
  std::vector<std::unique_ptr<Kernel>> found;
  std::istringstream file(contents(folder + "/kernels.txt"));
  bool wanted = false;
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string word;
    line >> word;
    if (word == "kernel") {
      int architecture = 0;
      std::string name;
      line >> architecture >> name;
      wanted = architecture == cuda.capability || (architecture / 10 == cuda.capability / 10 && architecture < 90 &&
                                                   architecture <= cuda.capability);  // those of sm_90 are of sm_90a
      if (!wanted) continue;
      found.push_back(std::make_unique<Kernel>());
      found.back()->name = name;
      found.back()->provider = provider;
      describe(found.back().get());
    }
    if (!wanted) continue;
    Kernel& kernel = *found.back();
    if (word == "start") {
      std::string binary;
      line >> kernel.entry >> binary >> kernel.warps >> kernel.shared;
      kernel.binary = contents(folder + "/" + binary);
    } else if (word == "size") {
      Size size;
      line >> size.kind >> size.number;
      if (size.kind == 'a') line >> size.input >> size.axis;
      kernel.sizes.push_back(size);
    } else if (word == "read") {
      kernel.reads.push_back(read_tensor(line));
    } else if (word == "write") {
      kernel.writes.push_back(read_tensor(line));
    } else if (word == "argument") {
      Argument argument;
      line >> argument.kind >> argument.divisible;
      if (argument.kind == 'p') {
        line >> argument.tensor;
      } else {
        argument.dims = read_dims(line);
      }
      kernel.arguments.push_back(argument);
    } else if (word == "grid") {
      int64_t per = 1;
      line >> per;
      kernel.grid.emplace_back(per, read_dims(line));
    }
    if (line.fail()) throw std::runtime_error("kernels.txt has a line that is not understood: " + text);
  }
  return found;
}

}  // namespace

extern "C" OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  ort = base->GetApi(ORT_API_VERSION);
  if (ort == nullptr) return nullptr;
  static const bool driver = cuda.open();
  if (!driver) return nullptr;
  try {
    Dl_info own;
    if (dladdr(reinterpret_cast<void*>(&RegisterCustomOps), &own) == 0) return nullptr;
    std::string path = own.dli_fname;
    size_t end = path.rfind('/');
    std::string folder = end == std::string::npos ? "." : path.substr(0, end);
    const char* provider = std::getenv("REGAUGE_ORT_PROVIDER");
    static auto kernels = read_kernels(folder, provider ? provider : "CUDAExecutionProvider");
    if (kernels.empty()) return nullptr;
    static OrtCustomOpDomain* domain = [] {
      OrtCustomOpDomain* made = nullptr;
      check(ort->CreateCustomOpDomain("regauge.kernels", &made));
      for (auto& kernel : kernels) check(ort->CustomOpDomain_Add(made, kernel.get()));
      return made;
    }();
    check(ort->AddCustomOpDomain(options, domain));
    return nullptr;
  } catch (const std::exception& error) {
    return ort->CreateStatus(ORT_FAIL, error.what());
  }
}
