"""
The speed of training: a step against the padded loop, and NSP batches with GradCache.

Weights and text are random, in SmolLM2-135M's shape, unless `--gen` and `--train_file` are given. Weights are float32,
under bf16 autocast. The peak that the arms are compared with is measured here too.
"""

import statistics
import tempfile
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import nn

from modeling_cosup import CoSupForCausalLM
from trainer import load_instances

from gpu_parts.errors import one_line
from gpu_parts.runner import Context
from gpu_parts.speed_failures import NO_TIME, clean_up, first_calls, require
from gpu_parts.speed_goals import goal
from gpu_parts.speed_training_arms import BASELINE, ROWS_OF_BASELINE, training_arms
from gpu_parts.weights import given_gen, name_of_gen
from measuring import GB, Meter, matmul_peak, spread, spread_text
from random_instances import random_instances, random_two_towers
from train_arms import Ours, batches_of, useful_tokens
from train_nsp_batch import measure_nsp_batch
from train_step import Step, model_flops, peak_flops, ratios, time_arms

MAX_SECONDS = 45  # for the timed batches of a table
COMPILE_SECONDS = 60  # for the warm-up of an arm that begins last, before those
LARGEST = 4096  # instances of an NSP batch, on a GPU


# ---------------------------------------------------------------------- what is trained


def training_model(context: Context) -> CoSupForCausalLM:
    """Return a model with two towers in float32 on the device, in training mode."""
    if context.gen is not None:
        gen = given_gen(context.gen, context.folder)
        options = {"dtype": "float32"}
        model = CoSupForCausalLM.from_gen_and_emb_seq(gen, tie_emb_seq=False, model_kwargs=options)
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
        "weights": f"random, shape {shape}" if context.gen is None else name_of_gen(context.gen),
        "text": context.train_file or "random",
    }


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
    repeats = 1 if context.tiny else 5
    instances = training_instances(context, model, batch_size * (repeats + 2))
    script = SimpleNamespace(batch_size=batch_size, bf16=True, seed=0)
    peak = matmul_peak(context.device, torch.bfloat16, (64,) if context.tiny else None)
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(model, folder, instances, script)
        rows = ours.trainer.train_dataset
        first, second, *batches = batches_of(ours.trainer, batch_size, repeats + 2, 0)
        arms = training_arms(context, model, rows, script, folder)
        # all batches: some kernels prepare something for every new shape
        of_all_batches = partial(warm_up, model=model, batches=[first, second, *batches], context=context)
        calls = {name: partial(of_all_batches, arm) for name, arm in arms.items()}
        errors = first_calls(calls, context.seconds_left() - MAX_SECONDS - COMPILE_SECONDS)
        require(BASELINE, errors)
        arms = {name: arm for name, arm in arms.items() if name not in errors}
        seconds, memory = time_arms(model, arms, batches, Meter(context.device), MAX_SECONDS)
    batches = batches[: len(seconds[BASELINE])]
    flops = [model_flops(model, batch) for batch in batches]
    tokens = [useful_tokens(batch) for batch in batches]
    sheet_peak = peak_flops(context.device)
    results = []
    for name in arms:
        speeds = ratios(flops, seconds[name])
        result = {
            "arm": name,
            "seconds": spread(seconds[name]),
            "speed_to_baseline": spread(ratios(seconds[BASELINE], seconds[name])),
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


def warm_up(arm: Step, model: nn.Module, batches: list[list[dict]], context: Context) -> None:
    """Let an arm take a step on each batch, on all but two only if time is left, and leave no gradients."""
    try:
        for number, batch in enumerate(batches):
            if number >= 2 and context.seconds_left() < MAX_SECONDS + COMPILE_SECONDS:
                break
            model.zero_grad()
            arm(batch)
    finally:
        model.zero_grad()


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
        ours = [result["mfu"] for result in results if result["arm"] != BASELINE]
        goals.append(goal(context, "model FLOP utilisation", max(ours, default=None), at_least=0.4))
    header = ["arm", "s / batch", "x padded eager (min to max)", "useful tokens/s"]
    header += ["of the matrix-product peak", "MFU (data sheet)", "peak memory GB"]
    return {
        "summary": f"{best['arm']}: {spread_text(best['speed_to_baseline'])} x padded eager",
        "goals": goals,
        "tables": [{"title": "forward and backward of a batch", "header": header, "rows": rows}],
    }


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
    sizes = (4, 8) if context.tiny else (64, 256, 1024, LARGEST)
    micro_batch_tokens = 256 if context.tiny else 16_384
    model = training_model(context)
    rows: Any = training_instances(context, model, max(sizes))
    script = SimpleNamespace(batch_size=sizes[0], bf16=True, seed=0, micro_batch_tokens=micro_batch_tokens)
    results = []
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = Ours(model, folder, rows, script).trainer.train_dataset  # tokenized once
        for size in sizes:
            name = f"NSP batch {size:,}"
            was_tried = False
            if size > len(rows):
                errors[name] = f"the file has {len(rows)} instances"
                continue
            if results and 5 * results[-1]["seconds"] > context.seconds_left():
                errors[name] = NO_TIME
                continue
            was_tried = True
            try:
                results.append(measure_nsp_batch(model, rows, script, folder, size))
            except Exception as error:  # e.g. too little memory: the smaller batches are results
                errors[name] = one_line(error)
            if name in errors:
                clean_up(model)
                continue
            print(f"  {results[-1]}", flush=True)
    if not results:
        raise RuntimeError(f"No NSP batch can be measured: {errors}")
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
    cells += [[name, error, "", "", ""] for name, error in errors.items()]
    header = ["NSP batch", "s / step", "useful tokens/s", "peak above weights and gradients, GB", "peak in all, GB"]
    reached = f"NSP batch {last['nsp_batch_size']:,}: {last['seconds']:.1f} s, {last['peak_memory_gb']:.1f} GB"
    memory = last.get("total_memory_gb") if last["nsp_batch_size"] == LARGEST else None
    memory_goal = goal(context, f"memory of an NSP batch of {LARGEST:,}, GB", memory, at_most=40)
    if memory is None and not was_tried:
        memory_goal["met"] = None
    return {
        **describe(context),
        "micro_batch_tokens": micro_batch_tokens,
        "batches": results,
        "errors": errors,
        "summary": "; ".join([reached, *(f"{name}: {error}" for name, error in errors.items())]),
        "goals": [memory_goal],
        "tables": [{"title": "one step with GradCache", "header": header, "rows": cells}],
    }
