"""A model, prompts and passages of random weights and words, in which retrieval happens at known steps: nothing is downloaded."""

import random
import string

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

from modeling_cosup import CoSupForCausalLM, RetrievalConfig
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
PROMPT_LENGTHS, PASSAGE_LENGTHS = (30, 80), (100, 150)  # tokens
FORCED = 1e9  # a score above all others


class World:
    """
    What all parts work with.

    Args:
        script (`BenchmarkArguments`), device (`torch.device`): what to build, and where.

    Attributes:
        model (`CoSupForCausalLM`): whose Emb_seq is a small one, since it takes no part in generation.
        options (`dict`): for every generate(): greedy, and neither an end of turn nor a control token unless it is forced.
        compile (`dict`): for a static cache and a captured step.
        said (`str`): what ran on what, for the headings of tables.
    """

    def __init__(self, script, device):
        self.script, self.device, self.meter = script, device, Meter(device)
        self.said, rng = "", random.Random(script.seed)
        self.words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))) for _ in range(200)]
        self.model = self._make_model()
        self.config, self.pad = self.model.config, self.model.generation_config.pad_token_id
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
        self.compile = {"cache_implementation": "static"}
        if device.type == "cpu":  # transformers captures by itself on a GPU only
            self.compile["compile_config"] = CompileConfig(mode="default")
            self.compile["compile_config"]._compile_all_devices = True

    def _make_model(self):
        dtype = getattr(torch, self.script.dtype)
        with torch.device(self.device):
            if self.script.gen:
                tokenizer, gen = (
                    AutoTokenizer.from_pretrained(self.script.gen),
                    AutoModelForCausalLM.from_pretrained(self.script.gen, dtype=dtype),
                )
            else:
                shape = {
                    "max_position_embeddings": 4096,
                    "initializer_range": 0.1,
                    **SHAPES[self.script.shape],
                }  # wide: what was read decides the tokens
                tokenizer, gen = (
                    self._make_tokenizer(),
                    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape), dtype=dtype),
                )
            small = SHAPES["tiny"] | {"num_hidden_layers": 1, "vocab_size": len(tokenizer)}
            emb_seq = AutoModel.from_config(
                AutoConfig.for_model("llama", **small), dtype=dtype
            )  # makes the index, takes no part in generation
            model = CoSupForCausalLM.from_gen_and_emb_seq(
                gen.to(self.device).eval(),
                emb_seq,
                tokenizer,
                emb_seq_tokenizer=tokenizer,
                max_passage_length=PASSAGE_LENGTHS[1],
            )
        return model.eval()

    def _make_tokenizer(self):
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=384, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        backend.train_from_iterator([" ".join(self.words)], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    def prompts(self, count):
        """Random token ids, each prompt beginning with a token of its own; the first prompts are the same for every `count`."""
        if count > len(self.ordinary):
            raise ValueError(
                f"{count} prompts that begin differently need as many tokens; the tokenizer has {len(self.ordinary)}."
            )
        rng = random.Random(self.script.seed + 1)
        return [
            [self.ordinary[i], *rng.choices(self.ordinary, k=rng.randint(*PROMPT_LENGTHS) - 1)] for i in range(count)
        ]

    def passages(self, count):
        """Random words, about as many as make `PASSAGE_LENGTHS` tokens."""
        rng = random.Random(self.script.seed + 2)
        per_word = len(self.model.tokenizer(" ".join(self.words))["input_ids"]) / len(self.words)
        lengths = [round(length / per_word) for length in PASSAGE_LENGTHS]
        for number in range(count):
            yield {
                "id": f"p{number}",
                "title": rng.choice(self.words),
                "text": " ".join(rng.choices(self.words, k=rng.randint(*lengths))),
            }

    def index(self, count):
        """An index of random passages, searched exactly where Gen is."""
        index = self.model.build_index(list(self.passages(count)), show_progress_bar=False)
        return index.to(self.device, self.script.dtype) if self.device.type == "cuda" else index

    @torch.no_grad()
    def embed(self, passages):
        """Passage embeddings `(C, h)`, `numpy.ndarray` of float32."""
        ids, mask = pad_rows(
            encode_passages_for_emb_seq(self.model.emb_seq_tokenizer, passages, self.config), device=self.device
        )
        return self.model.encode_passages(ids, mask).float().cpu().numpy()

    def plan(self, rows):
        """`(rows, new_tokens)` token ids to force, -1 for none: each row retrieves at steps of its own, and writes `[CE]` half a period later."""
        plan = torch.full((rows, self.script.new_tokens), -1)
        period = self.script.new_tokens // self.script.retrievals
        for row in range(rows):
            for start in range(0, period * self.script.retrievals, period):
                step = start + 5 * row % (period // 2)
                plan[row, step], plan[row, step + period // 2] = self.config.nsp_token_id, self.config.ce_token_id
        return plan

    def batch(self, prompts):
        input_ids, attention_mask = pad_rows(prompts, self.pad, side="left", device=self.device)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(self, model, prompts, **kwargs):
        """What `model` writes behind each prompt, without padding and the last end of turn: `list[list[int]]`."""
        batch = self.batch(prompts)
        output = model.generate(**batch, **{"max_new_tokens": self.script.new_tokens, **self.options, **kwargs})
        return [self.without_padding(row) for row in output[:, batch["input_ids"].shape[1] :].tolist()]

    def without_padding(self, ids):
        return [id for id in ids if id not in (self.pad, self.end)]

    def retrieve(self, model, prompts, index, candidates=None, **kwargs):
        """The same with the retrievals of `plan`."""
        settings = RetrievalConfig(max_retrievals=self.script.retrievals, candidates=candidates)
        forced = LogitsProcessorList([Forced(self.plan(len(prompts)))])
        return self.generate(
            model, prompts, retriever=index, retrieval_config=settings, logits_processor=forced, **kwargs
        )


class Forced(LogitsProcessor):
    """The n-th call decides the n-th token of every row: `plan` `(B, N)` says which, -1 leaves it to the model."""

    def __init__(self, plan):
        self.steps = iter(plan.unbind(1))

    def __call__(self, input_ids, scores):
        step = next(self.steps)
        rows = (step >= 0).nonzero()[:, 0]
        if len(rows):
            scores = scores.clone()
            scores[rows, step[rows]] = FORCED
        return scores


class Ends(LogitsProcessor):
    """Ends a row so many tokens behind its passage as its first token says: it reads nothing but the row, wherever that stands in a batch."""

    def __init__(self, lengths, world):
        self.length_of = torch.full((world.config.get_text_config().vocab_size,), 10**9, device=world.device)
        self.length_of[list(lengths)] = torch.tensor(list(lengths.values()), device=world.device)
        self.pad, self.cs, self.end = world.pad, world.config.cs_token_id, world.end

    def __call__(self, input_ids, scores):
        width = input_ids.shape[1]
        first = input_ids.gather(1, (input_ids == self.pad).sum(1, keepdim=True).clamp(max=width - 1))[:, 0]
        written = (input_ids == self.cs).flip(1).int().argmax(1)  # since the last [Cs]
        ends = torch.zeros_like(scores)
        ends[:, self.end] = FORCED * 2 * (written + 1 >= self.length_of[first])
        return torch.where(ends > 0, ends, scores)
