"""The tasks of an evaluation: their options, their questions with pools of candidates, and their indexes."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers.utils import logging

from modeling_cosup import CoSupForCausalLM, PassageIndex, Retriever
from modeling_cosup.files_cosup import digest, digest_all, digest_file, locked
from modeling_cosup.retriever_cosup import content_digest

from ..data import load_corpus, load_evaluation_set
from ..distributed import barrier, broadcast_object, rank, world_size
from ..questions import gold_ids, provenance_unknown
from .correctness import TEXT_METRICS
from .figures import SPLITS

logger = logging.get_logger(__name__)

OTHER_COR_METRICS = ("fever_nli", "str_em", "list_f1", "claim_recall")  # next to TEXT_METRICS
_RESERVED_NAMES = (".", "..", "plots", "indexes")  # "plots" and "indexes" are other folders of a results folder


@dataclass
class Task:
    """
    An evaluation set and how it is answered.

    Args:
        name (`str`): name of the task's folder, and of its row in tables.
        eval_file (`str`): the questions, see [`load_evaluation_set`].
        corpus_file (`str`, *optional*): passages to embed. One of `corpus_file` and `index`, never both, is needed
            unless nothing is retrieved.
        index (`str`, *optional*): name or path of an existing index.
        index_uri (`str`, *optional*): the Milvus server or local file that holds `index` as a collection.
        allow_faiss_files (`bool`): let FAISS read the file of `index`, if its search is approximate.
        split (`str`, *optional*): `"in-domain"` or `"out-of-domain"`, for the averages.
        pool (`str` or `int`): `"full"` searches the whole index. A number searches that many candidates of each
            question, in the order of the file, with gold candidates first if `gold_in_pool`.
        gold_in_pool (`bool`): whether gold candidates come first, so that they are in the pool (as in the paper).
            `False` takes the first candidates, gold or not (as in ALCE).
        metric (`str`, *optional*): the metric that is Cor; defaults to the metric of each question's dataset, see
            `trainer.judging.correctness.DATASET_METRICS`.
        count_empty_answers (`bool`): whether reference answers that normalise to nothing count, as in the official
            code, see [`~trainer.judging.scoring.score`].
        max_eval_samples (`int`, *optional*): ask only this many questions, from the start of the file.
        max_new_tokens (`int`), top_k (`int`), max_retrievals (`int`, *optional*): limits of each answer.

    Raises:
        `ValueError`: if a value is not valid.
    """

    name: str
    eval_file: str
    corpus_file: str | None = None
    index: str | None = None
    index_uri: str | None = None
    allow_faiss_files: bool = False
    split: str | None = None
    pool: str | int = "full"
    gold_in_pool: bool = True
    metric: str | None = None
    count_empty_answers: bool = False
    max_eval_samples: int | None = None
    max_new_tokens: int = 64
    top_k: int = 1
    max_retrievals: int | None = None

    def __post_init__(self) -> None:
        if not _is_folder_name(self.name):
            raise ValueError(f"A task's name is {self.name!r}, expected the name of a folder.")
        if self.index_uri is not None and self.index is None:
            raise ValueError(
                f"Task {self.name}: index_uri is {self.index_uri!r}, but no index says which collection there."
            )
        if self.corpus_file is not None and self.index is not None:
            raise ValueError(
                f"Task {self.name} names a corpus_file, {self.corpus_file}, and an index, {self.index}, which already"
                " holds its passages: give one of them."
            )
        if self.split not in (None, *SPLITS):
            raise ValueError(f"Task {self.name}: split is {self.split!r}, expected {' or '.join(map(repr, SPLITS))}.")
        if str(self.pool).isdigit():
            self.pool = int(self.pool)
        if self.pool != "full" and not _is_count(self.pool, minimum=1):
            raise ValueError(f"Task {self.name}: pool is {self.pool!r}, expected 'full' or a number of candidates.")
        cor_metrics = (*TEXT_METRICS, *OTHER_COR_METRICS)
        if self.metric not in (None, *cor_metrics):
            raise ValueError(f"Task {self.name}: metric is {self.metric!r}, expected one of {', '.join(cor_metrics)}.")
        if self.max_eval_samples is not None:
            self._check_count("max_eval_samples", minimum=1)
        self._check_count("max_new_tokens", minimum=1)
        self._check_count("top_k", minimum=1)
        if self.max_retrievals is not None:
            self._check_count("max_retrievals", minimum=0)

    def _check_count(self, name: str, minimum: int) -> None:
        value = getattr(self, name)
        if not _is_count(value, minimum):
            raise ValueError(f"Task {self.name}: {name} is {value!r}, expected a number of {minimum} or more.")

    def read_questions(self, corpus: list[dict] | None = None, answers_required: bool = False) -> list[dict]:
        """
        Read the questions, and return each with its pool as `candidates`.

        Args:
            corpus (`list[dict]`, *optional*), answers_required (`bool`): further checks, see [`load_evaluation_set`].

        Raises:
            `ValueError`: with counts, for questions with too few candidates or repeated ids, or if no question has
                provenance.
        """
        questions = load_evaluation_set(self.eval_file, corpus=corpus, answers_required=answers_required)
        questions = questions[: self.max_eval_samples]
        repeated = _repeated(question["id"] for question in questions)
        if repeated:
            raise ValueError(
                f"Task {self.name}: {len(repeated)} ids of {self.eval_file} occur twice, e.g. {repeated[0]!r}."
            )
        if not any(question["provenance"] or provenance_unknown(question) for question in questions):
            raise ValueError(
                f"Task {self.name}: none of the {len(questions)} questions of {self.eval_file} has provenance, so "
                "retrieval cannot be judged. If it is unknown, leave provenance out: an empty list says that a "
                "question needs no passage."
            )
        if isinstance(self.pool, str):
            return questions
        short = [question["id"] for question in questions if len(set(question["candidates"])) < self.pool]
        if short:
            raise ValueError(
                f"Task {self.name}: {len(short)} of {len(questions)} questions have fewer than {self.pool} "
                f"candidates, e.g. {short[0]!r}; recipes/build_candidates.py makes them, or set pool to 'full'."
            )
        return [{**question, "candidates": self._pool(question)} for question in questions]

    def _pool(self, question: dict) -> list[str]:
        ids = list(dict.fromkeys(question["candidates"]))
        if self.gold_in_pool:
            gold = gold_ids(question)
            ids.sort(key=lambda id: id not in gold)  # gold first; the sort is stable, so the order is kept otherwise
        return ids[: int(self.pool)]


def _is_folder_name(name: object) -> bool:
    if not isinstance(name, str) or not name or name in _RESERVED_NAMES:
        return False
    return Path(name).name == name


def _is_count(value: object, minimum: int) -> bool:
    return type(value) is int and value >= minimum  # a bool is not a count


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def task_name(eval_file: str) -> str:
    """Return the name of the task of a single evaluation set: the file's name without its suffixes."""
    return Path(eval_file).name.split(".")[0]


def read_tasks(entries: list[dict], **defaults: Any) -> list[Task]:
    """
    Read the tasks that a config lists.

    Args:
        entries (`list[dict]`): fields of [`Task`].
        **defaults: values for the fields that an entry leaves out; `None` leaves a field to [`Task`]. An entry that
            names a `corpus_file` gets no `index`, and one that names an `index` no `corpus_file`.

    Raises:
        `ValueError`: for an unknown or missing field, or for a name that occurs twice.
    """
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"tasks is {entries!r}, expected a list of tasks, each with a name and an eval_file.")
    defaults = {name: value for name, value in defaults.items() if value is not None}
    known = [field.name for field in fields(Task)]
    tasks = []
    for number, entry in enumerate(entries, 1):
        values = {**_defaults_of(entry, defaults), **entry}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"Task {number}: unknown field {unknown[0]!r}; a task has {', '.join(known)}.")
        for name in ("name", "eval_file"):
            if not values.get(name):
                raise ValueError(f"Task {number} has no {name}.")
        tasks.append(Task(**values))
    repeated = _repeated(task.name for task in tasks)
    if repeated:
        raise ValueError(f"{len(repeated)} names of tasks occur twice: {', '.join(repeated)}.")
    return tasks


def _defaults_of(entry: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that an entry takes: no index if it names a corpus, no corpus if it names an index."""
    replaced: tuple[str, ...] = ()
    if entry.get("corpus_file") is not None:
        replaced = ("index", "index_uri")
    elif entry.get("index") is not None:
        replaced = ("corpus_file",)
    return {name: value for name, value in defaults.items() if name not in replaced}


# ---------------------------------------------------------------------- indexes


def open_index(
    task: Task, model: CoSupForCausalLM, index_cache: str | Path, batch_size: int = 256
) -> tuple[Retriever | None, str | None]:
    """
    Open the index of a task: the index it names, or the index of its corpus. The corpus is embedded unless
    `index_cache` already holds its index.

    All processes call this together and share the work. The name in the cache is made of a hash of the corpus and a
    hash of everything that decides an embedding.

    Args:
        task ([`Task`]): names an index or a corpus, or neither.
        model ([`CoSupForCausalLM`]): embeds the corpus.
        index_cache (`str` or `Path`): a folder that all processes must see.
        batch_size (`int`): the most passages per forward.

    Returns:
        `tuple[Retriever, str]`: the index and a name that identifies it; `(None, None)` if the task has neither index
        nor corpus.

    Raises:
        `ValueError`: if the index belongs to another model, or the corpus is not valid.
    """
    if task.index is not None:
        options = {"allow_faiss_files": True} if task.allow_faiss_files and task.index_uri is None else {}
        index = model.load_index(task.index, task.index_uri, **options)
        return index, content_digest(index)
    if task.corpus_file is None:
        return None, None
    name = f"{corpus_digest(task.corpus_file)[:16]}-{digest(model.fingerprint())[:16]}"
    folder = Path(index_cache) / name
    if not broadcast_object((folder / "index_config.json").exists()):  # all processes take the same way
        Path(index_cache).mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if rank() == 0:  # the other processes of this call wait for it
                lock = Path(index_cache) / f".{name}.lock"
                busy = f"{folder}: another evaluation embeds this corpus; waiting"
                stack.enter_context(locked(lock, busy, on_wait=logger.warning))
            _embed_corpus(task.corpus_file, model, folder, batch_size)
    return model.load_index(folder), name


def _embed_corpus(corpus_file: str, model: CoSupForCausalLM, folder: Path, batch_size: int) -> None:
    """Build the index of a corpus together with all processes, unless another run has built it."""
    if broadcast_object((folder / "index_config.json").exists()):
        return
    source = corpus_file if is_file(corpus_file) else load_corpus(corpus_file)
    model.build_index(
        source, save_directory=folder, batch_size=batch_size, num_processes=world_size(), process_index=rank()
    )
    barrier()
    if world_size() > 1 and rank() == 0:
        PassageIndex.merge(folder)
    barrier()


def is_file(name: str) -> bool:
    """Return whether a corpus is a file rather than the name of a dataset."""
    return os.path.isfile(name) or str(name).endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"))


def corpus_digest(source: str) -> str:
    """Return the SHA-256 of a corpus: of the bytes of a file, or of the passages of a dataset."""
    if is_file(source):
        return digest_file(source)
    return digest_all(load_corpus(source))


def check_ids(task: Task, questions: list[dict], index: Retriever) -> None:
    """
    Raise unless the index holds every gold passage and every candidate.

    Raises:
        `ValueError`: with counts of ids and questions.
    """
    ids_of_questions = [{*gold_ids(question), *question["candidates"]} for question in questions]
    try:
        index.rows_of(sorted(set().union(*ids_of_questions)))
    except ValueError as error:
        num_affected = sum(not _holds(index, ids) for ids in ids_of_questions)
        raise ValueError(
            f"Task {task.name}: gold passages or candidates of {num_affected} of {len(questions)} questions are "
            f"missing. {error}"
        ) from None


def _holds(index: Retriever, ids: Iterable[str]) -> bool:
    try:
        index.rows_of(ids)
    except ValueError:
        return False
    return True
