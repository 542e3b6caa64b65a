"""The `profile` section of the benchmark of a training step: where the time of a step goes, eager and compiled."""

from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from modeling_cosup import CoSupForCausalLM

from measuring import Clock, matmul_peak, print_table
from train_arms import CompiledOurs, Ours, batches_of

# parts of operator names, by kind; the first kind that matches counts
KINDS = {
    "optimiser and clipping": ("_foreach", "adam", "Optimizer"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear"),
    "attention": ("scaled_dot_product", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    "loss": ("log_softmax", "nll_loss", "LogSoftmax", "NllLoss"),
    "embeddings": ("embedding", "Embedding"),
    "fused kernels of torch.compile": ("CompiledFxGraph", "triton"),
    "casts, copies and zeros": ("copy", "Copy", "aten::fill_", "aten::zero", "aten::cat", "aten::clone", "aten::to"),
    "norms, activations, rotary, sums": (
        "aten::mul",
        "aten::add",
        "aten::sub",
        "aten::neg",
        "aten::div",
        "aten::pow",
        "aten::mean",
        "aten::sum",
        "aten::rsqrt",
        "aten::silu",
        "aten::gelu",
        "aten::sigmoid",
        "aten::tanh",
        "aten::layer_norm",
        "aten::native_layer_norm",
    ),
}
OTHER = "other operators"
OUTSIDE = "outside operators (Python)"


def kind_of(name: str) -> str:
    """Return the kind of work that an operator does, by its name in torch's profiler."""
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return OTHER


def shares_of_kinds(events: Any, seconds: float, cuda: bool) -> dict[str, Any]:
    """
    Return the share of each kind of work in the time of profiled steps, and the speed of the matrix products.

    Args:
        events (`list`): what `profile.key_averages()` returns.
        seconds (`float`): what the steps took together.
        cuda (`bool`): count the time of the device, not of the host.

    Returns:
        `dict`: `shares` by kind, largest first; they sum to 1. `matmul_flops`, in FLOP/s.
    """
    seconds_of_kind = dict.fromkeys([*KINDS, OTHER], 0.0)
    flops = 0
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue  # a kernel: its time is counted with the operator that launched it
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        seconds_of_kind[kind] += microseconds / 1e6
        if kind == "matrix products":
            flops += event.flops
    seconds_of_kind[OUTSIDE] = max(0.0, seconds - sum(seconds_of_kind.values()))
    total = sum(seconds_of_kind.values())
    largest_first = sorted(seconds_of_kind.items(), key=lambda item: -item[1])
    shares = {kind: kind_seconds / total for kind, kind_seconds in largest_first}
    return {"shares": shares, "matmul_flops": flops / max(1e-9, seconds_of_kind["matrix products"])}


def section_profile(model: CoSupForCausalLM, instances: list[dict], script: Any, folder: str) -> dict[str, Any]:
    """Profile whole steps, with clipping and optimiser, of eager and of compiled layers on the same batches."""
    cuda = model.device.type == "cuda"
    ours = Ours(model, folder, instances, script)
    arms: dict[str, Any] = {"eager": ours}
    if script.torch_compile:
        arms["compiled"] = CompiledOurs(model, folder, ours.trainer.train_dataset, script)
    batches = batches_of(ours.trainer, script.batch_size, script.profile_steps, script.seed)
    optimizer = ours.trainer.optimizer
    assert optimizer is not None  # `Ours` has made it

    def step(arm: Any, batch: list[dict]) -> None:
        arm.step(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    clock = Clock(model.device)
    activities = [ProfilerActivity.CPU]
    if cuda:
        activities.append(ProfilerActivity.CUDA)
    peak = matmul_peak(model.device, torch.bfloat16 if script.bf16 else torch.float32)
    result: dict[str, Any] = {"matmul_peak": peak}
    for name, arm in arms.items():
        for batch in batches:  # a new length may compile a layer again
            step(arm, batch)
        with profile(activities=activities, record_shapes=True, with_flops=True) as profiler:
            with clock.time(name):
                for batch in batches:
                    step(arm, batch)
        result[name] = shares_of_kinds(profiler.key_averages(), clock.seconds[name], cuda)
        result[name]["seconds"] = clock.seconds[name] / script.profile_steps
        result[name]["matmul_share_of_peak"] = result[name]["matmul_flops"] / peak
    print_profile({name: result[name] for name in arms})
    return result


def print_profile(arms: dict[str, dict[str, Any]]) -> None:
    """Print the share of each kind of work, one column an arm."""
    print("\nShare of a training step (forward, backward, clipping and optimiser), in percent")
    rows = []
    for kind in next(iter(arms.values()))["shares"]:
        rows.append([kind, *(f"{arm['shares'][kind]:.1%}" for arm in arms.values())])
    rows.append(["seconds a step, under the profiler", *(f"{arm['seconds']:.2f}" for arm in arms.values())])
    speeds = []
    for arm in arms.values():
        speeds.append(f"{arm['matmul_flops'] / 1e9:.0f} GFLOP/s, {arm['matmul_share_of_peak']:.0%} of the peak")
    rows.append(["speed of the matrix products", *speeds])
    print_table(["kind of work", *arms], rows)
