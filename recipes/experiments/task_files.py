"""The tasks of an experiment in each of their settings, and the corpora that these settings need."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from modeling_cosup.files_cosup import digest, digest_file
from modeling_cosup.lines_cosup import write_lines
from trainer import load_corpus, load_evaluation_set
from trainer.judging.tasks import read_tasks
from trainer.questions import gold_ids

Entry: TypeAlias = dict[str, Any]  # a task as in a config of run_evaluation.py
Meaning: TypeAlias = dict[str, dict[str, Any]]  # name of an entry -> its task, setting, size and split


class Settings(Protocol):
    """The settings in which an experiment judges each task: `Experiment` has these fields, and others."""

    pools: list[int | str]
    corpus_sizes: list[int | str] | None
    pools_only: bool


def expand_tasks(experiment: Settings, entries: Sequence[Entry]) -> tuple[list[Entry], Meaning]:
    """
    Return each task in each of its settings.

    Args:
        experiment (`Experiment`): sets `pools` or `corpus_sizes`, and `pools_only`.
        entries (`Sequence[dict]`): the tasks, which may set another `pool` or other `pools`.

    Returns:
        `tuple[list[dict], dict]`: the entries for run_evaluation.py, and name of each entry -> `{"task", "setting",
        "size", "split"}`. `size` is an item of `corpus_sizes`, or `None`.

    Raises:
        `ValueError`: if a task sets a pool that the experiment cannot give it; see `read_tasks` too.
    """
    expanded: list[Entry] = []
    meaning: Meaning = {}
    for entry in entries:
        task = entry.get("name")
        pools = experiment.pools
        if "pool" in entry:
            pools = [entry["pool"]]
        if entry.get("pools"):
            pools = entry["pools"]
        _check_pools(experiment, entry, pools)
        settings: list[tuple[int | str, int | str | None]] = [(pool, None) for pool in pools]
        if experiment.corpus_sizes is not None:
            settings = [("full", size) for size in experiment.corpus_sizes]
        for pool, size in settings:
            name = task
            if size is not None:
                name = f"{task}-{size}"
            elif len(pools) > 1:
                name = f"{task}-{pool}"
            fields = {key: value for key, value in entry.items() if key != "pools"}
            expanded.append({**fields, "name": name, "pool": pool})
            meaning[name] = {
                "task": task,
                "setting": _setting_label(pool, size),
                "size": size,
                "split": entry.get("split"),
            }
    read_tasks(expanded)
    return expanded, meaning


def _check_pools(experiment: Settings, entry: Entry, pools: list[int | str]) -> None:
    if experiment.corpus_sizes is not None and (entry.get("pools") or entry.get("pool", "full") != "full"):
        raise ValueError(f"Task {entry.get('name')} sets its own pool, which corpus_sizes replaces: leave out one.")
    if experiment.pools_only and "full" in pools:
        raise ValueError(
            f"Task {entry.get('name')} searches the full corpus, of which pools_only leaves out passages."
        )


def _setting_label(pool: int | str, size: int | str | None) -> str:
    if isinstance(size, int):
        return f"corpus of {size:,}"
    if pool == "full":
        return "full corpus"
    return f"Top-{pool}"


def corpora_of(entries: Sequence[Entry]) -> list[str]:
    """
    Return the distinct corpus files of entries.

    Raises:
        `ValueError`: if an entry has no corpus file, because there is nothing to cut then.
    """
    without = [entry["name"] for entry in entries if not entry.get("corpus_file")]
    if without:
        raise ValueError(
            f"{len(without)} of {len(entries)} tasks have no corpus_file that corpus_sizes or pools_only could cut, "
            f"e.g. {without[0]}."
        )
    return list(dict.fromkeys(entry["corpus_file"] for entry in entries))


def cut_corpora(
    entries: Sequence[Entry], meaning: Meaning, folder: Path, max_questions: int | None = None, seed: int = 0
) -> tuple[list[Entry], list[str]]:
    """
    Write corpora of the sizes that `meaning` gives for the entries, and evaluation sets without candidates.

    A corpus holds all gold passages of the tasks that share it, and random others. A larger corpus holds the smaller
    ones.

    Args:
        entries (`Sequence[dict]`): entries from [`expand_tasks`].
        meaning (`dict`): from [`expand_tasks`]. A size `"full"` in it is replaced with the number of passages.
            Entries that are left out are removed.
        folder (`Path`): folder for the files.
        max_questions (`int`, *optional*): the most questions that each task asks, from the start of its file.
        seed (`int`): seed of the random passages.

    Returns:
        `tuple[list[dict], list[str]]`: the entries with their new files, without those whose corpus is too small, and
        notes on what was left out.

    Raises:
        `ValueError`: if a size is below the number of gold passages, or all sizes are above the number of passages.
    """
    cut_entries: list[Entry] = []
    notes: list[str] = []
    for source in corpora_of(entries):
        corpus = load_corpus(source)
        sharing = [entry for entry in entries if entry["corpus_file"] == source]
        gold = _gold_passages(sharing, max_questions)
        ordered = _gold_first(corpus, gold, seed)
        for entry in sharing:
            about = meaning[entry["name"]]
            size = len(corpus) if about["size"] == "full" else about["size"]
            if size > len(corpus):
                notes.append(f"{entry['name']}: {source} has only {len(corpus):,} passages")
                del meaning[entry["name"]]
                continue
            if size < len(gold):
                raise ValueError(
                    f"corpus_sizes holds {size:,}, but {len(gold):,} gold passages of the tasks over {source} must be "
                    "in the corpus."
                )
            about["size"] = size
            corpus_file = folder / f"{_short_digest(source)}-{digest(sorted(gold))[:8]}-{size}.jsonl"
            stem = Path(entry["eval_file"]).name.split(".")[0]
            eval_file = folder / f"{_short_digest(entry['eval_file'])}-{stem}.jsonl"
            # A small corpus lacks candidates of the questions.
            questions = [{**question, "candidates": []} for question in load_evaluation_set(entry["eval_file"])]
            write_lines(corpus_file, ordered[:size])
            write_lines(eval_file, questions)
            cut_entries.append({**entry, "corpus_file": str(corpus_file), "eval_file": str(eval_file)})
    if not cut_entries:
        raise ValueError(f"No task is left, because all corpus_sizes are too large: {'; '.join(notes)}.")
    return cut_entries, notes


def _gold_passages(entries: Sequence[Entry], max_questions: int | None) -> set[str]:
    """Return the ids of the gold passages of all questions that the entries ask."""
    limits = {(entry["eval_file"], entry.get("max_eval_samples", max_questions)) for entry in entries}
    gold: set[str] = set()
    for eval_file, limit in limits:
        for question in load_evaluation_set(eval_file)[:limit]:
            gold |= gold_ids(question)
    return gold


def _gold_first(corpus: Sequence[dict], gold: set[str], seed: int) -> list[dict]:
    """Return the passages of a corpus, the gold ones first, then the others in random order."""
    others = [passage for passage in corpus if passage["id"] not in gold]
    random.Random(seed).shuffle(others)
    return [passage for passage in corpus if passage["id"] in gold] + others


def cut_to_pools(entries: Sequence[Entry], folder: Path, options: dict[str, Any] | None = None) -> list[Entry]:
    """
    Write corpora that hold only the candidates and gold passages of the questions that the entries ask.

    Args:
        entries (`Sequence[dict]`): entries from [`expand_tasks`].
        folder (`Path`): folder for the files.
        options (`dict`, *optional*): defaults of the tasks, e.g. `max_eval_samples` and `gold_in_pool`.

    Returns:
        `list[dict]`: the entries with their new files.
    """
    corpus_files: dict[str, Path] = {}
    for source in corpora_of(entries):
        ids: set[str] = set()
        sharing = [entry for entry in entries if entry["corpus_file"] == source]
        for entry in sharing:
            (task,) = read_tasks([entry], **(options or {}))
            for question in task.read_questions():
                ids |= {*question["candidates"], *gold_ids(question)}
        corpus_files[source] = folder / f"{_short_digest(source)}-{digest(sorted(ids))[:8]}.jsonl"
        write_lines(corpus_files[source], [passage for passage in load_corpus(source) if passage["id"] in ids])
    return [{**entry, "corpus_file": str(corpus_files[entry["corpus_file"]])} for entry in entries]


def digest_of_content(source: str | Path) -> str:
    """Return the SHA-256 of the content of a file or folder, or of a name that is neither, e.g. a name on the Hub."""
    path = Path(source)
    if path.is_file():
        return digest_file(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return digest([[str(file.relative_to(path)), digest_file(file)] for file in files])
    return digest(str(source))


def _short_digest(source: str | Path) -> str:
    return digest_of_content(source)[:8]
