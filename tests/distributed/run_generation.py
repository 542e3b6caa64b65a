"""A sharded model generates with synced_gpus, every rank its own prompts. Launched by test_synced_generation.py."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import LogitsProcessorList

from modeling_cosup import RetrievalConfig, RetrievalError
from modeling_cosup.tokenization_cosup import encode_prompt
from support.generation import Steer, left_pad
from support.models import PASSAGES, make_model

PROMPTS = [["who?", "who painted the Night Watch?", "Curie"], ["when was it finished; in Amsterdam"]]  # of each rank
SETTINGS = {
    "plain": {},
    "first": {"force_nsp_first": True},
    "forget": {"forget_passages": "recompute", "top_k": 2},
    "refused": {"min_score": 0.15, "force_nsp_first": True},
}


def answer(model, index, rank, settings, **kwargs):
    """Return the sequences and the passage ids of this rank's prompts."""
    prompts = [encode_prompt(model.tokenizer, question) for question in PROMPTS[rank]]
    inputs = left_pad(prompts, model.tokenizer.pad_token_id)
    steer = Steer(model, retrieve_every=6, end_every=17 - 6 * rank)
    output = model.generate(
        **inputs,
        retriever=index,
        retrieval_config=RetrievalConfig(**settings),
        max_new_tokens=16,
        logits_processor=LogitsProcessorList([steer]),
        return_dict_in_generate=True,
        **kwargs,
    )
    passage_ids = [[retrieval.passage_ids for retrieval in trace] for trace in output.retrievals]
    return output.sequences.tolist(), passage_ids


def answer_all(model, index, rank, **kwargs):
    """Return the answers with each of `SETTINGS`."""
    return {name: answer(model, index, rank, settings, **kwargs) for name, settings in SETTINGS.items()}


def check_a_rank_without_prompts(model, index, rank):
    prompts = []
    if rank == 0:
        prompts = [encode_prompt(model.tokenizer, question) for question in PROMPTS[0]]
    completions = model.generate_many(
        prompts,
        retriever=index,
        batch_size=2,
        synced_gpus=True,
        max_new_tokens=9,
        show_progress_bar=False,
        logits_processor=LogitsProcessorList([Steer(model, 5)]),
    )
    assert len(completions) == len(prompts)
    if prompts:
        assert sum(len(completion.retrievals) for completion in completions) > 1


def check_an_error_ends_every_rank(model, index, rank, wrong_settings, message):
    """Rank 1 fails, with `message`; the other one learns that it did."""
    settings = {"force_nsp_first": True}
    if rank == 1:
        settings |= wrong_settings
    try:
        answer(model, index, rank, settings, synced_gpus=True)
    except (ValueError, ConnectionError, RetrievalError) as error:
        expected = message if rank == 1 else "nother rank"
        assert expected in str(error), error
    else:
        raise AssertionError("nothing was raised")


def unreachable(ids):
    raise ConnectionError("the server is gone")


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank = dist.get_rank()
    model = make_model()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    expected = answer_all(model, index, rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.gen.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    answers = answer_all(model, index, rank, synced_gpus=True)
    check_a_rank_without_prompts(model, index, rank)
    check_an_error_ends_every_rank(model, index, rank, {"candidates": [["nowhere"]] * len(PROMPTS[rank])}, "nowhere")
    if rank == 1:
        index.rows_of = unreachable
    check_an_error_ends_every_rank(model, index, rank, {"candidates": [["p0"]] * len(PROMPTS[rank])}, "is gone")
    if rank == 1:
        index.search = None  # its search fails: every rank ends, none waits
    check_an_error_ends_every_rank(model, index, rank, {}, "search")
    Path(sys.argv[1], f"rank-{rank}.json").write_text(json.dumps([expected, answers]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ
    main()
