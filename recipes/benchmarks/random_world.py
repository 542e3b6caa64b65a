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
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, pad_rows

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
FORCED = 1e9  # a score above all others


class World:
    """
    A model with prompts, passages and an index of them.

    Args:
        script (`BenchmarkArguments`): what to build.
        device (`torch.device`): where.

    Attributes:
        model (`CoSupForCausalLM`): its Emb_seq is a small one, which takes no part in generation.
        options (`dict`): of every generate(): greedy, with no end of turn and no control token unless it is forced.
        compile (`dict`): options for a static cache and a captured step.
        said (`str`): hardware and model, for the headings of tables.
    """

    def __init__(self, script: Any, device: torch.device) -> None:
        self.script = script
        self.device = device
        self.meter = Meter(device)
        self.said = ""
        rng = random.Random(script.seed)
        self.words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(200)]
        self.model = self._make_model()
        self.config = self.model.config
        self.pad = self.model.generation_config.pad_token_id
        ends = self.model.generation_config.eos_token_id
        self.end = ends[0]
        never = {*ends, self.pad, self.config.nsp_token_id, self.config.cs_token_id, self.config.ce_token_id}
        self.options = {
            "do_sample": False,
            "pad_token_id": self.pad,
            "eos_token_id": ends,
            "suppress_tokens": sorted(never),
        }
        special = never | set(self.model.tokenizer.all_special_ids)
        self.ordinary = [id for id in range(len(self.model.tokenizer)) if id not in special]
        self.compile: dict[str, Any] = {"cache_implementation": "static"}
        if device.type == "cpu":  # on its own, transformers captures only on a GPU
            self.compile["compile_config"] = CompileConfig(mode="default")
            self.compile["compile_config"]._compile_all_devices = True

    def _make_model(self) -> CoSupForCausalLM:
        dtype = getattr(torch, self.script.dtype)
        with torch.device(self.device):
            if self.script.gen:
                tokenizer = AutoTokenizer.from_pretrained(self.script.gen)
                gen = AutoModelForCausalLM.from_pretrained(self.script.gen, dtype=dtype)
            else:
                tokenizer = self._make_tokenizer()
                # a wide initializer_range: the tokens then depend on what was read
                shape = {"max_position_embeddings": 4096, "initializer_range": 0.1, **SHAPES[self.script.shape]}
                gen = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=dtype)
            # makes the index, and takes no part in generation
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

    def _make_tokenizer(self) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=384, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator([" ".join(self.words)], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    def prompts(self, count: int) -> list[list[int]]:
        """
        Return prompts of random token ids, each of which begins with another token.

        The first prompts are the same for every `count`.
        """
        if count > len(self.ordinary):
            raise ValueError(
                f"{count} prompts that begin differently need as many tokens; the tokenizer has {len(self.ordinary)}."
            )
        rng = random.Random(self.script.seed + 1)
        prompts = []
        for first_token in self.ordinary[:count]:
            length = rng.randint(*PROMPT_LENGTHS)
            prompts.append([first_token, *rng.choices(self.ordinary, k=length - 1)])
        return prompts

    def passages(self, count: int) -> Iterator[dict[str, str]]:
        """Yield passages of random words, about as many as make `PASSAGE_LENGTHS` tokens."""
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
        Return the token ids to force, `(rows, new_tokens)`, -1 for none.

        Each row retrieves at other steps, and writes `[CE]` half a period later.
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
        input_ids, attention_mask = pad_rows(prompts, self.pad, side="left", device=self.device)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(self, model: torch.nn.Module, prompts: list[list[int]], **kwargs: Any) -> list[list[int]]:
        """Return what `model` writes after each prompt, without padding and the last end of turn."""
        batch = self.batch(prompts)
        options = {"max_new_tokens": self.script.new_tokens, **self.options, **kwargs}
        output = model.generate(**batch, **options)
        new_ids = output[:, batch["input_ids"].shape[1] :]
        return [self.without_padding(row) for row in new_ids.tolist()]

    def without_padding(self, ids: list[int]) -> list[int]:
        return [id for id in ids if id not in (self.pad, self.end)]

    def retrieve(
        self,
        model: CoSupForCausalLM,
        prompts: list[list[int]],
        index: Retriever,
        candidates: list[list[str]] | None = None,
        **kwargs: Any,
    ) -> list[list[int]]:
        """Do what [`~World.generate`] does, with the retrievals of `plan`."""
        settings = RetrievalConfig(max_retrievals=self.script.retrievals, candidates=candidates)
        forced = LogitsProcessorList([Forced(self.plan(len(prompts)))])
        return self.generate(
            model, prompts, retriever=index, retrieval_config=settings, logits_processor=forced, **kwargs
        )


class Forced(LogitsProcessor):
    """Forces the n-th token of every row at the n-th call, by `plan` `(B, N)`; -1 leaves it to the model."""

    def __init__(self, plan: torch.Tensor) -> None:
        self.steps = iter(plan.unbind(1))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = next(self.steps)
        rows = (step >= 0).nonzero()[:, 0]
        if len(rows):
            scores = scores.clone()
            scores[rows, step[rows]] = FORCED
        return scores


class Ends(LogitsProcessor):
    """
    Ends a row as many tokens after its passage as its first token says.

    It depends on nothing but the row, wherever the row is in a batch.

    Args:
        lengths (`dict[int, int]`): tokens after the passage, by first token.
    """

    def __init__(self, lengths: dict[int, int], world: World) -> None:
        vocabulary = world.config.get_text_config().vocab_size
        self.length_of = torch.full((vocabulary,), 10**9, device=world.device)
        self.length_of[list(lengths)] = torch.tensor(list(lengths.values()), device=world.device)
        self.pad = world.pad
        self.cs = world.config.cs_token_id
        self.end = world.end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        width = input_ids.shape[1]
        padding = (input_ids == self.pad).sum(1, keepdim=True)  # (B, 1), on the left
        first = input_ids.gather(1, padding.clamp(max=width - 1))[:, 0]  # (B,)
        written = (input_ids == self.cs).flip(1).int().argmax(1)  # (B,), since the last [Cs]
        is_end = written + 1 >= self.length_of[first]
        ends = torch.zeros_like(scores)
        ends[:, self.end] = torch.where(is_end, 2 * FORCED, 0.0)
        return torch.where(ends > 0, ends, scores)
