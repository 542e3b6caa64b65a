"""
recipes/build_index.py, with the process of one rank killed after a number of shards.

Launched by test_index_build.py. Arguments: the number of shards, the rank, then the recipe's own.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import build_index

from modeling_cosup import index_build_cosup

die_at, die_on = int(sys.argv.pop(1)), int(sys.argv.pop(1))
make = index_build_cosup.ShardBuilder.make
shards = []


def die_or_make(self, *args):
    if len(shards) == die_at and int(os.environ.get("RANK", 0)) == die_on:
        os.kill(os.getpid(), signal.SIGKILL)
    shard = make(self, *args)
    shards.append(shard)
    return shard


index_build_cosup.ShardBuilder.make = die_or_make
build_index.main()
print(f"made {len(shards)} shards, world size {os.environ.get('WORLD_SIZE', 1)}", flush=True)
