"""
Decide what CoSupTrainer pushes, and when: at the end of training, or at every save.

`card.py` records what was trained and writes the card. `hub_cosup` of the model's package names the files of a
checkpoint and uploads them.
"""

import functools
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from transformers import TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from modeling_cosup.card_cosup import model_card
from modeling_cosup.facts_cosup import (
    FACTS_OF_OWNER,
    Facts,
    ResultGroup,
    lasting_facts,
    load_facts,
    published_facts,
    with_published,
)
from modeling_cosup.files_cosup import write_json
from modeling_cosup.hub_cosup import (
    CARD_FILE,
    CURVES_FILE,
    FACTS_FILE,
    check_adapter_base,
    checkpoint_files,
    is_repo_id,
    push_files,
    replaced_files,
)

from .card import draw_losses, held_out_group, training_record, write_card
from .files import link_or_copy
from .model_setup import adapter_config, without_peft
from .training_args import CoSupTrainingArguments
from .watch import explained_full_disk

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from peft import PeftModel

    from modeling_cosup import CoSupForCausalLM

    class TrainerBase:
        """Stub of `Trainer` for the type checker; the mixin overrides methods of it with other types."""

        def is_world_process_zero(self) -> bool: ...

        def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None: ...

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None: ...

        def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None: ...

        def _finish_current_push(self) -> None: ...
else:
    TrainerBase = object

logger = logging.get_logger(__name__)

WAITING_PREFIX = "_push-"  # of the names of folders that wait to be uploaded
RESUME_STRATEGIES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class HubMixin(TrainerBase):
    """The part of [`CoSupTrainer`] that describes and shares what was trained."""

    args: CoSupTrainingArguments
    model: "CoSupForCausalLM | PeftModel"
    eval_dataset: Any
    train_dataset: "Dataset | IterableDataset | None"
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    hub_model_id: str | None
    push_in_progress: PushInProgress | None

    stated_facts: Facts = {}  # the licence and the language, if they are given: they win over the repository's
    _saved_weights: str | None = None  # hash of the weights that were last saved in output_dir

    def _check_hub_arguments(self, args: CoSupTrainingArguments, model: "CoSupForCausalLM | PeftModel") -> None:
        """Raise before training if the model cannot be shared after it. Remove what a killed run left."""
        if not args.push_to_hub:
            return
        if args.hub_strategy in RESUME_STRATEGIES:
            strategy = HubStrategy(args.hub_strategy).value
            raise ValueError(
                f"hub_strategy={strategy!r} would upload resume states, which are pickled files: they stay local."
                " Use 'every_save' or 'end'."
            )
        _check_base(model, args.hub_model_id)
        for folder in Path(_output_dir(args)).glob(f"{WAITING_PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        results: list[ResultGroup] | None = None,
        index: str | None = None,
        question: str | None = None,
    ) -> None:
        """
        Record what was trained, and write the card of the checkpoint that was saved in `output_dir`.

        Args:
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
                (*optional*): as in `Trainer`. Tasks become tags. Datasets that are not repositories on the Hub are not
                linked, and `dataset_args` are not shown. What is not given keeps the value that was recorded before
                in `output_dir`; tags are added to the recorded ones.
            results (`list[dict]`, *optional*): results of evaluations, see [`result_group`]; defaults to the last
                `evaluate()` of each set with these weights.
            index (`str`, *optional*): dataset repository, or folder, of the index; see [`write_card`].
            question (`str`, *optional*): the question in the card's usage block.

        Raises:
            `ValueError`: when the weights were not saved since they were trained.
        """
        if not self.is_world_process_zero():
            return
        self._check_saved()
        datasets = [name for name in _as_list(dataset) + _as_list(dataset_tags) if is_repo_id(name)]
        fields = {
            "language": language,
            "license": license,
            "base_model": finetuned_from,
            "name": model_name,
            "datasets": datasets,
        }
        output_dir = _output_dir(self.args)
        recorded = lasting_facts(load_facts(output_dir))
        fields["tags"] = list(dict.fromkeys([*recorded.get("tags", []), *_as_list(tags), *_as_list(tasks)]))
        given = {name: value for name, value in fields.items() if value}
        of_owner = {name: given[name] for name in FACTS_OF_OWNER if name in given}
        self.stated_facts = cast(Facts, {**self.stated_facts, **of_owner})
        facts = cast(Facts, {**recorded, **self.stated_facts, **given})
        training = training_record(self.args, self.model, self.train_dataset, self.state)
        training["curves"] = draw_losses(training["log"], Path(output_dir) / CURVES_FILE)
        facts["training"] = training
        facts["results"] = self._held_out_results() if results is None else results
        repo_id = self.hub_model_id or self.args.hub_model_id or output_dir
        write_card(self.model, output_dir, repo_id, facts, index, question, self._saved_weights)

    def keep_published_facts(self, token: str | None = None, revision: str | None = None) -> None:
        """
        Record in `output_dir` what the repository states for any weights, such as its licence, if there is one.

        Args:
            token (`str`, *optional*), revision (`str`, *optional*): default to `hub_token` and `hub_revision`.
        """
        if self.hub_model_id is None or not self.is_world_process_zero():
            return
        output_dir = _output_dir(self.args)
        published = published_facts(
            self.hub_model_id, token or self.args.hub_token, revision or self.args.hub_revision
        )
        facts = with_published(load_facts(output_dir), lasting_facts(published))
        if facts:
            write_json(Path(output_dir) / FACTS_FILE, facts)

    def _held_out_results(self) -> list[ResultGroup]:
        """Return the recall that `evaluate()` has last measured with the current weights, for each evaluation set."""
        set_names = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else [None]
        groups: dict[str | None, list[ResultGroup]] = {}
        for entry in self._log_of_current_weights():
            for set_name in set_names:
                groups[set_name] = held_out_group(entry, set_name) or groups.get(set_name, [])
        return [group for set_name in groups for group in groups[set_name]]

    def _log_of_current_weights(self) -> list[dict[str, float]]:
        """Return the entries of the log that were measured with the current weights."""
        log = self.state.log_history
        ends = [number for number, entry in enumerate(log) if "train_runtime" in entry]
        step = self.state.global_step
        if not ends:
            return [entry for entry in log if entry["step"] == step]
        best_checkpoint = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best_checkpoint is not None:
            step = int(best_checkpoint.rpartition("-")[2])  # a better step need not have been saved
        during, afterwards = log[: ends[-1]], log[ends[-1] + 1 :]
        return [entry for entry in during if entry["step"] == step] + afterwards

    def _check_saved(self) -> None:
        """
        Raise unless output_dir holds the current weights, because a card must not describe others.

        Adapters and shards cannot be checked.
        """
        base = without_peft(self.model)
        if base is not self.model:
            return
        weights = base.hash_all_weights()
        if weights is not None and weights != self._saved_weights:
            raise ValueError(
                "The weights are not those that were last saved in output_dir: call save_model() first, then"
                " create_model_card()."
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Save, describe and share the model, in one commit on `hub_model_id`.

        Weights, configs, code, tokenizers and the card are pushed; resume states are not.

        Args: as in `Trainer.push_to_hub`; `**kwargs` are passed to [`~CoSupTrainer.create_model_card`]. The licence
            and the language default to those that were given to it before, or else that the repository states.

        Returns:
            `huggingface_hub.CommitInfo`, or a `Future` of it with `blocking=False`; `None` on other ranks.

        Raises:
            `ValueError`: for adapters of a base model that is not on the Hub, or that `hub_model_id` holds.
        """
        _check_base(self.model, self.hub_model_id or self.args.hub_model_id)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        revision = revision or self.args.hub_revision
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.keep_published_facts(token, revision)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        assert self.hub_model_id is not None  # set when the repository was created
        push = functools.partial(
            push_checkpoint,
            _output_dir(self.args),
            self.hub_model_id,
            commit_message,
            token=token,
            revision=revision,
            adapters=adapter_config(self.model) is not None,
        )
        return push() if blocking else self._hub_api.run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint during training (`hub_strategy="every_save"`), without its resume states."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        adapters = adapter_config(self.model)
        try:
            folder = _copy_checkpoint(checkpoint_folder, _output_dir(self.args), adapters is not None)
        except OSError as error:
            logger.warning(f"{checkpoint_folder} was not pushed, and training continues: {error}")
            return
        base_name = None if adapters is None else adapters.base_model_name_or_path
        assert self.hub_model_id is not None  # set when the repository was created
        recorded = cast(Facts, {**load_facts(folder), **load_facts(_output_dir(self.args))})
        published = published_facts(self.hub_model_id, self.args.hub_token, self.args.hub_revision)
        facts = lasting_facts(with_published(recorded, published))  # nothing has been measured with these weights
        facts = cast(Facts, {**facts, **self.stated_facts})
        if facts:
            write_json(folder / FACTS_FILE, facts)
        card = model_card(without_peft(self.model), self.hub_model_id, facts, base_name)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        job = self._hub_api.run_as_future(
            _push_and_remove,
            folder,
            self.hub_model_id,
            f"Training in progress, {self._progress()}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
            adapters=adapters is not None,
        )
        job.add_done_callback(_warn_of_failure)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress()
        self.push_in_progress.jobs.append(job)  # type: ignore[union-attr]  # a list, annotated as one job

    def _progress(self) -> str:
        """Return the step, or the epoch if checkpoints are saved by epoch."""
        if self.args.save_strategy == SaveStrategy.STEPS:
            return f"step {self.state.global_step}"
        return f"epoch {int(self.state.epoch or 0)}"

    @functools.cached_property
    def _hub_api(self) -> HfApi:
        """One client for all pushes, so that they wait for each other."""
        return HfApi()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Save as `Trainer` does, but keep the token out of the file of the arguments. A full disk undoes the save."""
        output_folder = Path(_output_dir(self.args))
        folder = Path(output_dir or output_folder)
        undo = functools.partial(_remove_changed, folder, _changed(folder))
        token = self.args.hub_token
        self.args.hub_token = None
        try:
            with explained_full_disk(folder, output_folder, undo):
                super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        base = without_peft(self.model)
        if base is self.model and folder == output_folder:
            self._saved_weights = base.hash_all_weights(state_dict)


def _output_dir(args: CoSupTrainingArguments) -> str:
    """Return `args.output_dir`, which `TrainingArguments` sets if it was not given."""
    return cast(str, args.output_dir)


def _changed(folder: Path) -> dict[Path, int]:
    """Return when each file of the checkpoint in a folder was last changed, in nanoseconds."""
    paths = {*checkpoint_files(folder).values(), *checkpoint_files(folder, adapters=True).values()}
    return {path: path.stat().st_mtime_ns for path in paths}


def _remove_changed(folder: Path, before: Mapping[Path, int]) -> None:
    """Remove the files of the checkpoint in a folder that a save has written, so that it does not mix two saves."""
    for path, changed in _changed(folder).items():
        if before.get(path) != changed:
            path.unlink()


def _as_list(value: str | Iterable[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _check_base(model: "CoSupForCausalLM | PeftModel", repo_id: str | None) -> None:
    """Raise for adapters that others could not load, or that would be pushed next to the model that they change."""
    adapters = adapter_config(model)
    if adapters is not None:
        check_adapter_base(adapters.base_model_name_or_path, repo_id)


def _copy_checkpoint(checkpoint_folder: str, output_dir: str, adapters: bool) -> Path:
    """
    Copy the files of a checkpoint, which may be rotated away before they are uploaded, to a new folder.

    Hard links are used if the file system has them. The folder is removed if a copy fails.
    """
    folder = Path(tempfile.mkdtemp(prefix=WAITING_PREFIX, dir=output_dir))
    try:
        for name, path in checkpoint_files(checkpoint_folder, adapters).items():
            if name != CARD_FILE:  # PEFT's card of adapters
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(path, target)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _push_and_remove(folder: Path, repo_id: str, commit_message: str, **options: Any) -> CommitInfo:
    """Push a folder that [`_copy_checkpoint`] made, then remove it."""
    try:
        return push_checkpoint(folder, repo_id, commit_message, **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _warn_of_failure(job: Future[CommitInfo]) -> None:
    if job.exception() is not None:
        logger.warning(f"A push during training failed, and training continues: {job.exception()}")


def push_checkpoint(
    folder: str | Path,
    repo_id: str,
    commit_message: str | None,
    token: str | None = None,
    revision: str | None = None,
    adapters: bool = False,
) -> CommitInfo:
    """
    Push the files of a checkpoint in an output folder, in one commit.

    Args:
        folder (`str` or `Path`): folder of the checkpoint, or of adapters.
        repo_id (`str`): a repository that exists.
        commit_message (`str`), token (`str`, *optional*), revision (`str`, *optional*): as in `Trainer.push_to_hub`.
        adapters (`bool`): whether the folder is of adapters.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        `ValueError`: when the folder holds no safetensors, as after FSDP saved with SHARDED_STATE_DICT.
    """
    files = checkpoint_files(folder, adapters)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"{folder} holds no safetensors, so nothing was pushed:"
            " with FSDP, save with the state dict type FULL_STATE_DICT."
        )
    replaced = replaced_files(adapters)
    return push_files(files, repo_id, replaced, commit_message=commit_message, token=token, revision=revision)
