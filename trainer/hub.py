"""What CoSupTrainer pushes, and when."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from modeling_cosup.card_cosup import CURVES_FILE
from modeling_cosup.hub_cosup import CARD_FILE, REPLACED_PATTERNS, checkpoint_files, is_repo_id, push_files

from .card import draw_losses, held_out_group, training_record, write_card
from .model_setup import adapter_config

logger = logging.get_logger(__name__)

RESUME_STRATEGIES = (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)


class HubMixin:
    """The part of [`CoSupTrainer`] that describes and shares what was trained."""

    def _check_hub_arguments(self, args, model):
        """What cannot be shared is an error before training, not after it."""
        if not args.push_to_hub:
            return
        if args.hub_strategy in RESUME_STRATEGIES:
            strategy = args.hub_strategy.value
            raise ValueError(f"hub_strategy={strategy!r} would upload resume states, which are pickled files: they stay local. Use 'every_save' or 'end'.")
        adapters = adapter_config(model)
        if adapters is not None and not is_repo_id(adapters.base_model_name_or_path):
            raise ValueError(
                f"push_to_hub would upload adapters of {adapters.base_model_name_or_path or 'a model in memory'}, which nobody else has: push the base model"
                " first (model.push_to_hub, or recipes/import_checkpoints.py) and train adapters of the repository."
            )

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        dataset=None,
        results=None,
        index=None,
        question=None,
    ):
        """
        Record what was trained, and write the card of the checkpoint in `output_dir`.

        Args:
            language (`str`, *optional*), license (`str`, *optional*), tags (`str` or `list[str]`, *optional*), model_name (`str`, *optional*), finetuned_from
                (`str`, *optional*), dataset (`str` or `list[str]`, *optional*): as in `Trainer`; a dataset that is no repository on the Hub is not linked.
            results (`list[dict]`, *optional*): of evaluations, see [`result_group`]; defaults to the last `evaluate()`.
            index (`str`, *optional*): dataset repository of the index.
            question (`str`, *optional*): that the usage block asks.
        """
        if not self.is_world_process_zero():
            return
        names = [dataset] if isinstance(dataset, str) else dataset or []
        given = {"language": language, "license": license, "tags": [tags] if isinstance(tags, str) else tags, "base_model": finetuned_from}
        given |= {"name": model_name, "datasets": [name for name in names if is_repo_id(name)], "index": index, "question": question}
        facts = {name: value for name, value in given.items() if value}
        last = next((entry for entry in reversed(self.state.log_history) if "eval_recall@1" in entry), {})
        facts |= {"training": training_record(self), "results": held_out_group(last) if results is None else results}
        facts["training"]["curves"] = draw_losses(facts["training"]["log"], Path(self.args.output_dir) / CURVES_FILE)
        write_card(self.model, self.args.output_dir, self.hub_model_id or self.args.hub_model_id or self.args.output_dir, facts)

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs):
        """
        Save, describe and share the model, in one commit on `hub_model_id`: weights, configs, code, tokenizer(s), card; no resume states.

        Args: those of `Trainer.push_to_hub`; `**kwargs` are for [`~CoSupTrainer.create_model_card`].

        Returns:
            `huggingface_hub.CommitInfo`, or a `Future` of it with `blocking=False`; `None` on other ranks.
        """
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
            return push_checkpoint(self.args.output_dir, self.hub_model_id, self.args, commit_message, **options)
        return self._hub_api.run_as_future(push_checkpoint, self.args.output_dir, self.hub_model_id, self.args, commit_message, **options)

    def _push_from_checkpoint(self, checkpoint_folder):
        """`hub_strategy="every_save"`: the files of a checkpoint that others can load, beside training."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        when = f"step {self.state.global_step}" if self.args.save_strategy == SaveStrategy.STEPS else f"epoch {int(self.state.epoch)}"
        folder = _keep_files(checkpoint_folder, self.args.output_dir)
        job = self._hub_api.run_as_future(_push_and_remove, folder, self.hub_model_id, self.args, f"Training in progress, {when}")
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


def _keep_files(checkpoint_folder, output_dir):
    """A folder of our own with the files of a checkpoint, which may be rotated away before they are uploaded; links, where the file system has them."""
    folder = Path(tempfile.mkdtemp(prefix="_push-", dir=output_dir))
    for name, path in checkpoint_files(checkpoint_folder).items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)
    return folder


def _push_and_remove(folder, repo_id, args, commit_message):
    """Push a folder of [`_keep_files`], which then goes. Without the card: that of a checkpoint of adapters is PEFT's, and the Hub would keep it."""
    try:
        return push_checkpoint(folder, repo_id, args, commit_message, card=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _report(job):
    if job.exception() is not None:
        logger.warning(f"A push during training failed, and training goes on: {job.exception()}")


def push_checkpoint(folder, repo_id, args, commit_message, token=None, revision=None, card=True):
    """
    Push what others can load of an output folder, in one commit.

    Args:
        folder (`str` or `Path`): of the checkpoint, or of adapters.
        repo_id (`str`): of a repository that exists.
        args ([`CoSupTrainingArguments`]): `hub_token` and `hub_revision`.
        commit_message (`str`), token (`str`, *optional*), revision (`str`, *optional*): as in `Trainer.push_to_hub`.
        card (`bool`): whether the card goes along.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    files = {name: path for name, path in checkpoint_files(folder).items() if card or name != CARD_FILE}
    options = {"token": token or args.hub_token, "revision": revision or args.hub_revision}
    return push_files(files, repo_id, REPLACED_PATTERNS, commit_message=commit_message, **options)
