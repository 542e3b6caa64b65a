"""When the index of candidates is built, saved and resumed: the part of CoSupTrainer between training and index."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import Trainer

from modeling_cosup import CoSupForCausalLM, PassageIndex, Retriever
from modeling_cosup.index_approximate_cosup import empty_approximate
from modeling_cosup.retrieval_cosup import require_packages

from .candidate_corpus import CandidateCorpus, candidates_of_instances, read_candidates_corpus
from .candidates import CandidateIndex
from .dataset_setup import gold_contents
from .model_setup import trains_passages, without_peft
from .running import RunningFigures
from .training_args import CoSupTrainingArguments

TRAIN_SIZE = 65536  # embeddings that an approximate index is trained on, see PassageIndex.train_approximate


class CandidatesMixin(Trainer):
    """The part of [`CoSupTrainer`] that keeps the index of candidates."""

    args: CoSupTrainingArguments
    candidates: CandidateIndex | None = None
    _host_group: dist.ProcessGroup | None
    _running: RunningFigures

    def _set_up_candidates(self, corpus: Any, train_dataset: Any, eval_dataset: Any) -> None:
        """
        Read and check the corpus, after the instances have been tokenized.

        Args:
            corpus, train_dataset, eval_dataset: as [`CoSupTrainer`] takes them.

        Raises:
            `ImportError`: without pyarrow.
            `ValueError`: for a corpus that cannot be searched; see [`read_candidates_corpus`].
        """
        if self.args.candidates_from is None:
            return
        require_packages()
        base = without_peft(self.model)
        named: dict[str, str] = {}
        if self.args.candidates_from == "instance":
            passages, named = candidates_of_instances(_named_sets(train_dataset, eval_dataset))
            corpus = _corpus_of_instances(corpus, passages, named)
        if corpus is None:
            raise ValueError(
                "Candidates are retrieved from a corpus: give corpus, passages (a list, a dataset or a file) or an"
                " index of this model; or candidates_from='instance', if the instances bring their own."
            )
        gold = gold_contents(_named_sets(self.train_dataset, self.eval_dataset))
        read = read_candidates_corpus(corpus, base, gold, named)
        _check_searchable(read, base, self.args)
        self.candidates = CandidateIndex(read, self.args, self._host_group, lambda: self.accelerator.autocast())

    def _refresh_candidates(self) -> None:
        """Build the index of candidates if it is time; all ranks call this before they search it for a step."""
        if self.candidates is None:
            return
        start = time.time()
        self.candidates.refresh(without_peft(self.model), self.state.global_step)
        self._running.leave_out(time.time() - start)

    @contextlib.contextmanager
    def _fresh_candidates(self) -> Iterator[None]:
        """In the block, such as an evaluation, search an index of the current weights."""
        if self.candidates is None:
            yield
            return
        step = self.state.global_step if self.is_in_train else None
        start = time.time()
        with self.candidates.fresh(without_peft(self.model), step):
            self._running.leave_out(time.time() - start)
            yield

    @contextlib.contextmanager
    def _candidates_of_training(self) -> Iterator[None]:
        """Forget earlier indexes at the beginning of the block, which trains, and all of them at its end."""
        self._restart_candidates()
        try:
            yield
        finally:
            self.is_in_train = False  # also after an error
            if self.candidates is not None:
                self.candidates.close(without_peft(self.model))

    def _restart_candidates(self) -> None:
        """Forget the indexes of an attempt that failed, or of a run that was killed."""
        if self.candidates is not None:
            self.candidates.restart()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what a training resumes from, the index of candidates included."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.candidates is not None and checkpoint is not None:
            self.candidates.load(Path(checkpoint))

    def _save_candidates(self, checkpoint: str) -> None:
        """Add the index of candidates to a checkpoint."""
        if self.candidates is not None and self.is_world_process_zero():
            self.candidates.save(Path(checkpoint))


def check_given_index(
    corpus: Any, model: CoSupForCausalLM, args: CoSupTrainingArguments, has_model_init: bool
) -> None:
    """
    Check what can be checked of a corpus before a model is prepared for training.

    Raises:
        `ValueError`: for a corpus that is not searched, and for an index of another model, or one that each trial of
            a search would need anew.
    """
    if corpus is not None and args.candidates_from is None:
        raise ValueError(
            "corpus is what candidates are retrieved from: give candidates_from='index' or 'instance', or a"
            " supervision that distils."
        )
    if isinstance(corpus, Retriever):
        if has_model_init:
            raise ValueError("corpus is an index of one model, and model_init makes new ones: give passages.")
        corpus.check_model(model)


def _corpus_of_instances(corpus: Any, passages: list[dict[str, str]], named: Mapping[str, str]) -> Any:
    """Return the corpus of `candidates_from="instance"`: passages that instances bring, or what their ids name."""
    if not passages and not named and corpus is None:
        raise ValueError(
            "candidates_from='instance' searches the candidates of each instance, and none has any. Those of a stream"
            " are not known in advance: name them by their ids in a corpus."
        )
    if named and corpus is None:
        id, where = next(iter(named.items()))
        raise ValueError(f"{where}: candidates holds the id {id!r}: give the corpus that holds it, or passages.")
    if passages and corpus is not None:
        raise ValueError(
            "Some candidates of the instances are passages, and there is a corpus too: leave it out, or name the"
            " candidates by their ids in it."
        )
    return passages if corpus is None else corpus


def _check_searchable(corpus: CandidateCorpus, model: CoSupForCausalLM, args: CoSupTrainingArguments) -> None:
    """Raise for an index that cannot be kept up to date, and for a search that FAISS refuses."""
    index = corpus.index
    if index is not None and trains_passages(model) and not isinstance(index, PassageIndex):
        raise ValueError(
            f"corpus is a {type(index).__name__}, which cannot be embedded again while training changes Emb_seq: give"
            " passages or a PassageIndex, or set freeze_emb_seq."
        )
    if args.index_factory is None:
        return
    if index is not None and not trains_passages(model):
        raise ValueError("index_factory: a given index is searched as it is; call its train_approximate before.")
    empty_approximate(args.index_factory, model.config.embedding_size, min(len(corpus), TRAIN_SIZE))


def _named_sets(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Return the given sets by the names that errors use."""
    sets = {"training set": train_dataset}
    if isinstance(eval_dataset, dict):
        sets |= {f"evaluation set {name!r}": dataset for name, dataset in eval_dataset.items()}
    else:
        sets["evaluation set"] = eval_dataset
    return {name: dataset for name, dataset in sets.items() if dataset is not None}
