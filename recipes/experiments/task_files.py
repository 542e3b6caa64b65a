"""The tasks of an experiment in each of their settings, and the corpora that settings ask for."""

import random
from pathlib import Path

from modeling_cosup.files_cosup import digest, digest_file
from modeling_cosup.lines_cosup import write_lines
from trainer import load_corpus, load_evaluation_set
from trainer.judging.matching import gold_ids
from trainer.judging.tasks import read_tasks


def expand_tasks(experiment, entries):
    """
    Each task in each of its settings.

    Returns:
        `(list[dict], dict)`: entries for run_evaluation.py, and name of the entry -> `{"task", "setting", "size", "split"}`; `size` is the number of passages
        of `corpus_sizes`.

    Raises:
        `ValueError`: as from `read_tasks`.
    """
    expanded, meaning = [], {}
    for entry in entries:
        pools = entry.get("pools") or ([entry["pool"]] if "pool" in entry else experiment.pools)
        sizes = experiment.corpus_sizes or [None]
        for pool, size in [
            (pool, size) for pool in (pools if experiment.corpus_sizes is None else ["full"]) for size in sizes
        ]:
            name = (
                entry.get("name")
                if size is None and len(pools) == 1
                else f"{entry.get('name')}-{pool if size is None else size}"
            )
            setting = (
                f"corpus of {size:,}" if isinstance(size, int) else f"Top-{pool}" if pool != "full" else "full corpus"
            )
            expanded.append(
                {**{key: value for key, value in entry.items() if key != "pools"}, "name": name, "pool": pool}
            )
            meaning[name] = {"task": entry.get("name"), "setting": setting, "size": size, "split": entry.get("split")}
    read_tasks(expanded)
    return expanded, meaning


def corpora_of(entries):
    """The distinct corpus files of entries; without one there is nothing to cut."""
    if without := [entry["name"] for entry in entries if not entry.get("corpus_file")]:
        raise ValueError(
            f"{len(without)} of {len(entries)} tasks have no corpus_file that corpus_sizes or pools_only could cut, e.g. {without[0]}."
        )
    return list(dict.fromkeys(entry["corpus_file"] for entry in entries))


def cut_corpora(entries, meaning, folder, max_questions=None, seed=0):
    """
    Corpora of the sizes that entries ask for: all gold passages of the tasks that share a corpus, and random others; a larger one holds the smaller one.

    Args:
        entries, meaning: of [`expand_tasks`].
        folder (`Path`): for the files that are written, unless they are there.
        max_questions (`int`, *optional*): only the first questions of each task are asked.
        seed (`int`): of the random others.

    Returns:
        `(list[dict], list[str])`: the entries with their new files, without those whose corpus has not so many passages, and what was left out, in words.

    Raises:
        `ValueError`: when a size is below the number of gold passages.
    """
    kept, notes, orders = [], [], {}
    for source in corpora_of(entries):
        corpus, own = load_corpus(source), [entry for entry in entries if entry["corpus_file"] == source]
        questions = {
            entry["eval_file"]: load_evaluation_set(entry["eval_file"])[: entry.get("max_eval_samples", max_questions)]
            for entry in own
        }
        gold = {id for rows in questions.values() for x in rows for id in gold_ids(x)}
        others = [passage for passage in corpus if passage["id"] not in gold]
        random.Random(seed).shuffle(others)
        orders[source] = [passage for passage in corpus if passage["id"] in gold] + others
        for entry in own:
            size = meaning[entry["name"]]["size"]
            size = len(corpus) if size == "full" else size
            if size > len(corpus):
                notes.append(f"{entry['name']}: {source} has only {len(corpus):,} passages")
                continue
            if size < len(gold):
                raise ValueError(
                    f"corpus_sizes holds {size:,}, but {len(gold):,} gold passages of the tasks over {source} must be in it."
                )
            meaning[entry["name"]]["size"] = size
            corpus_file = folder / f"{digest_of_content(source)[:8]}-{digest(sorted(gold))[:8]}-{size}.jsonl"
            eval_file = (
                folder
                / f"{digest_of_content(entry['eval_file'])[:8]}-{Path(entry['eval_file']).name.split('.')[0]}.jsonl"
            )
            write_lines(corpus_file, orders[source][:size])
            write_lines(
                eval_file, [{**x, "candidates": []} for x in load_evaluation_set(entry["eval_file"])]
            )  # which the small corpora lack
            kept.append({**entry, "corpus_file": str(corpus_file), "eval_file": str(eval_file)})
    return kept, notes


def cut_to_pools(entries, folder, options=None):
    """
    Corpora of nothing but the candidates and gold passages of the questions that are asked.

    Args:
        entries: of [`expand_tasks`]; folder (`Path`): as for [`cut_corpora`].
        options (`dict`, *optional*): of tasks that do not say otherwise, e.g. `max_eval_samples` and `gold_in_pool`.

    Returns:
        `list[dict]`: the entries with their new files.
    """
    files = {}
    for source in corpora_of(entries):
        wanted = {}
        for entry in [entry for entry in entries if entry["corpus_file"] == source]:
            (task,) = read_tasks([entry], **(options or {}))
            wanted |= {id: None for x in task.read_questions() for id in (*x["candidates"], *gold_ids(x))}
        files[source] = folder / f"{digest_of_content(source)[:8]}-{digest(sorted(wanted))[:8]}.jsonl"
        write_lines(files[source], [passage for passage in load_corpus(source) if passage["id"] in wanted])
    return [{**entry, "corpus_file": str(files[entry["corpus_file"]])} for entry in entries]


def digest_of_content(source):
    """SHA-256 of the content of a file or folder; a name that is neither, e.g. of the Hub, stands for itself."""
    path = Path(source)
    if path.is_file():
        return digest_file(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        return digest([[str(file.relative_to(path)), digest_file(file)] for file in files])
    return digest(str(source))
