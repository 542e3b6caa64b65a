"""
Judge whether a premise entails a hypothesis with an NLI model: a sequence classifier, or a T5 that writes "1" or "0",
such as the model trained on the TRUE mixture.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from modeling_cosup.architectures_cosup import num_positions
from modeling_cosup.files_cosup import digest

from ..distributed import broadcast_object, gather_objects, rank, world_size
from .grounding import Judge

logger = logging.getLogger(__name__)

DEFAULT_NLI_MODEL = "google/t5_xxl_true_nli_mixture"
MAX_LENGTH = 1024  # the most tokens of a pair, as in the paper; a model may have a lower limit
T5_ANSWERS = {"1": True, "0": False}

Pair = tuple[str, str]  # premise and hypothesis


class NLIJudge:
    """
    A judge of entailment by an NLI model. The functions of `trainer.judging` take it as `entail`.

    A pair is judged once, however often it occurs. Pairs of similar length share a batch. If a pair is too long, its
    premise is cut off at the end; its hypothesis is never cut. A T5 reads `premise: … hypothesis: …` and answers
    "1" or "0". A classifier says yes if entailment has the highest score.

    Args:
        model (`PreTrainedModel`): a sequence classifier with a label "entailment" (in any case), or a T5.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of the model.
        batch_size (`int`): pairs per batch.
        max_length (`int`, *optional*): the most tokens of a pair; defaults to what model and tokenizer allow, at most
            1,024.
        cache_file (`str` or `Path`, *optional*): JSON Lines file that keeps the answers between calls and runs, under
            a hash of model, settings and pair. Several processes may share it. By default nothing is kept.
        show_progress_bar (`bool`): whether to show a progress bar.

    Raises:
        `ValueError`: unless exactly one of a classifier's labels says entailment.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        max_length: int | None = None,
        cache_file: str | Path | None = None,
        show_progress_bar: bool = True,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.show_progress_bar = show_progress_bar
        self.writes = writes_its_answer(model.config)
        self.entailment = None if self.writes else entailment_label(model.config)
        self.max_length = max_length or _max_length(model.config, tokenizer, self.writes)
        self.cache_file: Path | None = None
        self._known: dict[str, bool] = {}
        self._fingerprint: str | None = None
        if cache_file is not None:
            self.cache_file = Path(cache_file)
            self._known = _read_cache(self.cache_file)
            self._fingerprint = self._hash_settings()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_NLI_MODEL,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "NLIJudge":
        """
        Load a judge from a repository or folder. Weights are read from safetensors only.

        Args:
            name (`str` or `Path`): the repository or folder.
            device (`str` or `torch.device`, *optional*): defaults to a GPU if there is one, and to the CPU otherwise.
                `"auto"` spreads the model over all GPUs.
            dtype (`torch.dtype`, *optional*): defaults to bfloat16 on a GPU and to float32 on the CPU.
            **options: further arguments of [`NLIJudge`].

        Raises:
            `OSError`: if the model does not exist or has no safetensors.
            `ValueError`: if weights are missing, which transformers would initialise at random, or if it is not an
                NLI model.
        """
        config = AutoConfig.from_pretrained(name)
        auto_class = AutoModelForSeq2SeqLM if writes_its_answer(config) else AutoModelForSequenceClassification
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            on_cpu = str(device).startswith("cpu")  # launchers name it "cpu:0"
            dtype = torch.float32 if on_cpu else torch.bfloat16
        placement = {"device_map": "auto"} if device == "auto" else {}
        model, info = auto_class.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **placement
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"{name} lacks {len(missing)} weights of a {type(model).__name__}, e.g. {missing[0]}: it is not a "
                "trained NLI model."
            )
        if not placement:
            model = model.to(device)
        return cls(model, AutoTokenizer.from_pretrained(name), **options)

    def __call__(self, pairs: list[Pair]) -> list[bool]:
        """
        Return whether each premise entails its hypothesis.

        Args:
            pairs (`list[tuple[str, str]]`): premise and hypothesis.

        Raises:
            `ValueError`: with counts, if the model does not answer some pairs (a T5 writes something else, or a score
                is not finite), or if a hypothesis leaves no room for a premise.
        """
        pairs = [(premise, hypothesis) for premise, hypothesis in pairs]
        key_of = {pair: self._key(pair) for pair in pairs}
        answers = {pair: self._known[key] for pair, key in key_of.items() if key in self._known}
        answers |= self._judge([pair for pair in key_of if pair not in answers], key_of)
        return [answers[pair] for pair in pairs]

    # ------------------------------------------------------------------ judging

    def _judge(self, pairs: list[Pair], key_of: dict[Pair, str]) -> dict[Pair, bool]:
        """Judge distinct pairs. If an error ends it, the answers so far are in the cache file."""
        self._check_hypotheses(pairs)
        order = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1]))
        answers: dict[Pair, bool] = {}
        unclear = []  # outputs that are not an answer
        no_bar = not (pairs and self.show_progress_bar)
        with tqdm(total=len(pairs), desc="Entailment", unit="pair", disable=no_bar) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for pair, (answer, output) in zip(batch, self._judge_batch(batch), strict=True):
                    if answer is None:
                        unclear.append(output)
                    else:
                        answers[pair] = answer
                self._remember({key_of[pair]: answers[pair] for pair in batch if pair in answers})
                bar.update(len(batch))
        if unclear:
            expected = '"1" or "0"' if self.writes else "finite scores"
            raise ValueError(
                f"The NLI model gave {len(unclear)} of {len(pairs)} pairs no answer: expected {expected}, found e.g. "
                f"{unclear[0]!r}."
            )
        return answers

    @torch.no_grad()
    def _judge_batch(self, pairs: list[Pair]) -> list[tuple[bool | None, str | list[float]]]:
        """Return for each pair its answer (`None` if it is not clear) and the model's output."""
        if self.writes:
            inputs = self._encode_for_t5(pairs).to(self.model.device)
            generate = cast(Callable[..., torch.Tensor], self.model.generate)
            written = generate(**inputs, max_new_tokens=10, do_sample=False, num_beams=1)
            texts = [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
            return [(T5_ANSWERS.get(text), text) for text in texts]
        inputs = self._encode(pairs).to(self.model.device)
        scores = self.model(**inputs).logits.float().cpu()  # (B, labels)
        answers = (scores.argmax(1) == self.entailment).tolist()
        finite = scores.isfinite().all(1).tolist()
        outputs: list[tuple[bool | None, str | list[float]]] = []
        for answer, is_finite, row in zip(answers, finite, scores.tolist(), strict=True):
            outputs.append((answer if is_finite else None, row))
        return outputs

    def _encode(self, pairs: list[Pair]) -> BatchEncoding:
        return self.tokenizer(
            [premise for premise, _ in pairs],
            [hypothesis for _, hypothesis in pairs],
            truncation="only_first",
            max_length=self.max_length,
            padding=True,
            return_tensors="pt",
        )

    def _encode_for_t5(self, pairs: list[Pair]) -> BatchEncoding:
        texts = [f"premise: {premise} hypothesis: {hypothesis}" for premise, hypothesis in pairs]
        rows = self.tokenizer(texts, verbose=False)["input_ids"]
        for i, (premise, hypothesis) in enumerate(pairs):
            # Only a pair that is too long is encoded in two parts: their tokens can differ from those of the whole.
            if len(rows[i]) > self.max_length:
                head, tail = self._ids(f"premise: {premise}"), self._ids(f"hypothesis: {hypothesis}")
                rows[i] = head[: self.max_length - len(tail) - 1] + tail + [self.tokenizer.eos_token_id]
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _check_hypotheses(self, pairs: list[Pair]) -> None:
        """Raise unless each hypothesis leaves room for at least one token of its premise."""
        num_fixed = self.tokenizer.num_special_tokens_to_add(pair=not self.writes)
        if self.writes:
            num_fixed += len(self._ids("premise: hypothesis:"))
        hypotheses = {hypothesis for _, hypothesis in pairs}
        lengths = [len(self._ids(hypothesis)) + num_fixed for hypothesis in hypotheses]
        too_long = [length for length in lengths if length >= self.max_length]
        if too_long:
            raise ValueError(
                f"{len(too_long)} of {len(lengths)} hypotheses leave no room for a premise: with special tokens they "
                f"have up to {max(too_long)} tokens of {self.max_length}."
            )

    # ------------------------------------------------------------------ keeping answers

    def _key(self, pair: Pair) -> str:
        return digest([self._fingerprint, *pair])

    def _hash_settings(self) -> str:
        """
        Hash what an answer depends on: a sample of each weight, the type of the weights, the label of entailment, the
        tokenizer and the maximum length.
        """
        probe = self.tokenizer("A probe, of IDs: naïve?")["input_ids"]
        settings = (self.max_length, self.model.dtype, self.writes, self.entailment, probe)
        sha = hashlib.sha256(repr(settings).encode())
        sha.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, parameter in self.model.named_parameters():
            sha.update(f"{name} {tuple(parameter.shape)}".encode())
            if not parameter.is_meta:  # accelerate keeps these weights elsewhere
                weights = parameter.detach().reshape(-1)
                sample = weights[:: max(1, len(weights) // 1024)]
                sha.update(sample.float().cpu().numpy().tobytes())
        return sha.hexdigest()

    def _remember(self, answers: dict[str, bool]) -> None:
        if self.cache_file is None or not answers:
            return
        self._known |= answers
        self.cache_file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"key": key, "entailed": answer}) for key, answer in answers.items()]
        with self.cache_file.open("a", encoding="utf-8") as file:
            # The newline comes first, so that a line that was cut off does not spoil the next one.
            file.write("".join(f"\n{line}" for line in lines))


class SharedJudge:
    """
    One judge for a whole process group: the first process has the pairs, and each process judges a share of them, e.g.
    on its own GPU.

    All processes create one together. The first then calls it like any judge and ends with `stop`, while the others
    `serve`.

    Args:
        entail (`Callable`): this process' judge, `list[(premise, hypothesis)]` -> `list[bool]`.
        group (`torch.distributed.ProcessGroup`, *optional*): a group on the host, to exchange pairs and answers.
    """

    def __init__(self, entail: Judge, group: dist.ProcessGroup | None = None) -> None:
        self.entail = entail
        self.group = group
        self.ended = False
        self._judge_of: dict[str, int] = {}  # digest of a pair -> the process that judges it, now and in later calls

    def __call__(self, pairs: list[Pair]) -> list[bool]:
        """
        Return whether each premise entails its hypothesis. Only the first process calls this.

        Raises:
            `ValueError`: if the judge of any process fails, with its message.
        """
        pairs = [(premise, hypothesis) for premise, hypothesis in pairs]
        broadcast_object(pairs, self.group)
        answers = self._judge_together(pairs)
        return [answers[pair] for pair in pairs]

    def serve(self) -> None:
        """Judge a share of the pairs until the first process stops. An error in any process ends all of them."""
        while (pairs := broadcast_object(None, self.group)) is not None:
            self._judge_together(pairs)

    def stop(self) -> None:
        """Release the other processes. Only the first process calls this; after an error it does nothing."""
        if not self.ended:
            broadcast_object(None, self.group)

    def _rank_of(self, pair: Pair) -> int:
        """Return the process that judges a pair. New pairs go to the processes in turn, the same on every process."""
        return self._judge_of.setdefault(digest(pair), len(self._judge_of) % world_size())

    def _judge_together(self, pairs: list[Pair]) -> dict[Pair, bool]:
        """Return the answers to the pairs of the first process, on every process."""
        share = [pair for pair in dict.fromkeys(pairs) if self._rank_of(pair) == rank()]
        answers: dict[Pair, bool] = {}
        error = None
        try:
            answers = dict(zip(share, self.entail(share), strict=True))
        except Exception as failure:  # the other processes wait for a reply
            error = f"process {rank()}: {failure}"
        replies = gather_objects((answers, error), self.group)
        errors = [error for _, error in replies if error]
        if errors:
            self.ended = True
            raise ValueError("; ".join(errors))
        merged: dict[Pair, bool] = {}
        for process_answers, _ in replies:
            merged |= process_answers
        return merged


def as_judge(nli: Judge | str) -> Judge:
    """Return a judge unchanged, or load the [`NLIJudge`] of a model's name or folder."""
    return nli if callable(nli) else NLIJudge.from_pretrained(nli)


def entailment_label(config: PretrainedConfig) -> int:
    """
    Return the index of a classifier's label for entailment: the label that begins with "entail", in any case.
    ("not_entailment" does not.)

    Raises:
        `ValueError`: unless there is exactly one such label and at least one other. The message names the labels.
    """
    label_of: Mapping[Any, str] = config.id2label or {}
    labels = [label_of[index] for index in sorted(label_of)]
    indices = [index for index, label in label_of.items() if str(label).lower().startswith("entail")]
    if len(indices) != 1 or len(labels) < 2:
        raise ValueError(
            f"The classifier's labels are {labels}, expected exactly one that begins with 'entail' and at least one "
            "other: it is no NLI model."
        )
    return int(indices[0])


def writes_its_answer(config: PretrainedConfig) -> bool:
    """Return whether a model is judged by the text it writes: an encoder-decoder without a classification head."""
    architectures = config.architectures or []
    classifies = any(name.endswith("ForSequenceClassification") for name in architectures)
    return bool(config.is_encoder_decoder) and not classifies


def _max_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, writes: bool) -> int:
    if writes:
        return MAX_LENGTH  # T5's positions are relative; its tokenizers name the 512 of its pretraining
    positions = num_positions(config) or MAX_LENGTH
    return min(tokenizer.model_max_length, positions, MAX_LENGTH)


def _read_cache(path: Path) -> dict[str, bool]:
    """Read the answers of a cache file. A line that another process did not finish is left out."""
    if not path.is_file():
        return {}
    known = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line:
            continue
        try:
            answer = json.loads(line)
            known[answer["key"]] = bool(answer["entailed"])
        except (json.JSONDecodeError, KeyError, TypeError):
            logger.warning(f"{path}: a damaged line is left out; its pair is judged again.")
    return known
