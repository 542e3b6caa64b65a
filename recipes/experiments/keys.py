"""
What identifies a training and an evaluation: hashes of all that decides their results, so that none runs twice.

For files and models, their content counts.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from modeling_cosup.configuration_cosup import SIMILARITY_DEFAULTS
from modeling_cosup.files_cosup import digest, digest_file
from trainer.judging.results import FORMAT

from experiments.definition import ROOT, TRAIN_DEFAULTS, read_yaml
from experiments.task_files import digest_of_content

NO_PART_OF_A_RESULT = {  # options of train.py that do not change the trained model
    "num_threads",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "report_to",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataset_num_proc",
    "num_examples",
    "per_device_eval_batch_size",
    "run_name",
    "license",
}
CONFIG_FILES = ("deepspeed", "fsdp_config", "accelerator_config")  # a path or a dictionary
ONE_PROCESS = {"num_processes": 1, "num_machines": 1, "mixed_precision": "no", "distributed_type": "NO"}
NO_PART_OF_A_LAUNCH = {  # of accelerate's config
    *("compute_environment", "debug", "gpu_ids", "machine_rank", "main_process_ip", "main_process_port"),
    *("main_training_function", "rdzv_backend", "same_network"),
}
# Options of an evaluation or a task that say how answers are judged. They do not change the answers.
SCORING = ("nli_model", "gr_hypothesis", "metric", "count_empty_answers", "split")
NO_PART_OF_AN_ANSWER = ("num_threads", "batch_size", "nli_batch_size", "num_examples", "disable_tqdm", *SCORING)


def launch_settings(accelerate_config: str | Path) -> dict[str, Any]:
    """Return what a config of `accelerate launch` decides about a training; nothing for one process."""
    values = read_yaml(Path(accelerate_config))
    decisive = {name: values.get(name, default) for name, default in ONE_PROCESS.items()}
    if decisive == ONE_PROCESS:
        return {}
    return {name: value for name, value in values.items() if name not in NO_PART_OF_A_LAUNCH}


def key_of(options: dict[str, Any], launched: dict[str, Any] | None = None) -> str:
    """
    Return the key of a training: a hash of the options that decide its result. For files and models, their content
    counts.

    An option that is set to train.py's default does not change the key, nor does one that is set to the default of a
    given similarity. Without one, the files of Emb_seq may decide it. `launched` is from [`launch_settings`].
    """
    models = ("gen", "emb_seq", "query_encoder", "model_name_or_path")
    file_options = (*models, "train_file", "validation_file", "corpus_file", *CONFIG_FILES)
    ignored = NO_PART_OF_A_RESULT - decisive_for_checkpoints(options)
    settings: dict[str, Any] = dict(SIMILARITY_DEFAULTS.get(options.get("similarity"), {}))
    settings |= {name: value for name, value in options.items() if value is not None}
    hashed = {}
    for name, value in settings.items():
        if name in ignored or value == TRAIN_DEFAULTS.get(name):
            continue
        is_file = name in file_options and isinstance(value, str | Path)
        hashed[name] = digest_of_content(value) if is_file else str(value)
    if launched:
        hashed["accelerate"] = str(sorted(launched.items()))
    return digest(hashed)[:12]


def training_key(options: dict[str, Any], start_key: str | None, launched: dict[str, Any] | None = None) -> str:
    """Return the key of a training; `start_key` is that of the training whose model it starts from, if any."""
    if start_key is None:
        return key_of(options, launched)
    return key_of({**options, "model_name_or_path": start_key}, launched)


def decisive_for_checkpoints(options: dict[str, Any]) -> set[str]:
    """Return the options that decide which checkpoint becomes the model, or at which steps a training evaluates."""
    decisive: set[str] = set()
    if options.get("load_best_model_at_end"):
        decisive |= {"save_strategy", "save_steps"}
    if options.get("eval_strategy") == "steps" and options.get("eval_steps") is None:
        decisive.add("logging_steps")  # which transformers takes for eval_steps
    return decisive


def code_digest() -> str:
    """Return a hash of the code that trains and judges."""
    files = [*sorted((ROOT / "modeling_cosup").glob("*.py")), *sorted((ROOT / "trainer").rglob("*.py"))]
    return digest([[file.name, digest_file(file)] for file in files])[:12]


def scoring(evaluation: dict[str, Any], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what decides how answers are scored: the `SCORING` options of an evaluation and of each task."""
    settings = _present(evaluation, SCORING)
    if "nli_model" in settings:
        settings["nli_model"] = digest_of_content(settings["nli_model"])
    return {**settings, "tasks": {entry["name"]: _present(entry, SCORING) for entry in entries}}


def _present(options: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}


def evaluation_key(model_key: str, entries: Sequence[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    """
    Return the key of a model's answers. For the files of tasks, their content counts.

    How the answers are judged (`SCORING`) does not change the key. Another format of results does.
    """
    tasks = []
    for entry in entries:
        task = {name: value for name, value in entry.items() if name not in SCORING}
        for name in ("eval_file", "corpus_file"):
            if name in task:
                task[name] = digest_of_content(task[name])
        if task.get("index") and not task.get("index_uri") and Path(task["index"]).is_dir():
            task["index"] = digest_of_content(Path(task["index"]) / "index_config.json")  # holds all checksums
        tasks.append(task)
    options = {name: value for name, value in evaluation.items() if name not in NO_PART_OF_AN_ANSWER}
    return digest([FORMAT, model_key, tasks, options])[:12]
