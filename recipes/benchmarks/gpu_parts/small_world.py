"""A small random model with heads of 64, and its prompts, passages and instances, for the checks of correctness."""

import copy
import random
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.packing_cosup import pad_rows

from gpu_parts.runner import Context
from random_world import World

# heads of 64 as in real models: flash and flex attention have kernels for them
SHAPE = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
TINY_SHAPE = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
NUM_PASSAGES = {True: 24, False: 400}  # by --tiny
NUM_ROWS = {True: 3, False: 16}
PASSAGES_OF_INSTANCES = (1, 2, 0, 1, 3, 0, 1, 2)  # ragged, and some have none


class SmallWorld(World):
    """
    A random model whose Emb_seq is as large as its Gen, and what it reads.

    Args:
        context ([`Context`]): device and size.
        dtype (`torch.dtype`): of the weights, which are rounded from the same float32 weights for every dtype.
        tied (`bool`): the embeddings of Gen are its LM head.

    Attributes: see [`~random_world.World`].
    """

    def __init__(self, context: Context, dtype: torch.dtype = torch.float32, tied: bool = False) -> None:
        self.tiny = context.tiny
        self.tied = tied
        self.dtype = dtype
        name = str(dtype).removeprefix("torch.")
        new_tokens = 12 if context.tiny else 64
        script = SimpleNamespace(gen=None, seed=0, dtype=name, new_tokens=new_tokens, retrievals=2)
        super().__init__(script, context.device)

    def _make_model(self) -> CoSupForCausalLM:
        torch.manual_seed(0)
        shape = {**(TINY_SHAPE if self.tiny else SHAPE), **HEADS, "tie_word_embeddings": self.tied}
        # with a wide initializer_range, the generated tokens depend on the passages
        config = AutoConfig.for_model("llama", initializer_range=0.1, **shape)
        gen = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        emb_seq = copy.deepcopy(gen.base_model)
        with torch.no_grad():
            for parameter in emb_seq.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        for parameter in [*gen.parameters(), *emb_seq.parameters()]:
            parameter.data = parameter.data.to(self.dtype)  # not the buffers: rotary frequencies stay in float32
        tokenizer = self._make_tokenizer()
        model = CoSupForCausalLM.from_gen_and_emb_seq(
            gen.eval(), emb_seq.eval(), tokenizer, emb_seq_tokenizer=tokenizer, max_passage_length=250
        )
        return model.to(self.device).eval()

    @property
    def num_passages(self) -> int:
        """The passages of the index."""
        return NUM_PASSAGES[self.tiny]

    @property
    def num_rows(self) -> int:
        """The rows of a batch of prompts."""
        return NUM_ROWS[self.tiny]

    def instances(self, count: int) -> list[dict[str, Any]]:
        """Return instances of random words, with 0 to 3 passages each; some passages occur several times."""
        rng = random.Random(3)
        passages = list(self.passages(max(3, count // 2)))
        instances = []
        for i in range(count):
            segments: list[dict[str, Any]] = []
            for passage in rng.sample(passages, PASSAGES_OF_INSTANCES[i % len(PASSAGES_OF_INSTANCES)]):
                segments.append({"text": " ".join(rng.choices(self.words, k=rng.randint(2, 12))), "passage": passage})
            if not segments:
                segments = [{"text": " ".join(rng.choices(self.words, k=5)), "passage": None}]
            question = " ".join(rng.choices(self.words, k=rng.randint(3, 20)))
            fixed = {"id": str(i), "dataset": "random", "instruction": ""}
            instances.append({**fixed, "input": question, "segments": segments})
        return instances

    def passage_rows(self, count: int) -> list[list[int]]:
        """Return what Emb_seq reads of passages of very different lengths."""
        rng = random.Random(4)
        rows = []
        for _ in range(count):
            rows.append(rng.choices(self.ordinary_ids, k=rng.randint(3, 140)))
        return rows

    @torch.no_grad()
    def embed_rows(self, rows: list[list[int]], side: str = "right") -> torch.Tensor:
        """Return passage embeddings `(M, h)` of rows of token ids, in one batch."""
        ids, mask = pad_rows(rows, side=side, device=self.device)
        return self.model.encode_passages(ids, mask)
