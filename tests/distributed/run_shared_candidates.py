"""Build, refresh, save and load candidates on this process group. Launched by test_shared_candidates.py."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from modeling_cosup.index_build_cosup import ShardBuilder
from support.models import make_model
from support.training import NAMES, arguments, questions
from trainer import candidate_files
from trainer.candidate_corpus import read_candidates_corpus
from trainer.candidates import CandidateIndex
from trainer.distributed import gather_objects, rank
from trainer.passage_contents import PassageContents


def main():
    output = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    candidate_files.SMALLEST_SHARD, candidate_files.NUM_SHARDS = 4, 5
    _, passages = questions(NAMES[:30])
    args = arguments(output, supervision="ntp", candidates_from="index", num_candidates=3, refresh_index_steps=1)
    model = make_model()
    embedded = []
    embed = ShardBuilder.embed

    def recording(builder, passage_ids, *rest):
        embedded.extend(passage_ids)
        embed(builder, passage_ids, *rest)

    ShardBuilder.embed = recording
    candidates = CandidateIndex(read_candidates_corpus(passages, model, PassageContents(), {}), args)
    queries = torch.nn.functional.normalize(torch.randn(4, model.config.embedding_size), dim=1)
    results = {"passages": [passage["id"] for passage in passages], "embedded": [], "found": []}
    for step in range(2):
        embedded.clear()
        candidates.refresh(model, step)
        results["embedded"].append(gather_objects(list(embedded)))
        found = candidates.search(model, queries)
        results["found"].append(gather_objects([[candidate.id for candidate in of_query] for of_query in found]))
        with torch.no_grad():
            for parameter in model.emb_seq.parameters():
                parameter *= 1.1
                parameter += 0.01
    checkpoint = output / "checkpoint-1"
    if rank() == 0:
        checkpoint.mkdir()
        candidates.save(checkpoint)
    dist.barrier()
    candidates.load(checkpoint)
    found = candidates.search(model, queries)
    results["resumed"] = gather_objects([[candidate.id for candidate in of_query] for of_query in found])

    if rank() == 1:
        ShardBuilder.embed = None
    try:
        candidates.refresh(model, 2)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    results["failed"] = gather_objects(message)
    results["after the failure"] = gather_objects(candidates.step)
    if rank() == 0:
        (output / "results.json").write_text(json.dumps(results))
    candidates.close(model)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
