"""
Candidate pools for an evaluation set: for each question its gold passages and the nearest others, by any retriever.

    python recipes/build_candidates.py --model sentence-transformers/all-MiniLM-L6-v2 --eval_file nq.jsonl.gz \\
        --corpus_file corpus.jsonl.gz --output_file nq_100.jsonl.gz --num_candidates 100 --index_dir cache
    python recipes/build_candidates.py --model out --index out/index --eval_file nq.jsonl.gz \\
        --output_file nq_20.jsonl.gz --num_candidates 20

The retriever is a sentence-transformers model, with its own prompts and similarity, or a CoSup checkpoint, whose query
is the state at an `[NSP]` after the prompt. Candidates are ordered best first, and gold passages among them by their
score. Gold that is not among the nearest comes last; `--gold_first` puts all gold first. Everything else in the
evaluation file is unchanged. The recipe also prints the retriever's recall over the whole corpus.

With `--index_dir` a corpus is encoded only once: it is recognised by the content of passages and model, not by file
names, and an interrupted run is resumed. A sentence-transformers model reads a passage in the form of
`--passage_template`, or only its text if it has no title. `[SEP]` in a slot filling question becomes a space, since
many models would read it as a control token.
"""

from dataclasses import dataclass
from typing import Any

from shared.cli import check_options, clear_errors, parse, table

from shared.mining_arguments import CandidateArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([CandidateArguments], __doc__)

import numpy as np
import torch
from tqdm import tqdm

from modeling_cosup.lines_cosup import writing_lines
from trainer.data import load_evaluation_set, read_rows
from trainer.judging.figures import figure, figure_line
from trainer.judging.intervals import Rate
from trainer.questions import gold_ids

from shared.indexes import check_index_options
from shared.retrievers import CoSupRetriever, SentenceRetriever, is_cosup

KS = (1, 5, 20, 100)
QUERIES = 1024  # per search


def main() -> None:
    """Read the options and build the pools."""
    (args,) = parse([CandidateArguments], __doc__)
    with clear_errors():
        print(table(build(args)))


def build(args: CandidateArguments) -> list[tuple[str, str]]:
    """
    Write the evaluation set with candidates.

    Returns:
        `list[(str, str)]`: rows of the table to print.

    Raises:
        `ValueError`: for bad input, naming file and line, or if the corpus lacks gold passages, naming their number.
    """
    if (args.corpus_file is None) == (args.index is None):
        raise ValueError("give either --corpus_file or --index.")
    if min(args.num_candidates, args.batch_size) < 1:
        raise ValueError(
            f"--num_candidates is {args.num_candidates} and --batch_size {args.batch_size}, expected at least 1."
        )
    check_index_options(args.index, args.index_uri)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    instances = load_evaluation_set(args.eval_file, args.split, answers_required=False)
    retriever_class = CoSupRetriever if is_cosup(args.model) else SentenceRetriever
    if args.index and args.index_dir:
        raise ValueError(f"--index_dir {args.index_dir} keeps a corpus that is encoded here: --index needs none.")
    if retriever_class is CoSupRetriever and args.passage_template != CandidateArguments.passage_template:
        raise ValueError(
            f"--passage_template {args.passage_template!r} is for a sentence-transformers model: {args.model} is a"
            " CoSup checkpoint, which has its own."
        )
    if args.index and retriever_class is SentenceRetriever:
        raise ValueError(f"--index {args.index}: {args.model} is not a CoSup checkpoint; give a --corpus_file.")
    retriever = retriever_class(args)
    gold = gold_rows(instances, retriever, args.index or args.corpus_file)
    pools = make_pools(instances, gold, retriever, args.num_candidates, args.gold_first)
    with writing_lines(args.output_file) as write:
        for (_, instance), pool in zip(read_rows(args.eval_file, args.split), pools, strict=True):
            write({**instance, "candidates": retriever.ids_of(pool.rows)})
    return summary(instances, pools, gold, len(retriever), args.num_candidates, retriever)


def gold_rows(
    instances: list[dict[str, Any]], retriever: CoSupRetriever | SentenceRetriever, corpus_name: str
) -> list[np.ndarray]:
    """
    Return for each question the rows of its gold passages, `list[numpy.ndarray]`.

    Raises:
        `ValueError`: if the corpus lacks gold passages, naming their number.
    """
    ids = sorted(set().union(*map(gold_ids, instances)))
    rows = dict(zip(ids, retriever.find(ids), strict=True))
    missing = [id for id in ids if rows[id] < 0]
    if missing:
        num_questions = sum(not gold_ids(instance).isdisjoint(missing) for instance in instances)
        raise ValueError(
            f"{corpus_name} lacks {len(missing)} of {len(ids)} gold passages, of {num_questions} of {len(instances)}"
            f" questions, e.g. {missing[0]!r}."
        )
    return [np.array([rows[id] for id in sorted(gold_ids(instance))], np.int64) for instance in instances]


@dataclass
class Pool:
    """
    Candidates of a question.

    Args:
        rows (`numpy.ndarray` of int64): rows of the corpus, in the order in which they are written.
        nearest (`numpy.ndarray` of int64): rows that the retriever found in the whole corpus, best first.
    """

    rows: np.ndarray
    nearest: np.ndarray


def make_pools(
    instances: list[dict[str, Any]],
    gold: list[np.ndarray],
    retriever: CoSupRetriever | SentenceRetriever,
    size: int,
    gold_first: bool,
) -> list[Pool]:
    """Search the corpus for all questions, and return a pool of `size` candidates for each."""
    queries = retriever.embed_queries(instances)
    k = min(max(size, *KS), len(retriever))
    pools = []
    for start in tqdm(range(0, len(instances), QUERIES), desc="Searching", unit=" batches"):
        part = slice(start, start + QUERIES)
        _, nearest = retriever.search(queries[part], k)
        for nearest_of_query, query, gold_of_query in zip(nearest, queries[part], gold[part], strict=True):
            if len(gold_of_query):
                best_first = np.argsort(-retriever.scores(query, gold_of_query), kind="stable")
                gold_of_query = gold_of_query[best_first]
            found = nearest_of_query[nearest_of_query >= 0]
            pools.append(make_pool(found, gold_of_query, size, gold_first))
    return pools


def make_pool(nearest: np.ndarray, gold: np.ndarray, size: int, gold_first: bool) -> Pool:
    """
    Return a pool of the gold passages and the nearest others.

    Args:
        nearest (`numpy.ndarray` of int64): rows of the corpus, best first, at least `size` unless the corpus is
            smaller.
        gold (`numpy.ndarray` of int64): rows of gold passages, best first.
        size (`int`): size of the pool; if there is more gold, only the best is kept.
        gold_first (`bool`): put all gold first; otherwise gold is ordered by its score, and comes last if it is not
            among the nearest.
    """
    gold = gold[:size]
    is_gold = np.isin(nearest, gold)
    others = nearest[~is_gold][: size - len(gold)]
    if gold_first:
        return Pool(np.concatenate([gold, others]), nearest)
    found = nearest[is_gold | np.isin(nearest, others)]
    not_found = gold[~np.isin(gold, found)]
    return Pool(np.concatenate([found, not_found]), nearest)


def summary(
    instances: list[dict[str, Any]],
    pools: list[Pool],
    gold: list[np.ndarray],
    num_passages: int,
    size: int,
    retriever: CoSupRetriever | SentenceRetriever,
) -> list[tuple[str, str]]:
    """Return table rows: the recall over the corpus, and how many questions and pools are unusual."""
    answerable = [i for i, rows in enumerate(gold) if len(rows)]
    lines = [("questions", f"{len(instances):,}"), ("passages in the corpus", f"{num_passages:,}")]
    lines += recall_lines(instances, pools, answerable, num_passages, retriever)
    missed = [i for i in answerable if not np.isin(gold[i], pools[i].nearest[:size]).any()]
    num_overfull = sum(len(rows) > size for rows in gold)
    counts = {
        "questions without gold": len(instances) - len(answerable),
        f"pools smaller than {size}": sum(len(pool.rows) < size for pool in pools),
        f"questions with more than {size} gold passages, of which the best were kept": num_overfull,
        f"questions whose gold is not among the nearest {size}": len(missed),
    }
    return lines + [(name, f"{count:,}") for name, count in counts.items() if count]


def recall_lines(
    instances: list[dict[str, Any]],
    pools: list[Pool],
    answerable: list[int],
    num_passages: int,
    retriever: CoSupRetriever | SentenceRetriever,
) -> list[tuple[str, str]]:
    """Return table rows: how often a gold passage, or a whole evidence set, is among the k nearest passages."""
    # for each answerable question, the place of its best gold passage, and the last place of its best evidence set
    gold_places, set_places = [], []
    for i in answerable:
        places = {id: place for place, id in enumerate(retriever.ids_of(pools[i].nearest))}
        evidence_sets = [[places.get(id, num_passages) for id in ids] for ids in instances[i]["provenance"]]
        gold_places.append(min(min(places_of_set) for places_of_set in evidence_sets))
        set_places.append(min(max(places_of_set) for places_of_set in evidence_sets))
    arms = [(gold_places, False)]
    if any(len(ids) > 1 for instance in instances for ids in instance["provenance"]):
        arms.append((set_places, True))
    lines = []
    for places_of_questions, whole_set in arms:
        for k in KS:
            if k >= num_passages or not answerable:  # among as many places as passages, nothing is missed
                continue
            name = f"query_recall@{k}"
            label = f"a whole evidence set in the first {k}" if whole_set else figure(name).label
            rate = Rate(sum(place < k for place in places_of_questions), len(answerable))
            lines.append((label, figure_line(rate.to_dict(), name)))
    return lines


if __name__ == "__main__":
    main()
