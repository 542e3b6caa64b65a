"""recipes/build_index.py, whose process of a given rank is killed when it has made a given number of shards. Launched by test_index_build.py."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import build_index

from modeling_cosup import index_build_cosup

die_at, die_on = int(sys.argv.pop(1)), int(sys.argv.pop(1))
make, made = index_build_cosup.ShardBuilder.make, []


def die_or_make(self, *args):
    if len(made) == die_at and int(os.environ.get("RANK", 0)) == die_on:
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(make(self, *args))
    return made[-1]


index_build_cosup.ShardBuilder.make = die_or_make
build_index.main()
print(f"made {len(made)} shards, world size {os.environ.get('WORLD_SIZE', 1)}", flush=True)
