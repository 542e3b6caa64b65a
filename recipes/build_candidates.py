"""
Candidate pools for an evaluation set: for each question its gold passages and the nearest others, by any retriever.

    python recipes/build_candidates.py --model sentence-transformers/all-MiniLM-L6-v2 --eval_file nq.jsonl.gz --corpus_file corpus.jsonl.gz \\
        --output_file nq_100.jsonl.gz --num_candidates 100 --index_dir cache
    python recipes/build_candidates.py --model out --index out/index --eval_file nq.jsonl.gz --output_file nq_20.jsonl.gz --num_candidates 20

The retriever is a sentence-transformers model, with its own prompts and similarity, or a CoSup checkpoint, whose query is its state at an `[NSP]` after the
prompt. Candidates stand best first, gold at its own place; gold that is not among the nearest takes the last places. `--gold_first` puts all gold first.
Everything else in the evaluation file stays as it is. Also printed: recall of the retriever over the whole corpus.

With `--index_dir` a corpus is encoded once: what is there is found by the content of passages and model, whatever the files are called, and a run that was
cut off goes on. A sentence-transformers model reads `--passage_template`, a passage without title its text alone; `[SEP]` in a slot filling question becomes a
space, since it would be a control token to many.
"""

from dataclasses import dataclass, field

from shared.cli import clear_errors, parse, table

import numpy as np
import torch
from tqdm import tqdm

from modeling_cosup.lines_cosup import writing_lines
from trainer.data import load_evaluation_set, read_rows
from trainer.judging.figures import figure, line
from trainer.judging.intervals import Rate
from trainer.judging.matching import gold_ids

from shared.indexes import INDEX_HELP, INDEX_URI_HELP, check_index_options
from shared.retrievers import CoSupRetriever, SentenceRetriever, is_cosup

KS = (1, 5, 20, 100)
QUERIES = 1024  # that are searched at once


@dataclass
class CandidateArguments:
    """Which retriever searches which passages for which questions."""

    model: str = field(metadata={"help": "name or path of a sentence-transformers model or a CoSup checkpoint"})
    eval_file: str = field(metadata={"help": "evaluation instances: JSON Lines (.gz or plain) or a dataset name"})
    output_file: str = field(
        metadata={"help": "the evaluation instances with their candidates, JSON Lines (.gz by the name)"}
    )
    corpus_file: str | None = field(
        default=None, metadata={"help": "passages {id, title, text}: JSON Lines (.gz) or Parquet"}
    )
    index: str | None = field(
        default=None,
        metadata={
            "help": f"of a CoSup checkpoint, in place of a corpus: {INDEX_HELP}, which must be of the index type FLAT"
        },
    )
    index_uri: str | None = field(default=None, metadata={"help": INDEX_URI_HELP})
    split: str = field(default="test", metadata={"help": "of a dataset name"})
    num_candidates: int = field(default=100, metadata={"help": "of a question; the paper's are 20 and 100"})
    gold_first: bool = field(default=False, metadata={"help": "all gold before the others"})
    index_dir: str | None = field(default=None, metadata={"help": "folder in which encoded corpora are kept"})
    batch_size: int = field(default=64, metadata={"help": "texts at once"})
    passage_template: str = field(
        default="{title}. {text}",
        metadata={"help": "of a sentence-transformers model; a CoSup checkpoint has its own"},
    )
    device: str = field(
        default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "where the model runs"}
    )
    dtype: str = field(default="auto", metadata={"help": "of the weights, e.g. bfloat16 on a GPU"})


def main():
    """Read the options and build the pools."""
    (args,) = parse([CandidateArguments], __doc__)
    with clear_errors():
        print(table(build(args)))


def build(args):
    """
    Write the evaluation set with candidates.

    Returns:
        `list[(str, str)]`: lines of the table that is printed.

    Raises:
        `ValueError`: for bad input, with file and line; for gold passages that the corpus lacks, with their number.
    """
    if (args.corpus_file is None) == (args.index is None):
        raise ValueError("give either --corpus_file or --index.")
    if min(args.num_candidates, args.batch_size) < 1:
        raise ValueError(
            f"--num_candidates is {args.num_candidates} and --batch_size {args.batch_size}, expected at least 1."
        )
    check_index_options(args.index, args.index_uri)
    instances = load_evaluation_set(args.eval_file, args.split, answers_required=False)
    kind = CoSupRetriever if is_cosup(args.model) else SentenceRetriever
    if args.index and kind is SentenceRetriever:
        raise ValueError(f"--index {args.index}: {args.model} is no CoSup checkpoint; give a --corpus_file.")
    retriever = kind(args)
    gold = gold_rows(instances, retriever, args.index or args.corpus_file)
    queries = retriever.embed_queries(instances)
    k = min(max(args.num_candidates, *KS), len(retriever))
    pools = []
    for start in tqdm(range(0, len(instances), QUERIES), desc="Searching", unit=" batches"):
        part = slice(start, start + QUERIES)
        _, nearest = retriever.search(queries[part], k)
        for rows, query, own in zip(nearest, queries[part], gold[part], strict=True):
            pools.append(
                make_pool(
                    rows[rows >= 0],
                    own,
                    lambda own, query=query: retriever.scores(query, own),
                    args.num_candidates,
                    args.gold_first,
                )
            )
    with writing_lines(args.output_file) as write:
        for (_, row), pool in zip(read_rows(args.eval_file, args.split), pools, strict=True):
            write({**row, "candidates": retriever.ids_of(pool.rows)})
    return summary(instances, pools, gold, len(retriever), args.num_candidates, retriever)


def gold_rows(instances, retriever, name):
    """
    For each question the rows of its gold passages, `list[numpy.ndarray]`.

    Raises:
        `ValueError`: with the number of gold passages that are not there.
    """
    ids = sorted({id for instance in instances for id in gold_ids(instance)})
    rows = dict(zip(ids, retriever.find(ids), strict=True))
    if missing := [id for id in ids if rows[id] < 0]:
        count = sum(bool(gold_ids(instance) & set(missing)) for instance in instances)
        raise ValueError(
            f"{name} lacks {len(missing)} of {len(ids)} gold passages, of {count} of {len(instances)} questions, e.g. {missing[0]!r}."
        )
    return [np.array([rows[id] for id in sorted(gold_ids(instance))], np.int64) for instance in instances]


@dataclass
class Pool:
    """
    Candidates of a question.

    Args:
        rows (`numpy.ndarray` of int64): of the corpus, in the order in which they are written.
        nearest (`numpy.ndarray` of int64): what the retriever found in the whole corpus, best first.
    """

    rows: np.ndarray
    nearest: np.ndarray


def make_pool(nearest, gold, scores, size, gold_first):
    """
    Gold and the nearest others.

    Args:
        nearest (`numpy.ndarray` of int64): rows of the corpus, best first, at least `size` of them where the corpus has so many.
        gold (`numpy.ndarray` of int64): rows of gold passages.
        scores (callable): gives the scores of gold rows.
        size (`int`): of the pool; where there is more gold, the best of it alone.
        gold_first (`bool`): else gold stands where its score puts it; what is not among the nearest comes last.

    Returns:
        [`Pool`].
    """
    gold = gold[np.argsort(-scores(gold), kind="stable")] if len(gold) else gold
    gold = gold[:size]
    others = nearest[~np.isin(nearest, gold)][: size - len(gold)]
    if gold_first:
        return Pool(np.concatenate([gold, others]), nearest)
    inside = nearest[np.isin(nearest, gold) | np.isin(nearest, others)]
    return Pool(np.concatenate([inside, gold[~np.isin(gold, inside)]]), nearest)


def summary(instances, pools, gold, num_passages, size, retriever):
    """How often a gold passage, and a whole evidence set, is among the first k of the corpus, and counts of what is not as it should be."""
    asked = [i for i, rows in enumerate(gold) if len(rows)]
    lines = [("questions", f"{len(instances):,}"), ("passages in the corpus", f"{num_passages:,}")]
    places = [{id: place for place, id in enumerate(retriever.ids_of(pool.nearest))} for pool in pools]

    def place(i, whole):
        sets = [[places[i].get(id, num_passages) for id in ids] for ids in instances[i]["provenance"]]
        return min(max(found) if whole else min(found) for found in sets)

    several = any(len(ids) > 1 for instance in instances for ids in instance["provenance"])
    ks = [k for k in KS if k <= num_passages] if asked else []
    for whole in (False, True) if several else (False,):
        found = [place(i, whole) for i in asked]
        for k in ks:
            name = f"query_recall@{k}"
            label = f"a whole evidence set in the first {k}" if whole else figure(name).label
            lines.append((label, line(Rate(sum(p < k for p in found), len(found)).to_dict(), name)))
    counts = {
        "questions without gold": len(instances) - len(asked),
        f"pools smaller than {size}": sum(len(pool.rows) < size for pool in pools),
        f"questions with more gold than {size}: the best of it was kept": sum(len(rows) > size for rows in gold),
        f"questions whose gold is not among the nearest {size}": sum(
            not np.isin(gold[i], pools[i].nearest[:size]).any() for i in asked
        ),
    }
    return lines + [(name, f"{count:,}") for name, count in counts.items() if count]


if __name__ == "__main__":
    main()
