"""generate(synced_gpus=True) of a sharded model, every rank with prompts of its own. Launched by test_synced_generation.py."""

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


def answers(model, index, rank, settings, **kwargs):
    prompts = [encode_prompt(model.tokenizer, question) for question in PROMPTS[rank]]
    steer = Steer(model, retrieve_every=6, end_every=17 - 6 * rank)
    inputs = left_pad(prompts, model.tokenizer.pad_token_id)
    options = {"max_new_tokens": 16, "logits_processor": LogitsProcessorList([steer]), "return_dict_in_generate": True}
    output = model.generate(
        **inputs, retriever=index, retrieval_config=RetrievalConfig(**settings), **options, **kwargs
    )
    return output.sequences.tolist(), [[r.passage_ids for r in trace] for trace in output.retrievals]


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    model = make_model()
    index = model.build_index(PASSAGES, show_progress_bar=False)
    expected = {name: answers(model, index, dist.get_rank(), settings) for name, settings in SETTINGS.items()}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.gen.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = {
        name: answers(model, index, dist.get_rank(), settings, synced_gpus=True) for name, settings in SETTINGS.items()
    }
    prompts = (
        [encode_prompt(model.tokenizer, question) for question in PROMPTS[0]] if dist.get_rank() == 0 else []
    )  # one rank has none left
    options = {
        "max_new_tokens": 9,
        "show_progress_bar": False,
        "logits_processor": LogitsProcessorList([Steer(model, 5)]),
    }
    many = model.generate_many(prompts, retriever=index, batch_size=2, synced_gpus=True, **options)
    assert len(many) == len(prompts) and (not many or sum(len(done.retrievals) for done in many) > 1)
    if dist.get_rank() == 1:
        index.search = None  # its search fails: every rank ends, none waits
    for rank, wrong, message in (
        (1, {"candidates": [["nowhere"]] * len(PROMPTS[dist.get_rank()])}, "nowhere"),
        (1, {}, "search"),
    ):
        settings = wrong if dist.get_rank() == rank else {}
        try:
            answers(model, index, dist.get_rank(), {"force_nsp_first": True, **settings}, synced_gpus=True)
        except (ValueError, RetrievalError) as error:
            assert message in str(error) if dist.get_rank() == rank else "nother rank" in str(error), error
        else:
            raise AssertionError("nothing was raised")
    Path(sys.argv[1], f"rank-{dist.get_rank()}.json").write_text(json.dumps([expected, found]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ
    main()
