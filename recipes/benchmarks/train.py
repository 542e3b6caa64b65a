"""
Speed, memory and error of a training step, side by side in one process.

    python recipes/benchmarks/train.py --gen HuggingFaceTB/SmolLM2-135M-Instruct --train_file train.jsonl
    python recipes/benchmarks/train.py --sections defaults    # no model and no data needed: the quickstart's world

Sections: `step` (forward and backward of a whole batch in each arm, interleaved, median of `--repeats` after one warm-up), `nsp_batch` (memory of
GradCache as its batch grows), `duplicates` (how many passages of a batch stand in it twice), `precision` (loss after 300 steps in float32 and bf16),
`defaults` (the paper's optimiser and similarity beside ours).
Prints tables and writes `--output_file`.
"""

import contextlib
import itertools
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # recipes/, for `shared`

from shared.cli import parse

import torch
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments, set_seed

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.files_cosup import write_json
from modeling_cosup.loss_cosup import chunked_cross_entropy
from modeling_cosup.tokenization_cosup import pad_rows
from trainer import CoSupTrainer, CoSupTrainingArguments, load_instances
from trainer.judging.figures import figure, shown

from measuring import GB, Meter, describe, print_table
from shared.quickstart import WorldArguments, prepare_world

PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12}  # dense bf16
HELD_OUT = ("ntp_loss", "query_recall@1", "query_recall@5")


@dataclass
class BenchmarkArguments:
    """What is measured."""

    gen: str | None = field(default=None, metadata={"help": "Name or path of Gen; Emb_seq is a copy of it."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training instances whose lengths and duplicates are the benchmark's."}
    )
    sections: str = field(
        default="step,nsp_batch,duplicates,precision,defaults", metadata={"help": "Comma-separated."}
    )
    batch_size: int = field(default=8, metadata={"help": "Instances of a batch."})
    micro_batch_tokens: int = field(default=2048, metadata={"help": "Token budget of a micro-batch with GradCache."})
    repeats: int = field(default=9, metadata={"help": "Timed rounds of every arm; each round is another batch."})
    nsp_batch_sizes: str = field(default="8,16,32,64", metadata={"help": "NSP batches whose memory is measured."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "In every arm."})
    torch_compile: bool = field(default=False, metadata={"help": "Add an arm with compiled layers."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads on a CPU; defaults to all cores."})
    precision_steps: int = field(default=300, metadata={"help": "Steps of the precision section."})
    precision_layers: int = field(
        default=4, metadata={"help": "Layers of Gen that it takes, so that a CPU gets through."}
    )
    defaults_steps: int = field(default=300, metadata={"help": "Steps of the defaults section."})
    seed: int = field(default=0, metadata={"help": "Of everything."})
    output_file: str | None = field(default=None, metadata={"help": "Where the numbers go, as JSON."})


# ---------------------------------------------------------------------- measuring


def gradients_of(model):
    return {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def gradient_error(found, expected):
    """‖found − expected‖ / ‖expected‖ over all parameters."""
    difference = sum(
        float((found[name].double() - gradient.double()).square().sum()) for name, gradient in expected.items()
    )
    return (difference / sum(float(gradient.double().square().sum()) for gradient in expected.values())) ** 0.5


# ---------------------------------------------------------------------- arms


def padded_baseline(model, rows, autocast):
    """
    The plain way: every row padded to the longest, attention masks, the LM head at every position, every passage encoded as often as it stands there.

    The loss is ours (identical passages are no negatives), or the two could not be compared; instances with hard negatives have no place here.
    """
    if any(row["negative_input_ids"] for row in rows):
        sys.exit("error: the padded baseline knows no hard negatives; take a file without.")
    input_ids, attention_mask = (tensor.to(model.device) for tensor in pad_rows([row["input_ids"] for row in rows]))
    labels = pad_rows([row["labels"] for row in rows], -100)[0].to(model.device)
    passages = [tuple(ids) for row in rows for ids in row["passage_input_ids"]]
    passage_ids, passage_mask = (tensor.to(model.device) for tensor in pad_rows([list(ids) for ids in passages]))
    with autocast():
        hidden = model.gen.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        logits = model.gen.get_output_embeddings()(hidden).float()  # (B, T, V)
        ntp_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        states = model.emb_seq(input_ids=passage_ids, attention_mask=passage_mask, use_cache=False).last_hidden_state
        embeds = states[torch.arange(len(states), device=states.device), passage_mask.sum(1) - 1]
    queries = F.normalize(hidden[input_ids == model.config.nsp_token_id].float(), dim=-1)
    embeds = F.normalize(embeds.float(), dim=-1)
    number = {passage: i for i, passage in enumerate(dict.fromkeys(passages))}
    group = torch.tensor([number[passage] for passage in passages], device=model.device)
    first = torch.tensor(
        [i for i, passage in enumerate(passages) if passages.index(passage) == i], device=model.device
    )
    scores = queries @ embeds[first].T / model.config.temperature
    loss = ntp_loss + model.config.nsp_loss_weight * F.cross_entropy(scores, group)
    loss.backward()
    return float(loss.detach())


class PlainTrainer(Trainer):
    """transformers' Trainer on Gen alone with what CoSupTrainer does for speed: rows of like length together, logits only where a label stands."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = []
        for batch in inputs["micro_batches"]:
            with self.accelerator.autocast():
                hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
                losses.append(
                    chunked_cross_entropy(
                        hidden,
                        batch["labels"],
                        model.get_output_embeddings(),
                        label_positions=batch["label_positions"],
                    )
                )
        return torch.stack(losses).sum() / num_items_in_batch


class Ours:
    """A CoSupTrainer whose steps are called one by one."""

    def __init__(self, model, folder, rows, script, **options):
        defaults = {
            "per_device_train_batch_size": script.batch_size,
            "report_to": "none",
            "bf16": script.bf16,
            "seed": script.seed,
            "tf32": False,
        }
        args = CoSupTrainingArguments(folder, **{**defaults, **options})
        self.trainer = CoSupTrainer(model, args, train_dataset=rows)
        self.trainer.create_optimizer_and_scheduler(1)
        # accelerate puts autocast around forward, once; float32 arms must not see it
        for name in ("forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
        self.model = self.trainer.accelerator.prepare_model(model)
        self.forward = vars(model).pop("forward", None)

    def step(self, rows):
        collated = self.trainer.data_collator([dict(row) for row in rows])
        batches, count = self.trainer.get_batch_samples(iter([collated]), 1, self.trainer.args.device)
        if self.forward is not None:
            self.model.forward = self.forward
        try:
            return float(self.trainer.training_step(self.model, batches[0], count))
        finally:
            vars(self.model).pop("forward", None)

    def padding(self, rows):
        facts = self.trainer.data_collator([dict(row) for row in rows])["facts"]
        return 1 - facts.num_tokens / facts.num_padded_tokens


def batches_of(trainer, size, count, seed):
    """`count` random batches of tokenized instances."""
    order = torch.randperm(len(trainer.train_dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    if size > len(order):
        sys.exit(
            f"error: a batch of {size} instances needs as many; the file has {len(order)}, and repeated ones would be cheaper."
        )
    order = list(itertools.islice(itertools.cycle(order), size * count))
    return [[trainer.train_dataset[i] for i in order[start : start + size]] for start in range(0, len(order), size)]


def useful_tokens(rows):
    """Tokens of Gen's rows and of the passages of a batch, these as often as they are named."""
    return sum(len(row["input_ids"]) + sum(map(len, row["passage_input_ids"])) for row in rows)


# ---------------------------------------------------------------------- sections


def section_step(model, instances, script, folder):
    """Every arm on the same batches, one after the other, batch by batch."""
    device = model.device
    meter = Meter(device)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=script.bf16)

    first = Ours(model, folder, instances, script)
    rows = first.trainer.train_dataset
    cached = {"nsp_batch_size": script.batch_size, "max_tokens_per_micro_batch": script.micro_batch_tokens}
    arms = {
        "padded baseline": lambda batch: padded_baseline(model, batch, autocast),
        "ours": first.step,
        "ours, duplicates encoded": Ours(model, folder, rows, script, mask_duplicates=False).step,
        "ours, GradCache": Ours(model, folder, rows, script, **cached).step,
    }
    uncut = Ours(model, folder, rows, script)
    uncut.trainer.data_collator.call_overhead = None
    arms["ours, one padded micro-batch"] = uncut.step
    if script.torch_compile:
        compiled = Ours(
            model, folder, rows, script, torch_compile=True
        )  # compiles the layers in place: only this arm may see it
        calls = {
            module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None
        }

        def switch(on):
            for module, call in calls.items():
                module._compiled_call_impl = call if on else None

        def compiled_step(batch):
            switch(True)
            try:
                return compiled.step(batch)
            finally:
                switch(False)

        switch(False)

        arms["ours, compiled layers"] = compiled_step

    def full_precision():
        return torch.autocast(device.type, enabled=False)

    exactness = {}  # each arm in float32 on a small batch
    small = batches_of(first.trainer, 4, 1, script.seed + 1)[0]
    exact = {
        "ours": {},
        "ours, duplicates encoded": {"mask_duplicates": False},
        "ours, GradCache": cached | {"nsp_batch_size": 4},
    }
    model.zero_grad()
    expected = padded_baseline(model, small, full_precision), gradients_of(model)
    for name, options in exact.items():
        model.zero_grad()
        loss = Ours(model, folder, rows, script, bf16=False, **options).step(small)
        exactness[name] = abs(loss - expected[0]) / expected[0], gradient_error(gradients_of(model), expected[1])

    seconds, memory, errors = ({name: [] for name in arms} for _ in range(3))
    batches = batches_of(first.trainer, script.batch_size, script.repeats + 1, script.seed)
    for i, batch in enumerate(batches):
        expected = None
        if i == 0:  # the warm-up batch says what bf16 costs in precision
            model.zero_grad()
            padded_baseline(model, batch, full_precision)
            expected = gradients_of(model)
        names = list(arms)
        for name in names[i % len(names) :] + names[: i % len(names)]:  # none is always the first to see a batch
            arm = arms[name]
            model.zero_grad()
            _, took, peak = meter(lambda arm=arm, batch=batch: arm(batch))
            if expected is not None:
                errors[name].append(gradient_error(gradients_of(model), expected))
            else:
                seconds[name].append(took)
                memory[name].append(peak)
        if i:
            print(
                f"  batch {i} of {len(batches) - 1}: "
                + ", ".join(f"{name} {seconds[name][-1]:.1f} s" for name in arms),
                flush=True,
            )
    model.zero_grad()

    tokens = statistics.mean(useful_tokens(batch) for batch in batches[1:])
    named = sum(len(row["passage_input_ids"]) for batch in batches[1:] for row in batch)
    distinct = sum(len({tuple(ids) for row in batch for ids in row["passage_input_ids"]}) for batch in batches[1:])
    result = {"useful_tokens": tokens, "duplicate_rate": 1 - distinct / named, "padding": {}, "arms": {}}
    result["padding"] = {
        "one padded micro-batch": statistics.mean(uncut.padding(batch) for batch in batches[1:]),
        "ours": statistics.mean(first.padding(batch) for batch in batches[1:]),
    }
    base = seconds["padded baseline"]
    parameters = sum(part.num_parameters(exclude_embeddings=True) for part in (model.gen, model.emb_seq)) / 2
    flops = next(
        (
            peak
            for prefix, peak in PEAK_FLOPS.items()
            if device.type == "cuda" and torch.cuda.get_device_name().startswith(prefix)
        ),
        None,
    )
    for name in arms:
        ratios = [b / s for b, s in zip(base, seconds[name], strict=True)]
        median = statistics.median(seconds[name])
        result["arms"][name] = {
            "seconds": median,
            "seconds_min_max": [min(seconds[name]), max(seconds[name])],
            "speed_to_baseline": statistics.median(ratios),
            "speed_to_baseline_min_max": [min(ratios), max(ratios)],
            "useful_tokens_per_second": tokens * len(batches[1:]) / sum(seconds[name]),
            "peak_memory_gb": max(memory[name]) / GB,
            "gradient_error": max(errors[name]),
            "float32_loss_and_gradient_error": exactness.get(name),
            "mfu": None if flops is None else 6 * parameters * tokens * len(batches[1:]) / sum(seconds[name]) / flops,
        }
    print(
        f"\nForward and backward, batches of {script.batch_size} instances, {tokens:.0f} useful tokens, {named} passages of which {distinct} distinct"
    )
    print(f"padding: {result['padding']}")
    print_table(
        [
            "arm",
            "s / batch",
            "x baseline",
            "min, max",
            "useful tokens/s",
            "MFU",
            "peak memory GB",
            "gradient error of bf16",
            "in float32: loss, gradient",
        ],
        [
            [
                name,
                f"{a['seconds']:.2f}",
                f"{a['speed_to_baseline']:.2f}",
                "{:.2f}, {:.2f}".format(*a["speed_to_baseline_min_max"]),
            ]
            + [
                f"{a['useful_tokens_per_second']:.0f}",
                "" if a["mfu"] is None else f"{a['mfu']:.1%}",
                f"{a['peak_memory_gb']:.2f}",
            ]
            + [f"{a['gradient_error']:.1e}", "{:.0e}, {:.0e}".format(*exactness[name]) if name in exactness else ""]
            for name, a in result["arms"].items()
        ],
    )
    paired = [cached / plain for cached, plain in zip(seconds["ours, GradCache"], seconds["ours"], strict=True)]
    result["gradcache_to_uncached"] = statistics.median(paired)
    print(
        f"\nGradCache takes {statistics.median(paired):.2f} x the uncached step (median of the batches' ratios; {min(paired):.2f} to {max(paired):.2f})"
    )
    result["ntp"] = against_plain_trainer(model, rows, batches, meter, script, folder)
    return result


def against_plain_trainer(model, rows, batches, meter, script, folder):
    """`supervision="ntp"` and transformers' Trainer on Gen alone, on the same micro-batches."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ours = Ours(model, folder, rows, script, supervision="ntp")
    plain = PlainTrainer(
        model.gen, TrainingArguments(folder, report_to="none", bf16=script.bf16, use_cpu=model.device.type == "cpu")
    )
    gen = model.gen

    def plain_step(batch):
        collated = ours.trainer.data_collator([dict(row) for row in batch])
        return float(
            plain.training_step(gen, {"micro_batches": collated["micro_batches"]}, collated["facts"].num_labels)
        )

    seconds = {"ours, ntp": [], "plain Trainer, same tricks": []}
    for i, batch in enumerate(batches):
        arms = [("ours, ntp", ours.step), ("plain Trainer, same tricks", plain_step)]
        for name, arm in arms[:: 1 if i % 2 else -1]:
            model.zero_grad()
            _, took, _ = meter(lambda arm=arm, batch=batch: arm(batch))
            if i:
                seconds[name].append(took)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\nntp alone: {medians}, throughput of ours {ratio:.3f} x the plain Trainer's")
    return {"seconds": medians, "throughput_ratio": ratio}


def section_duplicates(instances, seed):
    """How many passages of a random batch stand in it already, and what share of the passages' words need not be read again."""
    rng, rows = random.Random(seed), []
    for size in (8, 64, 512, 4096):
        if size > len(instances):
            continue
        batch = rng.sample(instances, size)
        passages = [
            f"{s['passage']['title']} {s['passage']['text']}"
            for instance in batch
            for s in instance["segments"]
            if s["passage"]
        ]
        words = [sum(len(text.split()) for text in texts) for texts in (passages, set(passages))]
        rows.append(
            {
                "batch": size,
                "passages": len(passages),
                "duplicates": 1 - len(set(passages)) / len(passages),
                "words_spared": 1 - words[1] / words[0],
            }
        )
    print_table(
        ["instances", "passages", "duplicates", "words spared"],
        [[str(r["batch"]), str(r["passages"]), f"{r['duplicates']:.1%}", f"{r['words_spared']:.1%}"] for r in rows],
    )
    return rows


def section_nsp_batch(model, instances, script, folder):
    """Peak memory and time of one GradCache step, micro-batches held at the same token budget."""
    meter, results = Meter(model.device), []
    for size in map(int, script.nsp_batch_sizes.split(",")):
        options = {"nsp_batch_size": size, "max_tokens_per_micro_batch": script.micro_batch_tokens}
        ours = Ours(model, folder, instances, script, **options)
        (batch,) = batches_of(ours.trainer, size, 1, script.seed)
        model.zero_grad()
        ours.step(batch[:2])  # gradients exist before the measurement
        _, took, peak = meter(lambda ours=ours, batch=batch: ours.step(batch))
        results.append(
            {
                "nsp_batch_size": size,
                "seconds": took,
                "peak_memory_gb": peak / GB,
                "useful_tokens_per_second": useful_tokens(batch) / took,
            }
        )
        print(f"  NSP batch {size}: {results[-1]}", flush=True)
    model.zero_grad()
    print_table(
        ["NSP batch", "s / step", "peak memory above weights and gradients, GB", "useful tokens/s"],
        [
            [
                str(r["nsp_batch_size"]),
                f"{r['seconds']:.1f}",
                f"{r['peak_memory_gb']:.2f}",
                f"{r['useful_tokens_per_second']:.0f}",
            ]
            for r in results
        ],
    )
    return results


def section_precision(script, folder):
    """The first layers of Gen, twice, on real text: the same batches in float32, with bf16 autocast over float32 weights, and with bf16 weights."""
    instances, results = load_instances(script.train_file), {}
    arms = {
        "float32": ("float32", {}),
        "bf16 autocast, float32 weights": ("float32", {"bf16": True}),
        "bf16 weights (no master copy)": ("bfloat16", {}),
    }
    for name, (dtype, options) in arms.items():
        set_seed(script.seed)
        model = CoSupForCausalLM.from_gen_and_emb_seq(
            script.gen, model_kwargs={"dtype": dtype, "num_hidden_layers": script.precision_layers}
        )
        steps = {
            "max_steps": script.precision_steps,
            "per_device_train_batch_size": script.batch_size,
            "learning_rate": 2e-5,
            "warmup_steps": 20,
        }
        quiet = {
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": script.seed,
        }
        trainer = CoSupTrainer(
            model, CoSupTrainingArguments(folder, **steps, **quiet, **options), train_dataset=instances
        )
        for (
            parameter
        ) in trainer.model.parameters():  # CoSupTrainer itself would not train weights of less than float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
        with contextlib.redirect_stdout(sys.stderr):  # a line for every step
            trainer.train()
        results[name] = mean_losses(trainer)
        print(f"  {name}: {results[name]}", flush=True)
    exact = results["float32"]
    header = ["weights and computation"] + [cell for name in exact for cell in (name, "to float32")]
    print(
        f"\nMean of the last 50 of {script.precision_steps} steps of {script.batch_size} instances, {script.precision_layers} layers, seed {script.seed}"
    )
    print_table(
        header,
        [
            [name] + [text for key in exact for text in (f"{r[key]:.4f}", f"{r[key] / exact[key] - 1:+.2%}")]
            for name, r in results.items()
        ],
    )
    return results


def mean_losses(trainer, steps=50):
    """Mean of each logged loss over the last steps."""
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-steps:]
    return {name: statistics.mean(entry[name] for entry in last) for name in last[0] if name.endswith("loss")}


def section_defaults(script, folder):
    """The paper's optimiser and similarity, and the modern ones, one change at a time, on the quickstart's world; held-out losses and recall."""
    num_instances = 64 * script.defaults_steps // 3  # three epochs, as in the paper
    world = WorldArguments(str(Path(folder) / "world"), seed=script.seed, num_train_instances=num_instances)
    paths, results = prepare_world(world), {}
    paper = {"lr_decay_per_epoch": 0.85, "clip_gen_only": True, "weight_decay": 0.0}
    modern = {"lr_scheduler_type": "cosine", "warmup_steps": 50, "weight_decay": 0.01}
    arms = {
        "the paper's: dot, λ 0.01, rate x 0.85 an epoch, clip Gen": (paper, {"similarity": "dot"}),
        "the paper's at a tenth of the rate": (paper | {"learning_rate": 2e-4}, {"similarity": "dot"}),
        "dot, λ 0.01, warm-up and cosine schedule": (modern, {"similarity": "dot"}),
        "cosine 0.05, λ 1, the paper's optimiser": (paper, {}),
        "cosine 0.05, λ 1, warm-up and cosine schedule": (modern, {}),
    }
    for name, (options, config) in arms.items():
        set_seed(script.seed)
        model = CoSupForCausalLM.from_gen_and_emb_seq(paths["gen"], paths["emb_seq"], max_passage_length=128, **config)
        common = {
            "max_steps": script.defaults_steps,
            "per_device_train_batch_size": 64,
            "per_device_eval_batch_size": 256,
            "learning_rate": 2e-3,
        }
        common |= {
            "bf16": True,
            "adam_beta2": 0.98,
            "logging_steps": 50,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": script.seed,
        }
        data = {"train_dataset": load_instances(paths["train"]), "eval_dataset": load_instances(paths["validation"])}
        trainer = CoSupTrainer(model, CoSupTrainingArguments(folder, **{**common, **options}), **data)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        results[name] = {
            key.removeprefix("eval_"): value for key, value in trainer.evaluate().items() if key.startswith("eval_")
        }
        print(f"  {name}: {results[name]}", flush=True)
    print(
        f"\nHeld out, after 3 epochs of {script.defaults_steps // 3} steps on the quickstart's world, seed {script.seed}, learning rate 2e-3 unless said,"
    )
    print("recall in percent")
    print_table(
        ["setting", *(figure(name).label for name in HELD_OUT), figure("num_passages").label],
        [
            [setting, *(shown(r[name], name) for name in HELD_OUT), str(r["num_passages"])]
            for setting, r in results.items()
        ],
    )
    return results


def main():
    (script,) = parse([BenchmarkArguments], __doc__)
    set_seed(script.seed)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(script.num_threads or torch.get_num_threads())
    script.bf16 = True
    results = {**describe(device), "arguments": vars(script)}
    sections = script.sections.split(",")
    with tempfile.TemporaryDirectory() as folder:
        if set(sections) - {"defaults"} and not (script.gen and script.train_file):
            sys.exit("error: every section but `defaults` needs --gen and --train_file.")
        if {"step", "nsp_batch"} & set(sections):
            kwargs = {"dtype": "float32"} | (
                {"attn_implementation": script.attn_implementation} if script.attn_implementation else {}
            )
            model = CoSupForCausalLM.from_gen_and_emb_seq(script.gen, model_kwargs=kwargs).to(device).train()
            if script.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            instances = load_instances(script.train_file)
            if "step" in sections:
                results["step"] = section_step(model, instances, script, folder)
            if "nsp_batch" in sections:
                results["nsp_batch"] = section_nsp_batch(model, instances, script, folder)
        if "duplicates" in sections:
            results["duplicates"] = section_duplicates(load_instances(script.train_file), script.seed)
        if "precision" in sections:
            results["precision"] = section_precision(script, folder)
        if "defaults" in sections:
            results["defaults"] = section_defaults(script, folder)
    if script.output_file:
        write_json(script.output_file, results)


if __name__ == "__main__":
    main()
