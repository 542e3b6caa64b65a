"""The arms of the benchmark of a training step: ours, a padded baseline, and transformers' Trainer."""

import itertools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Trainer

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.loss_cosup import chunked_cross_entropy
from modeling_cosup.packing_cosup import pad_rows
from trainer import CoSupTrainer, CoSupTrainingArguments

Gradients = dict[str, torch.Tensor]


def gradients_of(model: torch.nn.Module) -> Gradients:
    """Return a copy of each parameter's gradient, by parameter name."""
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.detach().clone()
    return gradients


def gradient_error(gradients: Gradients, expected: Gradients) -> float:
    """Return ‖gradients − expected‖ / ‖expected‖ over all parameters."""
    squared_error = 0.0
    squared_norm = 0.0
    for name, gradient in expected.items():
        squared_error += float((gradients[name].double() - gradient.double()).square().sum())
        squared_norm += float(gradient.double().square().sum())
    return (squared_error / squared_norm) ** 0.5


def padded_baseline(
    model: CoSupForCausalLM, rows: list[dict], autocast: Callable[[], AbstractContextManager]
) -> float:
    """
    Run a batch the plain way, forward and backward, and return its loss.

    Every row is padded to the longest, with attention masks. The LM head runs at every position. Every passage is
    encoded as often as the batch names it. The loss is ours (identical passages are not negatives), or the two could
    not be compared. Hard negatives are not supported.
    """
    if any(row["negative_input_ids"] for row in rows):
        sys.exit("error: the padded baseline does not support hard negatives; use a file without them.")
    device = model.device
    passages = [tuple(ids) for row in rows for ids in row["passage_input_ids"]]
    input_ids, attention_mask = pad_rows([row["input_ids"] for row in rows], device=device)
    labels, _ = pad_rows([row["labels"] for row in rows], -100, device=device)
    passage_ids, passage_mask = pad_rows([list(ids) for ids in passages], device=device)
    with autocast():
        gen_outputs = model.gen.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = gen_outputs.last_hidden_state  # (B, T, h)
        logits = model.gen.get_output_embeddings()(hidden).float()  # (B, T, V)
        ntp_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        states = model.emb_seq(input_ids=passage_ids, attention_mask=passage_mask, use_cache=False).last_hidden_state
        embeds = states[torch.arange(len(states), device=device), passage_mask.sum(1) - 1]  # (M, h)
    queries = F.normalize(hidden[input_ids == model.config.nsp_token_id].float(), dim=-1)  # (N, h)
    embeds = F.normalize(embeds.float(), dim=-1)
    number_of_passage = {passage: number for number, passage in enumerate(dict.fromkeys(passages))}  # D distinct ones
    first_rows = torch.tensor([passages.index(passage) for passage in number_of_passage], device=device)  # (D,)
    targets = torch.tensor([number_of_passage[passage] for passage in passages], device=device)  # (N,)
    scores = queries @ embeds[first_rows].T / model.config.temperature  # (N, D)
    loss = ntp_loss + model.config.nsp_loss_weight * F.cross_entropy(scores, targets)
    loss.backward()
    return float(loss.detach())


class PlainTrainer(Trainer):
    """
    Transformers' Trainer on Gen alone, with the tricks that make CoSupTrainer fast.

    Rows of similar length share a micro-batch, and logits are computed only where there is a label.
    """

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        lm_head = model.get_output_embeddings()
        losses = []
        for batch in inputs["micro_batches"]:
            with self.accelerator.autocast():
                hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
                positions = batch["label_positions"]
                losses.append(chunked_cross_entropy(hidden, batch["labels"], lm_head, label_positions=positions))
        return torch.stack(losses).sum() / num_items_in_batch


class Ours:
    """
    A CoSupTrainer that takes one step at a time.

    Args:
        model (`CoSupForCausalLM`): shared by all arms.
        folder (`str`): output folder of the trainer.
        rows (`list[dict]` or `Dataset`): instances.
        script (`BenchmarkArguments`): batch size, seed and precision.
        options: other arguments of the trainer.
    """

    def __init__(self, model: CoSupForCausalLM, folder: str, rows: Any, script: Any, **options: Any) -> None:
        defaults = {
            "per_device_train_batch_size": script.batch_size,
            "report_to": "none",
            "bf16": script.bf16,
            "seed": script.seed,
            "tf32": False,
            "use_cpu": model.device.type == "cpu",
        }
        args = CoSupTrainingArguments(folder, **{**defaults, **options})
        self.trainer = CoSupTrainer(model, args, train_dataset=rows)
        self.trainer.create_optimizer_and_scheduler(1)
        # accelerate puts autocast around forward, once; float32 arms must not see it
        for name in ("forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
        self.model = self.trainer.accelerator.prepare_model(model)
        self.forward = vars(model).pop("forward", None)

    def step(self, rows: list[dict]) -> float:
        """Run forward and backward of a batch, and return its loss."""
        batch = self.collate(rows)
        batches, count = self.trainer.get_batch_samples(iter([batch]), 1, self.trainer.args.device)
        if self.forward is not None:
            self.model.forward = self.forward
        try:
            return float(self.trainer.training_step(self.model, batches[0], count))
        finally:
            vars(self.model).pop("forward", None)

    def collate(self, rows: list[dict]) -> dict[str, Any]:
        """Return the batch of these instances, which are copied."""
        return self.trainer.data_collator([dict(row) for row in rows])

    def padding(self, rows: list[dict]) -> float:
        """Return the share of padding in all tokens of a batch."""
        facts = self.collate(rows)["facts"]
        return 1 - facts.num_tokens / facts.num_padded_tokens


class CompiledOurs:
    """
    [`Ours`] with compiled layers.

    Compiling changes the layers in place, so the compiled calls are switched on only during this arm's steps.
    Arguments are as in [`Ours`].
    """

    def __init__(self, model: CoSupForCausalLM, folder: str, rows: Any, script: Any, **options: Any) -> None:
        self.ours = Ours(model, folder, rows, script, torch_compile=True, **options)
        self.compiled_calls = {}
        for module in model.modules():
            if module._compiled_call_impl is not None:
                self.compiled_calls[module] = module._compiled_call_impl
        self.switch_off()

    def switch_off(self) -> None:
        """Let the layers run without their compiled calls."""
        for module in self.compiled_calls:
            module._compiled_call_impl = None

    def step(self, rows: list[dict]) -> float:
        """Run forward and backward of a batch with compiled layers, and return its loss."""
        for module, compiled_call in self.compiled_calls.items():
            module._compiled_call_impl = compiled_call
        try:
            return self.ours.step(rows)
        finally:
            self.switch_off()


def batches_of(trainer: CoSupTrainer, size: int, count: int, seed: int) -> list[list[dict]]:
    """Return `count` random batches of tokenized instances."""
    dataset = trainer.train_dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    if size > len(order):
        sys.exit(
            f"error: a batch of {size} instances needs as many; the file has {len(order)},"
            " and repeated instances would be cheaper."
        )
    order = list(itertools.islice(itertools.cycle(order), size * count))
    batches = []
    for start in range(0, len(order), size):
        batches.append([dataset[i] for i in order[start : start + size]])
    return batches


def useful_tokens(rows: list[dict]) -> int:
    """Count the tokens of Gen's rows and of the passages of a batch; a passage counts each time that it is named."""
    return sum(len(row["input_ids"]) + sum(map(len, row["passage_input_ids"])) for row in rows)
