"""A checkpoint in the demo's own process, which runs the code that comes with it."""

import argparse
import contextlib
import importlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_parts.answers import Answer
from demo_parts.questions import FORCED, MAX_RETRIEVALS, OFF, Question


class Stop:
    """A stopping criterion that ends generation at the next token after `event` is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.new_full((input_ids.shape[0],), self.event.is_set()).bool()


class LocalModel:
    """
    A checkpoint in this process, with its index. Only one call at a time uses the model.

    Args:
        args (`argparse.Namespace`): options of [`parse`].

    Raises:
        `ValueError`, `OSError`, `ImportError`: for a checkpoint or an index that cannot be loaded.
    """

    at_once = 1  # answers
    no_corpora = "This demo takes no corpora: it was started without Emb_seq, which embeds them."

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise ImportError(f"{error}. A model in the demo needs: pip install torch transformers") from error
        config = AutoConfig.from_pretrained(args.model, revision=args.revision, trust_remote_code=True)
        if config.model_type != "cosup":
            raise ValueError(
                f"{args.model} is a plain {config.model_type} model, not a CoSup checkpoint: build one from it with"
                " CoSupForCausalLM.from_gen_and_emb_seq, or with recipes/train.py --gen."
            )
        load_emb_seq = args.upload or config.query_from != "gen"  # otherwise generation needs only Gen
        model = AutoModelForCausalLM.from_pretrained(
            args.model, revision=args.revision, trust_remote_code=True, load_emb_seq=load_emb_seq
        )
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        is_folder = Path(args.model).exists()
        self.name = Path(os.path.abspath(args.model)).name if is_folder else args.model
        self.score_name = self.model.config.similarity
        self.instruction = args.instruction
        self.index = None
        faiss_options = {"allow_faiss_files": True} if args.allow_faiss_files else {}
        if args.index:
            options = {} if args.index_revision is None else {"revision": args.index_revision}
            if args.index_uri is None:
                options |= faiss_options
            self.index = self.model.load_index(args.index, args.index_uri, **options)
        self.status, self.note = "There is no index: answers come from Gen alone.", "there is no index"
        if self.index is not None:
            self.status = f"An index of {len(self.index):,} passages is searched."
            self.note = "searched: the index of this demo"
        self.memory = self.model.load_memory(args.memory, **faiss_options) if args.memory else None
        # from the code of the checkpoint: it renders a question so that a typed [NSP] stays text
        package = type(self.model).__module__.rpartition(".")[0]
        self.encode_prompt = importlib.import_module(".tokenization_cosup", package).encode_prompt
        self.lock = threading.Lock()

    def write(self, answer: Answer, question: Question, corpus: Any, stop: threading.Event) -> Iterator[None]:
        """
        Check a question; return an iterator that writes the answer, until `stop` is set or it is closed.

        Raises:
            `ValueError`: at once, if the question cannot be answered with its settings.
        """
        index = self.index if corpus is None else corpus
        if question.retrieval == FORCED and index is None:
            raise ValueError("There is no index to retrieve from: upload a corpus, or start the demo with one.")
        retrieval_config = self.model.retrieval_config_class(
            top_k=question.top_k,
            min_score=question.min_score,
            force_nsp_first=question.retrieval == FORCED,
            forbid_nsp=question.retrieval == OFF or index is None,
        )
        options = {
            "input_ids": self.encode_prompt(self.model.tokenizer, question.text, self.instruction),
            "max_new_tokens": question.max_new_tokens,
            "retriever": index,
            "retrieval_config": retrieval_config,
            "max_retrievals": MAX_RETRIEVALS,
            "memory": self.memory,
        }
        return self._write(answer, stop, **options)

    def _write(self, answer, stop, **options):
        with contextlib.closing(self.stream(stop, **options)) as events:
            for event in events:
                if event.type == "retrieval":
                    answer.begin_grounded(event.retrieval.passages, event.retrieval.scores)
                elif event.type == "grounded_end":
                    answer.end_grounded()
                else:
                    answer.write(event.text)
                yield

    def stream(self, stop: threading.Event, input_ids: list[int], **options: Any) -> Iterator[Any]:
        """Yield the events of one generate() call, which ends when `stop` is set or the caller stops iterating."""
        import torch

        streamer = self.model.make_streamer(timeout=600)
        prompt = torch.tensor([input_ids], device=self.model.device)  # (1, T)

        def work():
            try:
                with self.lock:
                    self.model.generate(prompt, streamer=streamer, stopping_criteria=[Stop(stop)], **options)
            except Exception as error:
                streamer.on_error(error)  # for errors outside generate(), which reports its own errors

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()
            thread.join()

    def add_to_index(self, index: Any, passages: list[dict[str, str]]) -> Any:
        """Return an index with these passages in addition; `None` is an empty one."""
        with self.lock:
            if index is None:
                return self.model.build_index(passages, show_progress_bar=False)
            index.add(passages, self.model, show_progress_bar=False)
            return index
