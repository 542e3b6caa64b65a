"""
Train Gen and Emb_seq together, then build the index and evaluate.

    accelerate launch --config_file recipes/accelerate_configs/single.yaml recipes/train.py --config recipes/configs/quickstart.yaml
    accelerate launch recipes/train.py --gen NAME --train_file train.jsonl --corpus_file corpus.jsonl --eval_file eval.jsonl --output_dir out

With a frozen Emb_seq an existing index stays valid: `--index out/index`, or for a Milvus collection
`--index wiki --index_uri http://host:19530`, evaluates it instead of building one.

Writes the checkpoint with its model card to `output_dir`, the index to `output_dir/index`, all measured numbers to `output_dir/results.json`. With
`--push_to_hub true` the checkpoint goes to `--hub_model_id`, and with `--push_index true` the index, passages included, to the dataset repository of that name
with `-index` after it.
"""

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

from shared.cli import clear_errors, parse, table

import torch
from accelerate import DistributedType
from transformers import set_seed

from modeling_cosup import CoSupForCausalLM, PassageIndex
from modeling_cosup.facts_cosup import load_facts
from modeling_cosup.files_cosup import write_json
from modeling_cosup.lines_cosup import read_lines
from trainer import CoSupTrainer, CoSupTrainingArguments, load_corpus, load_instances
from trainer.card import complete_card, evaluation_groups, held_out_group, write_card
from trainer.hub import push_checkpoint
from trainer.judging.answers import ntp_loss, rank_passages, reference_instances
from trainer.judging.figures import MODES, QUERY, Measured, figure, line
from trainer.judging.judge import evaluate_tasks
from trainer.judging.matching import gold_ids, provenance_unknown
from trainer.judging.results import FORMAT
from trainer.judging.scoring import check_questions, measure, score_rankings
from trainer.judging.tasks import Task, task_name
from trainer.model_setup import without_peft

from shared.arguments import ScriptArguments
from shared.indexes import check_index_options, close_index, open_index
from shared.processes import end_processes
from shared.quickstart import WorldArguments, prepare_world

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
PRINTED = (  # modes and their figures, as far as there are any
    (QUERY, "query_recall@1"),
    (QUERY, "query_recall@5"),
    ("retrieval", "ret"),
    ("retrieval", "em"),
    ("gold", "em"),
    ("off", "em"),
    ("retrieval", "nsp_not_needed"),
    ("retrieval", "em_not_needed"),
)


def main():
    """Train on all processes, then index and evaluate on the main one, without a process group that would time out meanwhile."""
    script, args = parse([ScriptArguments, CoSupTrainingArguments], __doc__)
    model, corpus, questions, results = train(script, args)
    main_process = args.process_index == 0
    gc.collect()  # the trainer first: the last owner of a gloo group can deadlock as it goes
    end_processes()
    if main_process:
        if model is None:  # its weights were shards
            model = CoSupForCausalLM.from_pretrained(args.output_dir).to(args.device)
        index_and_evaluate(model, corpus, questions, results, script, args)


def train(script, args):
    """Read and check everything, train, save. Returns the model (`None` where it was sharded), corpus, questions and results so far."""
    if args.use_cpu and args.world_size == 1:
        torch.set_num_threads(script.num_threads or os.cpu_count())  # accelerate launch leaves one
    with clear_errors():
        check_output_dir(args.output_dir)
        check_index_options(script.index, script.index_uri)
        if script.index and (script.corpus_file or script.push_index):
            raise ValueError(
                "--index names an index that is there: --corpus_file and --push_index are for one that training builds."
            )
        if script.index and script.use_peft:
            raise ValueError(
                "--index needs Emb_seq as it is, and --use_peft wraps it in adapters: evaluate with run_evaluation.py afterwards."
            )
        set_seed(args.seed)
        if script.prepare:
            prepare(script, args)
        if not script.train_file or not (script.gen or script.model_name_or_path):
            raise ValueError(
                "Nothing to train: give --train_file and --gen (or --model_name_or_path), or --prepare quickstart."
            )
        train = load_instances(script.train_file)[: script.max_train_samples]
        validation = load_instances(script.validation_file, "validation") if script.validation_file else None
        corpus = load_corpus(script.corpus_file) if script.corpus_file else None
        questions = read_questions(script, args, corpus) if script.eval_file else None
        if corpus is not None:
            PassageIndex.check_save_directory(Path(args.output_dir) / "index")
        if validation is None and args.eval_strategy != "no":
            raise ValueError(f"eval_strategy is {args.eval_strategy.value!r} but there is no --validation_file.")
        trainer = CoSupTrainer(
            load_model(script, args), args, train_dataset=train, eval_dataset=validation, peft_config=lora(script)
        )
        if script.use_peft and trainer.accelerator.distributed_type in SHARDED:
            raise ValueError(
                "--use_peft leaves adapters, which the evaluation after a sharded training cannot load: train LoRA with DDP or one process."
            )
        if script.index:
            corpus = check_index(trainer, questions, script)

    results = {"format": FORMAT, "seed": args.seed}
    if questions is not None and script.eval_before_training and trainer.is_world_process_zero():
        model = trainer.model.to(args.device)
        with precision(args):
            index = open_index(model, script.index, script.index_uri)
            if index is None:
                index = model.build_index(corpus, batch_size=args.per_device_eval_batch_size)
            results["before"] = held_out(model, index, questions, corpus, args)
            close_index(index)
    resume = args.resume_from_checkpoint
    output = trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(_internal_call=True)  # pushed at the end, with its numbers, while no rank waits for the upload
    trainer.create_model_card(license=script.license, dataset=script.train_file)
    trainer.save_state()
    if args.push_to_hub and trainer.is_world_process_zero():
        args.hub_model_id = trainer.hub_model_id
    results["train"] = output.metrics
    if validation is not None:
        results["validation"] = trainer.evaluate()

    if trainer.accelerator.distributed_type in SHARDED:
        return None, corpus, questions, results
    model = trainer.accelerator.unwrap_model(trainer.model)
    if script.use_peft:  # output_dir holds the adapters; what follows, and any user without peft, takes the whole
        model = model.merge_and_unload()
        if trainer.is_world_process_zero():
            model.save_pretrained(Path(args.output_dir) / "merged")
    return model, corpus, questions, results


def index_and_evaluate(model, corpus, questions, results, script, args):
    """Build and save the index, unless there is one; measure, write `results.json`, complete the card, and push both."""
    index = None
    groups = held_out_group(results["validation"]) if "validation" in results else []
    write_json(Path(args.output_dir, "results.json"), results)  # so far: an evaluation may fail
    if corpus is not None:
        with precision(args):
            if script.index is None:
                index = model.build_index(corpus, batch_size=args.per_device_eval_batch_size)
                index.save_pretrained(Path(args.output_dir) / "index")
            if questions is not None:
                groups += evaluate(model, questions, corpus, results, script, args)
    write_json(Path(args.output_dir, "results.json"), results)
    share(model, index, questions, groups, script, args)


def check_index(trainer, questions, script):
    """
    On the main process only (a local Milvus file opens once), check that the given index can be evaluated after
    training.

    Returns:
        `list[dict]`: the gold passages of the questions, all that is needed of its corpus; `[]` on the other processes.

    Raises:
        `ValueError`: when training changes Emb_seq, for an index of another model, or one without these passages.
    """
    model = without_peft(trainer.model)
    parts = [part for part in (model.emb_seq, model.emb_head) if part is not None]
    if any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        raise ValueError(
            f"--index {script.index}: training changes Emb_seq, and no index of it stays valid; add --freeze_emb_seq true."
        )
    if not trainer.is_world_process_zero():
        return []
    index = open_index(model, script.index, script.index_uri)
    gold, candidates = set(), set()
    for question in questions or []:
        gold |= gold_ids(question)
        candidates.update(question.get("candidates") or [])
    index.rows_of(sorted(candidates))
    passages = index.get_passages(index.rows_of(sorted(gold)))
    close_index(index)
    return [{name: passage[name] for name in ("id", "title", "text")} for passage in passages]


def share(model, index, questions, groups, script, args):
    """The cards with all that was measured; with `push_to_hub` also the index and the checkpoint."""
    output_dir = Path(args.output_dir)
    repo_id, place = str(output_dir), None
    if script.index:
        place = (
            script.index if script.index_uri is None else None
        )  # a card can show how to load what is a folder or a repository
    elif index is not None:
        place = str(output_dir / "index")
    if args.push_to_hub:
        repo_id = args.hub_model_id
        if place is not None and Path(place).exists():  # a local folder means nothing on the Hub
            place = None
        if script.push_index and index is not None:
            place = f"{repo_id}-index"
            hub = {"private": args.hub_private_repo, "token": args.hub_token}
            PassageIndex.from_pretrained(output_dir / "index").push_to_hub(
                place, model=repo_id, license=script.corpus_license, **hub
            )
    question = next((x["input"] for x in questions or [] if x["provenance"]), None) if place else None
    complete_card(model, output_dir, repo_id, groups, place, question)
    if script.use_peft:
        write_card(model, output_dir / "merged", str(output_dir / "merged"), load_facts(output_dir), place, question)
    if args.push_to_hub:
        push_checkpoint(output_dir, repo_id, "End of training", token=args.hub_token, revision=args.hub_revision)


def precision(args):
    """Autocast as in training, for what is measured before and after it."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype, enabled=args.bf16 or args.fp16)


def check_output_dir(output_dir):
    """An output folder that cannot be written is an error now, not after training."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from None


def prepare(script, args):
    """Make the quickstart's world on one process; its paths fill the options that were not given."""
    settings = {"seed": args.seed, **json.loads(script.prepare_options)}
    try:
        world = WorldArguments(str(Path(args.output_dir) / "world"), **settings)
    except TypeError as error:
        raise ValueError(f"--prepare_options {script.prepare_options}: {error}") from None
    with args.main_process_first(desc="prepare", local=False):
        paths = prepare_world(world)
    for name in ("gen", "emb_seq", "train_file", "validation_file", "corpus_file", "eval_file"):
        if name == "corpus_file" and script.index:
            continue
        if getattr(script, name) is None:
            setattr(script, name, paths[name.removesuffix("_file")])


def lora(script):
    """`LoraConfig` of both models, or `None`."""
    if not script.use_peft:
        return None
    from peft import LoraConfig

    target_modules = script.lora_target_modules or "all-linear"
    return LoraConfig(
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )


def load_model(script, args):
    """The model to train: a checkpoint of this project, or Gen and Emb_seq put together."""
    kwargs = {"dtype": script.dtype}
    if script.attn_implementation:
        kwargs["attn_implementation"] = script.attn_implementation
    names = (
        "similarity",
        "temperature",
        "nsp_loss_weight",
        "emb_seq_pooling",
        "passage_template",
        "max_passage_length",
    )
    names += ("query_from", "nsp_token", "cs_token", "ce_token")
    fields = {name: getattr(script, name) for name in names}
    if script.model_name_or_path:
        defaults = ScriptArguments()
        if changed := [name for name in names if fields[name] != getattr(defaults, name)]:
            raise ValueError(
                f"--{changed[0]} is the checkpoint's business: {script.model_name_or_path} was built with its own."
            )
        return CoSupForCausalLM.from_pretrained(script.model_name_or_path, **kwargs)
    if fields["query_from"] is None:
        fields["query_from"] = "emb_seq" if args.supervision == "separate" else "gen"
    if fields["query_from"] == "query_encoder":
        fields["query_encoder"] = script.query_encoder or script.emb_seq or script.gen
    return CoSupForCausalLM.from_gen_and_emb_seq(script.gen, script.emb_seq, model_kwargs=kwargs, **fields)


def evaluation_task(script, args):
    """The evaluation set as recipes/run_evaluation.py judges it, over the index of the output folder."""
    return Task(
        task_name(script.eval_file),
        script.eval_file,
        index=script.index or str(Path(args.output_dir) / "index"),
        index_uri=script.index_uri,
        max_eval_samples=script.max_eval_samples,
        max_new_tokens=script.max_new_tokens,
    )


def read_questions(script, args, corpus):
    """
    The questions of the evaluation set, checked for all that is asked of them before and after training.

    Raises:
        `ValueError`: when there is nothing to retrieve from or for, or for what cannot be judged.
    """
    if corpus is None and script.index is None:
        raise ValueError("--eval_file needs --corpus_file (or --index): its questions are answered from that corpus.")
    questions = evaluation_task(script, args).read_questions(corpus, answers_required=True)
    if not any(question["provenance"] for question in questions):
        raise ValueError(f"{script.eval_file}: no question has provenance, so there is nothing to retrieve.")
    check_questions(questions, script.eval_file)
    return questions


def held_out(model, index, questions, corpus, args) -> dict[str, Measured]:
    """NTP loss of the reference answers, and recall of the query embeddings over the corpus."""
    needing = [question for question in questions if question["provenance"]]
    rankings = rank_passages(model, index, needing, args.per_device_eval_batch_size)
    figures = measure(score_rankings([ranking["corpus"] for ranking in rankings], needing, ks=(1, 5)))
    recall = {name: figures[name] for name in ("query_recall@1", "query_recall@5")}
    return {"ntp_loss": ntp_loss(model, reference_instances(questions, corpus)).to_dict(), **recall}


def evaluate(model, questions, corpus, results, script, args):
    """Judge the model on the evaluation set, print figures and a few answers, keep all figures in `results`; returns groups of the card."""
    task = evaluation_task(script, args)
    with tempfile.TemporaryDirectory() as folder:
        judged = evaluate_tasks(model, [task], folder, batch_size=args.per_device_eval_batch_size)
        predictions = read_lines(Path(folder, task.name, "retrieval", "predictions.jsonl"))
    evaluation = judged["tasks"][task.name]
    names = (
        "n",
        "passages",
        "cor",
        "modes",
        "query",
        "left_out",
    )  # no paths: results.json is pushed with the checkpoint
    results["evaluation"] = {name: evaluation[name] for name in names}
    by_mode = {mode: answers["metrics"] for mode, answers in evaluation["modes"].items()}
    by_mode[QUERY] = evaluation["query"]["corpus"]
    print(
        f"\n{len(questions)} questions over an index of {evaluation['passages']:,} passages (95 % intervals in brackets)\n"
    )
    rows = []
    for mode, name in PRINTED:
        if name in by_mode[mode]:
            rows.append((f"{MODES[mode]}: {figure(name).label}", line(by_mode[mode][name], name)))
    print(table(rows))
    if "before" in results:
        recall = {name: value for name, value in by_mode[QUERY].items() if name in results["before"]}
        results["after"] = {"ntp_loss": ntp_loss(model, reference_instances(questions, corpus)).to_dict(), **recall}
        print_before_and_after(results["before"], results["after"])
    print_examples(questions, predictions, script, args)
    return evaluation_groups(judged)


def print_before_and_after(before, after):
    """The held-out figures of before and after training, one below the other."""
    rows = []
    for name in after:
        for when, figures in (("before", before), ("after", after)):
            rows.append((f"{figure(name).label} {when}", line(figures[name], name)))
    print("\nHeld-out reference answers and questions, before and after training\n\n" + table(rows))


def print_examples(questions, predictions, script, args):
    """A few answers, one of a question that needs no passage among them, and where everything is."""
    needing = [i for i, question in enumerate(questions) if question["provenance"]]
    free = [i for i, question in enumerate(questions) if not (question["provenance"] or provenance_unknown(question))][
        :1
    ]
    for i in needing[: max(0, script.num_examples - len(free))] + free[: script.num_examples]:
        print(f"\nQ  {questions[i]['input']}\nA  {predictions[i]['cited_text']}")
    output_dir = Path(args.output_dir)
    checkpoint = output_dir / "merged" if script.use_peft else output_dir
    index = script.index or output_dir / "index"
    if script.index_uri is not None:
        index = f"{index} --index_uri {script.index_uri}"
    print(f"\nCheckpoint: {checkpoint}   Index: {index}   Numbers: {output_dir / 'results.json'}")
    question = questions[needing[0]]["input"]
    print(f'Ask it:     python recipes/generate.py --model {checkpoint} --index {index} "{question}"')


if __name__ == "__main__":
    sys.exit(main())
