"""Judge pairs in three processes together. Launched by test_shared_judge.py."""

import json
import sys

import torch.distributed as dist

from trainer.judging.nli import SharedJudge

dist.init_process_group("gloo")
fails = sys.argv[1] == "fails"
asked = []


def entail(pairs):
    asked.append(pairs)
    if fails and dist.get_rank() == 1 and len(asked) == 2:
        raise ValueError("1 of 2 pairs got no answer")
    return [premise == hypothesis for premise, hypothesis in pairs]


judge = SharedJudge(entail)
report = {}
try:
    if dist.get_rank() == 0:
        pairs = [("a", "a"), ("a", "b"), ("b", "b"), ("c", "a"), ["a", "a"], ("d", "d")]
        try:
            report["answers"] = [judge(pairs), judge(pairs[1:3]), judge([])]
        finally:
            judge.stop()
    else:
        judge.serve()
except ValueError as error:
    report["error"] = str(error)
report["asked"] = asked
reports = [None] * dist.get_world_size()
dist.all_gather_object(reports, report)
if dist.get_rank() == 0:
    print(json.dumps(reports))
dist.destroy_process_group()
