"""What all rows of a question–answer set say together: the split, right passages, and rows that belong together."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from modeling_cosup.passages_cosup import hash_id

from shared.qa_records import Record


@dataclass
class Survey:
    """
    What a first reading of all rows tells.

    Args:
        evaluated (`set[int]`): the questions for evaluation, see [`question_hash`].
        right_passages (`dict[int, list[str]]`): question -> ids of its right passages in all rows, if it has several.
        num_rows (`dict[int, int]`): instance -> number of its rows, if it has several, see [`instance_key`].
    """

    evaluated: set[int]
    right_passages: dict[int, list[str]]
    num_rows: dict[int, int]


def question_hash(question: str) -> int:
    """Return a hash of a question that does not depend on case and white space."""
    return hash_id(" ".join(question.lower().split()))


def instance_key(record: Record, is_evaluated: bool) -> int:
    """
    Return a hash that is the same for all rows of an instance.

    They have the same question and answers. A training instance has one right passage to train, so its rows have the
    same passages too.
    """
    content = [record.question, *record.answers]
    if not is_evaluated:
        content += ["", *(passage["id"] for passage in record.passages)]
    return hash_id("\0".join(content))


def survey(records: Iterable[Record], fraction: float) -> Survey:
    """
    Read all rows. It takes about 40 bytes for each.

    Args:
        records (iterable of [`Record`]): all rows, whose passages have content ids.
        fraction (`float`): share of the questions for evaluation, see [`evaluation_questions`].
    """
    row_questions, training_keys, evaluation_keys = array("q"), array("q"), array("q")
    questions, passages = array("q"), array("Q")  # for each right passage of each row
    for record in records:
        question = question_hash(record.question)
        row_questions.append(question)
        training_keys.append(instance_key(record, is_evaluated=False))
        evaluation_keys.append(instance_key(record, is_evaluated=True))
        for passage in record.passages:
            questions.append(question)
            passages.append(int(passage["id"], 16))
    question_of_row = np.array(row_questions, np.int64)
    edges = np.empty(len(questions), [("question", np.int64), ("passage", np.uint64)])
    edges["question"], edges["passage"] = questions, passages
    edges = np.unique(edges)
    evaluated = evaluation_questions(np.unique(question_of_row), edges["question"], edges["passage"], fraction)
    keys = np.where(np.isin(question_of_row, evaluated), evaluation_keys, training_keys)
    repeated, counts = np.unique(keys, return_counts=True)
    several = counts > 1
    num_rows = dict(zip(repeated[several].tolist(), counts[several].tolist(), strict=True))
    return Survey(set(evaluated.tolist()), passages_of_questions(edges), num_rows)


def passages_of_questions(edges: NDArray[np.void]) -> dict[int, list[str]]:
    """Return the right passages of each question that has several, by its hash."""
    _, first, counts = np.unique(edges["question"], return_index=True, return_counts=True)
    right_passages = {}
    for start, count in zip(first[counts > 1].tolist(), counts[counts > 1].tolist(), strict=True):
        ids = [f"{passage:016x}" for passage in edges["passage"][start : start + count].tolist()]
        right_passages[int(edges["question"][start])] = ids
    return right_passages


def evaluation_questions(
    hashes: NDArray[np.int64], questions: NDArray[np.int64], passages: NDArray[np.uint64], fraction: float
) -> NDArray[np.int64]:
    """
    Choose the questions for evaluation.

    Questions with a right passage in common form a group, as do passages with a question in common. A hash of the
    group's least question hash decides for the whole group, so the order of the rows does not matter.

    Args:
        hashes (`numpy.ndarray` of int64): of all questions, sorted, each once.
        questions, passages (`numpy.ndarray`): question and passage of each pair that belongs together.
        fraction (`float`): share of the groups, and so about that of the questions.

    Returns:
        `numpy.ndarray` of int64: the hashes of those chosen.
    """
    question_nodes = np.searchsorted(hashes, questions)
    keys_of_passages, passage_nodes = np.unique(passages, return_inverse=True)
    size = len(hashes) + len(keys_of_passages)
    edges = np.ones(len(question_nodes), bool), (question_nodes, passage_nodes + len(hashes))
    num_groups, groups = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    groups = groups[: len(hashes)]  # of the questions
    least = np.full(num_groups, np.iinfo(np.int64).max)
    np.minimum.at(least, groups, hashes)
    chosen = np.fromiter((share(value) < fraction for value in least.tolist()), bool, num_groups)
    return hashes[chosen[groups]]


def share(value: int) -> float:
    """Return a number from 0 to 1 that follows from `value` and is uniform."""
    return hash_id(str(value)) / 2**64 + 0.5
