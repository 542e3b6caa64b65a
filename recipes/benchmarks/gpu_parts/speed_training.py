"""
The speed of training: a step against the padded loop, and NSP batches with GradCache.

Random weights and text (SmolLM2-135M's shape), or those of `--gen` and `--train_file`. Weights are float32, computation
is bf16 autocast. The peak that the arms are compared with is measured here too.
"""

import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.masking_utils import flex_attention_mask

from modeling_cosup import CoSupForCausalLM
from trainer import load_instances

from gpu_parts.runner import Context, is_installed
from gpu_parts.speed_goals import goal
from measuring import GB, Meter, matmul_peak, spread, spread_text
from random_instances import random_instances, random_two_towers
from train_arms import CompiledOurs, Ours, batches_of, padded_baseline, useful_tokens
from train_nsp_batch import measure_nsp_batch
from train_step import Step, peak_flops, ratios, time_arms

ROWS_OF_BASELINE = 64  # of a forward of the padded loop: with its logits at every position, more do not fit
FLEX = "flex_attention_one_dtype"  # begins with flex: the trainer then packs rows without a dense mask
MAX_SECONDS = 45  # for the timed batches of a table


# ---------------------------------------------------------------------- what is trained


def training_model(context: Context) -> CoSupForCausalLM:
    """Return a model with two towers in float32 on the device, in training mode."""
    if context.gen is not None:
        options = {"dtype": "float32"}
        model = CoSupForCausalLM.from_gen_and_emb_seq(context.gen, tie_emb_seq=False, model_kwargs=options)
        return model.to(context.device).train()
    return random_two_towers("tiny" if context.tiny else "135m", 0, context.device).train()


def training_instances(context: Context, model: CoSupForCausalLM, count: int) -> list[dict[str, Any]]:
    """Return `count` training instances, or as many as `--train_file` has."""
    if context.train_file is not None:
        return load_instances(context.train_file)[:count]
    return random_instances(model.tokenizer, count, 0)


def describe(context: Context) -> dict[str, str]:
    """Return where weights and text of a result come from."""
    shape = "tiny" if context.tiny else "135m"
    return {
        "weights": context.gen or f"random, shape {shape}",
        "text": context.train_file or "random",
    }


# ---------------------------------------------------------------------- arms


class WithAttention:
    """
    An arm whose Gen and Emb_seq have another attention implementation during its steps.

    Args:
        model (`CoSupForCausalLM`): shared with other arms.
        implementation (`str`): e.g. `"flash_attention_2"`.
        step (`Callable`): the step of the arm.
    """

    def __init__(self, model: CoSupForCausalLM, implementation: str, step: Step) -> None:
        self.parts = (model.gen, model.emb_seq)
        self.implementation = implementation
        self.arm_step = step

    def step(self, rows: list[dict]) -> float:
        """Run forward and backward of a batch, and return its loss."""
        before = [part.config._attn_implementation for part in self.parts]
        try:
            for part in self.parts:
                part.set_attn_implementation(self.implementation)
            return self.arm_step(rows)
        finally:
            for part, implementation in zip(self.parts, before, strict=True):
                part.set_attn_implementation(implementation)


def register_flex() -> None:
    """
    Register flex attention that takes queries, keys and values of different dtypes under the name [`FLEX`].

    Under autocast, rotary positions leave queries and keys in float32. Other kernels cast them; flex attention does so
    only in new releases of torch.
    """

    def forward(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        return flex_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, *args, **kwargs)

    AttentionInterface.register(FLEX, forward)
    AttentionMaskInterface.register(FLEX, flex_attention_mask)


def packed_attentions(device: torch.device) -> dict[str, str]:
    """Return the attention implementations in which packed rows are tried, by the name that the table gives them."""
    if device.type != "cuda":
        return {"a dense mask": "sdpa"}  # flex attention has no backward on a CPU
    register_flex()
    implementations = {"flex": FLEX}
    if is_installed("flash_attn"):
        implementations["flash"] = "flash_attention_2"
    return implementations


def training_arms(
    context: Context, model: CoSupForCausalLM, rows: Any, script: SimpleNamespace, folder: str
) -> dict[str, Step]:
    """Return the step of each arm by its name; the first is the baseline."""
    autocast = partial(torch.autocast, model.device.type, torch.bfloat16)
    backend = "eager" if context.tiny else "inductor"
    compiled = partial(CompiledOurs, model, folder, rows, script, torch_compile_backend=backend)

    def baseline(batch: list[dict]) -> float:
        losses = []
        for start in range(0, len(batch), ROWS_OF_BASELINE):
            losses.append(padded_baseline(model, batch[start : start + ROWS_OF_BASELINE], autocast))
        return statistics.mean(losses)

    arms: dict[str, Step] = {
        "padded, eager": baseline,
        "ours, eager": Ours(model, folder, rows, script).step,
        "ours, compiled layers": compiled().step,
    }
    for kind, implementation in packed_attentions(context.device).items():
        packed = compiled(padding_free=True)
        arms[f"ours, packed rows ({kind}), compiled layers"] = WithAttention(model, implementation, packed.step).step
    return arms


def working_arms(
    arms: dict[str, Step], batches: Sequence[list[dict]], model: nn.Module
) -> tuple[dict[str, Step], dict[str, str]]:
    """
    Warm every arm up on some batches.

    Returns:
        `(arms, errors)`: the arms that work, and of the others the first line of their error.
    """
    working = {}
    errors = {}
    for name, arm in arms.items():
        try:
            for batch in batches:
                model.zero_grad()
                arm(batch)
            working[name] = arm
        except Exception as error:  # whatever kernels, compilers and their versions raise: the others are measured
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(f"  {name}: {errors[name]}", flush=True)
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return working, errors


# ---------------------------------------------------------------------- the table of a step


def training_table(context: Context, batch_size: int) -> dict[str, Any]:
    """
    Compare a step of ours, forward and backward, with the padded loop on the same batches.

    Returns:
        `dict`: for each arm seconds, speed, tokens/s, peak memory in addition to the weights, and model FLOP/s as a
            share of the measured peak and of the data sheet's.
    """
    torch._dynamo.config.recompile_limit = 64  # the arms share the code of the layers
    model = training_model(context)
    repeats = 2 if context.tiny else 5
    instances = training_instances(context, model, batch_size * (repeats + 2))
    script = SimpleNamespace(batch_size=batch_size, bf16=True, seed=0)
    peak = matmul_peak(context.device, torch.bfloat16, (64,) if context.tiny else None)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(model, folder, instances, script)
        rows = ours.trainer.train_dataset
        first, second, *batches = batches_of(ours.trainer, batch_size, repeats + 2, 0)
        arms, errors = working_arms(training_arms(context, model, rows, script, folder), [first, second], model)
        seconds, memory = time_arms(model, arms, batches, Meter(context.device), MAX_SECONDS)
    if "padded, eager" not in arms:
        raise RuntimeError(f"The padded baseline does not run: {errors['padded, eager']}")
    batches = batches[: len(seconds["padded, eager"])]
    flops = [model_flops(model, batch) for batch in batches]
    tokens = [useful_tokens(batch) for batch in batches]
    sheet_peak = peak_flops(context.device)
    results = []
    for name in arms:
        speeds = ratios(flops, seconds[name])
        result = {
            "arm": name,
            "seconds": spread(seconds[name]),
            "speed_to_baseline": spread(ratios(seconds["padded, eager"], seconds[name])),
            "useful_tokens_per_second": statistics.median(ratios(tokens, seconds[name])),
            "peak_memory_gb": max(memory[name]) / GB,
            "share_of_matmul_peak": statistics.median(speeds) / peak,
            "mfu": None if sheet_peak is None else statistics.median(speeds) / sheet_peak,
        }
        results.append(result)
    return {
        **describe(context),
        "batch_size": batch_size,
        "useful_tokens": statistics.mean(tokens),
        "padding": statistics.mean(padding_of_baseline(batch) for batch in batches),
        "matmul_peak": peak,
        "arms": results,
        "errors": errors,
        **training_report(context, results, errors),
    }


def training_report(context: Context, results: list[dict[str, Any]], errors: dict[str, str]) -> dict[str, Any]:
    """Return summary, goals and table of the arms."""
    rows = []
    for result in results:
        mfu = result["mfu"]
        rows.append(
            [
                result["arm"],
                f"{result['seconds']['median']:.3f}",
                spread_text(result["speed_to_baseline"]),
                f"{result['useful_tokens_per_second']:,.0f}",
                f"{result['share_of_matmul_peak']:.1%}",
                "" if mfu is None else f"{mfu:.1%}",
                f"{result['peak_memory_gb']:.2f}",
            ]
        )
    for name, error in errors.items():
        rows.append([name, error, "", "", "", "", ""])
    best = max(results, key=lambda result: result["speed_to_baseline"]["median"])
    goals = [goal(context, "training, x padded eager", best["speed_to_baseline"]["median"], at_least=5)]
    if best["mfu"] is not None:
        goals.append(goal(context, "model FLOP utilisation", max(result["mfu"] for result in results), at_least=0.4))
    header = ["arm", "s / batch", "x padded eager (min to max)", "useful tokens/s"]
    header += ["of the matrix-product peak", "MFU (data sheet)", "peak memory GB"]
    return {
        "summary": f"{best['arm']}: {spread_text(best['speed_to_baseline'])} x padded eager",
        "goals": goals,
        "tables": [{"title": "forward and backward of a batch", "header": header, "rows": rows}],
    }


def model_flops(model: CoSupForCausalLM, batch: list[dict]) -> float:
    """
    Return the floating-point operations that the losses of a batch need, forward and backward.

    They are 6 a weight for each token that it reads (embeddings are looked up), causal attention within rows, and the
    LM head where there is a label. Padding is not counted, and a passage that is named twice is counted once.
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


def padding_of_baseline(batch: list[dict]) -> float:
    """Return the share of padding in the tokens that the padded loop reads."""
    padded = 0
    for start in range(0, len(batch), ROWS_OF_BASELINE):
        rows = batch[start : start + ROWS_OF_BASELINE]
        passages = [len(ids) for row in rows for ids in row["passage_input_ids"]]
        padded += len(rows) * max(len(row["input_ids"]) for row in rows)
        padded += len(passages) * max(passages, default=0)
    return 1 - useful_tokens(batch) / padded


# ---------------------------------------------------------------------- NSP batches


def nsp_batches(context: Context) -> dict[str, Any]:
    """Measure one GradCache step of each NSP batch: seconds, and memory with and without weights and gradients."""
    sizes = (4, 8) if context.tiny else (64, 256, 1024, 4096)
    micro_batch_tokens = 256 if context.tiny else 16_384
    model = training_model(context)
    rows: Any = training_instances(context, model, max(sizes))
    script = SimpleNamespace(batch_size=sizes[0], bf16=True, seed=0, micro_batch_tokens=micro_batch_tokens)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Ours(model, folder, rows, script).trainer.train_dataset  # tokenized once
        for size in sizes:
            if size > len(rows):
                print(f"  NSP batch {size}: the file has {len(rows)} instances", flush=True)
                continue
            if results and 5 * results[-1]["seconds"] > context.seconds_left():
                print(f"  NSP batch {size}: no time is left", flush=True)
                break
            results.append(measure_nsp_batch(model, rows, script, folder, size))
            print(f"  {results[-1]}", flush=True)
    last = results[-1]
    cells = [
        [
            str(result["nsp_batch_size"]),
            f"{result['seconds']:.2f}",
            f"{result['useful_tokens_per_second']:,.0f}",
            f"{result['peak_memory_gb']:.2f}",
            f"{result['total_memory_gb']:.2f}" if "total_memory_gb" in result else "",
        ]
        for result in results
    ]
    header = ["NSP batch", "s / step", "useful tokens/s", "peak above weights and gradients, GB", "peak in all, GB"]
    memory = last.get("total_memory_gb")
    goals = []
    if last["nsp_batch_size"] == 4096 and memory is not None:
        goals.append(goal(context, "memory of an NSP batch of 4,096, GB", memory, at_most=40))
    return {
        **describe(context),
        "micro_batch_tokens": micro_batch_tokens,
        "batches": results,
        "summary": f"NSP batch {last['nsp_batch_size']:,}: {last['seconds']:.1f} s, {last['peak_memory_gb']:.1f} GB",
        "goals": goals,
        "tables": [{"title": "one step with GradCache", "header": header, "rows": cells}],
    }
