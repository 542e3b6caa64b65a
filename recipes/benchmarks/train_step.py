"""The `step` section of the benchmark of a training step: time, memory and error of every arm on the same batches."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from modeling_cosup import CoSupForCausalLM

from measuring import GB, Meter, matmul_peak, print_table, rotated
from train_arms import (
    CompiledOurs,
    Gradients,
    Ours,
    PlainTrainer,
    batches_of,
    gradient_error,
    gradients_of,
    padded_baseline,
    useful_tokens,
)

PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12}  # dense bf16

Step = Callable[[list[dict]], float]


def section_step(model: CoSupForCausalLM, instances: list[dict], script: Any, folder: str) -> dict[str, Any]:
    """Measure every arm on the same batches: errors on the first one, then time and memory, arm by arm."""
    meter = Meter(model.device)
    autocast = partial(torch.autocast, model.device.type, torch.bfloat16, enabled=script.bf16)
    ours = Ours(model, folder, instances, script)
    rows = ours.trainer.train_dataset
    cached = {"nsp_batch_size": script.batch_size, "max_tokens_per_micro_batch": script.micro_batch_tokens}
    padded = Ours(model, folder, rows, script, padding_free=False)
    uncut = Ours(model, folder, rows, script, padding_free=False)
    uncut.trainer.data_collator.call_overhead = None
    arms: dict[str, Step] = {
        "padded baseline": partial(padded_baseline, model, autocast=autocast),
        "ours": ours.step,
        "ours, duplicates encoded": Ours(model, folder, rows, script, mask_duplicates=False).step,
        "ours, GradCache": Ours(model, folder, rows, script, **cached).step,
        "ours, padded, rows of similar length": padded.step,
        "ours, padded, one micro-batch": uncut.step,
    }
    if script.torch_compile:
        arms["ours, compiled layers"] = CompiledOurs(model, folder, rows, script).step
    (small_batch,) = batches_of(ours.trainer, 4, 1, script.seed + 1)
    float32_errors = errors_in_float32(model, rows, small_batch, script, folder)
    warm_up, *batches = batches_of(ours.trainer, script.batch_size, script.repeats + 1, script.seed)
    expected = float32_baseline(model, warm_up)
    bf16_errors = {}  # of gradients: what bf16 costs in precision
    for name, arm in arms.items():
        _, bf16_errors[name] = errors_of(arm, model, warm_up, expected)
    seconds, memory = time_arms(model, arms, batches, meter)

    tokens = statistics.mean(useful_tokens(batch) for batch in batches)
    flops = sum(model_flops(model, batch) for batch in batches)
    num_named, num_distinct = count_passages(batches)
    measured_peak = matmul_peak(model.device, torch.bfloat16 if script.bf16 else torch.float32)
    result: dict[str, Any] = {
        "useful_tokens": tokens,
        "matmul_peak": measured_peak,
        "duplicate_rate": 1 - num_distinct / num_named,
        "padding": {
            "one micro-batch": statistics.mean(uncut.padding(batch) for batch in batches),
            "rows of similar length": statistics.mean(padded.padding(batch) for batch in batches),
            "ours": statistics.mean(ours.padding(batch) for batch in batches),
        },
        "arms": {},
    }
    for name in arms:
        speeds = ratios(seconds["padded baseline"], seconds[name])
        tokens_per_second = tokens * len(batches) / sum(seconds[name])
        flops_per_second = flops / sum(seconds[name])
        data_sheet_peak = peak_flops(model.device)
        result["arms"][name] = {
            "seconds": statistics.median(seconds[name]),
            "seconds_min_max": [min(seconds[name]), max(seconds[name])],
            "speed_to_baseline": statistics.median(speeds),
            "speed_to_baseline_min_max": [min(speeds), max(speeds)],
            "useful_tokens_per_second": tokens_per_second,
            "peak_memory_gb": max(memory[name]) / GB,
            "gradient_error": bf16_errors[name],
            "float32_loss_and_gradient_error": float32_errors.get(name),
            "mfu": None if data_sheet_peak is None else flops_per_second / data_sheet_peak,
            "share_of_matmul_peak": flops_per_second / measured_peak,
        }
    print(
        f"\nForward and backward, batches of {script.batch_size} instances, {tokens:.0f} useful tokens,"
        f" {num_named} passages of which {num_distinct} distinct"
    )
    print_step(result)
    slowdowns = ratios(seconds["ours, GradCache"], seconds["ours"])
    result["gradcache_to_uncached"] = statistics.median(slowdowns)
    print(
        f"\nGradCache takes {statistics.median(slowdowns):.2f} x the uncached step"
        f" (median of the batches' ratios; {min(slowdowns):.2f} to {max(slowdowns):.2f})"
    )
    result["ntp"] = against_plain_trainer(model, rows, [warm_up, *batches], meter, script, folder)
    return result


# ---------------------------------------------------------------------- errors


def errors_in_float32(
    model: CoSupForCausalLM, rows: Any, batch: list[dict], script: Any, folder: str
) -> dict[str, tuple[float, float]]:
    """
    Return each arm's relative errors of loss and gradients in float32.

    In float32 every arm should equal the padded baseline.
    """
    options_of_arm: dict[str, dict[str, Any]] = {
        "ours": {},
        "ours, duplicates encoded": {"mask_duplicates": False},
        "ours, GradCache": {
            "nsp_batch_size": len(batch),
            "max_tokens_per_micro_batch": script.micro_batch_tokens,
        },
    }
    expected = float32_baseline(model, batch)
    errors = {}
    for name, options in options_of_arm.items():
        arm = Ours(model, folder, rows, script, bf16=False, **options).step
        errors[name] = errors_of(arm, model, batch, expected)
    return errors


def float32_baseline(model: CoSupForCausalLM, batch: list[dict]) -> tuple[float, Gradients]:
    """Return the loss and gradients of the padded baseline without autocast."""
    model.zero_grad()
    loss = padded_baseline(model, batch, partial(torch.autocast, model.device.type, enabled=False))
    return loss, gradients_of(model)


def errors_of(
    arm: Step, model: CoSupForCausalLM, batch: list[dict], expected: tuple[float, Gradients]
) -> tuple[float, float]:
    """Return the relative errors of an arm's loss and gradients."""
    expected_loss, expected_gradients = expected
    model.zero_grad()
    loss = arm(batch)
    return abs(loss - expected_loss) / expected_loss, gradient_error(gradients_of(model), expected_gradients)


# ---------------------------------------------------------------------- time and memory


def time_arms(
    model: nn.Module,
    arms: dict[str, Step],
    batches: list[list[dict]],
    meter: Meter,
    max_seconds: float | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """
    Return the seconds and the peak memory in bytes of every arm, batch by batch.

    No batch but the first begins later than `max_seconds` after the call.
    """
    start = time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    memory: dict[str, list[float]] = {name: [] for name in arms}
    for i, batch in enumerate(batches, 1):
        if max_seconds is not None and i > 1 and time.perf_counter() - start > max_seconds:
            break
        for name in rotated(list(arms), i):  # no arm is always the first to see a batch
            model.zero_grad()
            _, took, peak = meter(partial(arms[name], batch))
            seconds[name].append(took)
            memory[name].append(peak)
        times = ", ".join(f"{name} {seconds[name][-1]:.1f} s" for name in arms)
        print(f"  batch {i} of {len(batches)}: {times}", flush=True)
    model.zero_grad()
    return seconds, memory


def model_flops(model: CoSupForCausalLM, batch: list[dict]) -> float:
    """
    Return the floating-point operations that the losses of a batch need, forward and backward.

    They are 6 for each token and each weight of the body that reads it (embeddings are looked up, and norms count as
    if they were products), causal attention within rows, and the LM head where there is a label. A passage that is
    named several times counts once. Padding, the scores of [NSP], what is computed twice (the first pass of GradCache)
    and the optimiser count for nothing.
    """
    gen, emb_seq = model.gen.base_model, model.emb_seq
    lm_head = model.get_output_embeddings().weight
    passages = {tuple(ids) for row in batch for ids in row["passage_input_ids"]}
    flops = 0.0
    for row in batch:
        num_labels = sum(label != -100 for label in row["labels"][1:])
        flops += body_flops(gen, len(row["input_ids"])) + 6 * lm_head.numel() * num_labels
    for ids in passages:
        flops += body_flops(emb_seq, len(ids))
    return flops


def body_flops(body: nn.Module, length: int) -> float:
    """Return the operations of a row of `length` tokens in a body without LM head, forward and backward."""
    config = body.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    # two products of 2 · length² · width, half of which causal attention needs, and twice that backward
    attention = 6 * config.num_hidden_layers * width * length**2
    return 6 * body.num_parameters(exclude_embeddings=True) * length + attention


def count_passages(batches: list[list[dict]]) -> tuple[int, int]:
    """Return how many passages the batches name, and how many of these are distinct within their batch."""
    num_named = 0
    num_distinct = 0
    for batch in batches:
        passages = [tuple(ids) for row in batch for ids in row["passage_input_ids"]]
        num_named += len(passages)
        num_distinct += len(set(passages))
    return num_named, num_distinct


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """Return the quotients of two lists, batch by batch."""
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


def peak_flops(device: torch.device) -> float | None:
    """Return the data sheet's peak of a known GPU, in FLOP/s; `None` for other devices."""
    if device.type == "cuda":
        for prefix, peak in PEAK_FLOPS.items():
            if torch.cuda.get_device_name().startswith(prefix):
                return peak
    return None


def print_step(result: dict[str, Any]) -> None:
    """Print the padding and a table of all arms."""
    print(f"padding: {result['padding']}")
    print(f"fastest matrix product: {result['matmul_peak'] / 1e9:.0f} GFLOP/s")
    header = ["arm", "s / batch", "x baseline", "min, max", "useful tokens/s", "of the matrix-product peak", "MFU"]
    header += ["peak memory GB", "gradient error of bf16", "in float32: loss, gradient"]
    rows = []
    for name, figures in result["arms"].items():
        mfu = figures["mfu"]
        exactness = figures["float32_loss_and_gradient_error"]
        rows.append(
            [
                name,
                f"{figures['seconds']:.2f}",
                f"{figures['speed_to_baseline']:.2f}",
                "{:.2f}, {:.2f}".format(*figures["speed_to_baseline_min_max"]),
                f"{figures['useful_tokens_per_second']:.0f}",
                f"{figures['share_of_matmul_peak']:.1%}",
                "" if mfu is None else f"{mfu:.1%}",
                f"{figures['peak_memory_gb']:.2f}",
                f"{figures['gradient_error']:.1e}",
                "" if exactness is None else "{:.0e}, {:.0e}".format(*exactness),
            ]
        )
    print_table(header, rows)


def against_plain_trainer(
    model: CoSupForCausalLM, rows: Any, batches: list[list[dict]], meter: Meter, script: Any, folder: str
) -> dict[str, Any]:
    """Compare `supervision="ntp"` with transformers' Trainer on Gen alone, on the same micro-batches."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ours = Ours(model, folder, rows, script, supervision="ntp", padding_free=False)  # which Trainer cannot read
    use_cpu = model.device.type == "cpu"
    plain_args = TrainingArguments(folder, report_to="none", bf16=script.bf16, use_cpu=use_cpu)
    plain = PlainTrainer(model.gen, plain_args)
    gen = model.gen

    def plain_step(rows: list[dict]) -> float:
        batch = ours.collate(rows)
        inputs = {"micro_batches": batch["micro_batches"]}
        return float(plain.training_step(gen, inputs, batch["facts"].num_labels))

    our_seconds: list[float] = []
    plain_seconds: list[float] = []
    arms = [(ours.step, our_seconds), (plain_step, plain_seconds)]
    for i, batch in enumerate(batches):
        arms_in_turn = arms if i % 2 else arms[::-1]
        for step, seconds in arms_in_turn:
            model.zero_grad()
            _, took, _ = meter(partial(step, batch))
            if i > 0:  # the first batch warms up
                seconds.append(took)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    ratio = statistics.median(ratios(plain_seconds, our_seconds))
    medians = {
        "ours, ntp": statistics.median(our_seconds),
        "plain Trainer, same tricks": statistics.median(plain_seconds),
    }
    print(f"\nntp alone: {medians}, throughput of ours {ratio:.3f} x the plain Trainer's")
    return {"seconds": medians, "throughput_ratio": ratio}
