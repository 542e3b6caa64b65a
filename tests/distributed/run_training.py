"""
One SGD step of CoSupTrainer for each case, on this process group. Launched by test_ranks_equal_one_process.py.

Rank 0 writes parameters and log.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import Dataset
from safetensors.torch import save_file

from support.models import PASSAGES, make_model
from trainer import CoSupTrainer, CoSupTrainingArguments

EMB_SEQ = {"hidden_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# passages of 12 instances: duplicates across ranks (p0, p1), hard negatives, and ranks without any passage
PATTERNS = {
    "ragged": ["p0", "p1 p2", "", "p3", "p0", "p1", "p4 p5 p0", "", "p2", "p5", "p1 p3", "p4"],
    "zero": ["p0", "p1", "p2", "p3", *[""] * 8],
    "none": [""] * 12,
    "lone": ["p1 p2", "", "p3", "p0", "p1", "", *["p0"] * 6],  # the last six have no negative among themselves
    # questions with candidates in place of a passage: with two batches each, one of two ranks has none of them
    "asked": ["p0", "p1 p2", "", "?p0 p1", "?p1 p2 p3", "?p4", "p3", "p0", "p5", "?p2 p0 p3 p4", "?p5 p4", "p4 p1"],
}


class ShardedTrainer(CoSupTrainer):
    """
    FSDP2 on a CPU mesh, for which accelerate would take DDP.

    Layers and root are sharded, and a reduce-scatter averages gradients.
    """

    def create_optimizer(self, model=None):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        layers = list(self.model.gen.model.layers)
        if not self.model.config.tie_emb_seq:
            layers += self.model.emb_seq.h
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        self.accelerator.prepare_model = lambda model, **kwargs: model
        return super().create_optimizer(model)


def make_instances(pattern):
    """The instances of a pattern."""
    passages = {passage["id"]: passage for passage in PASSAGES}
    hard_negative = {"id": "hard", "title": "Radium", "text": "Radium is a metal."}
    instances = []
    for i, ids in enumerate(PATTERNS[pattern]):
        question = f"question {i} " * (i % 5 + 1)
        instance = {"id": str(i), "dataset": "d", "instruction": "", "input": question}
        if ids.startswith("?"):
            candidates = [passages[id] for id in ids[1:].split()]
            answers = [candidates[-1]["text"].split()[-1].strip(".")]
            instances.append({**instance, "answers": answers, "candidates": candidates})
            continue
        segments = [{"text": f"answer {i} {id}", "passage": passages[id]} for id in ids.split()]
        if i == 5 and segments:
            segments[0]["negatives"] = [passages["p0"], hard_negative]
        if not segments:
            segments = [{"text": "free", "passage": None}]
        instances.append({**instance, "segments": segments})
    return instances


def run(
    output,
    name,
    pattern="ragged",
    accumulation=1,
    fsdp=False,
    model=None,
    evaluate_first=False,
    predict=False,
    stream_held_out=False,
    logging_steps=1,
    **options,
):
    """Train one step, evaluate, and write parameters and log; on one process `fsdp` changes nothing."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    sharded = fsdp and world_size > 1
    model = make_model(**{"emb_seq": "gpt2", "emb_seq_kwargs": EMB_SEQ, **(model or {})})
    options = {"max_grad_norm": 0.0, "per_device_train_batch_size": 12 // accumulation // world_size, **options}
    args = CoSupTrainingArguments(
        str(Path(output, f"{name}-{world_size}")),
        use_cpu=True,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=logging_steps,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=3,
        **options,
    )
    held_out = make_instances(pattern if pattern == "asked" else "ragged")[:11]  # no multiple of anything
    eval_dataset = Dataset.from_list(held_out).to_iterable_dataset(num_shards=2) if stream_held_out else held_out
    trainer_class = ShardedTrainer if sharded else CoSupTrainer
    trainer = trainer_class(model, args, train_dataset=make_instances(pattern), eval_dataset=eval_dataset)
    assert trainer.accelerator.num_processes == world_size, trainer.accelerator.num_processes
    if evaluate_first:
        trainer.evaluate()
    trained = trainer.train()
    state = {}
    for key, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        value = parameter.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        state[key] = value.clone()
    if sharded and trainer.is_world_process_zero():
        trainer.model.save_pretrained(Path(output, f"{name}-saved"), state_dict=dict(state))
    entry = next((entry for entry in trainer.state.log_history if "loss" in entry), {})
    entry |= {"train_loss": trained.training_loss, **trainer.evaluate()}
    if predict:
        (query_embeds, passage_embeds), labels, _ = trainer.predict(held_out)
        for i, (query, positive) in enumerate(zip(query_embeds, passage_embeds[labels], strict=True)):
            entry |= {f"predicted_query_{i}": query[0], f"predicted_positive_{i}": positive[0]}
    if trainer.is_world_process_zero():
        names = [name for name in entry if name.endswith("loss")]
        figures = ["nsp_accuracy", "num_negatives", "grad_norm", "gradient_cosine", "gradient_ratio"]
        figures += ["target_entropy", "student_entropy", "target_max", "hit_rate@3", "num_left_out"]
        figures += ["eval_target_entropy", "eval_hit_rate@3", "eval_num_left_out"]
        figures += ["eval_first_query_recall@1", "eval_later_query_recall@1"]
        figures += ["eval_query_recall@1", "eval_query_recall@5", "eval_num_queries", "eval_nsp_predicted"]
        names += [name for name in figures if name in entry]
        names += [name for name in entry if name.startswith(("predicted", "num_input_tokens"))]
        log = {key: repr(float(entry[key])) for key in names}
        save_file(state, Path(output, f"{name}-{world_size}.safetensors"), metadata=log)


def main():
    output, cases = sys.argv[1], json.loads(sys.argv[2])
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for name, case in cases.items():
        run(output, name, **case)
        gc.collect()  # DDP's reducer: the last owner of a gloo group can deadlock as it goes
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
