"""What a model is judged on: tasks as a user lists them, their questions, their pools of candidates, and the index of each corpus, embedded once."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from modeling_cosup import CoSupForCausalLM, PassageIndex, Retriever
from modeling_cosup.files_cosup import digest, digest_all, digest_file

from ..data import load_corpus, load_evaluation_set
from ..distributed import barrier, rank, world_size
from .correctness import TEXT_METRICS
from .figures import SPLITS
from .matching import gold_ids, provenance_unknown

COR_METRICS = (*TEXT_METRICS, "fever_nli", "str_em", "claim_recall")


@dataclass
class Task:
    """
    One evaluation set, and how it is answered.

    Args:
        name (`str`): of its folder and its row in tables.
        eval_file (`str`): questions, see [`load_evaluation_set`].
        corpus_file (`str`, *optional*): passages to embed; one of `corpus_file` and `index` is needed unless nothing is retrieved.
        index (`str`, *optional*): name or path of an index that is there already.
        index_uri (`str`, *optional*): of the Milvus server, or local file, that holds it as a collection of that name.
        split (`str`, *optional*): `"in-domain"` or `"out-of-domain"`, for the averages.
        pool (`str` or `int`): `"full"`: the whole index is searched. A number: among so many candidates of each question, in the order of the file, but gold
            candidates first of all with `gold_in_pool`.
        gold_in_pool (`bool`): gold candidates are always in the pool (the paper). `False`: the first ones, whatever they are (ALCE).
        metric (`str`, *optional*): what Cor is; defaults to the metric of the questions' dataset, see `trainer.judging.correctness.DATASET_METRICS`.
        max_eval_samples (`int`, *optional*): only so many questions, the first ones.
        max_new_tokens (`int`), top_k (`int`), max_retrievals (`int`, *optional*): of each answer.

    Raises:
        `ValueError`: for values that cannot be.
    """

    name: str
    eval_file: str
    corpus_file: str | None = None
    index: str | None = None
    index_uri: str | None = None
    split: str | None = None
    pool: str | int = "full"
    gold_in_pool: bool = True
    metric: str | None = None
    max_eval_samples: int | None = None
    max_new_tokens: int = 64
    top_k: int = 1
    max_retrievals: int | None = None

    def __post_init__(self):
        if (
            not isinstance(self.name, str)
            or not self.name
            or self.name in (".", "..", "plots", "indexes")
            or Path(self.name).name != self.name
        ):
            raise ValueError(f"A task's name is {self.name!r}, expected the name of a folder.")
        if self.index_uri is not None and self.index is None:
            raise ValueError(
                f"Task {self.name}: index_uri is {self.index_uri!r}, but no index says which collection there."
            )
        if self.split not in (None, *SPLITS):
            raise ValueError(f"Task {self.name}: split is {self.split!r}, expected {' or '.join(map(repr, SPLITS))}.")
        if str(self.pool).isdigit():
            self.pool = int(self.pool)
        if self.pool != "full" and not (type(self.pool) is int and self.pool > 0):
            raise ValueError(f"Task {self.name}: pool is {self.pool!r}, expected 'full' or a number of candidates.")
        if self.metric not in (None, *COR_METRICS):
            raise ValueError(f"Task {self.name}: metric is {self.metric!r}, expected one of {', '.join(COR_METRICS)}.")
        for name in ("max_eval_samples", "max_new_tokens", "top_k", "max_retrievals"):
            value = getattr(self, name)
            if not (type(value) is int and value >= (name != "max_retrievals")) and (
                value is not None or name in ("max_new_tokens", "top_k")
            ):
                raise ValueError(f"Task {self.name}: {name} is {value!r}, expected a number of 1 or more.")

    def read_questions(self, corpus: list[dict] | None = None, answers_required: bool = False) -> list[dict]:
        """
        The questions, each with its pool as `candidates`: `list[dict]`.

        Args:
            corpus (`list[dict]`, *optional*), answers_required (`bool`): what is checked besides, see
                [`load_evaluation_set`].

        Raises:
            `ValueError`: with counts, for questions with too few candidates, ids that stand twice, or provenance that is missing everywhere.
        """
        questions = load_evaluation_set(self.eval_file, corpus=corpus, answers_required=answers_required)[
            : self.max_eval_samples
        ]
        if twice := [id for id, count in Counter(x["id"] for x in questions).items() if count > 1]:
            raise ValueError(f"Task {self.name}: {len(twice)} ids of {self.eval_file} stand twice, e.g. {twice[0]!r}.")
        if not any(x["provenance"] or provenance_unknown(x) for x in questions):
            raise ValueError(
                f"Task {self.name}: none of the {len(questions)} questions of {self.eval_file} has provenance, so retrieval cannot be judged. "
                'Where it is unknown, the questions say so: "meta": {"provenance_unknown": true}.'
            )
        if isinstance(self.pool, str):
            return questions
        if short := [x["id"] for x in questions if len(set(x["candidates"])) < self.pool]:
            raise ValueError(
                f"Task {self.name}: {len(short)} of {len(questions)} questions have fewer than {self.pool} candidates, e.g. {short[0]!r}; "
                "recipes/build_candidates.py makes them, or set pool to 'full'."
            )
        return [{**x, "candidates": self._pool(x)} for x in questions]

    def _pool(self, question: dict) -> list[str]:
        ids = list(dict.fromkeys(question["candidates"]))
        if self.gold_in_pool:
            ids.sort(key=lambda id: id not in gold_ids(question))  # stable: the others keep their order
        return ids[: int(self.pool)]


def task_name(eval_file: str) -> str:
    """Name of the task of a single evaluation set: the file's, without its endings."""
    return Path(eval_file).name.split(".")[0]


def read_tasks(entries: list[dict], **defaults) -> list[Task]:
    """
    Tasks as a config lists them.

    Args:
        entries (`list[dict]`): fields of [`Task`].
        **defaults: of the fields that an entry leaves out; `None` leaves them to [`Task`].

    Raises:
        `ValueError`: for an unknown or missing field, or a name that occurs twice.
    """
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"tasks is {entries!r}, expected a list of tasks, each with a name and an eval_file.")
    known, tasks = {field.name for field in fields(Task)}, []
    for number, entry in enumerate(entries, 1):
        values = {**{name: value for name, value in defaults.items() if value is not None}, **entry}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"Task {number}: unknown field {unknown[0]!r}; a task has {', '.join(field.name for field in fields(Task))}."
            )
        if missing := [name for name in ("name", "eval_file") if not values.get(name)]:
            raise ValueError(f"Task {number} has no {missing[0]}.")
        tasks.append(Task(**values))
    if twice := [name for name, count in Counter(task.name for task in tasks).items() if count > 1]:
        raise ValueError(f"{len(twice)} names of tasks stand twice: {', '.join(twice)}.")
    return tasks


# ---------------------------------------------------------------------- indexes


def open_index(
    task: Task, model: CoSupForCausalLM, index_cache: str | Path, batch_size: int = 256
) -> tuple[Retriever | None, str | None]:
    """
    The index of a task: the one it names, or the index of its corpus, which is embedded unless `index_cache` holds it.

    All processes call this together; they share the work. The name in the cache is made of the corpus' content and of all that decides an embedding.

    Args:
        task ([`Task`]), model ([`CoSupForCausalLM`]).
        index_cache (`str` or `Path`): a folder that all processes see.
        batch_size (`int`): most passages of a forward.

    Returns:
        `(Retriever, str)`: and what tells it from others; `(None, None)` where the task has neither index nor corpus.

    Raises:
        `ValueError`: for an index of another model, or what is wrong with the corpus.
    """
    if task.index is not None:
        index = model.load_index(task.index, task.index_uri)
        return index, digest([index.fingerprint, len(index)])
    if task.corpus_file is None:
        return None, None
    name = f"{corpus_digest(task.corpus_file)[:16]}-{digest(model.fingerprint())[:16]}"
    folder = Path(index_cache) / name
    if not (folder / "index_config.json").exists():
        barrier()  # nobody looks while another one already builds
        Path(index_cache).mkdir(parents=True, exist_ok=True)
        source = task.corpus_file if is_file(task.corpus_file) else load_corpus(task.corpus_file)
        model.build_index(
            source, save_directory=folder, batch_size=batch_size, num_processes=world_size(), process_index=rank()
        )
        barrier()
        if world_size() > 1 and rank() == 0:
            PassageIndex.merge(folder)
        barrier()
    return model.load_index(folder), name


def is_file(name: str) -> bool:
    """Whether a corpus is a file, not the name of a dataset."""
    return os.path.isfile(name) or str(name).endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"))


def corpus_digest(source: str) -> str:
    """SHA-256 of a corpus: of the file as it is, or of the passages of a dataset."""
    if is_file(source):
        return digest_file(source)
    return digest_all(load_corpus(source))


def check_ids(task: Task, questions: list[dict], index: Retriever) -> None:
    """
    Raise unless the index holds every gold passage and every candidate.

    Raises:
        `ValueError`: with counts of ids and questions.
    """
    wanted = [{*gold_ids(x), *x["candidates"]} for x in questions]
    try:
        index.rows_of(sorted(set().union(*wanted)))
    except ValueError as error:
        touched = sum(not _holds(index, ids) for ids in wanted)
        raise ValueError(
            f"Task {task.name}: gold passages or candidates of {touched} of {len(questions)} questions are missing. {error}"
        ) from None


def _holds(index: Retriever, ids: Iterable[str]) -> bool:
    try:
        index.rows_of(ids)
    except ValueError:
        return False
    return True
