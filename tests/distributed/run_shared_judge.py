"""A judge that three processes answer together. Launched by test_shared_judge.py."""

import json
import sys

import torch.distributed as dist

from trainer.judging.nli import SharedJudge

dist.init_process_group("gloo")
asked, fails = [], sys.argv[1] == "fails"


def entail(pairs):
    asked.append(pairs)
    if fails and dist.get_rank() == 1 and len(asked) == 2:
        raise ValueError("1 of 2 pairs got no answer")
    return [premise == hypothesis for premise, hypothesis in pairs]


judge, told = SharedJudge(entail), {}
try:
    if dist.get_rank() == 0:
        pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "a"), ["a", "a"], ("d", "d")]
        try:
            told["answers"] = [judge(pairs), judge(pairs[:2]), judge([])]
        finally:
            judge.stop()
    else:
        judge.serve()
except ValueError as error:
    told["error"] = str(error)
every = [None] * dist.get_world_size()
dist.all_gather_object(every, {**told, "asked": asked})
if dist.get_rank() == 0:
    print(json.dumps(every))
dist.destroy_process_group()
