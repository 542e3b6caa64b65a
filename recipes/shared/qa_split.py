"""Split questions into training and evaluation so that no passage and no question is on both sides."""

from array import array
from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from modeling_cosup.passages_cosup import hash_id

from shared.qa_records import Record


def question_hash(question: str) -> int:
    """Return a hash of a question that does not depend on case and white space."""
    return hash_id(" ".join(question.lower().split()))


def evaluation_questions(records: Iterable[Record], fraction: float) -> set[int]:
    """
    Choose the questions for evaluation.

    Questions with a right passage in common form a group, as do passages with a question in common. A hash of the
    group's least question hash decides for the whole group, so the order of the records does not matter.

    Args:
        records (iterable of [`Record`]): all questions.
        fraction (`float`): share of the groups, and so about that of the questions.

    Returns:
        `set[int]`: their hashes, see [`question_hash`].
    """
    questions, passages = array("q"), array("q")
    for record in records:
        question = question_hash(record.question)
        keys = [hash_id(passage["id"]) for passage in record.passages]
        for key in keys or [question]:
            questions.append(question)
            passages.append(key)
    hashes, question_nodes = np.unique(np.array(questions, np.int64), return_inverse=True)
    keys_of_passages, passage_nodes = np.unique(np.array(passages, np.int64), return_inverse=True)
    size = len(hashes) + len(keys_of_passages)
    edges = np.ones(len(question_nodes), bool), (question_nodes, passage_nodes + len(hashes))
    num_groups, groups = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    groups = groups[: len(hashes)]  # of the questions
    least = np.full(num_groups, np.iinfo(np.int64).max)
    np.minimum.at(least, groups, hashes)
    chosen = np.fromiter((share(value) < fraction for value in least.tolist()), bool, num_groups)
    return set(hashes[chosen[groups]].tolist())


def share(value: int) -> float:
    """Return a number from 0 to 1 that follows from `value` and is uniform."""
    return hash_id(str(value)) / 2**64 + 0.5
