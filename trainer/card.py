"""What is recorded of training and evaluation: facts and a picture of the losses, written next to the weights."""

import platform
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.utils import ADAPTER_CONFIG_NAME

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.card_cosup import model_card
from modeling_cosup.facts_cosup import FACTS_FILE, facts_of, load_facts
from modeling_cosup.files_cosup import read_json, write_json
from modeling_cosup.hub_cosup import CARD_FILE, CARD_MARKER, is_repo_id

from .judging.figures import FIGURES, MAIN, SEARCHING, Measured, cor_label, figure
from .judging.intervals import Rate
from .model_setup import adapter_config, without_peft

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # type: ignore[assignment, misc]

KEPT_LINES = 500  # of a log
LOGGED = ("step", "epoch", "nsp_accuracy", "num_negatives", "learning_rate")  # and every loss


def training_record(trainer):
    """
    What training did, `dict` as JSON has it.

    Returns:
        `instances` (counts by data set), `passages` (distinct ones, where known), `arguments` (rows of a table) and `log`.
    """
    data, log = trainer.train_dataset, trainer.state.log_history
    columns = getattr(data, "column_names", None) or []
    sized = hasattr(data, "__len__")
    counts = Counter(data["dataset"]) if sized and "dataset" in columns else Counter({"": len(data)} if sized else {})
    passages = len({id for row in data["passage_ids"] for id in row}) if sized and "passage_ids" in columns else None
    kept = [_shown(entry) for entry in log if "loss" in entry]
    kept = kept[:: -(-len(kept) // KEPT_LINES) or 1]
    return {
        "instances": dict(counts.most_common()),
        "passages": passages,
        "arguments": _arguments(trainer, log),
        "log": kept,
    }


def _shown(entry):
    """What the card shows of an entry of the log: every loss, whatever its name, and `LOGGED`."""
    return {name: value for name, value in entry.items() if name in LOGGED or name.endswith("loss")}


def _arguments(trainer, log):
    """Rows of the card's table: names and values as text. No paths, no tokens."""
    args, adapters = trainer.args, adapter_config(trainer.model)
    negatives = [entry["num_negatives"] for entry in log if "num_negatives" in entry]
    runtime = next((entry["train_runtime"] for entry in reversed(log) if "train_runtime" in entry), None)
    batch = args.train_batch_size * args.world_size
    device = (
        torch.cuda.get_device_name()
        if args.device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    rows = {
        "supervision": args.supervision,
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}, weight decay {args.weight_decay:g}, gradients clipped at {args.max_grad_norm:g}",
        "learning rate": f"{args.learning_rate:g}, "
        + (
            f"×{args.lr_decay_per_epoch:g} after every epoch"
            if args.lr_decay_per_epoch
            else f"{getattr(args.lr_scheduler_type, 'value', '')} schedule"
        ),
        "steps": f"{trainer.state.global_step:,} ({trainer.state.epoch:.2f} epochs)"
        if trainer.state.epoch is not None
        else f"{trainer.state.global_step:,}",
        "instances a step": f"{batch * args.gradient_accumulation_steps:,}",
        "NSP batch": f"{batch:,} instances" + (", GradCache" if args.nsp_batch_size else ""),
        "negatives per query": f"{sum(negatives) / len(negatives):,.1f} (mean)" if negatives else None,
        "negatives from": {
            "global": "all processes",
            "local": "the own process",
            "detached": "all processes, without gradients",
        }[args.gather],
        "longest instance": f"{args.max_length:,} tokens",
        "adapters": None if adapters is None else ", ".join([adapters.peft_type.value, *_rank(adapters.to_dict())]),
        "precision": "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "float32",
        "seed": str(args.seed),
        "hardware": f"{args.world_size} × {device}",
        "training time": None if runtime is None else f"{runtime / 60:.1f} minutes",
        "versions": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }
    return {name: value for name, value in rows.items() if value is not None}


def _rank(adapters):
    return [f"{sign} = {adapters[name]}" for name, sign in (("r", "r"), ("lora_alpha", "α")) if name in adapters]


def result_group(
    figures: dict[str, Measured], dataset: str, index_size: int | None = None, labels: dict[str, str] | None = None
) -> dict:
    """
    The results of one evaluation set as the card shows them.

    Args:
        figures (`dict[str, Measured]`): by name, see `trainer.judging.figures`; figures measured on no question are
            left out.
        dataset (`str`): name of the set.
        index_size (`int`, *optional*): passages that were searched.
        labels (`dict[str, str]`, *optional*): in place of the labels of the vocabulary.
    """
    rows = []
    for name, measured in figures.items():
        if not measured["n"]:
            continue
        is_share = figure(name).scale == "share"
        scale = 100 if is_share else 1
        rows.append(
            {
                "type": name,
                "name": (labels or {}).get(name, figure(name).label),
                "value": round(scale * measured["value"], 4),
                "interval": [round(scale * bound, 4) for bound in measured["interval"]],
                "unit": "%" if is_share else "",
                "n": measured["n"],
            }
        )
    return {
        "dataset": {"name": dataset, "type": dataset if is_repo_id(dataset) else "custom"},
        "index_size": index_size,
        "metrics": rows,
    }


def held_out_group(metrics_of_set: dict[str, float]) -> list[dict]:
    """Recall that `CoSupTrainer.evaluate()` returned, as a list of one [`result_group`]; empty without queries."""
    n = int(metrics_of_set.get("eval_num_queries", 0))
    if not n:
        return []
    figures = {}
    for name in ("query_recall@1", "query_recall@5"):
        figures[name] = Rate(round(metrics_of_set[f"eval_{name}"] * n), n).to_dict()
    return [result_group(figures, "held-out instances", int(metrics_of_set["eval_num_passages"]))]


def evaluation_groups(results: dict) -> list[dict]:
    """
    The main figures of [`~trainer.judging.judge.evaluate_tasks`] as the card shows them.

    Args:
        results (`dict`): what it returned.

    Returns:
        `list[dict]`: one [`result_group`] for each task: answers by the model's own decision to retrieve (else forced),
        and R@1 of the query embedding over what was searched.
    """
    groups = []
    for name, task in results["tasks"].items():
        mode = next((mode for mode in SEARCHING if mode in task["modes"]), None)
        answers = task["modes"][mode]["metrics"] if mode is not None else {}
        figures = {main: answers[main] for main in MAIN if main in answers}
        scope = "corpus" if task["pool"] == "full" else "pool"
        if rankings := task["query"].get(scope):
            figures["query_recall@1"] = rankings["query_recall@1"]
        labels = {
            "cor": f"Cor ({', '.join(map(cor_label, task['cor']))})",
            "gr": f"Gr (by {results['settings'].get('nli_model') or 'an NLI model'})",
        }
        title = name if scope == "corpus" else f"{name} (pools of {task['pool']})"
        groups.append(result_group(figures, title, task["passages"], labels))
    return [group for group in groups if group["metrics"]]


def draw_losses(log, path):
    """A picture of the losses, where matplotlib is installed and there is something to draw; whether it was drawn."""
    steps = [entry["step"] for entry in log]
    if Figure is None or len(steps) < 2:
        path.unlink(missing_ok=True)
        return False
    picture = Figure(figsize=(9, 3.2), layout="constrained")
    losses, accuracy = picture.subplots(1, 2)
    for name in dict.fromkeys(name for entry in log for name in entry if name.endswith("_loss")):
        label = figure(name).label if name in FIGURES else name
        losses.plot(steps, [entry.get(name, float("nan")) for entry in log], label=label)
    shares = [100 * entry.get("nsp_accuracy", float("nan")) for entry in log]
    accuracy.plot(steps, shares, color="C2", label=f"{figure('nsp_accuracy').label} in the batch (%)")
    for axis in (losses, accuracy):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    picture.savefig(path, dpi=110)
    return True


# ---------------------------------------------------------------------- what is written


def write_card(model, folder, repo_id, facts, index=None, question=None, weights=None):
    """
    Record facts and write the card of a checkpoint that was saved in a folder; both travel with it when it is pushed.

    Args:
        model ([`CoSupForCausalLM`] or `PeftModel`): whose weights were saved; of adapters, the base model, merged or not.
        folder (`str` or `Path`): of the checkpoint, or of adapters.
        repo_id (`str`): where it will be loaded from.
        facts (`dict`): see [`load_facts`].
        index (`str`, *optional*): repository or folder of its index, and
        question (`str`, *optional*): for the usage block. Both are recorded only with an index that is a repository: nobody else has use for a folder here,
            and an unpublished question is data.
        weights (`str`, *optional*): hash of the weights, where those in memory are shards.
    """
    folder, base, adapters = Path(folder), without_peft(model), None
    shown = {name: value for name, value in (("index", index), ("question", question)) if value}
    facts = {**facts, **(shown if is_repo_id(index) else {})}
    if (folder / ADAPTER_CONFIG_NAME).exists():
        adapters = read_json(folder / ADAPTER_CONFIG_NAME)["base_model_name_or_path"] or "the base model"
    else:
        facts = {"weights": weights or base.hash_all_weights(), **facts}
    write_json(folder / FACTS_FILE, facts)
    (folder / CARD_FILE).write_text(model_card(base, repo_id, {**facts, **shown}, adapters), encoding="utf-8")


def add_results(folder, groups):
    """
    Add results to the facts of a checkpoint's folder, in place of earlier results of the same evaluation sets, and
    write its card anew.

    What the folder says of other weights than it holds goes. A card that its owner has made his own (its marker is gone) stays.

    Args:
        folder (`str` or `Path`): of a whole checkpoint, no adapters.
        groups (`list[dict]`): see [`result_group`].

    Returns:
        `bool`: whether the card was written.
    """
    folder = Path(folder)
    model = CoSupForCausalLM.from_pretrained(folder)
    facts, names = facts_of(model), {group["dataset"]["name"] for group in groups}
    facts["results"] = [group for group in facts.get("results", []) if group["dataset"]["name"] not in names] + groups
    card = folder / CARD_FILE
    if card.exists() and CARD_MARKER not in card.read_text(encoding="utf-8"):
        write_json(folder / FACTS_FILE, {"weights": model.hash_all_weights(), **facts})
        return False
    write_card(model, folder, str(folder), facts, facts.get("index"), facts.get("question"))
    return True


def complete_card(model, folder, repo_id, results, index=None, question=None):
    """Add results that were measured after training to the facts of a folder, and write its card anew; see [`write_card`]."""
    write_card(model, folder, repo_id, {**load_facts(folder), "results": results}, index, question)
