"""
Speed and memory of what distillation adds to a training step: reading, scoring, encoding and searching candidates.

    python recipes/benchmarks/distillation.py --output_file distillation.json
    python recipes/benchmarks/distillation.py --device cuda --dtype bfloat16 --num_passages 20000
    python recipes/benchmarks/distillation.py --sections recording perplexity
    python recipes/benchmarks/distillation.py --quick true                  # takes seconds, only shows that it runs

Nothing is downloaded: weights, passages and tokens are random. Sections:
    `recording`: a forward of the reader that records its answer's attention, against a plain one, and against eager
        attention with `output_attentions`; by number of passages, and by length of the answer
    `perplexity`: likelihood of the answer after each passage alone, with and without one KV cache for each prompt
    `candidates`: a batch's candidates through Emb_seq, each distinct one once, against all of them
    `refresh`: the first index of a training corpus, and one after it, against embedding its token ids alone

Arms take turns in each round, in rotating order; a ratio is the median of the ratios within rounds. Peak memory is
what a call needs in addition to what was in use. Errors stand beside speeds.
"""

import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import clear_errors, parse

import torch
from transformers import DynamicCache

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.files_cosup import write_json
from modeling_cosup.index_build_cosup import ShardBuilder
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_passages_for_gen
from trainer.batching import CoSupDataCollator
from trainer.candidate_files import IndexFolders
from trainer.reader_scores import answer_log_likelihoods, passage_shares, token_attention
from trainer.reading import ReaderRow, reader_row

from measuring import Arm, Meter, print_hardware, print_table, spread, spread_text, take_turns
from random_world import SHAPES, World

SECTIONS = ("recording", "perplexity", "candidates", "refresh")
MB = 1e6


@dataclass
class BenchmarkArguments:
    """What to measure, and how."""

    sections: list[str] = field(default_factory=lambda: list(SECTIONS), metadata={"help": "Sections to run."})
    shape: str = field(default="135m", metadata={"help": f"Shape of a random Llama: {', '.join(SHAPES)}."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16 or float16."})
    num_instances: int = field(default=2, metadata={"help": "Questions that the reader reads at a time."})
    num_candidates: list[int] = field(
        default_factory=lambda: [2, 5, 10], metadata={"help": "`recording`: passages of a question; else the second."}
    )
    answer_lengths: list[int] = field(
        default_factory=lambda: [8, 64], metadata={"help": "`recording`: tokens of the answer; else the first."}
    )
    prompt_lengths: list[int] = field(
        default_factory=lambda: [50, 400], metadata={"help": "`perplexity`: tokens of the prompt; else the first."}
    )
    passage_length: int = field(default=125, metadata={"help": "Tokens of a passage that the reader reads."})
    num_questions: int = field(default=8, metadata={"help": "`candidates`: questions of a batch."})
    pool_sizes: list[int] = field(
        default_factory=lambda: [10, 20, 100],
        metadata={"help": "`candidates`: passages from which the candidates of a batch are drawn."},
    )
    num_passages: int = field(default=64, metadata={"help": "`refresh`: passages of the corpus."})
    repeats: int = field(default=3, metadata={"help": "Timed rounds of every arm, after a warm-up round."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; defaults to all cores."})
    seed: int = field(default=0, metadata={"help": "Of weights, passages and tokens."})
    quick: bool = field(default=False, metadata={"help": "Tiny sizes: shows that it runs, measures nothing."})
    output_file: str | None = field(default=None, metadata={"help": "JSON file for all numbers."})

    def __post_init__(self) -> None:
        unknown = set(self.sections) - set(SECTIONS)
        if unknown:
            raise ValueError(f"--sections holds {min(unknown)!r}, expected some of {', '.join(SECTIONS)}.")
        if self.shape not in SHAPES:
            raise ValueError(f"--shape is {self.shape!r}, expected one of {', '.join(SHAPES)}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype is {self.dtype!r}, expected float32, bfloat16 or float16.")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"--device is {self.device!r}, expected cpu or cuda.")
        if self.output_file and not Path(self.output_file).parent.is_dir():
            raise ValueError(f"--output_file {self.output_file}: its folder does not exist.")
        if self.quick:
            self.shape, self.passage_length, self.num_questions, self.num_passages = "tiny", 12, 4, 12
            self.num_candidates, self.answer_lengths, self.prompt_lengths = [2, 3], [2, 5], [6]
            self.pool_sizes, self.repeats = [4], 1
        if len(self.num_candidates) < 2:
            raise ValueError("--num_candidates has fewer than two numbers, so nothing shows how memory grows.")

    @property
    def usual_candidates(self) -> int:
        """Passages of a question where their number does not vary."""
        return self.num_candidates[1]


class Setting:
    """
    What the sections share.

    Args:
        args ([`BenchmarkArguments`]): what to measure.

    Attributes:
        model ([`CoSupForCausalLM`]): a random tied model, so that Emb_seq has the same shape as Gen.
        world ([`World`]): random words, prompts and passages.
        meter ([`Meter`]): of the device.
    """

    def __init__(self, args: BenchmarkArguments) -> None:
        self.args = args
        device = torch.device(args.device)
        options = {"seed": args.seed, "dtype": args.dtype, "gen": None, "shape": args.shape, "new_tokens": 8}
        self.world = World(SimpleNamespace(**options), device)
        self.meter = Meter(device)
        parts = self.world.model
        self.model = CoSupForCausalLM.from_gen_and_emb_seq(
            parts.gen, None, parts.tokenizer, tie_emb_seq=True, max_passage_length=parts.config.max_passage_length
        ).eval()
        self.pad_id = self.world.pad_id

    def rows(self, count: int, prompt: int, candidates: int, answer: int) -> list[ReaderRow]:
        """Return rows of random tokens with parts of these lengths."""
        rng = random.Random(self.args.seed)

        def tokens(length: int) -> list[int]:
            return rng.choices(self.world.ordinary_ids, k=length)

        separator, length = tokens(1), self.args.passage_length
        rows = []
        for _ in range(count):
            passages = [tokens(length) for _ in range(candidates)]
            parts = (tokens(prompt), passages, tokens(answer))
            rows.append(reader_row(*parts, self.model.config, separator, self.world.end_id))
        return rows


def main() -> None:
    """Run the sections, print tables and write the numbers."""
    (args,) = parse([BenchmarkArguments], __doc__)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)
    with clear_errors():
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is cuda, and this machine has no GPU that torch can use.")
        results: dict[str, Any] = {**print_hardware(torch.device(args.device)), "arguments": vars(args)}
        setting = Setting(args)
        sections: dict[str, Callable] = {
            "recording": recording,
            "perplexity": perplexity,
            "candidates": candidates,
            "refresh": refresh,
        }
        for name in args.sections:
            results[name] = sections[name](setting)
            if args.output_file:
                write_json(args.output_file, results)


def compared(arms: dict[str, Arm], baseline: str) -> dict[str, Any]:
    """Return the costs of arms, and how many times the seconds of `baseline` each needs."""
    costs = {}
    for name, arm in arms.items():
        ratios = [seconds / base for seconds, base in zip(arm.seconds, arms[baseline].seconds, strict=True)]
        costs[name] = {"seconds": spread(arm.seconds), "times_baseline": spread(ratios), "peak": arm.peak}
    return costs


def cost_cells(cost: dict[str, Any]) -> list[str]:
    """Return seconds, ratio and peak of an arm, as cells of a table."""
    return [f"{cost['seconds']['median']:.3f}", spread_text(cost["times_baseline"]), f"{cost['peak'] / MB:.1f}"]


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.float() - second.float()).abs().max())


# ---------------------------------------------------------------------- the reader


def recording(setting: Setting) -> list[dict[str, Any]]:
    """Measure a reader's forward that records, against a plain one and against eager attention."""
    args, gen = setting.args, setting.model.gen
    results = []
    for count in args.num_candidates:
        for answer_length in args.answer_lengths:
            rows = setting.rows(args.num_instances, args.prompt_lengths[0], count, answer_length)
            length = rows[0].answer_span[1] - 1  # the recorded forward reads no further
            ids, _ = pad_rows([row.input_ids[:length] for row in rows], device=gen.device)

            @torch.no_grad()
            def plain(ids: torch.Tensor = ids) -> None:
                gen.base_model(input_ids=ids, use_cache=False)

            def recorded(rows: list[ReaderRow] = rows) -> torch.Tensor:
                return passage_shares(token_attention(gen, rows, setting.pad_id), rows)

            eager = partial(eager_shares, gen, ids, rows)
            arms = take_turns({"plain": plain, "recorded": recorded, "eager": eager}, args.repeats, setting.meter)
            error = largest_difference(arms["recorded"].results[-1], arms["eager"].results[-1])
            sizes = {"tokens": length, "answer_rows": answer_length, "instances": len(rows)}
            results.append({**sizes, "error": error, "arms": compared(arms, "plain")})
    table = []
    for result in results:
        for name, cost in result["arms"].items():
            error = f"{result['error']:.0e}" if name == "recorded" else ""
            table.append([str(result["tokens"]), str(result["answer_rows"]), name, *cost_cells(cost), error])
    header = ["tokens", "answer rows", "forward", "s", "times plain", "peak MB", "difference of shares from eager"]
    print_table(header, table)
    return results


@torch.no_grad()
def eager_shares(gen: Any, ids: torch.Tensor, rows: list[ReaderRow]) -> torch.Tensor:
    """Return the shares of passages, from all attention weights of all layers."""
    implementation = gen.config._attn_implementation
    gen.set_attn_implementation("eager")
    cache = DynamicCache()  # keeps the values
    output = gen.base_model(input_ids=ids, past_key_values=cache, output_attentions=True)
    gen.set_attn_implementation(implementation)
    start, end = rows[0].answer_span
    attention = torch.zeros(ids.shape, device=ids.device)  # (B, T)
    for weights, layer in zip(output.attentions, cache.layers, strict=True):
        norms = layer.values.float().norm(dim=-1)  # (B, H', T)
        of_answer = weights[:, :, start - 1 : end - 1].float().mean(2)  # (B, H, T)
        attention += (of_answer.unflatten(1, (norms.shape[1], -1)).mean(2) * norms).mean(1)
    return passage_shares(list(attention), rows)


def perplexity(setting: Setting) -> list[dict[str, Any]]:
    """Measure the readings of each passage alone, with and without a shared cache of the prompt."""
    args = setting.args
    results = []
    for prompt_length in args.prompt_lengths:
        rows = setting.rows(args.num_instances, prompt_length, args.usual_candidates, args.answer_lengths[0])
        score = partial(answer_log_likelihoods, setting.model.gen, rows, setting.pad_id)
        calls = {"prompt read K times": partial(score, share_prompts=False), "prompt read once": score}
        arms = take_turns(calls, args.repeats, setting.meter)
        first, second = (arm.results[-1] for arm in arms.values())
        sizes = {"prompt_tokens": prompt_length, "candidates": args.usual_candidates, "instances": len(rows)}
        results.append({**sizes, "error": largest_difference(first, second), "arms": compared(arms, list(arms)[0])})
    table = []
    for result in results:
        for name, cost in result["arms"].items():
            cells = [str(result["prompt_tokens"]), str(result["candidates"]), name, *cost_cells(cost)]
            table.append([*cells, f"{result['error']:.0e}" if name == "prompt read once" else ""])
    header = ["prompt", "K", "arm", "s", "times reading it K times", "peak MB", "difference of log-likelihoods"]
    print_table(header, table)
    return results


# ---------------------------------------------------------------------- Emb_seq


def candidates(setting: Setting) -> list[dict[str, Any]]:
    """Measure how Emb_seq encodes the candidates of a batch, with and without repetitions."""
    args = setting.args
    results = []
    for pool_size in args.pool_sizes:
        passages = list(setting.world.passages(max(pool_size, args.usual_candidates)))
        features = batch_features(setting, passages)
        calls = {}
        num_rows = {}
        for name, mask_duplicates in (("every mention", False), ("distinct passages", True)):
            collator = CoSupDataCollator(
                pad_token_id=setting.pad_id,
                emb_seq_pad_token_id=setting.pad_id,
                nsp_token_id=setting.model.config.nsp_token_id,
                mask_duplicates=mask_duplicates,
                max_tokens=8192,
            )
            batch = collator(features)
            num_rows[name] = sum(len(part.get("passage_input_ids", ())) for part in batch["micro_batches"])
            calls[name] = partial(encode, setting, batch)
        arms = take_turns(calls, args.repeats, setting.meter)
        sizes = {"pool": len(passages), "mentions": args.num_questions * args.usual_candidates, "rows": num_rows}
        results.append({**sizes, "arms": compared(arms, "every mention")})
    table = []
    for result in results:
        for name, cost in result["arms"].items():
            table.append([str(result["pool"]), name, str(result["rows"][name]), *cost_cells(cost)])
    header = [f"{args.num_questions} questions; pool", "what is encoded", "passages", "s", "times every mention"]
    print_table([*header, "peak MB"], table)
    return results


def batch_features(setting: Setting, passages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return tokenized instances whose candidates are drawn from `passages`."""
    args, model = setting.args, setting.model
    rng = random.Random(args.seed)
    for_emb_seq = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    for_gen = encode_passages_for_gen(model.tokenizer, passages, model.config)
    features = []
    for number in range(args.num_questions):
        drawn = rng.sample(range(len(passages)), args.usual_candidates)
        prompt, answer = ([rng.choice(setting.world.ordinary_ids)] * 5 for _ in range(2))
        read = [for_gen[i] for i in drawn]
        row = reader_row(prompt, read, answer, model.config, [prompt[0]], setting.world.end_id)
        features.append(
            {
                "id": f"q{number}",
                "input_ids": row.input_ids,
                "labels": row.labels,
                "passage_input_ids": [],
                "candidate_ids": [passages[i]["id"] for i in drawn],
                "candidate_input_ids": [for_emb_seq[i] for i in drawn],
                "candidate_scores": [0.0] * len(drawn),
            }
        )
    return features


@torch.no_grad()
def encode(setting: Setting, batch: dict[str, Any]) -> None:
    """Encode the passages of all micro-batches."""
    for micro_batch in batch["micro_batches"]:
        if len(micro_batch.get("passage_input_ids", ())):
            ids, mask = micro_batch["passage_input_ids"], micro_batch.get("passage_attention_mask")
            device = setting.model.device
            setting.model.encode_passages(ids.to(device), None if mask is None else mask.to(device))


def refresh(setting: Setting) -> dict[str, Any]:
    """Measure the first index and a refresh of it, against embedding token ids alone."""
    args, model = setting.args, setting.model
    passages = list(setting.world.passages(args.num_passages))
    token_ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config)
    ids = [passage["id"] for passage in passages]

    def embed() -> torch.Tensor:
        embeddings = torch.empty(len(passages), model.config.embedding_size)
        ShardBuilder(model).embed(ids, [torch.tensor(row, dtype=torch.int32).numpy() for row in token_ids], embeddings)
        return embeddings

    with tempfile.TemporaryDirectory() as folder:
        folders = IndexFolders(Path(folder))
        first = IndexFolders(Path(folder, "first"))

        def build() -> Any:
            shutil.rmtree(Path(folder, "first"), ignore_errors=True)
            return first.build(passages, len(passages), model, "step-0", None)

        index = folders.build(passages, len(passages), model, "step-0", None)
        again = partial(folders.build_again, index, model, "step-1", None)
        arms = take_turns({"embedding": embed, "first index": build, "refresh": again}, args.repeats, setting.meter)
        arms_of_index = arms["refresh"].results[-1]
        embeddings = torch.stack([torch.as_tensor(arms_of_index.embeddings[i]) for i in range(len(passages))])
    error = largest_difference(arms["embedding"].results[-1], embeddings)
    costs = compared(arms, "embedding")
    table = []
    for name, cost in costs.items():
        speed = f"{args.num_passages / cost['seconds']['median']:.1f}"
        table.append([name, speed, *cost_cells(cost), f"{error:.0e}" if name == "refresh" else ""])
    header = [f"{args.num_passages} passages", "passages / s", "s", "times embedding", "peak MB", "difference"]
    print_table(header, table)
    return {"passages": args.num_passages, "tokens": sum(map(len, token_ids)), "error": error, "arms": costs}


if __name__ == "__main__":
    main()
