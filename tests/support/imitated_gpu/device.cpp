// A CUDA device that computes on the CPU, to find code that would break on a GPU where there is none.
//
// A tensor "on cuda:0" has the CPU's memory under the dispatch key CUDA. A fallback for all operators calls the CPU's
// kernel on tensors that share this memory. As on a GPU, an operator whose tensors are on two devices is an error, and
// so is numpy() of a tensor of the device. Nothing here says anything about speed, rounding or the memory of a GPU.
//
// It is loaded after libtorch_cpu and before Python imports torch: torch asks once, early, which hooks there are.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <unordered_set>

namespace {

const c10::Device kImitated(c10::DeviceType::CUDA, 0);

// ---------------------------------------------------------------------- memory

constexpr size_t kHeader = 64;  // bytes before each block, which hold its size
std::atomic<long> allocated{0};
std::atomic<long> peak{0};

void free_block(void* block) {
  allocated -= *static_cast<long*>(block);
  std::free(block);
}

void free_nothing(void*) {}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &free_nothing, kImitated};
    void* block = nullptr;
    if (posix_memalign(&block, kHeader, bytes + kHeader) != 0) throw std::bad_alloc();
    *static_cast<long*>(block) = static_cast<long>(bytes);
    long now = allocated += static_cast<long>(bytes);
    for (long highest = peak; now > highest && !peak.compare_exchange_weak(highest, now);) {
    }
    return {static_cast<char*>(block) + kHeader, block, &free_block, kImitated};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

Memory memory;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &memory);

// ---------------------------------------------------------------------- the device: one, with one stream

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, kImitated); }
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return kImitated; }
  c10::Device getDevice() const override { return kImitated; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() <= 0, "CUDA error: invalid device ordinal");
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream other) const override { return other; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Generator final : c10::GeneratorImpl {
  at::Generator on_cpu;
  explicit Generator(at::Generator generator)
      : c10::GeneratorImpl(kImitated, c10::DispatchKeySet(c10::DispatchKey::CUDA)), on_cpu(std::move(generator)) {}
  void set_current_seed(uint64_t seed) override { on_cpu.set_current_seed(seed); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return on_cpu.current_seed(); }
  uint64_t seed() override { return on_cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { on_cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return on_cpu.unsafeGetGeneratorImpl()->get_state();
  }
  GeneratorImpl* clone_impl() const override { return new Generator(on_cpu.clone()); }
};

}  // namespace

namespace at {

// Its name is the key under which torch looks for it.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return kImitated; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override {
    static const at::Generator generator =
        make_generator<::Generator>(globalContext().defaultGenerator(DeviceType::CPU));
    return generator;
  }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return make_generator<::Generator>(make_generator<CPUGeneratorImpl>());
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at

namespace c10d {
namespace {

struct NoTimer final : Timer {  // DistributedDataParallel wants one for each kind of device
  explicit NoTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event, Event) override { return std::nullopt; }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::DeviceType::CUDA, NoTimer);

}  // namespace
}  // namespace c10d

namespace {

// ---------------------------------------------------------------------- operators

void release(void* storage) { delete static_cast<c10::Storage*>(storage); }

// Bytes of a storage under another device; they live as long as either storage does.
c10::DataPtr shared_bytes(const c10::Storage& storage, c10::Device device) {
  return {storage.mutable_data(), new c10::Storage(storage), &release, device};
}

// A tensor with the shape of another, on a storage.
at::Tensor tensor_on(c10::Storage storage, const at::Tensor& like, c10::DispatchKeySet keys) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  tensor.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  tensor._set_conj(like.is_conj());
  tensor._set_neg(like.is_neg());
  return tensor;
}

// A tensor on the same memory under another device.
at::Tensor alias(const at::Tensor& tensor, c10::Device device) {
  const auto& storage = tensor.storage();
  c10::Storage other(c10::Storage::use_byte_size_t(), storage.nbytes(), shared_bytes(storage, device),
                     c10::GetAllocator(device.type()), /*resizable=*/true);
  auto key = device.is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  return tensor_on(std::move(other), tensor, c10::DispatchKeySet(key));
}

// A view has the keys of its base: in inference mode it is an inference tensor only if its base is one.
at::Tensor view_of(const at::Tensor& base, const at::Tensor& like) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()),
                                                       base.key_set(), like.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return view;
}

// One call of an operator: replaces tensors of the device by aliases on the CPU, and results by tensors of the device.
class Call {
 public:
  bool on_device = false;   // some tensor, or the device that is asked for, is the imitated one
  bool on_cpu = false;      // some tensor is on the CPU; 0-dimensional ones are welcome on a GPU too

  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.device().is_cuda()) {
      on_cpu = on_cpu || (tensor.dim() > 0 && tensor.device().is_cpu());
      return tensor;
    }
    on_device = true;
    at::Tensor replaced;
    for (const auto& [ours, theirs] : pairs_) {
      if (ours.is_same(tensor)) return theirs;
      if (ours.storage().is_alias_of(tensor.storage()))  // what overlaps must overlap on the CPU too
        replaced = tensor_on(theirs.storage(), tensor, c10::DispatchKeySet(c10::DispatchKey::CPU));
    }
    if (!replaced.defined()) replaced = alias(tensor, c10::Device(c10::DeviceType::CPU));
    pairs_.emplace_back(tensor, replaced);
    return replaced;
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined() || !result.device().is_cpu() || !on_device) return result;
    for (const auto& [ours, theirs] : pairs_)
      if (theirs.is_same(result)) return ours;
    for (const auto& [ours, theirs] : pairs_)
      if (theirs.storage().is_alias_of(result.storage())) return view_of(ours, result);
    return alias(result, kImitated);
  }

  // An `out=` tensor that the operator has resized gets the new memory and shape.
  void take_resized() {
    for (auto& [ours, theirs] : pairs_) {
      const auto& from = theirs.storage();
      auto to = ours.storage();
      if (from.data() != to.data() || from.nbytes() != to.nbytes()) {
        to.set_data_ptr_noswap(shared_bytes(from, kImitated));
        to.set_nbytes(from.nbytes());
      }
      if (theirs.sizes() != ours.sizes() || theirs.strides() != ours.strides())
        ours.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides());
    }
  }

 private:
  std::vector<std::pair<at::Tensor, at::Tensor>> pairs_;  // of the device, and its alias
};

template <typename Change>
c10::IValue with_tensors(const c10::IValue& value, const Change& change) {
  if (value.isTensor()) return change(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector())
      list.push_back(tensor.has_value() ? std::optional<at::Tensor>(change(*tensor)) : std::nullopt);
    return list;
  }
  if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {  // of collectives
    c10::impl::GenericList list(c10::ListType::ofTensors());
    for (const c10::IValue& inner : value.toListRef()) list.push_back(with_tensors(inner, change));
    return list;
  }
  return value;
}

c10::IValue argument(const c10::IValue& value, Call& call) {
  if (value.isDevice() && value.toDevice().is_cuda()) {
    call.on_device = true;
    return c10::Device(c10::DeviceType::CPU);
  }
  if (value.isGenerator() && value.toGenerator().defined() && value.toGenerator().device().is_cuda())
    return static_cast<Generator*>(value.toGenerator().unsafeGetGeneratorImpl())->on_cpu;
  return with_tensors(value, [&](const at::Tensor& tensor) { return call.to_cpu(tensor); });
}

// Whether a GPU takes tensors of both devices: copies, and indices on the CPU into a tensor on the GPU.
bool may_mix(const std::string& name, const c10::IValue& first) {
  static const std::unordered_set<std::string> copies = {"aten::copy_", "aten::_copy_from"};
  static const std::unordered_set<std::string> indexing = {"aten::index", "aten::index_put", "aten::index_put_",
                                                           "aten::_index_put_impl_", "aten::_unsafe_index"};
  if (copies.count(name) > 0) return true;
  return indexing.count(name) > 0 && first.isTensor() && first.toTensor().device().is_cuda();
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t begin = stack->size() - schema.arguments().size();
  const bool mixing_allowed = begin < stack->size() && may_mix(schema.name(), (*stack)[begin]);
  Call call;
  for (size_t i = begin; i < stack->size(); i++) (*stack)[i] = argument((*stack)[i], call);
  TORCH_CHECK(!(call.on_device && call.on_cpu) || mixing_allowed,
              "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (in ",
              schema.name(), ")");
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
    op.callBoxed(stack);
  }
  call.take_resized();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
    (*stack)[i] = with_tensors((*stack)[i], [&](const at::Tensor& tensor) { return call.to_device(tensor); });
}

// ---------------------------------------------------------------------- operators that need more than the fallback

at::ScalarType or_default(std::optional<at::ScalarType> dtype) {
  return dtype.value_or(at::get_default_dtype_as_scalartype());
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::CUDA), or_default(dtype));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  TORCH_CHECK(storage.device().is_cuda(), "a tensor on cuda:0 cannot use a storage on ", storage.device());
  auto* tensor = self.unsafeGetTensorImpl();
  tensor->set_storage_keep_dtype(std::move(storage));
  tensor->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  if (stride.size() == size.size())
    tensor->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  else
    tensor->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage storage) {
  const c10::SymInt length = static_cast<int64_t>(storage.nbytes() / self.dtype().itemsize());
  return set_storage(self, std::move(storage), 0, {length}, {1});
}

// The CPU has no product of half precision with a result in float32.
at::Tensor mm_in_dtype(const at::Tensor& left, const at::Tensor& right, at::ScalarType dtype) {
  return at::mm(left.to(dtype), right.to(dtype));
}

at::Tensor& mm_in_dtype_out(const at::Tensor& left, const at::Tensor& right, at::ScalarType dtype, at::Tensor& out) {
  return out.copy_(mm_in_dtype(left, right, dtype));
}

// The fused kernels are chosen by device, and there is none for this one.
at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double dropout, bool causal, std::optional<double> scale,
                     bool grouped) {
  auto added = mask;
  if (mask.has_value() && mask->scalar_type() == at::kBool)
    added = at::zeros_like(*mask, query.options()).masked_fill_(mask->logical_not(), -INFINITY);
  return std::get<0>(at::_scaled_dot_product_attention_math(query, key, value, added, dropout, causal, std::nullopt,
                                                            scale, grouped));
}

void record_stream(at::Tensor&, at::Stream) {}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  library.impl("mm.dtype", TORCH_FN(mm_in_dtype));
  library.impl("mm.dtype_out", TORCH_FN(mm_in_dtype_out));
  library.impl("record_stream", TORCH_FN(record_stream));
  library.impl("scaled_dot_product_attention", TORCH_FN(attention));
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());  // torch's own is for its devices
}

TORCH_LIBRARY_IMPL(aten, AutogradCUDA, library) {
  library.impl("scaled_dot_product_attention", TORCH_FN(attention));
}

TORCH_LIBRARY_IMPL(c10d, CUDA, library) {  // collectives on the CPU's backend, gloo
  for (const char* name :
       {"_allgather_base_", "_reduce_scatter_base_", "allgather_", "allgather_coalesced_",
        "allgather_into_tensor_coalesced_", "allreduce_", "allreduce_coalesced_", "alltoall_", "alltoall_base_",
        "barrier", "broadcast_", "gather_", "recv_", "reduce_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_",
        "scatter_", "send"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

}  // namespace

// ---------------------------------------------------------------------- for Python

extern "C" {

long imitated_allocated() { return allocated; }

long imitated_peak() { return peak; }

void imitated_reset_peak() { peak = allocated.load(); }

void imitated_resize(void* storage_impl, long bytes) {
  auto* storage = static_cast<c10::StorageImpl*>(storage_impl);
  auto data = memory.allocate(static_cast<size_t>(bytes));
  std::memcpy(data.get(), storage->data(), std::min(static_cast<size_t>(bytes), storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(data));
  storage->set_nbytes(static_cast<size_t>(bytes));
}
}
