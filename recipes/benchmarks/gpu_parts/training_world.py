"""Tiny data for the training part: instances, questions and corpora about the quickstart's fictional people."""

from pathlib import Path
from typing import Any

from modeling_cosup.lines_cosup import write_lines

from shared.quickstart_world import World, labelled, unlabelled

NUM_TINY_INSTANCES = 20
NUM_TINY_QUESTIONS = 5
NUM_TINY_PASSAGES = 12
TINY_TASKS = ("nq", "squad")  # one in-domain, one out-of-domain


def write_tiny_world(folder: Path) -> Path:
    """Write `train.jsonl`, and `eval/` and `corpus/` with a file for each task, unless they are there."""
    if (folder / "train.jsonl").exists():
        return folder
    world = World(0)
    for kind in ("eval", "corpus"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for task in TINY_TASKS:
        entities = [world.entity("eval") for _ in range(NUM_TINY_PASSAGES)]
        questions = [question_about(world, task, i, entities[i]) for i in range(NUM_TINY_QUESTIONS)]
        write_lines(folder / "eval" / f"{task}.jsonl.gz", questions)
        write_lines(folder / "corpus" / f"{task}.jsonl.gz", [passage for passage, _ in entities])
    entities = [world.entity("train") for _ in range(NUM_TINY_INSTANCES)]
    instances = [labelled("train", i, *world.ask(*entity)) for i, entity in enumerate(entities)]
    write_lines(folder / "train.jsonl", instances)  # last: it says that everything is there
    return folder


def question_about(world: World, task: str, number: int, entity: tuple[dict[str, str], Any]) -> dict[str, Any]:
    """Return a question of a task about an entity."""
    return {**unlabelled("eval", number, *world.ask(*entity)), "dataset": task}
