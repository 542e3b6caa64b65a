"""
Record what was trained and measured: facts and a plot of the losses, written next to the weights with their card.

`hub.py` decides when a card is written and pushed. `card_cosup` of the model's package writes its text, and
`facts_cosup` defines the facts and loads them again.
"""

import math
import platform
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import TrainerState
from transformers.utils import ADAPTER_CONFIG_NAME

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.card_cosup import model_card
from modeling_cosup.facts_cosup import Facts, Metric, ResultGroup, TrainingRecord, facts_of, load_facts
from modeling_cosup.files_cosup import read_json, write_json
from modeling_cosup.hub_cosup import CARD_FILE, CARD_MARKER, FACTS_FILE, is_repo_id

from .candidates import trains_passages
from .judging.figures import FIGURES, MAIN, MODES, SEARCHING, Measured, cor_label, figure
from .judging.intervals import Rate
from .model_setup import adapter_config, without_peft
from .training_args import CoSupTrainingArguments

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftModel

EMPTY_PEFT_CARD = "# Model Card for Model ID"  # the heading of a card that PEFT saves with adapters
MAX_LOG_ENTRIES = 500  # of a record
LOGGED = ("step", "epoch", "nsp_accuracy", "num_negatives", "target_entropy", "learning_rate")  # and every loss
GATHER_LABELS = {
    "global": "all processes",
    "local": "the query's own process",
    "detached": "all processes, without gradients",
}

# ---------------------------------------------------------------------- what training did


def training_record(
    args: CoSupTrainingArguments,
    model: "CoSupForCausalLM | PeftModel",
    dataset: "Dataset | IterableDataset | None",
    state: TrainerState,
) -> TrainingRecord:
    """
    Return the record of what training did, as far as it is known; the caller adds `curves`.

    Args:
        args ([`CoSupTrainingArguments`]): arguments of the run.
        model ([`CoSupForCausalLM`] or `PeftModel`): the trained model.
        dataset (`Dataset` or `IterableDataset`, *optional*): tokenized training set. A stream is not read again to be
            counted.
        state (`TrainerState`): state at the end of the run, with its log.
    """
    counts: Counter[str] = Counter()
    passages = None
    if dataset is not None and hasattr(dataset, "__len__"):
        columns = getattr(dataset, "column_names", None) or []
        if "dataset" in columns:
            counts.update(dataset["dataset"])
        else:
            counts[""] = len(dataset)
        if "passage_ids" in columns:
            ids: set[str] = set()
            for ids_of_instance in dataset["passage_ids"]:
                ids.update(ids_of_instance)
            passages = len(ids)
    entries = [_recorded(entry) for entry in state.log_history if "loss" in entry]
    stride = max(1, math.ceil(len(entries) / MAX_LOG_ENTRIES))
    record: TrainingRecord = {
        "instances": dict(counts.most_common()),
        "passages": passages,
        "arguments": _arguments(args, model, state),
        "log": entries[::stride],
    }
    if args.candidates_from is not None and args.num_candidates > 1:
        record["top_k"] = args.num_candidates
    return record


def _recorded(entry: dict[str, Any]) -> dict[str, Any]:
    """
    Return the part of a log entry that is recorded: every loss, whatever its name, hit rates, and `LOGGED`. Numbers
    that are not finite are left out: no facts file can hold them.
    """
    recorded = {}
    for name, value in entry.items():
        if isinstance(value, float) and not math.isfinite(value):
            continue
        if name in LOGGED or name.endswith("loss") or name.startswith("hit_rate@"):
            recorded[name] = value
    return recorded


def _arguments(
    args: CoSupTrainingArguments, model: "CoSupForCausalLM | PeftModel", state: TrainerState
) -> dict[str, str]:
    """Return the rows of the card's table of arguments, names and values as text. They hold no paths and no tokens."""
    optimizer = getattr(args.optim, "value", args.optim)
    if args.lr_decay_per_epoch:
        schedule = f"×{args.lr_decay_per_epoch:g} after every epoch"
    else:
        schedule = f"{getattr(args.lr_scheduler_type, 'value', '')} schedule"
    steps = f"{state.global_step:,}"
    if state.epoch is not None:
        steps += f" ({state.epoch:.2f} epochs)"
    if args.nsp_batch_size is not None:
        batch = args.nsp_batch_size
    else:  # auto_find_batch_size may have lowered it
        batch = (state.train_batch_size or args.train_batch_size) * args.world_size
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    negatives = [entry["num_negatives"] for entry in state.log_history if "num_negatives" in entry]
    if args.bf16:
        precision = "bfloat16 autocast"
    elif args.fp16:
        precision = "float16 autocast"
    else:
        precision = "float32"
    if args.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    runtimes = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    rows = {
        "supervision": args.supervision,
        "target of the distillation": _target(args),
        "candidates": _candidates(args, model),
        "optimizer": f"{optimizer}, weight decay {args.weight_decay:g}, gradients clipped at {args.max_grad_norm:g}",
        "learning rate": f"{args.learning_rate:g}, {schedule}",
        "Matryoshka widths": ", ".join(map(str, args.matryoshka_dims or [])) or None,
        "learning rate of control tokens": None if args.control_token_lr is None else f"{args.control_token_lr:g}",
        "steps": steps,
        "instances a step": f"{batch * args.gradient_accumulation_steps:,}",
        "NSP batch": f"{batch:,} instances" + (", GradCache" if args.nsp_batch_size else ""),
        "negatives per query": f"{sum(negatives) / len(negatives):,.1f} (mean)" if negatives else None,
        "negatives from": GATHER_LABELS[args.gather],
        "longest instance": f"{args.max_length:,} tokens",
        "trained parameters": f"{num_trained:,}",
        "adapters": _adapters(model),
        "precision": precision,
        "seed": str(args.seed),
        "hardware": f"{args.world_size} × {device}",
        "training time": f"{runtimes[-1] / 60:.1f} minutes" if runtimes else None,
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    return {name: value for name, value in rows.items() if value is not None}


def _target(args: CoSupTrainingArguments) -> str | None:
    """Return what a distillation distils, and how sharp it is; `None` without one."""
    if not args.distills:
        return None
    name, temperature = args.target
    return name if temperature is None else f"{name}, temperature {temperature:g}"


def _candidates(args: CoSupTrainingArguments, model: "CoSupForCausalLM | PeftModel") -> str | None:
    """Return how instances without a passage got their candidates; `None` if there are none."""
    if args.candidates_from is None:
        return None
    source = "of the corpus" if args.candidates_from == "index" else "of the instance's own"
    refreshes = f"every {args.refresh_index_steps:,} steps" if trains_passages(without_peft(model)) else "once"
    return f"{args.num_candidates} {source}, embedded {refreshes}"


def _adapters(model: "CoSupForCausalLM | PeftModel") -> str | None:
    """Return the kind of a model's adapters and, for LoRA, their sizes; `None` for a model without adapters."""
    config = adapter_config(model)
    if config is None:
        return None
    settings = config.to_dict()
    words = [str(getattr(config.peft_type, "value", config.peft_type))]
    for name, symbol in (("r", "r"), ("lora_alpha", "α")):
        if name in settings:
            words.append(f"{symbol} = {settings[name]}")
    return ", ".join(words)


def draw_losses(log: list[dict[str, Any]], path: Path) -> bool:
    """Plot the losses of a log. Return whether there is a plot: it needs matplotlib and two entries."""
    steps = [entry["step"] for entry in log]
    try:
        from matplotlib.figure import Figure  # here: importing it takes half a second
    except ImportError:
        Figure = None  # type: ignore[assignment, misc]
    if Figure is None or len(steps) < 2:
        path.unlink(missing_ok=True)
        return False
    names: dict[str, None] = {}
    for entry in log:
        names.update(dict.fromkeys(name for name in entry if name.endswith("_loss")))
    has_accuracy = any("nsp_accuracy" in entry for entry in log)  # not without queries that have negatives
    plot = Figure(figsize=(9, 3.2), layout="constrained")
    axes = plot.subplots(1, 1 + has_accuracy, squeeze=False)[0]
    for name in names:
        label = figure(name).label if name in FIGURES else name
        axes[0].plot(steps, [entry.get(name, float("nan")) for entry in log], label=label)
    if has_accuracy:
        shares = [100 * entry.get("nsp_accuracy", float("nan")) for entry in log]
        axes[1].plot(steps, shares, color="C2", label=f"{figure('nsp_accuracy').label} in the batch (%)")
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    plot.savefig(path, dpi=110)
    return True


# ---------------------------------------------------------------------- results


def result_group(
    figures: dict[str, Measured], dataset: str, index_size: int | None = None, labels: dict[str, str] | None = None
) -> ResultGroup:
    """
    Return the results of one evaluation set as the card shows them.

    Args:
        figures (`dict[str, Measured]`): by name, see `trainer.judging.figures`. Figures that were measured on no
            question are left out.
        dataset (`str`): name of the set.
        index_size (`int`, *optional*): number of passages that were searched.
        labels (`dict[str, str]`, *optional*): replace labels of the vocabulary, by name.
    """
    metrics: list[Metric] = []
    for name, measured in figures.items():
        if not measured["n"]:
            continue
        is_share = figure(name).scale == "share"
        scale = 100 if is_share else 1
        metrics.append(
            {
                "type": name,
                "name": (labels or {}).get(name, figure(name).label),
                "value": round(scale * measured["value"], 4),
                "interval": [round(scale * bound, 4) for bound in measured["interval"] or []],
                "unit": "%" if is_share else "",
                "n": measured["n"],
            }
        )
    return {
        "dataset": {"name": dataset, "type": dataset if is_repo_id(dataset) else "custom"},
        "index_size": index_size,
        "metrics": metrics,
    }


def held_out_group(metrics_of_set: dict[str, float], set_name: str | None = None) -> list[ResultGroup]:
    """
    Return the recall that `CoSupTrainer.evaluate()` measured, as one [`result_group`]; none if it measured none.

    Args:
        metrics_of_set (`dict[str, float]`): what `evaluate()` returned, or an entry of the log.
        set_name (`str`, *optional*): of the set, if `eval_dataset` is a dictionary of several.
    """
    prefix = "eval_" if set_name is None else f"eval_{set_name}_"
    n = int(metrics_of_set.get(f"{prefix}num_queries", 0))
    if not n:
        return []
    figures = {}
    for name in ("query_recall@1", "query_recall@5"):
        if f"{prefix}{name}" in metrics_of_set:
            figures[name] = Rate(round(metrics_of_set[f"{prefix}{name}"] * n), n).to_dict()
    title = "held-out instances" if set_name is None else f"held-out instances of {set_name}"
    return [result_group(figures, title, int(metrics_of_set[f"{prefix}num_passages"]))]


def evaluation_groups(results: dict[str, Any]) -> list[ResultGroup]:
    """
    Return the main figures of an evaluation as the card shows them.

    Args:
        results (`dict`): what [`~trainer.judging.judge.evaluate_tasks`] returned.

    Returns:
        `list[dict]`: one [`result_group`] for each task. The answers come from the mode in which the model decides
            when to retrieve, or else from the forced mode. R@1 and HR@5 are measured with the query embedding, over
            the searched passages.
    """
    groups = []
    for name, task in results["tasks"].items():
        mode = next((mode for mode in SEARCHING if mode in task["modes"]), None)
        answers = {} if mode is None else task["modes"][mode]["metrics"]
        figures = {main: answers[main] for main in MAIN if main in answers}
        scope = "corpus" if task["pool"] == "full" else "pool"
        rankings = task["query"].get(scope)
        if rankings:
            figures |= {name: rankings[name] for name in ("query_recall@1", "hit_rate@5") if name in rankings}
        labels = {
            "cor": f"Cor ({', '.join(map(cor_label, task['cor']))})",
            "gr": f"Gr (by {results['settings'].get('nli_model') or 'an NLI model'})",
        }
        title = name if scope == "corpus" else f"{name} (pools of {task['pool']})"
        if mode == "forced":
            title += f", {MODES[mode]}"
        if task["top_k"] > 1:
            title += f", {task['top_k']} passages for each [NSP]"
        groups.append(result_group(figures, title, task["passages"], labels))
    return [group for group in groups if group["metrics"]]


# ---------------------------------------------------------------------- files


def write_card(
    model: "CoSupForCausalLM | PeftModel",
    folder: str | Path,
    repo_id: str,
    facts: Facts,
    index: str | None = None,
    question: str | None = None,
    weights: str | None = None,
) -> bool:
    """
    Record facts and write the card of a checkpoint that was saved in a folder. A push of the folder includes both.

    An index and a question are recorded only if the index is a repository: a local folder is of no use to others, and
    a question may come from data that is not public. For the same reason a card for the Hub shows neither. A card that
    its owner edited (without the marker) is not replaced.

    Args:
        model ([`CoSupForCausalLM`] or `PeftModel`): the model that was saved. For adapters the base model will do,
            merged or not.
        folder (`str` or `Path`): folder of the checkpoint, or of adapters.
        repo_id (`str`): where the checkpoint will be loaded from.
        facts (`dict`): see [`Facts`].
        index (`str`, *optional*): repository or folder of an index, for the usage block.
        question (`str`, *optional*): question of the usage block.
        weights (`str`, *optional*): hash of the weights, needed if those in memory are shards.

    Returns:
        `bool`: whether the card was written.
    """
    folder = Path(folder)
    usage: Facts = {}
    if is_repo_id(repo_id) and not is_repo_id(index):
        index = question = None
    if index:
        usage["index"] = index
    if question:
        usage["question"] = question
    if is_repo_id(index):
        facts = {**facts, **usage}
    base = without_peft(model)
    base_name = None
    if (folder / ADAPTER_CONFIG_NAME).exists():
        base_name = read_json(folder / ADAPTER_CONFIG_NAME)["base_model_name_or_path"] or "the base model"
    else:
        facts = {"weights": weights or base.hash_all_weights(), **facts}
    write_json(folder / FACTS_FILE, facts)
    path = folder / CARD_FILE
    earlier = path.read_text(encoding="utf-8") if path.exists() else CARD_MARKER
    if CARD_MARKER not in earlier and EMPTY_PEFT_CARD not in earlier:
        return False
    path.write_text(model_card(base, repo_id, {**facts, **usage}, base_name), encoding="utf-8")
    return True


def add_results(folder: str | Path, groups: list[ResultGroup]) -> bool:
    """
    Add results to the facts of a checkpoint's folder and rewrite its card.

    They replace earlier results of the same evaluation sets. Facts about weights that the folder no longer holds are
    removed. A card that its owner edited (without the marker) is not replaced.

    Args:
        folder (`str` or `Path`): folder of a whole checkpoint, not of adapters.
        groups (`list[dict]`): see [`result_group`].

    Returns:
        `bool`: whether the card was written.
    """
    folder = Path(folder)
    model = CoSupForCausalLM.from_pretrained(folder)
    facts = facts_of(model)
    new_names = {group["dataset"]["name"] for group in groups}
    others = [group for group in facts.get("results", []) if group["dataset"]["name"] not in new_names]
    facts["results"] = others + groups
    return write_card(model, folder, str(folder), facts, facts.get("index"), facts.get("question"))


def complete_card(
    model: "CoSupForCausalLM | PeftModel",
    folder: str | Path,
    repo_id: str,
    results: list[ResultGroup],
    index: str | None = None,
    question: str | None = None,
) -> None:
    """Replace the results in the facts of a folder and rewrite its card; see [`write_card`]."""
    facts = load_facts(folder)
    facts["results"] = results
    write_card(model, folder, repo_id, facts, index, question)
