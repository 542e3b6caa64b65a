"""One arm of the training part: train it on the whole training set, keep the checkpoint, and judge it."""

import gc
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.files_cosup import read_json, write_json
from trainer import CoSupTrainer, CoSupTrainingArguments
from trainer.judging.results import write_results

from gpu_parts.errors import one_line
from gpu_parts.runner import Context, Skip, free_memory, is_usable, peak_memory
from gpu_parts.training_inputs import Inputs, read_inputs
from gpu_parts.training_tasks import is_judged, judge_tasks, result_of_tasks
from measuring import GB
from train_step import peak_flops

SUPERVISION = {"co": "co", "co-tied": "co", "separate": "separate"}
MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "co": {"tie_emb_seq": False},
    "co-tied": {"tie_emb_seq": True},
    "separate": {"tie_emb_seq": False, "query_from": "emb_seq"},  # one encoder of queries and passages
}
COMMON_MODEL_OPTIONS: dict[str, Any] = {"similarity": "cosine", "temperature": 0.05, "nsp_loss_weight": 1.0}
# The same for all arms. The rate lies between that of recipes/configs/smollm2_135m.yaml (three epochs) and that of the
# short trainings in docs/results; in one epoch, [NSP] needs a higher rate, see docs/results/nsp_start.
TRAINING_OPTIONS: dict[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "learning_rate": 2e-4,
    "control_token_lr": 2e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_length": 1024,
    "bf16": True,
    "logging_steps": 20,
    "include_num_input_tokens_seen": "non_padding",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
TINY_OPTIONS: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1}
SECONDS_TO_JUDGE = 20  # what must be left before the first task is judged
WARM_UP_SECONDS = 120  # a way to run the model that takes longer up to the first log is given up


@dataclass
class Speed:
    """How a model is run in training: its attention implementation, and whether its layers are compiled."""

    attention: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.attention}, {'compiled' if self.compiled else 'eager'} layers"


def speeds(device: torch.device, speed_file: Path) -> list[Speed]:
    """
    Return what to try, the fastest first: on a GPU packed rows (flex attention needs no package) and compiled layers.

    Args:
        device (`torch.device`): where the model is trained.
        speed_file (`Path`): says with what to begin; what comes before it has failed in an earlier arm.
    """
    choices = [Speed("sdpa", False)]
    if device.type == "cuda":
        choices = [Speed("flex_attention", True), Speed("sdpa", True), Speed("sdpa", False)]
    if speed_file.exists():
        first = Speed(**read_json(speed_file))
        if first in choices:
            return choices[choices.index(first) :]
    return choices


def train_and_judge(context: Context, arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """
    Train an arm, unless its checkpoint is there, and judge it on the tasks that have not been judged.

    Args:
        context ([`Context`]): device, files and time.
        arm (`str`): name of the arm.
        seed (`int`): seed of the new rows of the embeddings, and of the order of the instances.
        folder (`Path`): keeps the checkpoint until all tasks are judged, and what was measured.

    Raises:
        [`Skip`]: without the files that it needs.
        [`Later`]: if the time does not suffice for the next task.
    """
    if context.tiny and seed > 0:
        raise Skip("tiny shapes: seed 0 alone")
    inputs = read_inputs(context)
    training_file, model_folder, tasks_folder = folder / "training.json", folder / "model", folder / "tasks"
    finished = all(is_judged(task, tasks_folder) for task in inputs.tasks)
    if not was_trained_on(training_file, inputs) or not (model_folder.exists() or finished):
        shutil.rmtree(folder, ignore_errors=True)
        training = train(context, arm, seed, inputs, model_folder)
        write_results(training_file, {"inputs": inputs.facts(), **training})  # a loss may be NaN
        gc.collect()  # not `free_memory`: the record shows the peak of training and judging
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
    judged = judge_tasks(context, model_folder, inputs.tasks, tasks_folder, SECONDS_TO_JUDGE)
    shutil.rmtree(model_folder, ignore_errors=True)
    training = read_json(training_file)
    return {
        "summary": f"{inputs.weights}: {summary(training, judged)}",
        "arm": arm,
        "seed": seed,
        "weights": inputs.weights,
        "missing_tasks": inputs.missing_tasks,
        "training": training,
        **result_of_tasks(judged),
    }


def was_trained_on(training_file: Path, inputs: Inputs) -> bool:
    """Return whether an earlier call has trained this arm on the same inputs."""
    return training_file.exists() and read_json(training_file)["inputs"] == inputs.facts()


# ---------------------------------------------------------------------- training


def train(context: Context, arm: str, seed: int, inputs: Inputs, model_folder: Path) -> dict[str, Any]:
    """
    Train an arm as fast as this machine can, and save it in bfloat16.

    If a way to run the model fails, e.g. because a kernel does not compile, the next one starts from the beginning. If
    it ends the process or breaks the GPU before the first log, it ends this arm, but the next arm begins with the next
    way: `speed.json` names that one until the first log.

    Returns:
        `dict`: what was measured, and which ways failed.

    Raises:
        [`Skip`]: if the training takes longer than what is left of the time.
    """
    failures: list[str] = []
    speed_file = context.folder / "speed.json"
    choices = speeds(context.device, speed_file)
    for speed, next_speed in zip(choices, [*choices[1:], choices[-1]], strict=True):
        write_json(speed_file, asdict(next_speed))
        try:
            training = train_once(context, arm, seed, inputs, speed, model_folder)
            return {**training, "failed_before": failures}
        except Skip:
            raise
        except Exception as error:
            if speed is choices[-1] or not is_usable(context.device):
                raise
            failures.append(f"{speed}: {one_line(error)}")
            print(f"[training] {failures[-1]}", flush=True)
        free_memory(context.device)  # here the traceback, which holds tensors, is gone
    raise AssertionError("the last choice returns or raises")


def train_once(
    context: Context, arm: str, seed: int, inputs: Inputs, speed: Speed, model_folder: Path
) -> dict[str, Any]:
    """Train an arm in one way of running it, and save it; return what was measured."""
    start = time.perf_counter()
    forget_compilation()
    if speed.compiled:
        torch._dynamo.config.recompile_limit = 64  # at the limit, layers would become eager without a word
    set_seed(seed)
    model = CoSupForCausalLM.from_gen_and_emb_seq(
        inputs.gen,
        model_kwargs={"dtype": "float32", "attn_implementation": speed.attention},
        **COMMON_MODEL_OPTIONS,
        **MODEL_OPTIONS[arm],
    )
    options = TRAINING_OPTIONS | (TINY_OPTIONS if context.tiny else {})
    args = CoSupTrainingArguments(
        str(model_folder.parent / "trainer"),
        supervision=SUPERVISION[arm],
        torch_compile=speed.compiled,
        seed=seed,
        use_cpu=context.device.type == "cpu",
        **options,
    )
    stopwatch = Stopwatch(context, at_first_log=partial(write_json, context.folder / "speed.json", asdict(speed)))
    trainer = CoSupTrainer(model, args, train_dataset=inputs.instances, callbacks=[stopwatch])
    setup_seconds = time.perf_counter() - start
    start = time.perf_counter()
    trainer.train()
    stopwatch.wait()
    train_seconds = time.perf_counter() - start
    peak_gb = peak_memory(context.device) / GB
    losses = [entry for entry in trainer.state.log_history if "nsp_loss" in entry][-1]
    facts = {
        "attention": speed.attention,
        "compiled": speed.compiled,
        "setup_seconds": setup_seconds,
        "seconds": train_seconds,
        "steps": trainer.state.global_step,
        "instances": len(trainer.train_dataset),
        "tokens": trainer.state.num_input_tokens_seen,
        **stopwatch.figures(),
        "peak_memory_gb": peak_gb,
        "last_losses": {name: value for name, value in losses.items() if name.endswith(("_loss", "_accuracy"))},
    }
    save_model(trainer.accelerator.unwrap_model(trainer.model), model_folder)
    return rounded(facts)


def save_model(model: CoSupForCausalLM, folder: Path) -> None:
    """Save a model in bfloat16; the folder is complete or not there at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    for path in (folder, unfinished):
        shutil.rmtree(path, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    unfinished.rename(folder)


def forget_compilation() -> None:
    """Forget that an earlier training compiled: accelerate reads it from the environment."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_DYNAMO_"):
            del os.environ[name]


class Stopwatch(TrainerCallback):
    """
    A clock of the training that leaves out its first steps, in which kernels are compiled.

    It starts at the first log and stops at the last one; `Trainer` counts operations up to each log: 6 for each token
    and weight of Gen and Emb_seq, without attention and LM head.

    Args:
        context ([`Context`]): device and time.
        at_first_log (`Callable`): called at the first log, when this way to run the model has shown that it works.

    Raises:
        `RuntimeError`: at the first log, if kernels took too long to compile.
        [`Skip`]: at the second log, if the training would not end in time.
    """

    def __init__(self, context: Context, at_first_log: Callable[[], Any]) -> None:
        self.context = context
        self.at_first_log = at_first_log
        self.start = time.perf_counter()
        self.marks: list[dict[str, float]] = []  # at each log

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.context.device.type == "cuda":
            torch.cuda.synchronize()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when the training begins."""
        self.start = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note the time, and what has been computed so far."""
        if logs is None or "grad_norm" not in logs:  # the log after the training
            return
        self.wait()
        self.marks.append(
            {
                "time": time.perf_counter(),
                "steps": state.global_step,
                "tokens": state.num_input_tokens_seen,
                "operations": state.total_flos,
            }
        )
        self.check_time(args, state)

    def check_time(self, args: TrainingArguments, state: TrainerState) -> None:
        """Raise if the first steps show that the training takes too long."""
        warm_up = self.marks[0]["time"] - self.start
        if args.torch_compile and len(self.marks) == 1 and warm_up > WARM_UP_SECONDS:
            raise RuntimeError(f"The first {state.global_step} steps took {warm_up:.0f} s.")
        if len(self.marks) == 1:
            self.at_first_log()
        if len(self.marks) == 2:
            seconds_needed = (state.max_steps - state.global_step) * self.figures()["step_seconds"]
            seconds_left = self.context.seconds_left()
            if seconds_needed > seconds_left:
                raise Skip(
                    f"the training takes {seconds_needed / 60:.1f} more minutes, and {seconds_left / 60:.1f} are left:"
                    " give more --minutes"
                )

    def figures(self) -> dict[str, Any]:
        """Return speed and model FLOP utilisation between the first and the last log; nothing if there was one."""
        if len(self.marks) < 2:
            return {}
        first, last = self.marks[0], self.marks[-1]
        seconds = last["time"] - first["time"]
        peak = peak_flops(self.context.device)
        operations_per_second = (last["operations"] - first["operations"]) / seconds
        return {
            "timed_steps": last["steps"] - first["steps"],
            "step_seconds": seconds / (last["steps"] - first["steps"]),
            "tokens_per_second": (last["tokens"] - first["tokens"]) / seconds,
            "mfu": None if peak is None else operations_per_second / peak,
        }


def rounded(facts: dict[str, Any]) -> dict[str, Any]:
    """Return facts with floats of four digits, which keep a results file small."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in facts.items()}


def summary(training: dict[str, Any], judged: dict[str, dict[str, Any]]) -> str:
    """Return the line of the report: speed, and the mean over tasks of recall and correctness."""
    parts = [f"{training['steps']} steps in {training['seconds']:.0f} s"]
    if "tokens_per_second" in training:
        parts.append(f"{training['tokens_per_second']:,.0f} tokens/s")
    if training.get("mfu") is not None:
        parts.append(f"{training['mfu']:.0%} MFU")
    for name, label in (("query_recall@1", "R@1"), ("cor", "Cor")):
        values = [task["figures"][name]["value"] for task in judged.values() if name in task["figures"]]
        if values:
            parts.append(f"{label} {sum(values) / len(values):.1%} (mean of {len(values)} tasks)")
    return ", ".join(parts)
