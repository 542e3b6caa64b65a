"""What a resumed run goes on with: the same instances in the same order, and the same clock."""

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from support.models import make_model
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer

SAVES = {"save_strategy": "steps", "save_steps": 1}


class Stream(IterableDataset):
    def __iter__(self):
        yield from world(NAMES[:24])


class Recording(CoSupTrainer):
    """Keeps the ids of the instances of every step, by its number."""

    def training_step(self, model, inputs, *args, **kwargs):
        (ids,) = inputs["facts"].instance_ids
        self.instances_of_step.setdefault(self.state.global_step + 1, []).append(ids)
        return super().training_step(model, inputs, *args, **kwargs)


def run(folder, dataset, checkpoint=None, **options):
    """Train, and return the ids of the instances of each step."""
    trainer = Recording(make_model(), arguments(folder, **SAVES, **options), train_dataset=dataset)
    trainer.data_collator.call_overhead = None
    trainer.instances_of_step = {}
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer.instances_of_step


def check_resume(folder, dataset, steps, **options):
    """Resume from the checkpoint of each of these steps, and compare with the whole run."""
    whole = run(folder / "whole", dataset(), **options)
    for step in steps:
        resumed = run(folder / f"from {step}", dataset(), folder / "whole" / f"checkpoint-{step}", **options)
        assert resumed == {number: ids for number, ids in whole.items() if number > step}
    return whole


@pytest.mark.parametrize("kind", ["torch", "datasets"])
def test_a_stream_goes_on_where_it_was(tmp_path, kind):
    """Three batches are a pass: checkpoints in the first pass, at its end, and in the second and third."""

    def stream():
        if kind == "torch":
            return Stream()
        return datasets.Dataset.from_list(world(NAMES[:24])).to_iterable_dataset().shuffle(seed=1, buffer_size=24)

    whole = check_resume(tmp_path, stream, (2, 3, 4, 7), max_steps=8)
    if kind == "datasets":
        assert whole[1] != whole[4]  # each pass has another order


def test_a_stream_with_accumulated_batches_goes_on_where_it_was(tmp_path):
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    check_resume(tmp_path, Stream, (2, 3), **options)


def test_a_finished_run_within_a_first_pass_is_extended(tmp_path):
    class Long(Stream):
        def __iter__(self):
            return iter(world(NAMES[:48]))

    whole = run(tmp_path / "whole", Long(), max_steps=4)
    run(tmp_path / "short", Long(), max_steps=2)
    extended = run(tmp_path / "extended", Long(), tmp_path / "short" / "checkpoint-2", max_steps=4)
    assert extended == {step: whole[step] for step in (3, 4)}


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_every_epoch_has_its_order_after_a_resume_too(tmp_path, strategy):
    """Dropout draws random numbers, on which the order must not depend."""
    options = {"num_train_epochs": 2, "train_sampling_strategy": strategy, "per_device_train_batch_size": 4}
    instances = world(NAMES[:16])
    for number, instance in enumerate(instances):
        instance["input"] += " please" * (number % 5)
    whole = check_resume(tmp_path, lambda: instances, (2, 4, 6), **options)
    first, second = [whole[step] for step in range(1, 5)], [whole[step] for step in range(5, 9)]
    assert first != second


def test_the_clock_of_a_checkpoint_counts_what_was_not_logged(tmp_path):
    class Slow(CoSupTrainer):
        def training_step(self, *args, **kwargs):
            self._running.leave_out(-1000)  # as if the step took 1,000 seconds
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, max_steps=3, **{**SAVES, "logging_steps": 100})
    Slow(make_model(), args, train_dataset=world(NAMES[:16])).train()
    resumed = Slow(make_model(), args, train_dataset=world(NAMES[:16]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert round(resumed._running.training_seconds, -3) == 3000


def test_a_smaller_batch_is_not_tried_with_weights_that_are_trained(tmp_path):
    class Full(CoSupTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, max_steps=4, auto_find_batch_size=True)
    trainer = Full(make_model(), args, train_dataset=world(NAMES[:16]))
    message = "memory ran out after step 2, .* begin at step 0 .* Set per_device_train_batch_size=7 or less"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_noise_is_not_added_twice_after_an_error(tmp_path):
    class Breaking(CoSupTrainer):
        def training_step(self, *args, **kwargs):
            raise KeyboardInterrupt

    trainer = Breaking(make_model(), arguments(tmp_path, neftune_noise_alpha=5.0), train_dataset=world(NAMES[:8]))
    assert not trainer.data_collator.padding_free  # the noise depends on the length of a row
    embeddings = trainer.model.get_input_embeddings()
    num_hooks = len(embeddings._forward_hooks)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert len(embeddings._forward_hooks) == num_hooks
    with pytest.raises(ValueError, match="padding_free=True with neftune_noise_alpha"):
        args = arguments(tmp_path, neftune_noise_alpha=5.0, padding_free=True)
        CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:8]))
