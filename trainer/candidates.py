"""
The passages that a reader is shown, found in an index of the training corpus that is built again as the model learns.

`candidate_refresh` says when, and `candidate_files` how all ranks build it together.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from modeling_cosup import CoSupForCausalLM, PassageIndex, Retriever
from modeling_cosup.encoding_cosup import evaluating
from modeling_cosup.files_cosup import read_json, write_json
from modeling_cosup.index_build_cosup import ShardBuilder

from .candidate_corpus import CandidateCorpus
from .candidate_files import EVALUATION, FOLDER, IndexFolders, emb_seq_ids
from .model_setup import trains_passages
from .training_args import CoSupTrainingArguments

STATE_FILE = "candidates.json"  # of a checkpoint, in its folder of the index


@dataclasses.dataclass(frozen=True)
class Candidate:
    """
    A passage that was retrieved for a question.

    Args:
        id, title, text (`str`): the passage.
        input_ids (`list[int]`): as Gen reads it, without BOS and EOS.
        emb_seq_input_ids (`list[int]`): as Emb_seq reads it.
        score (`float`): inner product of query and passage embedding; with `rerank_candidates`, from current weights.
    """

    id: str
    title: str
    text: str
    input_ids: list[int]
    emb_seq_input_ids: list[int]
    score: float = 0.0


class CandidateIndex:
    """
    The index that candidates are retrieved from. Its embeddings are from the weights at its last refresh.

    All ranks call the same methods, except for `search`.

    Args:
        corpus ([`CandidateCorpus`]): the passages, checked; or an index of them, which is searched until the first
            refresh.
        args ([`CoSupTrainingArguments`]): `num_candidates`, `rerank_candidates`, `refresh_index_steps` and
            `index_factory`, read when they are needed, because a trial of a search may change them.
        group (`ProcessGroup`, *optional*): for messages between the hosts of all ranks.
        precision (`Callable`, *optional*): returns the autocast context of training, in which passages are embedded.

    Raises:
        `ValueError`: for a corpus of fewer passages than are to be retrieved.
    """

    def __init__(
        self,
        corpus: CandidateCorpus,
        args: CoSupTrainingArguments,
        group: dist.ProcessGroup | None = None,
        precision: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> None:
        self.corpus, self.args, self.precision = corpus, args, precision
        self._check_counts()
        self.folders = IndexFolders(Path(cast(str, args.output_dir)), group, not args.disable_tqdm)
        self.step = None if corpus.index is None else 0  # whose weights the index has
        self._given = corpus.index  # of the weights at the beginning of training
        self._index = self._given  # the one that is searched
        self._built: PassageIndex | None = None  # the last refresh
        self._evaluated: tuple[int, PassageIndex] | None = None  # step and index of an evaluation while training
        self._is_fresh = False  # inside `fresh`

    def _check_counts(self) -> None:
        for name in ("num_candidates", "rerank_candidates"):
            count = getattr(self.args, name)
            if count is not None and count > len(self.corpus):
                raise ValueError(f"{name} is {count}, and the corpus holds only {len(self.corpus)} passages.")

    # ------------------------------------------------------------------ searching

    @property
    def index(self) -> Retriever:
        """The index that is searched."""
        assert self._index is not None, "refresh() comes first"
        return self._index

    def search(
        self, model: CoSupForCausalLM, query_embeds: torch.Tensor, pools: Sequence[Sequence[str] | None] | None = None
    ) -> list[list[Candidate]]:
        """
        Retrieve the candidates of each query, the best first.

        With `rerank_candidates=R`, R passages are retrieved for each query. The passages of all queries are encoded
        with the model's weights as they are now, each passage once, and the best `num_candidates` are kept.

        Args:
            model ([`CoSupForCausalLM`]): encodes passages to rerank; its tokenizers say what it reads.
            query_embeds (`torch.Tensor` of shape `(N, h)`): of these weights; N may be 0.
            pools (`list`, *optional*): for each query the ids of the only passages to search, or `None` for all.

        Returns:
            `list[list[Candidate]]`: at most `num_candidates` for each query, fewer if its pool is smaller.

        Raises:
            `ValueError`: for query embeddings that are NaN or infinite, and ids that the index does not hold.
        """
        num_searched = self.args.rerank_candidates or self.args.num_candidates
        scores, rows = self._search_rows(query_embeds, num_searched, self._rows_of_pools(pools))
        candidate_of_row = self._candidates(model, np.unique(rows[rows >= 0]))
        found = []
        for query_scores, query_rows in zip(scores.tolist(), rows.tolist(), strict=True):
            of_query = []
            for score, row in zip(query_scores, query_rows, strict=True):
                if row >= 0:
                    of_query.append(dataclasses.replace(candidate_of_row[row], score=score))
            found.append(of_query)
        if self.args.rerank_candidates:
            with self.precision():
                found = rerank(model, query_embeds, found)
        return [of_query[: self.args.num_candidates] for of_query in found]

    def _search_rows(
        self, query_embeds: torch.Tensor, k: int, pools: Sequence[np.ndarray | None] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Search the index; where an approximate search finds fewer than k passages for a query, search exactly."""
        scores, rows = self.index.search(query_embeds, k, pools)
        short: list[int] = np.flatnonzero(rows[:, -1] < 0).tolist()
        if pools is not None:
            short = [query for query in short if pools[query] is None]
        if short:
            live = self.index.live_rows()
            scores[short], rows[short] = self.index.search(query_embeds[short], k, [live] * len(short))
        return scores, rows

    def _rows_of_pools(self, pools: Sequence[Sequence[str] | None] | None) -> list[np.ndarray | None] | None:
        if pools is None:
            return None
        try:
            return [None if pool is None else self.index.rows_of(pool) for pool in pools]
        except ValueError as error:
            raise ValueError(
                f"An instance names candidates that are not in the corpus. {error} An evaluation set that brings"
                " passages of its own must be one that CoSupTrainer was made with."
            ) from error

    def _candidates(self, model: CoSupForCausalLM, rows: np.ndarray) -> dict[int, Candidate]:
        """Return the passages of rows, without scores."""
        passages = self.index.get_passages(rows)
        candidates = {}
        for row, passage, ids in zip(rows.tolist(), passages, emb_seq_ids(model, passages), strict=True):
            fields = {name: passage[name] for name in ("id", "title", "text", "input_ids")}
            candidates[row] = Candidate(**fields, emb_seq_input_ids=ids)
        return candidates

    # ------------------------------------------------------------------ refreshing

    def refresh(self, model: CoSupForCausalLM, step: int) -> None:
        """
        Build the index with the weights of a step if it is time, and search it from now on.

        That is when there is none, and then, if training changes passage embeddings, every `refresh_index_steps`.
        """
        is_due = trains_passages(model) and step % self.args.refresh_index_steps == 0 and step != self.step
        if self._index is None or is_due:
            if self._evaluated is None or self._evaluated[0] != step:
                self._built = self._build(model, f"step-{step}")
            else:
                self._built = self._evaluated[1]
            self._index, self.step = self._built, step
        elif self._evaluated is None:
            return
        self._evaluated = None
        self._tidy()

    @contextlib.contextmanager
    def fresh(self, model: CoSupForCausalLM, step: int | None = None) -> Iterator[None]:
        """
        In the block, search an index of the current weights; afterwards, training's index is searched again.

        Args:
            model ([`CoSupForCausalLM`]): its weights.
            step (`int`, *optional*): of the training that the block interrupts, if it does.
        """
        is_valid = self._index is not None and not trains_passages(model)
        if self._is_fresh or is_valid or (step is not None and step == self.step):
            yield
            return
        before = self._index
        if self._evaluated is None or step is None or self._evaluated[0] != step:
            index = self._build(model, EVALUATION if step is None else f"step-{step}")
            self._evaluated = None if step is None else (step, index)
        else:
            index = self._evaluated[1]
        self._index, self._is_fresh = index, True
        try:
            yield
        finally:
            self._index, self._is_fresh = before, False
            if step is None:
                self.folders.remove(EVALUATION)
            else:
                self._tidy()

    def _build(self, model: CoSupForCausalLM, name: str) -> PassageIndex:
        factory = self.args.index_factory
        with self.precision():
            if self._built is not None:
                return self.folders.build_again(self._built, model, name, factory)
            return self.folders.build(self.corpus.source, len(self.corpus), model, name, factory)

    def _tidy(self) -> None:
        """Remove the indexes of this training that are no longer needed."""
        needed = [self._built] if self._evaluated is None else [self._built, self._evaluated[1]]
        self.folders.keep([index.folder.name for index in needed if index is not None and index.folder is not None])

    def restart(self) -> None:
        """At the beginning of a training, forget earlier refreshes and check its arguments, which may have changed."""
        self._check_counts()
        self._forget()
        self.folders.keep([])  # what a killed training has left

    def close(self, model: CoSupForCausalLM) -> None:
        """At the end of a training, forget all indexes except a given one that is still valid."""
        if trains_passages(model):
            self._given = None
        self._forget()
        self._tidy()

    def _forget(self) -> None:
        self._index, self.step = self._given, None if self._given is None else 0
        self._built = self._evaluated = None

    # ------------------------------------------------------------------ checkpoints

    def save(self, checkpoint: Path) -> None:
        """
        Add the index to a checkpoint, as hard links where possible; called by one rank.

        An index that was given, and that no refresh has replaced, is not copied.
        """
        folder = checkpoint / FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
        folder.mkdir()
        if self._built is not None:
            assert self._built.folder is not None
            self.folders.link(self._built.folder, folder / "index")
        write_json(folder / STATE_FILE, {"step": self.step, "corpus": self.corpus.digest})

    def load(self, checkpoint: Path) -> None:
        """
        Search the index of a checkpoint again.

        Raises:
            `ValueError`: if it is of another corpus.
        """
        self.restart()
        folder = checkpoint / FOLDER
        if not (folder / STATE_FILE).exists():  # of a training without candidates
            return
        state = read_json(folder / STATE_FILE)
        if state["corpus"] != self.corpus.digest:
            raise ValueError(
                f"{checkpoint} was trained with another corpus than the one given now: resume with that, or begin a"
                " new training from the weights of the checkpoint."
            )
        self._index, self.step = self.corpus.index, state["step"]
        if (folder / "index").exists():
            self._index = self._built = self.folders.adopt(
                folder / "index", f"step-{self.step}", self.args.index_factory
            )


@torch.no_grad()
def rerank(
    model: CoSupForCausalLM, query_embeds: torch.Tensor, found: Sequence[Sequence[Candidate]]
) -> list[list[Candidate]]:
    """
    Sort the candidates of each query by the model's weights as they are now; each distinct passage is encoded once.

    Args:
        model ([`CoSupForCausalLM`]): put in evaluation mode for this.
        query_embeds (`torch.Tensor` of shape `(N, h)`): of the queries.
        found (`list[list[Candidate]]`): for each query.

    Returns:
        `list[list[Candidate]]`: the same with fresh scores, the best first.
    """
    distinct = {candidate.id: candidate for of_query in found for candidate in of_query}
    if not distinct:
        return [list(of_query) for of_query in found]
    row_of = {id: row for row, id in enumerate(distinct)}
    token_ids = [np.array(candidate.emb_seq_input_ids, np.int32) for candidate in distinct.values()]
    embeds = torch.empty(len(distinct), model.config.embedding_size)  # (D, h)
    with evaluating(model):
        ShardBuilder(model).embed(list(distinct), token_ids, embeds)
    queries = query_embeds.float().cpu()
    reranked = []
    for query, of_query in zip(queries, found, strict=True):
        # not a matrix product, which autocast would compute in half precision
        scores = (embeds[[row_of[candidate.id] for candidate in of_query]] * query).sum(1)
        fresh = [dataclasses.replace(c, score=score) for c, score in zip(of_query, scores.tolist(), strict=True)]
        reranked.append(sorted(fresh, key=lambda candidate: -candidate.score))
    return reranked
