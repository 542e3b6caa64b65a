"""A random model, random prompts and passages, and retrieval at known steps: nothing is downloaded."""

import random
import string
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from modeling_cosup import CoSupForCausalLM, PassageIndex, RetrievalConfig, Retriever
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq

from measuring import Meter

SHAPES = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
PROMPT_LENGTHS = (30, 80)  # tokens
PASSAGE_LENGTHS = (100, 150)
FORCED = 1e9  # higher than any score of a model


def random_words(seed: int) -> list[str]:
    """Return 200 words of 3 to 8 random letters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(200)]


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 384 tokens, trained on some words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([" ".join(words)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


class World:
    """
    A model, with random prompts and passages for it.

    Args:
        script (`BenchmarkArguments`): what to build.
        device (`torch.device`): where to build it.

    Attributes:
        model (`CoSupForCausalLM`): the model; its Emb_seq is small and takes no part in generation.
        options (`dict`): options of every generate(): greedy; no end of turn and no control token unless it is forced.
        capture_options (`dict`): further options, for a static cache and a captured step.
        description (`str`): model and hardware, for the headings of tables.
    """

    def __init__(self, script: Any, device: torch.device) -> None:
        self.script = script
        self.device = device
        self.meter = Meter(device)
        self.description = ""
        self.words = random_words(script.seed)
        self.model = self._make_model()
        self.config = self.model.config
        self.pad_id = self.model.generation_config.pad_token_id
        end_ids = self.model.generation_config.eos_token_id
        self.end_id = end_ids[0]
        control_ids = (self.config.nsp_token_id, self.config.cs_token_id, self.config.ce_token_id)
        suppressed_ids = {*end_ids, self.pad_id, *control_ids}
        self.options = {
            "do_sample": False,
            "pad_token_id": self.pad_id,
            "eos_token_id": end_ids,
            "suppress_tokens": sorted(suppressed_ids),
        }
        special_ids = suppressed_ids | set(self.model.tokenizer.all_special_ids)
        self.ordinary_ids = [id for id in range(len(self.model.tokenizer)) if id not in special_ids]
        self.capture_options: dict[str, Any] = {"cache_implementation": "static"}
        if device.type == "cpu":  # by default, transformers captures only on a GPU
            compile_config = CompileConfig(mode="default")
            compile_config._compile_all_devices = True
            self.capture_options["compile_config"] = compile_config

    def _make_model(self) -> CoSupForCausalLM:
        dtype = getattr(torch, self.script.dtype)
        with torch.device(self.device):
            if self.script.gen:
                tokenizer = AutoTokenizer.from_pretrained(self.script.gen)
                gen = AutoModelForCausalLM.from_pretrained(self.script.gen, dtype=dtype)
            else:
                tokenizer = make_tokenizer(self.words)
                # with a wide initializer_range, the generated tokens depend on the passages
                shape = {"max_position_embeddings": 4096, "initializer_range": 0.1, **SHAPES[self.script.shape]}
                gen = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=dtype)
            # Emb_seq only makes the index; it takes no part in generation
            small_shape = SHAPES["tiny"] | {"num_hidden_layers": 1, "vocab_size": len(tokenizer)}
            emb_seq = AutoModel.from_config(AutoConfig.for_model("llama", **small_shape), dtype=dtype)
            model = CoSupForCausalLM.from_gen_and_emb_seq(
                gen.to(self.device).eval(),
                emb_seq,
                tokenizer,
                emb_seq_tokenizer=tokenizer,
                max_passage_length=PASSAGE_LENGTHS[1],
            )
        return model.eval()

    def prompts(self, count: int) -> list[list[int]]:
        """
        Return prompts of random token ids, no two of which begin with the same token.

        The first prompts are the same for every `count`.
        """
        num_ordinary = len(self.ordinary_ids)
        if count > num_ordinary:
            raise ValueError(
                f"{count} prompts that begin differently need as many tokens; the tokenizer has {num_ordinary}."
            )
        rng = random.Random(self.script.seed + 1)
        prompts = []
        for first_token in self.ordinary_ids[:count]:
            length = rng.randint(*PROMPT_LENGTHS)
            prompts.append([first_token, *rng.choices(self.ordinary_ids, k=length - 1)])
        return prompts

    def passages(self, count: int) -> Iterator[dict[str, str]]:
        """Yield passages of random words, with about `PASSAGE_LENGTHS` tokens each."""
        rng = random.Random(self.script.seed + 2)
        tokens_per_word = len(self.model.tokenizer(" ".join(self.words))["input_ids"]) / len(self.words)
        lengths = [round(length / tokens_per_word) for length in PASSAGE_LENGTHS]
        for number in range(count):
            yield {
                "id": f"p{number}",
                "title": rng.choice(self.words),
                "text": " ".join(rng.choices(self.words, k=rng.randint(*lengths))),
            }

    def index(self, count: int) -> PassageIndex:
        """Build an index of random passages, with exact search on Gen's device."""
        index = self.model.build_index(list(self.passages(count)), show_progress_bar=False)
        return index.to(self.device, self.script.dtype) if self.device.type == "cuda" else index

    @torch.no_grad()
    def embed(self, passages: list[dict]) -> np.ndarray:
        """Return passage embeddings `(C, h)` in float32."""
        rows = encode_passages_for_emb_seq(self.model.emb_seq_tokenizer, passages, self.config)
        ids, mask = pad_rows(rows, device=self.device)
        return self.model.encode_passages(ids, mask).float().cpu().numpy()

    def plan(self, rows: int) -> torch.Tensor:
        """
        Return the token ids to force, `(rows, new_tokens)`; -1 forces nothing.

        The rows retrieve at different steps. Each writes `[CE]` half a period after its `[NSP]`.
        """
        plan = torch.full((rows, self.script.new_tokens), -1)
        period = self.script.new_tokens // self.script.retrievals
        for row in range(rows):
            for start in range(0, period * self.script.retrievals, period):
                step = start + 5 * row % (period // 2)
                plan[row, step] = self.config.nsp_token_id
                plan[row, step + period // 2] = self.config.ce_token_id
        return plan

    def batch(self, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        """Return prompts as inputs of generate(), padded on the left."""
        input_ids, attention_mask = pad_rows(prompts, self.pad_id, side="left", device=self.device)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(self, model: torch.nn.Module, prompts: list[list[int]], **kwargs: Any) -> list[list[int]]:
        """Return the token ids that `model` writes after each prompt, without padding and end of turn."""
        batch = self.batch(prompts)
        options = {"max_new_tokens": self.script.new_tokens, **self.options, **kwargs}
        output = model.generate(**batch, **options)
        new_ids = output[:, batch["input_ids"].shape[1] :]
        return [self.without_padding(row) for row in new_ids.tolist()]

    def without_padding(self, ids: list[int]) -> list[int]:
        """Return token ids without padding and end of turn."""
        return [id for id in ids if id not in (self.pad_id, self.end_id)]

    def retrieve(
        self,
        model: CoSupForCausalLM,
        prompts: list[list[int]],
        index: Retriever,
        candidates: list[list[str]] | None = None,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Generate like [`~World.generate`], with the retrievals of [`~World.plan`]."""
        settings = RetrievalConfig(max_retrievals=self.script.retrievals, candidates=candidates)
        processors = LogitsProcessorList([Forced(self.plan(len(prompts)))])
        return self.generate(
            model, prompts, retriever=index, retrieval_config=settings, logits_processor=processors, **kwargs
        )


class Forced(LogitsProcessor):
    """A processor whose n-th call forces the tokens of the n-th column of `plan` `(B, N)`; -1 forces nothing."""

    def __init__(self, plan: torch.Tensor) -> None:
        self.columns = iter(plan.unbind(1))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        column = next(self.columns)  # (B,)
        rows = (column >= 0).nonzero()[:, 0]
        if len(rows):
            scores = scores.clone()
            scores[rows, column[rows]] = FORCED
        return scores


class Ends(LogitsProcessor):
    """
    A processor that ends each row a given number of tokens after its passage.

    The first token of a row determines the number, so it does not matter where the row is in a batch.

    Args:
        lengths (`dict[int, int]`): first token of a row -> number of tokens after its passage.
        world (`World`): the model whose tokens are used.
    """

    def __init__(self, lengths: dict[int, int], world: World) -> None:
        vocabulary = world.config.get_text_config().vocab_size
        self.length_of = torch.full((vocabulary,), 10**9, device=world.device)
        self.length_of[list(lengths)] = torch.tensor(list(lengths.values()), device=world.device)
        self.pad_id = world.pad_id
        self.cs_id = world.config.cs_token_id
        self.end_id = world.end_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        width = input_ids.shape[1]
        num_padding = (input_ids == self.pad_id).sum(1, keepdim=True)  # (B, 1), on the left
        first_ids = input_ids.gather(1, num_padding.clamp(max=width - 1))[:, 0]  # (B,)
        num_written = (input_ids == self.cs_id).flip(1).int().argmax(1)  # (B,), since the last [Cs]
        is_end = num_written + 1 >= self.length_of[first_ids]  # (B,)
        forced = torch.zeros_like(scores)
        forced[:, self.end_id] = torch.where(is_end, 2 * FORCED, 0.0)
        return torch.where(forced > 0, forced, scores)
