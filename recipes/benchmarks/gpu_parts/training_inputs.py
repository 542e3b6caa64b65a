"""What the arms of the training part learn from and are judged on: given files, or tiny ones that are made here."""

from dataclasses import dataclass
from typing import Any

from trainer import load_instances
from trainer.data import CheckedInstance
from trainer.judging.tasks import Task

from gpu_parts.runner import Context, Skip
from gpu_parts.training_tasks import given_tasks
from gpu_parts.training_world import NUM_TINY_INSTANCES, write_tiny_world
from gpu_parts.weights import given_gen, name_of_gen, random_gen


@dataclass
class Inputs:
    """
    What the arms learn from and are judged on.

    Args:
        gen (`str`): folder of Gen's checkpoint.
        weights (`str`): what its weights are, for the results.
        instances (`list[CheckedInstance]`): training instances.
        tasks (`list[Task]`): tasks whose files are there.
        missing_tasks (`list[str]`): names of the other tasks.
    """

    gen: str
    weights: str
    instances: list[CheckedInstance]
    tasks: list[Task]
    missing_tasks: list[str]

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint depends on, next to arm and seed."""
        return {"weights": self.weights, "instances": len(self.instances), "first_instance": self.instances[0]["id"]}


def read_inputs(context: Context) -> Inputs:
    """
    Read the training instances, and find Gen and the tasks; with `--tiny`, make what was not given.

    Raises:
        [`Skip`]: without the files, or a package to read them.
    """
    train_file, data = context.train_file, context.data
    if context.tiny and (train_file is None or data is None):
        world = write_tiny_world(context.folder / "world")
        train_file, data = train_file or str(world / "train.jsonl"), data or str(world)
    if train_file is None or data is None:
        raise Skip("needs --train_file and --data")
    tasks, missing_tasks = given_tasks(data, context.tiny)
    instances = load_instances(train_file)
    if context.tiny:
        instances = instances[:NUM_TINY_INSTANCES]
    context.folder.mkdir(parents=True, exist_ok=True)
    if context.gen is not None:
        gen, weights = given_gen(context.gen, context.folder), name_of_gen(context.gen)
    else:
        gen = random_gen(context.folder, (text for instance in instances for text in texts_of(instance)), context.tiny)
        weights = f"random weights, {'a tiny shape' if context.tiny else 'the shape of SmolLM2-135M'}"
    return Inputs(gen, weights, instances, tasks, missing_tasks)


def texts_of(instance: CheckedInstance) -> list[str]:
    """Return the texts of an instance, from which the tokenizer of a random Gen is made."""
    texts = [instance["instruction"], instance["input"]]
    for segment in instance["segments"]:
        texts.append(segment["text"])
        if segment["passage"]:
            texts += [segment["passage"]["title"], segment["passage"]["text"]]
    return texts
