"""
Part 3: does co-supervision help? Three arms learn from the full training set and answer questions of six tasks.

    arm         what is trained
    co          Gen and Emb_seq together, two towers
    co-tied     the same with one model: Gen's body reads the passages
    separate    Gen on next tokens; Emb_seq, which also encodes the queries, on next passages

All arms see the same instances in the same order, for one epoch. A check trains an arm with a seed, keeps the
checkpoint, and judges it task by task. A call that runs out of time keeps what is done, and the next one goes on from
there. Seed 0 comes first; `compare_seed_0` pairs the arms question by question. More calls add seeds 1 and 2.

What it needs, and how to bring it to a machine without a network:

    --train_file    training instances, JSON Lines, .gz or plain (24,995 instances: 6.5 MB as .gz)
    --data FOLDER   FOLDER/eval/TASK.jsonl.gz and FOLDER/corpus/TASK.jsonl.gz of the tasks in
                    recipes/experiments/tasks/folder.yaml (six tasks: 14 MB); missing tasks are left out and named
    --gen           a folder of transformers (SmolLM2-135M in float32: 540 MB); or NAME.gguf (about 90 MB), or a folder
                    that holds it or its pieces, so that each travels alone:
                        sha256sum NAME.gguf > GEN/NAME.gguf.sha256; split -b 45M NAME.gguf GEN/NAME.gguf.part
                    A GGUF file needs the package gguf. Without --gen, weights are random, in the shape of
                    SmolLM2-135M, and the result says so: speed and memory mean something then, the answers do not.
    packages        `datasets` (with `multiprocess` and `dill`), which the trainer needs; `faiss` is not needed

Checkpoints are in OUT/training/<check>/ (1 GB at most) until their tasks are judged. The results, in
OUT/training/<check>.json, take about 20 kB.
"""

from typing import Any

from gpu_parts.runner import Check, Context

ARMS = ("co", "co-tied", "separate")
SEEDS = (0, 1, 2)


def check_name(arm: str, seed: int) -> str:
    """Return the name of the check of an arm with a seed."""
    return f"{arm}_seed_{seed}"


def arm_check(arm: str, seed: int) -> Check:
    """Return the check that trains and judges an arm with a seed."""

    def run(context: Context) -> dict[str, Any]:
        from gpu_parts.training_arm import train_and_judge  # it needs packages that may be missing

        return train_and_judge(context, arm, seed, context.folder / check_name(arm, seed))

    return Check(check_name(arm, seed), run, minutes=2.5, packages=("datasets", "pyarrow"))


def comparison(name: str, seeds: tuple[int, ...]) -> Check:
    """Return the check that compares the arms of some seeds."""

    def run(context: Context) -> dict[str, Any]:
        from gpu_parts.training_comparison import compare_arms

        checks = {arm: [check_name(arm, seed) for seed in seeds] for arm in ARMS}
        return compare_arms(context.folder, checks)

    return Check(name, run, minutes=0.3)


def all_checks() -> list[Check]:
    """Return the checks of all arms and seeds, seed by seed, each seed with its comparison."""
    checks = []
    for seed in SEEDS:
        checks += [arm_check(arm, seed) for arm in ARMS]
        checks.append(comparison(f"compare_seed_{seed}", (seed,)))
    return [*checks, comparison("compare_seeds", SEEDS)]


CHECKS = all_checks()
