"""The NLI judge: does a premise entail a hypothesis? A sequence classifier, or a T5 that writes "1" (as of the TRUE mixture)."""

import hashlib
import json
import logging
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from modeling_cosup.files_cosup import digest

from ..distributed import broadcast_object, gather_objects, rank, world_size

logger = logging.getLogger(__name__)

DEFAULT_NLI_MODEL = "google/t5_xxl_true_nli_mixture"
MAX_LENGTH = 1024  # the paper's, of models that have no limit of their own
T5_ANSWERS = {"1": True, "0": False}


class NLIJudge:
    """
    Answers whether premises entail hypotheses: the `entail` of `trainer.judging`.

    A pair is judged once, however often it is asked, in batches of similar length under a progress bar. A pair that is too long loses the end of its premise,
    never of its hypothesis. A T5 reads `premise: … hypothesis: …` and must write "1" or "0"; a classifier's highest score must be that of entailment.

    Args:
        model (`PreTrainedModel`): a sequence classifier with a label "entailment" (in any case), or a T5.
        tokenizer (`PreTrainedTokenizerBase`): the model's.
        batch_size (`int`): pairs a batch.
        max_length (`int`, *optional*): tokens of a pair; by default what model and tokenizer allow, at most 1,024.
        cache_file (`str` or `Path`, *optional*): JSON Lines of the answers by content hash of model, settings and pair, kept between calls and runs; several
            processes may share it. By default nothing is kept.
        show_progress_bar (`bool`).

    Raises:
        `ValueError`: when not exactly one of a classifier's labels says entailment.
    """

    def __init__(self, model, tokenizer, batch_size=32, max_length=None, cache_file=None, show_progress_bar=True):
        self.show_progress_bar = show_progress_bar
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.writes = writes_its_answer(model.config)
        self.entailment = None if self.writes else entailment_label(model.config)
        self.max_length = max_length or _max_length(model.config, tokenizer, self.writes)
        self.cache_file = None if cache_file is None else Path(cache_file)
        self._known = {} if self.cache_file is None else _read_cache(self.cache_file)
        self._fingerprint = None if self.cache_file is None else self._hash_settings()

    @classmethod
    def from_pretrained(cls, name=DEFAULT_NLI_MODEL, device=None, dtype=None, **options):
        """
        A judge from a repository or folder; weights are read from safetensors only.

        Args:
            name (`str`): of the model.
            device (`str` or `torch.device`, *optional*): a GPU if there is one, else the CPU. `"auto"` spreads the model over all GPUs.
            dtype (`torch.dtype`, *optional*): bfloat16 on a GPU, float32 on the CPU.
            options: of [`NLIJudge`].

        Raises:
            `OSError`: when the model is not there or has no safetensors.
            `ValueError`: when weights are missing, which transformers would make up, or when it is no NLI model.
        """
        config = AutoConfig.from_pretrained(name)
        kind = AutoModelForSeq2SeqLM if writes_its_answer(config) else AutoModelForSequenceClassification
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (
            torch.float32 if str(device).startswith("cpu") else torch.bfloat16
        )  # of a launch it is "cpu:0"
        placement = {"device_map": "auto"} if device == "auto" else {}
        model, info = kind.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **placement
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{name} lacks {len(missing)} weights of a {type(model).__name__}, e.g. {missing[0]}: it is no trained NLI model."
            )
        return cls(model if placement else model.to(device), AutoTokenizer.from_pretrained(name), **options)

    def __call__(self, pairs):
        """
        Whether each premise entails its hypothesis.

        Args:
            pairs (`list[tuple[str, str]]`): premise and hypothesis.

        Returns:
            `list[bool]`.

        Raises:
            `ValueError`: with counts, when the model gives some pairs no answer (a T5 writes something else, a score is NaN), or when a hypothesis leaves no
                room for a premise.
        """
        pairs = [tuple(pair) for pair in pairs]
        keys = {pair: self._key(pair) for pair in pairs}
        answers = {pair: self._known[key] for pair, key in keys.items() if key in self._known}
        answers |= self._judge([pair for pair in keys if pair not in answers], keys)
        return [answers[pair] for pair in pairs]

    # ------------------------------------------------------------------ judging

    def _judge(self, pairs, keys):
        """`{pair: bool}` of distinct pairs; what was judged before an error is in the cache file."""
        self._check_hypotheses(pairs)
        order, answers, strange = sorted(pairs, key=lambda pair: -len(pair[0]) - len(pair[1])), {}, []
        with tqdm(
            total=len(pairs), desc="Entailment", unit="pair", disable=not (pairs and self.show_progress_bar)
        ) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                for pair, (answer, output) in zip(batch, self._answer(batch), strict=True):
                    if answer is None:
                        strange.append(output)
                    else:
                        answers[pair] = answer
                self._remember({keys[pair]: answers[pair] for pair in batch if pair in answers})
                bar.update(len(batch))
        if strange:
            expected = '"1" or "0"' if self.writes else "finite scores"
            raise ValueError(
                f"The NLI model gave {len(strange)} of {len(pairs)} pairs no answer: expected {expected}, found e.g. {strange[0]!r}."
            )
        return answers

    @torch.no_grad()
    def _answer(self, pairs):
        """For each pair of a batch its answer, `True`, `False` or `None`, and what the model put out."""
        inputs = (self._encode_for_t5 if self.writes else self._encode)(pairs).to(self.model.device)
        if self.writes:
            written = self.model.generate(**inputs, max_new_tokens=10, do_sample=False, num_beams=1)
            texts = [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]
            return [(T5_ANSWERS.get(text), text) for text in texts]
        scores = self.model(**inputs).logits.float().cpu()  # (B, labels)
        entailed = scores.argmax(1) == self.entailment
        return [
            (bool(e) if row.isfinite().all() else None, row.tolist()) for e, row in zip(entailed, scores, strict=True)
        ]

    def _encode(self, pairs):
        premises, hypotheses = zip(*pairs, strict=True)
        options = {"truncation": "only_first", "max_length": self.max_length, "padding": True, "return_tensors": "pt"}
        return self.tokenizer(list(premises), list(hypotheses), **options)

    def _encode_for_t5(self, pairs):
        rows = self.tokenizer(
            [f"premise: {premise} hypothesis: {hypothesis}" for premise, hypothesis in pairs], verbose=False
        )["input_ids"]
        for row, (premise, hypothesis) in enumerate(pairs):
            if len(rows[row]) > self.max_length:  # only then in two parts, which might not join in the same tokens
                head, tail = self._ids(f"premise: {premise}"), self._ids(f"hypothesis: {hypothesis}")
                rows[row] = head[: self.max_length - len(tail) - 1] + tail + [self.tokenizer.eos_token_id]
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def _specials(self):
        return self.tokenizer.num_special_tokens_to_add(pair=not self.writes)

    def _check_hypotheses(self, pairs):
        """A hypothesis must leave room for at least one token of its premise."""
        lead = len(self._ids("premise: hypothesis:")) if self.writes else 0
        lengths = [
            len(self._ids(hypothesis)) + lead + self._specials
            for hypothesis in {hypothesis for _, hypothesis in pairs}
        ]
        if full := [length for length in lengths if length >= self.max_length]:
            raise ValueError(
                f"{len(full)} of {len(lengths)} hypotheses leave no room for a premise: with special tokens they have up to {max(full)} tokens "
                f"of {self.max_length}."
            )

    # ------------------------------------------------------------------ keeping answers

    def _key(self, pair):
        return digest([self._fingerprint, *pair])

    def _hash_settings(self):
        """What an answer depends on: a sample of each weight, its type, which label is entailment, how a probe is read, and the length."""
        told = (
            self.max_length,
            self.model.dtype,
            self.writes,
            self.entailment,
            self.tokenizer("A probe, of IDs: naïve?")["input_ids"],
        )
        digest = hashlib.sha256(repr(told).encode())
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {tuple(parameter.shape)}".encode())
            if not parameter.is_meta:  # weights that accelerate keeps elsewhere
                weights = parameter.detach().reshape(-1)
                digest.update(weights[:: max(1, len(weights) // 1024)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _remember(self, answers):
        if self.cache_file is None or not answers:
            return
        self._known |= answers
        self.cache_file.parent.mkdir(parents=True, exist_ok=True)
        with self.cache_file.open("a", encoding="utf-8") as file:
            # the newline comes first: a line that was cut off spoils no other
            file.write("".join("\n" + json.dumps({"key": key, "entailed": answer}) for key, answer in answers.items()))


class SharedJudge:
    """
    One judge of a process group: the first process asks, each answers a share, e.g. on its own GPU.

    All processes make one together. Then the first calls it as any judge and ends with `stop`, while the others `serve`.

    Args:
        entail (`Callable`): this process' judge, `list[(premise, hypothesis)]` -> `list[bool]`.
        group (`torch.distributed.ProcessGroup`, *optional*): for what processes tell each other, of the host.
    """

    def __init__(self, entail, group=None):
        self.entail, self.group, self.ended = entail, group, False

    def __call__(self, pairs):
        """
        Whether each premise entails its hypothesis, on the first process.

        Raises:
            `ValueError`: when any process' judge gives no answer, with what it said.
        """
        answers = self._answer([tuple(pair) for pair in pairs])
        return [answers[tuple(pair)] for pair in pairs]

    def serve(self):
        """Answer until the first process stops; the error of any process ends all."""
        while self._answer(None) is not None:
            pass

    def stop(self):
        """Let the other processes go on, on the first one; after an error nobody serves any more."""
        if not self.ended:
            broadcast_object(None, self.group)

    def _answer(self, pairs):
        """`{pair: bool}` of the pairs of the first process, on every process; `None` when it has stopped."""
        pairs = broadcast_object(pairs, self.group)
        if pairs is None:
            return None
        distinct, found, error = list(dict.fromkeys(pairs)), {}, None
        own = distinct[rank() :: world_size()]
        try:
            found = dict(zip(own, self.entail(own), strict=True))
        except Exception as failure:  # the others wait for an answer
            error = f"process {rank()}: {failure}"
        replies = gather_objects((found, error), self.group)
        if errors := [each for _, each in replies if each]:
            self.ended = True
            raise ValueError("; ".join(errors))
        return {pair: answer for answers, _ in replies for pair, answer in answers.items()}


def as_judge(nli):
    """A judge as it is, or the [`NLIJudge`] of a model's name or folder."""
    return nli if callable(nli) else NLIJudge.from_pretrained(nli)


def entailment_label(config):
    """
    Index of a classifier's label for entailment: the one that begins with "entail", in any case ("not_entailment" does not).

    Raises:
        `ValueError`: when there is not exactly one such label among others; names the labels.
    """
    labels = dict(sorted(config.id2label.items()))
    found = [index for index, label in labels.items() if str(label).lower().startswith("entail")]
    if len(found) != 1 or len(labels) < 2:
        raise ValueError(
            f"The classifier's labels are {list(labels.values())}, expected exactly one that begins with 'entail', beside others: no NLI model."
        )
    return int(found[0])


def writes_its_answer(config):
    """Whether a model is judged by the text it writes: an encoder-decoder without a classification head."""
    return bool(config.is_encoder_decoder) and not any(
        name.endswith("ForSequenceClassification") for name in config.architectures or []
    )


def _max_length(config, tokenizer, writes):
    if writes:
        return MAX_LENGTH  # T5's positions are relative; its tokenizers name the 512 of its pretraining
    positions = getattr(config, "max_position_embeddings", None) or MAX_LENGTH
    if "roberta" in config.model_type:
        positions -= config.pad_token_id + 1  # its positions start after the padding's
    return min(tokenizer.model_max_length, positions, MAX_LENGTH)


def _read_cache(path):
    """`{key: bool}` of a cache file; a line that another process was cut off in is left out."""
    known = {}
    for line in filter(None, path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        try:
            answer = json.loads(line)
            known[answer["key"]] = bool(answer["entailed"])
        except (json.JSONDecodeError, KeyError, TypeError):
            logger.warning(f"{path}: a damaged line is left out; its pair is judged again.")
    return known
