"""
What `torch.cuda` needs in Python, for the device of device.cpp.

A build of torch for CPUs has `torch.cuda`, but its functions call C functions that it lacks. They are replaced, each
by a function of its own, because `torch.compile` keeps a table of torch's functions.
"""

import contextlib
import ctypes
import sys
import time
from types import ModuleType, SimpleNamespace

TOTAL_MEMORY = 16 * 2**30  # bytes
PROPERTIES = SimpleNamespace(
    name="imitated GPU", major=9, minor=0, total_memory=TOTAL_MEMORY, multi_processor_count=132, warp_size=32
)


def returns(value):
    """Return a new function that takes anything and returns the value."""
    return lambda *args, **kwargs: value


def install(torch: ModuleType, device: ctypes.CDLL) -> None:
    """Make `torch.cuda`, `torch.accelerator`, storages, compilation and process groups work with the device."""
    device.imitated_allocated.restype = device.imitated_peak.restype = ctypes.c_long
    device.imitated_resize.argtypes = [ctypes.c_void_p, ctypes.c_long]
    _install_device(torch)
    _install_memory(torch, device)
    _install_random_numbers(torch)
    _install_streams(torch.cuda)
    _install_storages(torch, device)
    _install_compilation(torch)
    _install_process_groups(torch)


def _install_device(torch) -> None:
    cuda = torch.cuda
    for name in ("_lazy_init", "set_device", "synchronize", "ipc_collect", "empty_cache"):
        setattr(cuda, name, returns(None))
    for name in ("_is_compiled", "is_initialized", "is_available", "is_bf16_supported"):
        setattr(cuda, name, returns(True))
    cuda._initialized = True
    cuda.device_count, cuda.current_device = returns(1), returns(0)
    cuda.get_device_properties, cuda.get_device_name = returns(PROPERTIES), returns(PROPERTIES.name)
    cuda.get_device_capability, cuda.get_arch_list = returns((9, 0)), returns(["sm_90"])
    cuda.is_current_stream_capturing = returns(False)
    cuda.device = cuda._DeviceGuard = type("device", (contextlib.nullcontext,), {})
    torch._C._cuda_getDeviceCount, torch._C._cuda_getDevice = returns(1), returns(0)
    torch._C._cuda_setDevice, torch._C._cuda_getCurrentRawStream = returns(None), returns(0)
    torch._C._cuda_isInBadFork = returns(False)
    torch.version.cuda = "0.0"
    torch.backends.cuda.is_built = returns(True)
    accelerator = torch.accelerator
    accelerator.is_available, accelerator.device_count = returns(True), returns(1)
    accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    accelerator.current_device_index = returns(0)
    for name in ("synchronize", "set_device_index", "empty_cache"):
        setattr(accelerator, name, returns(None))


def _install_memory(torch, device) -> None:
    cuda = torch.cuda
    for module in (cuda, cuda.memory, torch.accelerator):
        module.memory_allocated = lambda *args: device.imitated_allocated()
        module.memory_reserved = lambda *args: device.imitated_allocated()
        module.max_memory_allocated = lambda *args: device.imitated_peak()
        module.max_memory_reserved = lambda *args: device.imitated_peak()
        module.reset_peak_memory_stats = lambda *args: device.imitated_reset_peak()
        module.memory_stats = lambda *args: {"allocated_bytes.all.current": device.imitated_allocated()}
    for module in (cuda, cuda.memory):
        module.mem_get_info = lambda *args: (TOTAL_MEMORY - device.imitated_allocated(), TOTAL_MEMORY)
    torch.accelerator.get_memory_info = lambda *args: (TOTAL_MEMORY - device.imitated_allocated(), TOTAL_MEMORY)
    torch.Tensor.pin_memory = lambda tensor, *args: tensor
    torch.Tensor.is_pinned = returns(False)


def _install_random_numbers(torch) -> None:
    """The device draws from the CPU's generator."""
    for module in (torch.cuda, torch.cuda.random):
        for name in ("manual_seed", "manual_seed_all", "seed", "seed_all"):
            setattr(module, name, returns(None))
        module.get_rng_state = lambda *args: torch.get_rng_state()
        module.set_rng_state = lambda state, *args: torch.set_rng_state(state)
        module.get_rng_state_all = lambda: [torch.get_rng_state()]
        module.set_rng_state_all = lambda states: torch.set_rng_state(states[0])


class Event:
    """An event on the device's one stream, where all has happened already."""

    def __init__(self, *args, **kwargs):
        self.seconds = 0.0

    def record(self, *args):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)

    def query(self):
        return True

    wait = synchronize = returns(None)


class Stream:
    """The device's one stream."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    wait_stream = wait_event = synchronize = returns(None)


def _install_streams(cuda) -> None:
    cuda.Event, cuda.Stream = Event, Stream
    cuda.current_stream, cuda.default_stream = lambda *args: Stream(), lambda *args: Stream()
    cuda.stream, cuda.set_stream = lambda stream: contextlib.nullcontext(), returns(None)


def _install_storages(torch, device) -> None:
    def to(storage, device=None, non_blocking=False):
        if torch.device(device).type == storage.device.type:
            return storage
        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return content.to(device).untyped_storage()

    def clone(storage):
        content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return content.clone().untyped_storage()

    resize_on_cpu = torch.UntypedStorage.resize_

    def resize(storage, size):
        if storage.device.type == "cpu":
            return resize_on_cpu(storage, size)
        device.imitated_resize(storage._cdata, size)
        return storage

    kind = torch.storage._StorageBase
    kind.to, kind.clone = to, clone
    kind.cuda, kind.cpu = lambda storage, *args, **kwargs: to(storage, "cuda"), lambda storage: to(storage, "cpu")
    torch.UntypedStorage.resize_ = resize


def _install_compilation(torch) -> None:
    """Layers are traced as for a GPU; what was traced runs as it is, for there is no Triton and are no CUDA graphs."""
    compile_function, compile_module = torch.compile, torch.nn.Module.compile

    def without_inductor(options):
        return {name: value for name, value in options.items() if name not in ("mode", "options", "backend")}

    def compiled(model=None, **options):
        return compile_function(model, backend="eager", **without_inductor(options))

    def compiled_module(module, *args, **options):
        return compile_module(module, *args, backend="eager", **without_inductor(options))

    torch.compile, torch.nn.Module.compile = compiled, compiled_module
    torch.compiler.cudagraph_mark_step_begin = returns(None)
    trees = ModuleType("torch._inductor.cudagraph_trees")
    trees.reset_cudagraph_trees, trees.mark_step_begin = returns(None), returns(None)
    sys.modules[trees.__name__] = trees


def _install_process_groups(torch) -> None:
    """NCCL's place is taken by gloo."""
    if not torch.distributed.is_available():
        return
    init_process_group = torch.distributed.init_process_group

    def init(backend=None, *args, device_id=None, **kwargs):
        if backend is None or "nccl" in backend:
            backend = "cpu:gloo,cuda:gloo"
        return init_process_group(backend, *args, **kwargs)

    for module in (torch.distributed, torch.distributed.distributed_c10d):
        module.init_process_group, module.is_nccl_available = init, returns(True)
