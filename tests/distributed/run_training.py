"""One SGD step of CoSupTrainer on this process group; rank 0 writes the parameters. Launched by test_ranks_equal_one_process.py."""

import gc
import sys
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import PASSAGES, make_model  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from trainer import CoSupTrainer, CoSupTrainingArguments  # noqa: E402

EMB_SEQ = {"hidden_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# passages per instance; duplicates across ranks (p0, p1), and a rank without any passage
PATTERNS = {
    "ragged": [["p0"], ["p1", "p2"], [], ["p3"], ["p0"], ["p1"], ["p4", "p5", "p0"], []],
    "zero": [["p0"], ["p1"], ["p2"], ["p3"], [], [], [], []],
    "none": [[], [], [], [], [], [], [], []],
}


def main(output, pattern, world_size, accumulation):
    passages = {passage["id"]: passage for passage in PASSAGES}
    instances = []
    for i, ids in enumerate(PATTERNS[pattern]):
        segments = [{"text": f"answer {i} {id}", "passage": passages[id]} for id in ids] or [{"text": "free", "passage": None}]
        instances.append({"id": str(i), "dataset": "d", "instruction": "", "input": f"question {i} " * (i + 1), "segments": segments})
    args = CoSupTrainingArguments(
        output + ".folder",
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=8 // accumulation // world_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = CoSupTrainer(make_model(emb_seq="gpt2", emb_seq_kwargs=EMB_SEQ), args, train_dataset=instances)
    assert trainer.accelerator.num_processes == world_size, trainer.accelerator.num_processes
    trainer.train()
    if trainer.is_world_process_zero():
        state = {name: parameter.detach().clone() for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}
        (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        save_file(state, output, metadata={key: repr(entry[key]) for key in ("loss", "ntp_loss", "nsp_loss", "nsp_accuracy", "num_negatives")})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    gc.collect()  # DDP's reducer first: the last owner of a gloo group can deadlock as it goes
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
