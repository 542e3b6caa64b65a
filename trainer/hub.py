"""What CoSupTrainer pushes, and when: the files and cards themselves are made by `card.py` and `modeling_cosup`."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from modeling_cosup.card_cosup import model_card
from modeling_cosup.facts_cosup import CURVES_FILE
from modeling_cosup.hub_cosup import CARD_FILE, REPLACED_FILES, checkpoint_files, is_repo_id, push_files

from .card import draw_losses, held_out_group, training_record, write_card
from .model_setup import adapter_config, without_peft

logger = logging.get_logger(__name__)

KEPT = "_push-"  # begins the names of folders that wait to be uploaded
RESUME_STRATEGIES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class HubMixin:
    """The part of [`CoSupTrainer`] that describes and shares what was trained."""

    _saved_weights = None  # hash of the weights that were last saved in output_dir

    def _check_hub_arguments(self, args, model):
        """What cannot be shared is an error before training, not after it."""
        if args.push_to_hub and args.hub_strategy in RESUME_STRATEGIES:
            strategy = args.hub_strategy.value
            raise ValueError(
                f"hub_strategy={strategy!r} would upload resume states, which are pickled files: they stay local. Use 'every_save' or 'end'."
            )
        if args.push_to_hub:
            _check_base(model)
            for folder in Path(args.output_dir).glob(f"{KEPT}*"):  # of a run that was killed
                shutil.rmtree(folder, ignore_errors=True)

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
        results=None,
        index=None,
        question=None,
    ):
        """
        Record what was trained, and write the card of the checkpoint that was saved in `output_dir`.

        Args:
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args (*optional*): as in `Trainer`. Tasks become tags.
                What is no repository on the Hub is not linked, and `dataset_args` are not shown.
            results (`list[dict]`, *optional*): of evaluations, see [`result_group`]; defaults to the last `evaluate()`.
            index (`str`, *optional*): dataset repository, or folder, of the index.
            question (`str`, *optional*): that the usage block asks.

        Raises:
            `ValueError`: when the weights were not saved since they were trained.
        """
        if not self.is_world_process_zero():
            return
        self._check_saved()
        given = {
            "language": language,
            "license": license,
            "tags": _listed(tags) + _listed(tasks),
            "base_model": finetuned_from,
            "name": model_name,
        }
        given["datasets"] = [name for name in _listed(dataset) + _listed(dataset_tags) if is_repo_id(name)]
        facts = {name: value for name, value in given.items() if value}
        last = next((entry for entry in reversed(self.state.log_history) if "eval_query_recall@1" in entry), {})
        facts |= {"training": training_record(self), "results": held_out_group(last) if results is None else results}
        facts["training"]["curves"] = draw_losses(facts["training"]["log"], Path(self.args.output_dir) / CURVES_FILE)
        repo_id = self.hub_model_id or self.args.hub_model_id or self.args.output_dir
        write_card(self.model, self.args.output_dir, repo_id, facts, index, question, self._saved_weights)

    def _check_saved(self):
        """
        Raise unless the weights are the ones in output_dir: a card must not describe others. Cannot be checked for
        adapters or shards.
        """
        base = without_peft(self.model)
        if base is self.model and base.hash_all_weights() not in (None, self._saved_weights):
            raise ValueError(
                "The weights are not those that were last saved in output_dir: call save_model() first, then create_model_card()."
            )

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """
        Save, describe and share the model, in one commit on `hub_model_id`: weights, configs, code, tokenizer(s), card; no resume states.

        Args: those of `Trainer.push_to_hub`; `**kwargs` are for [`~CoSupTrainer.create_model_card`].

        Returns:
            `huggingface_hub.CommitInfo`, or a `Future` of it with `blocking=False`; `None` on other ranks.

        Raises:
            `ValueError`: for adapters of a base model that is not on the Hub.
        """
        _check_base(self.model)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        options = {"token": token, "revision": revision or self.args.hub_revision}
        if blocking:
            return push_checkpoint(self.args.output_dir, self.hub_model_id, commit_message, **options)
        return self._hub_api.run_as_future(
            push_checkpoint, self.args.output_dir, self.hub_model_id, commit_message, **options
        )

    def _push_from_checkpoint(self, checkpoint_folder):
        """`hub_strategy="every_save"`: the files of a checkpoint that others can load, during training."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        when = (
            f"step {self.state.global_step}"
            if self.args.save_strategy == SaveStrategy.STEPS
            else f"epoch {int(self.state.epoch)}"
        )
        try:
            folder = _keep_files(checkpoint_folder, self.args.output_dir)
        except OSError as error:
            logger.warning(f"{checkpoint_folder} was not pushed, and training goes on: {error}")
            return
        base, adapters = without_peft(self.model), adapter_config(self.model)
        card = model_card(
            base, self.hub_model_id, {}, None if adapters is None else adapters.base_model_name_or_path
        )  # no results: of these there are none
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        options = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        job = self._hub_api.run_as_future(
            _push_and_remove, folder, self.hub_model_id, f"Training in progress, {when}", **options
        )
        job.add_done_callback(_report)
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress([job])
        else:
            self.push_in_progress.jobs.append(job)

    @functools.cached_property
    def _hub_api(self):
        """The one whose pushes wait for each other."""
        return HfApi()

    def _save(self, output_dir=None, state_dict=None):
        """`Trainer`'s, which keeps the arguments in a file: without the token."""
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
        base = without_peft(self.model)
        if base is self.model and Path(output_dir or self.args.output_dir) == Path(self.args.output_dir):
            self._saved_weights = base.hash_all_weights(state_dict)


def _listed(value):
    return [value] if isinstance(value, str) else list(value or [])


def _check_base(model):
    """Raise unless the base of adapters, if these are some, is a repository that others can load."""
    adapters = adapter_config(model)
    if adapters is not None and not is_repo_id(adapters.base_model_name_or_path):
        raise ValueError(
            f"A push would upload adapters of {adapters.base_model_name_or_path or 'a model in memory'}, which nobody else has: push the base model"
            " first (model.push_to_hub, or recipes/import_checkpoints.py) and train adapters of the repository."
        )


def _keep_files(checkpoint_folder, output_dir):
    """A folder of our own with the files of a checkpoint, which may be rotated away before they are uploaded; links, where the file system has them."""
    folder = Path(tempfile.mkdtemp(prefix=KEPT, dir=output_dir))
    for name, path in checkpoint_files(checkpoint_folder).items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if name == CARD_FILE:  # PEFT writes the card of adapters
            continue
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
    return folder


def _push_and_remove(folder, repo_id, commit_message, **options):
    """Push a folder of [`_keep_files`], which then goes."""
    try:
        return push_checkpoint(folder, repo_id, commit_message, **options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _report(job):
    if job.exception() is not None:
        logger.warning(f"A push during training failed, and training goes on: {job.exception()}")


def push_checkpoint(folder, repo_id, commit_message, token=None, revision=None):
    """
    Push what others can load of an output folder, in one commit.

    Args:
        folder (`str` or `Path`): of the checkpoint, or of adapters.
        repo_id (`str`): of a repository that exists.
        commit_message (`str`), token (`str`, *optional*), revision (`str`, *optional*): as in `Trainer.push_to_hub`.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        `ValueError`: when the folder holds no weights, as those that FSDP saves with SHARDED_STATE_DICT.
    """
    files = checkpoint_files(folder)
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"{folder} holds no safetensors, so nothing was pushed: with FSDP, save with the state dict type FULL_STATE_DICT."
        )
    return push_files(files, repo_id, REPLACED_FILES, commit_message=commit_message, token=token, revision=revision)
