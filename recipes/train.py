"""
Train Gen and Emb_seq together, then build the index and evaluate.

    accelerate launch --config_file recipes/accelerate_configs/single.yaml recipes/train.py \\
        --config recipes/configs/quickstart.yaml
    accelerate launch recipes/train.py --gen NAME --train_file train.jsonl --corpus_file corpus.jsonl \\
        --eval_file eval.jsonl --output_dir out

Questions whose passage is unknown get candidates from the corpus: see `--candidates_from`, and the configs of a
distillation, `recipes/configs/distillation_*.yaml`. Then answers are evaluated with as many passages as were trained.

With a frozen Emb_seq an existing index stays valid: `--index out/index`, or for a Milvus collection
`--index wiki --index_uri http://host:19530`, evaluates it instead of building one.

Writes the checkpoint with its model card to `output_dir`, the index to `output_dir/index`, and all measured numbers to
`output_dir/results.json`. `--push_to_hub true` also pushes the checkpoint to `--hub_model_id`. `--push_index true`
also pushes the index, passages included, to the dataset repository `--hub_model_id` plus `-index`.
"""

import gc
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared.cli import check_options, clear_errors, json_object, parse, refuse_given

from shared.arguments import TRAINING_ARGUMENTS, ScriptArguments

if __name__ == "__main__":  # --help and a wrong option do not wait for the imports below
    check_options([ScriptArguments, TRAINING_ARGUMENTS], __doc__)

import torch
from accelerate import DistributedType
from transformers import set_seed
from transformers.utils import logging

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.facts_cosup import load_facts
from trainer import CoSupTrainer, CoSupTrainingArguments, load_corpus, load_instances
from trainer.card import complete_card, held_out_group, write_card
from trainer.hub import push_checkpoint
from trainer.judging.figures import Measured
from trainer.judging.results import FORMAT, write_results
from trainer.model_setup import trains_passages, without_peft
from trainer.questions import gold_ids, ranking_can_be_judged
from trainer.watch import is_full_disk

from shared.indexes import check_index_options, close_index, open_index
from shared.model_options import check_tied_options, load_model, lora
from shared.processes import end_processes, set_cpu_threads, waiting_for_the_slowest
from shared.progress_bars import progress_bars
from shared.quickstart import WorldArguments, prepare_world
from shared.training_run import Run, evaluate, held_out, read_questions

logger = logging.get_logger(__name__)

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
READ_WITH = {  # option -> the option without which it is not read
    "corpus_license": "push_index",
    "prepare_options": "prepare",
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"), "use_peft"),
}


def main() -> None:
    """Read the options and run; a full disk ends the run with one line."""
    script, args = parse([ScriptArguments, CoSupTrainingArguments], __doc__)
    try:
        with progress_bars(hidden=bool(args.disable_tqdm)):
            train_and_evaluate(Run(script, args))
    except Exception as error:
        if not is_full_disk(error):
            raise
        sys.exit(f"error: {error}")


def train_and_evaluate(run: Run) -> None:
    """Train on all processes, then index and evaluate on the main one, without a process group that could time out."""
    args = run.args
    model = train(run)
    main_process = args.process_index == 0
    # free the trainer before the process groups: freeing it as the last owner of a gloo group can deadlock
    gc.collect()
    end_processes()
    if main_process:
        if model is None:  # its weights were sharded
            model = CoSupForCausalLM.from_pretrained(args.output_dir).to(args.device)
        index_and_evaluate(model, run)


# ---------------------------------------------------------------------- training


def train(run: Run) -> CoSupForCausalLM | None:
    """Read and check everything, train, and save. Return the model, or `None` if it was sharded."""
    script, args = run.script, run.args
    torch.backends.cuda.enable_cudnn_sdp(False)  # on an H100 its gradients can be NaN: pytorch issue 196678
    with clear_errors():
        set_cpu_threads(script.num_threads, args.use_cpu)
        trainer = prepare_training(run)
        if script.index:
            run.corpus = check_index(trainer, run)

    run.results = {"format": FORMAT, "seed": args.seed}
    if run.questions is not None and script.eval_before_training:
        with waiting_for_the_slowest():
            if trainer.is_world_process_zero():
                run.results["before"] = measure_before(trainer, run)
    if script.license:
        trainer.stated_facts = {"license": script.license}  # now, for pushes during training
    resume: str | bool | None = args.resume_from_checkpoint
    if resume in ("True", "true"):
        resume = True
    output = trainer.train(resume_from_checkpoint=resume)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(_internal_call=True)  # pushed at the end, with its numbers, when no rank waits for the upload
    trainer.keep_published_facts()
    trainer.create_model_card(license=script.license, dataset=script.train_file)
    trainer.save_state()
    if args.push_to_hub and trainer.is_world_process_zero():
        args.hub_model_id = trainer.hub_model_id
    run.results["train"] = output.metrics
    if script.validation_file:
        run.results["validation"] = trainer.evaluate()
    if run.index is not None:
        close_index(run.index)
        run.index = None

    if trainer.accelerator.distributed_type in SHARDED:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    if script.use_peft:  # output_dir has the adapters, but the evaluation, and users without peft, need a whole model
        model = model.merge_and_unload()
        if trainer.is_world_process_zero():
            model.save_pretrained(run.output_dir / "merged")
    return model


def prepare_training(run: Run) -> CoSupTrainer:
    """
    Read and check everything that training and evaluation need, corpus and questions included.

    Raises:
        `ValueError`: for options that do not go together, and for bad data.
    """
    script, args = run.script, run.args
    check_output_dir(args.output_dir)
    check_index_options(script.index, script.index_uri)
    check_tied_options(script, args)
    check_options_are_read(script)
    if script.push_index and not args.push_to_hub:
        raise ValueError("--push_index pushes the index next to the model: set --push_to_hub true.")
    if script.index and (script.corpus_file or script.push_index):
        raise ValueError(
            "--index names an existing index: --corpus_file and --push_index are for one that training builds."
        )
    if script.index and script.use_peft:
        raise ValueError(
            "--index needs an unchanged Emb_seq, and --use_peft wraps it in adapters:"
            " evaluate with run_evaluation.py afterwards."
        )
    set_seed(args.seed)
    if script.prepare:
        prepare(script, args)
    if not script.train_file or not (script.gen or script.model_name_or_path):
        raise ValueError(
            "Nothing to train: give --train_file and --gen (or --model_name_or_path), or --prepare quickstart."
        )
    train_instances = load_instances(script.train_file)[: script.max_train_samples]
    if script.eval_before_training and not script.eval_file:  # which configs of ours set
        logger.warning("--eval_before_training is not read without --eval_file.")
    validation_instances = None
    if script.validation_file:
        validation_instances = load_instances(script.validation_file, "validation")
    if script.corpus_file:
        run.corpus = load_corpus(script.corpus_file)
    if script.push_index and run.corpus is None:
        raise ValueError("--push_index pushes the index of a corpus: give --corpus_file.")
    if script.eval_file:
        run.questions = read_questions(run)
    if run.corpus is not None:
        PassageIndex.check_save_directory(run.output_dir / "index")
    if validation_instances is None and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy is {args.eval_strategy.value!r} but there is no --validation_file.")
    model = load_model(script, args)
    trainer = CoSupTrainer(
        model,
        args,
        train_dataset=train_instances,
        eval_dataset=validation_instances,
        peft_config=lora(script),
        corpus=candidates_corpus(model, [*train_instances, *(validation_instances or [])], run),
    )
    if script.use_peft and trainer.accelerator.distributed_type in SHARDED:
        raise ValueError(
            "--use_peft leaves adapters, which the evaluation after a sharded training cannot load:"
            " train LoRA with DDP or one process."
        )
    return trainer


def candidates_corpus(model: CoSupForCausalLM, instances: list, run: Run) -> Any:
    """
    Return what candidates are retrieved from: the passages of `--corpus_file`, or the index of `--index`.

    That is nothing if none are retrieved, or if all instances bring their own.

    Raises:
        `ValueError`: if neither is given, and for an index of another model.
    """
    script, args = run.script, run.args
    if args.candidates_from is None:
        return None
    if args.candidates_from == "instance":
        own = itertools.chain.from_iterable(instance.get("candidates") or [] for instance in instances)
        if not any(isinstance(candidate, str) for candidate in own):
            return None
    if script.index:
        run.index = open_index(model, script.index, script.index_uri)
        return run.index
    if run.corpus is None:
        raise ValueError(
            "Candidates are retrieved from passages: give --corpus_file, or an --index of a frozen Emb_seq."
        )
    return run.corpus


def check_index(trainer: CoSupTrainer, run: Run) -> list[dict[str, str]]:
    """
    Check that the given index can be evaluated after training.

    Only the main process opens it, because a local Milvus file can be opened only once.

    Returns:
        `list[dict]`: the gold passages of the questions, the only part of its corpus that the evaluation needs; `[]`
        on the other processes.

    Raises:
        `ValueError`: if training changes Emb_seq, or if the index is of another model or lacks a passage.
    """
    script = run.script
    model = without_peft(trainer.model)
    if trains_passages(model):
        remedy = "add --freeze_emb_seq true"
        if model.config.tie_emb_seq:
            remedy = "this model is tied (tie_emb_seq), so give the passages: --corpus_file"
        raise ValueError(
            f"--index {script.index}: training changes Emb_seq, and no index of it stays valid; {remedy}."
        )
    if not trainer.is_world_process_zero():
        return []
    index = run.index or open_index(model, script.index, script.index_uri)
    gold: set[str] = set()
    candidates: set[str] = set()
    for question in run.questions or []:
        gold |= gold_ids(question)
        candidates.update(question.get("candidates") or [])
    index.rows_of(sorted(candidates))  # raises for a passage that the index lacks
    passages = index.get_passages(index.rows_of(sorted(gold)))
    if index is not run.index:
        close_index(index)
    return [{name: passage[name] for name in ("id", "title", "text")} for passage in passages]


def measure_before(trainer: CoSupTrainer, run: Run) -> dict[str, Measured]:
    """Return the held-out figures of the model before training."""
    model = trainer.model.to(run.args.device)
    with precision(run.args):
        index = run.index or open_index(model, run.script.index, run.script.index_uri)
        if index is None:
            index = model.build_index(run.corpus, batch_size=run.args.per_device_eval_batch_size)
        figures = held_out(model, index, run)
        if index is not run.index:
            close_index(index)
    return figures


# ---------------------------------------------------------------------- after training


def index_and_evaluate(model: CoSupForCausalLM, run: Run) -> None:
    """Build and save the index, unless one was given; measure, write `results.json`, complete the card, and push."""
    index = None
    groups = held_out_group(run.results["validation"]) if "validation" in run.results else []
    write_results(run.output_dir / "results.json", run.results)  # written again below, but the evaluation may fail
    if run.corpus is not None:
        with precision(run.args):
            if run.script.index is None:
                index = model.build_index(run.corpus, batch_size=run.args.per_device_eval_batch_size)
                index.save_pretrained(run.output_dir / "index")
            if run.questions is not None:
                groups += evaluate(model, run)
    write_results(run.output_dir / "results.json", run.results)
    share(model, index, groups, run)


def share(model: CoSupForCausalLM, index: PassageIndex | None, groups: list, run: Run) -> None:
    """Write the cards with all that was measured; with `push_to_hub`, push the index and the checkpoint."""
    script, args, output_dir = run.script, run.args, run.output_dir
    repo_id = str(output_dir)
    index_place = None  # a folder or a repository; the card shows how to load it
    if script.index and script.index_uri is None:
        index_place = script.index
    elif not script.index and index is not None:
        index_place = str(output_dir / "index")
    if args.push_to_hub:
        repo_id = args.hub_model_id
        if index_place is not None and Path(index_place).exists():  # a local folder means nothing on the Hub
            index_place = None
        if script.push_index and index is not None:
            index_place = f"{repo_id}-index"
            hub = {"private": args.hub_private_repo, "token": args.hub_token}
            PassageIndex.from_pretrained(output_dir / "index").push_to_hub(
                index_place, model=repo_id, license=script.corpus_license, **hub
            )
    example = None  # the first question that needs a passage
    if index_place:
        needing_passage = filter(ranking_can_be_judged, run.questions or [])
        example = next((question["input"] for question in needing_passage), None)
    complete_card(model, output_dir, repo_id, groups, index_place, example)
    if script.use_peft:
        merged = output_dir / "merged"
        write_card(model, merged, str(merged), load_facts(output_dir), index_place, example)
    if args.push_to_hub:
        hub = {"token": args.hub_token, "revision": args.hub_revision}
        push_checkpoint(output_dir, repo_id, "End of training", adapters=script.use_peft, **hub)


# ---------------------------------------------------------------------- before training


def precision(args: CoSupTrainingArguments) -> torch.autocast:
    """Return the autocast context of training, for measurements before and after it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)


def check_options_are_read(script: ScriptArguments) -> None:
    """Raise for an option that was given and that nothing reads without another one."""
    for name, needed in READ_WITH.items():
        if getattr(script, name) and not getattr(script, needed):
            refuse_given(script, [name], f"is not read without --{needed}: give both, or leave it out")


def check_output_dir(output_dir: str) -> None:
    """Raise now, not after training, if the output folder cannot be written."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from None


def prepare(script: ScriptArguments, args: CoSupTrainingArguments) -> None:
    """Make the quickstart's world on one process, and set the options that were not given to its paths."""
    settings = {"seed": args.seed, **json_object(script.prepare_options, "prepare_options")}
    try:
        world = WorldArguments(str(Path(args.output_dir) / "world"), **settings)
    except TypeError as error:
        raise ValueError(f"--prepare_options {script.prepare_options}: {error}") from None
    with args.main_process_first(desc="prepare", local=False):
        paths = prepare_world(world)
    for name in ("gen", "emb_seq", "train_file", "validation_file", "corpus_file", "eval_file"):
        if name == "corpus_file" and script.index:
            continue
        if name == "emb_seq" and script.tie_emb_seq:
            continue
        if getattr(script, name) is None:
            setattr(script, name, paths[name.removesuffix("_file")])


if __name__ == "__main__":
    sys.exit(main())
