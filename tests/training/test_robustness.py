"""Clear errors, before anything is lost: NaN, too little memory, broken instances, unfinished checkpoints."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate import Accelerator, DistributedType
from transformers import TrainerCallback

from support.models import PASSAGES, make_model
from support.training import NAMES, arguments, world
from trainer import CoSupTrainer, CoSupTrainingArguments
from trainer.card import training_record
from trainer.watch import FullDiskError, explained_memory_errors, last_complete_checkpoint


def poisoned(model, instances, part, value):
    """Give instance 5 alone a token whose embedding, in Gen or in Emb_seq, is NaN or infinite."""
    tokenizer = model.tokenizer
    token = tokenizer("~", add_special_tokens=False)["input_ids"][0]
    passage = {"id": "poisoned", "title": "", "text": "~ here"}
    question = "what is ~?" if part == "gen" else "what?"
    instances[5] = dict(instances[5], input=question, segments=[{"text": "a", "passage": passage}])
    poisoned_model = model.gen.model if part == "gen" else model.emb_seq
    with torch.no_grad():
        poisoned_model.embed_tokens.weight[token] = value
    return instances


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("part", ["gen", "emb_seq"])
def test_nan_stops_with_step_loss_and_instances(tmp_path, part, cached):
    model = make_model(gen_kwargs={"tie_word_embeddings": False})
    instances = world(NAMES[:16])
    options = {
        "train_sampling_strategy": "sequential",
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
    }
    if cached:
        options |= {"nsp_batch_size": 4, "per_device_train_batch_size": 1}
    poison = float("inf") if cached else float("nan")
    instances = poisoned(model, instances, part, poison)
    trainer = CoSupTrainer(model, arguments(tmp_path, **options), train_dataset=instances)
    name = "ntp_loss" if part == "gen" and not cached else "nsp_loss"  # GradCache computes NSP first
    with pytest.raises(FloatingPointError, match=f"Step 2: the {name} is NaN or infinite") as error:
        trainer.train()
    if name == "nsp_loss" or cached:
        assert f"instances '{instances[5]['id']}'." in str(error.value)  # only this one
    assert instances[5]["id"] in str(error.value)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]
    for name, parameter in model.named_parameters():
        assert "embed_tokens" in name or parameter.isfinite().all()  # no step was taken with it


@pytest.mark.parametrize("part", ["gen", "emb_seq"])
@pytest.mark.parametrize("clip_gen_only", [False, True])
def test_a_nan_gradient_of_a_finite_loss_stops_before_the_step(tmp_path, part, clip_gen_only):
    model = make_model()
    options = {
        "clip_gen_only": clip_gen_only,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
    }
    trainer = CoSupTrainer(model, arguments(tmp_path, **options), train_dataset=world(NAMES[:16]))
    body = model.gen.model if part == "gen" else model.emb_seq
    weight = body.layers[0].mlp.up_proj.weight

    def poison(gradient):
        return gradient * float("nan") if trainer.state.global_step == 1 else gradient

    weight.register_hook(poison)
    message = f"Step 2: the gradient is NaN or infinite, in or among the instances .*'{NAMES[4]}'"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("query_from", "options"),
    [("gen", {"freeze_gen": True, "supervision": "nsp"}), ("emb_seq", {"supervision": "nsp"})],
)
def test_clip_gen_only_needs_a_gen_that_is_trained(tmp_path, query_from, options):
    args = arguments(tmp_path, clip_gen_only=True, **options)
    with pytest.raises(ValueError, match="no weight of Gen is trained, so nothing would be clipped: leave it out"):
        CoSupTrainer(make_model(query_from=query_from), args, train_dataset=world(NAMES[:16]))


def test_sharding_that_cannot_do_it_is_refused(tmp_path, monkeypatch):
    """DeepSpeed, faked here, is refused the options that only DDP and FSDP2 support."""
    for option, message in (
        ({"nsp_batch_size": 8}, "nsp_batch_size works under DDP and FSDP2, not under DEEPSPEED"),
        ({"clip_gen_only": True}, "clip_gen_only works under DDP and FSDP2, not under DEEPSPEED"),
        ({"control_token_lr": 1e-3}, "control_token_lr works under DDP and FSDP2, not under DEEPSPEED"),
        ({"bf16_full_eval": True}, "bf16_full_eval would change the weights of a sharded model, under DEEPSPEED"),
    ):
        monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.DEEPSPEED))
        with pytest.raises(ValueError, match=message):
            CoSupTrainer(make_model(), arguments(tmp_path, **option), train_dataset=world(NAMES[:8]))


def test_liger_kernels_go_into_each_model_once(tmp_path, monkeypatch):
    """They need a GPU, so this only tests which models get them and that the loss stays ours."""
    from trainer import model_setup

    calls = []
    monkeypatch.setattr(
        model_setup, "apply_liger_kernel", lambda part, config: calls.append((type(part).__name__, config))
    )
    args = arguments(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:8]))
    config = {"fused_linear_cross_entropy": False, "cross_entropy": False, "rope": False}
    assert calls == [("LlamaForCausalLM", config), ("LlamaModel", config)]
    calls.clear()
    CoSupTrainer(make_model(tie_emb_seq=True), args, train_dataset=world(NAMES[:8]))
    assert calls == [("LlamaForCausalLM", config)]


def test_an_attention_that_this_machine_lacks_does_not_stop_the_check_for_causality(model):
    model.emb_seq.config._attn_implementation = "flash_attention_2"
    assert model.find_causal_encoders()
    assert model.emb_seq.config._attn_implementation == "flash_attention_2"


def test_weights_alone_are_no_checkpoint_to_resume_from(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, save_only_model=True)
    CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:8])).train()
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        last_complete_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_weights_are_trained_in_float32(tmp_path, dtype, monkeypatch):
    from trainer import model_setup

    warnings = []
    monkeypatch.setattr(model_setup.logger, "warning", warnings.append)
    model = make_model().to(dtype)
    before = model.gen.model.layers[0].mlp.up_proj.weight.detach().float().clone()
    options = {"max_steps": 2, "learning_rate": 2e-5, "lr_scheduler_type": "constant"}
    args = arguments(tmp_path, bf16=True, freeze_emb_seq=True, **options)
    CoSupTrainer(model, args, train_dataset=world(NAMES[:16])).train()
    assert model.gen.dtype == torch.float32
    assert model.emb_seq.dtype == dtype  # frozen, so not converted
    assert (model.gen.model.layers[0].mlp.up_proj.weight != before).float().mean() > 0.9
    assert len(warnings) == (1 if dtype == torch.bfloat16 else 0)


def test_a_tied_model_in_half_precision_is_converted_as_a_whole(tmp_path, passages):
    """Without NSP the `emb_head` is frozen, but it must read the states of the Gen that is trained in float32."""
    model = make_model(tie_emb_seq=True, emb_head_size=24).to(torch.bfloat16)
    CoSupTrainer(model, arguments(tmp_path, supervision="ntp"), train_dataset=world(NAMES[:8]))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.emb_head.weight.requires_grad
    assert model.build_index(passages, show_progress_bar=False).embeddings.shape[1] == 24


@pytest.mark.parametrize("option", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_in_half_precision_leaves_the_weights(tmp_path, option):
    """Before training, between two trainings and after them: bit by bit, and so are the states of the optimiser."""
    model = make_model()
    options = {"max_steps": 1, "lr_scheduler_type": "constant", option: True}
    trainer = CoSupTrainer(model, arguments(tmp_path, **options), train_dataset=world(NAMES[:8]))
    whole = CoSupTrainer(copy.deepcopy(model), arguments(tmp_path, **options), train_dataset=world(NAMES[:8]))
    dtypes = set()
    model.gen.model.layers[0].register_forward_pre_hook(
        lambda layer, inputs: None if model.training else dtypes.add(layer.self_attn.q_proj.weight.dtype)
    )

    def evaluate():
        before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        trainer.evaluate(world(NAMES[8:12]))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name

    for _ in range(2):
        evaluate()
        trainer.train()
        whole.train()
    evaluate()
    assert dtypes == {torch.bfloat16 if option == "bf16_full_eval" else torch.float16}
    for parameter, expected in zip(model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    for state in trainer.optimizer.state.values():
        assert state["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("streamed", [False, True])
def test_a_query_longer_than_its_encoder_reads_keeps_its_end(tmp_path, monkeypatch, streamed):
    from trainer import dataset_setup

    warnings = []
    for name in ("warning", "warning_once"):
        monkeypatch.setattr(dataset_setup.logger, name, warnings.append)
    positions = {"gen_kwargs": {"max_position_embeddings": 2048}, "emb_seq_kwargs": {"max_position_embeddings": 300}}
    model = make_model(query_from="emb_seq", **positions)
    instances = world(NAMES[:4])
    for instance in instances[1:3]:
        instance["input"] = f"{'where ' * 200} is {instance['id']}?"
    dataset = datasets.Dataset.from_list(instances)
    if streamed:
        dataset = dataset.to_iterable_dataset()
    args = arguments(tmp_path, supervision="separate", max_length=2048, max_steps=1)
    trainer = CoSupTrainer(model, args, train_dataset=dataset)
    rows = {row["id"]: row["query_input_ids"] for row in trainer.train_dataset}
    (first,), (second,) = rows[NAMES[1]], rows[NAMES[2]]
    assert len(first) == len(second) == 300
    assert first[0] == model.tokenizer.bos_token_id
    assert f"is {NAMES[1]}?## Output:\n\n[NSP]" in model.tokenizer.decode(first)
    assert f"is {NAMES[2]}?## Output:\n\n[NSP]" in model.tokenizer.decode(second)
    assert len(rows[NAMES[3]][0]) < 100
    trainer.train()
    count = "Some" if streamed else "2 of 3"
    message = f"{count} queries of the training set are longer than their encoder reads, and lose their beginning."
    assert set(warnings) == {message}
    assert streamed or len(warnings) == 1


def test_ntp_nan_names_the_micro_batch(tmp_path):
    model = make_model(gen_kwargs={"tie_word_embeddings": False})
    instances = world(NAMES[:8])
    instances[3] = dict(instances[3], input="say ~ now", segments=[{"text": "free", "passage": None}])
    token = model.tokenizer("~", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.gen.model.embed_tokens.weight[token] = float("nan")
    args = arguments(tmp_path, nsp_batch_size=8, per_device_train_batch_size=1, max_steps=1)
    message = f"Step 1: the ntp_loss is NaN or infinite, in or among the instances '{instances[3]['id']}'"
    with pytest.raises(FloatingPointError, match=message):
        CoSupTrainer(model, args, train_dataset=instances).train()


MEMORY = """
import resource, sys
sys.path.insert(0, {tests!r})
import torch
from support.models import PASSAGES, make_model
from trainer import CoSupTrainer, CoSupTrainingArguments
segments = [{{"text": "answer " * 100, "passage": PASSAGES[0]}}]
instances = [{{"id": str(i), "input": "long " * 150, "segments": segments}} for i in range(64)]
options = {{"max_steps": 1, "report_to": "none", "max_length": 2048, "save_strategy": "no"}}
args = CoSupTrainingArguments({folder!r}, per_device_train_batch_size=64, **options)
gen = {{"max_position_embeddings": 2048, "hidden_size": 256, "layers": 8, "intermediate_size": 1024}}
model = make_model(gen_kwargs=gen, emb_seq_kwargs={{"hidden_size": 256}})
trainer = CoSupTrainer(model, args, train_dataset=instances)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 400 * 2**20,) * 2)
trainer.train()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process")
def test_out_of_memory_names_the_arguments_that_help(tmp_path):
    script = MEMORY.format(tests=str(Path(__file__).parents[1]), folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode != 0
    assert "OutOfMemoryError" in done.stderr, done.stderr[-2000:]
    assert "Out of memory in a training step" in done.stderr, done.stderr[-2000:]
    assert "nsp_batch_size=64 with a per_device_train_batch_size below 64" in done.stderr
    assert "gradient_checkpointing" in done.stderr


def out_of_memory_above(model, num_instances):
    """Let Gen run out of memory, as a GPU would, with more instances than this in one call; return their numbers."""
    counts = []

    def check(part, args, kwargs):
        if not torch.is_grad_enabled():
            return
        counts.append(len(kwargs["input_ids"]))
        if counts[-1] > num_instances:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    model.gen.model.register_forward_pre_hook(check, with_kwargs=True)
    return counts


def test_finding_a_batch_size_keeps_the_nsp_batch(tmp_path):
    """The micro-batch shrinks from 4 to 3 to 2 instances; loss and negatives are those of the whole NSP batch."""
    options = {"nsp_batch_size": 8, "max_steps": 2, "train_sampling_strategy": "sequential", "seed": 3}
    model = make_model()
    args = arguments(tmp_path, per_device_train_batch_size=8, **options)
    whole = CoSupTrainer(copy.deepcopy(model), args, train_dataset=world(NAMES[:16]))
    whole.train()
    counts = out_of_memory_above(model, 2)
    options |= {"auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 1, "padding_free": False}
    args = arguments(tmp_path, per_device_train_batch_size=4, **options)
    trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:16]))
    trainer.train()
    assert list(dict.fromkeys(counts)) == [1, 4, 3, 2]  # 1 when the trainer was made
    for found, expected in zip(trainer.state.log_history[:2], whole.state.log_history[:2], strict=True):
        for name in ("loss", "ntp_loss", "nsp_loss", "nsp_accuracy", "num_negatives"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), name
    assert trainer.state.max_steps == 2
    assert trainer.state.epoch == 1.0
    counts.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert max(counts) == 2  # a resumed run begins with what was found


def test_finding_no_batch_size_names_what_helps(tmp_path):
    args = arguments(tmp_path, nsp_batch_size=8, per_device_train_batch_size=2, auto_find_batch_size=True, max_steps=1)
    trainer = CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:8]))
    out_of_memory_above(trainer.model, 0)
    with pytest.raises(torch.OutOfMemoryError, match="No executable batch size found.*\n.*gradient_checkpointing"):
        trainer.train()


def test_an_evaluation_out_of_memory_names_its_batch_size_once(tmp_path):
    options = {"per_device_eval_batch_size": 4, "eval_on_start": True, "eval_strategy": "steps", "max_steps": 1}
    model = make_model()
    args = arguments(tmp_path, **options)
    trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:8]), eval_dataset=world(NAMES[8:16]))

    def fail(part, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.gen.model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    expected = "a per_device_eval_batch_size below 4; bf16; a max_length below 256."
    assert str(error.value) == f"CUDA out of memory.\nOut of memory in an evaluation. What lowers it: {expected}"


def test_a_smaller_batch_that_was_found_is_sampled_and_shown(tmp_path):
    """Without `nsp_batch_size` the batch itself shrinks, and its sampler and card follow."""
    model = make_model()
    out_of_memory_above(model, 6)
    options = {"auto_find_batch_size": True, "batch_sampler": "no_duplicates", "padding_free": False}
    args = arguments(tmp_path, max_steps=1, **options)
    trainer = CoSupTrainer(model, args, train_dataset=world(NAMES[:16]))
    trainer.data_collator.call_overhead = None
    trainer.train()
    assert trainer._sampler.batch_size == 6
    trainer.state.log_history.append({"loss": 1.5, "step": 1, "ntp_loss": float("nan")})
    record = training_record(args, model, trainer.train_dataset, trainer.state)
    assert record["arguments"]["NSP batch"] == "6 instances"
    assert record["log"][-1] == {"loss": 1.5, "step": 1}  # no facts file can hold NaN


def test_memory_advice_follows_the_arguments_and_other_errors_pass(tmp_path):
    cached = {"nsp_batch_size": 8}
    cached_and_cut = {"nsp_batch_size": 8, "max_tokens_per_micro_batch": 99, "gradient_checkpointing": True}
    for options, expected in (
        (cached, "max_tokens_per_micro_batch"),
        (cached_and_cut, "a max_tokens_per_micro_batch below 99"),
    ):
        args = CoSupTrainingArguments(str(tmp_path), report_to="none", **options)
        with pytest.raises(torch.OutOfMemoryError, match=expected) as error:
            with explained_memory_errors(args):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        assert "Tried to allocate 2 GiB" in str(error.value)
        assert ("gradient_checkpointing;" in str(error.value)) != bool(options.get("gradient_checkpointing"))
    with pytest.raises(torch.OutOfMemoryError) as error:
        with explained_memory_errors(args), explained_memory_errors(args, evaluates=True):
            raise torch.OutOfMemoryError("CUDA out of memory.")
    expected = "a max_tokens_per_micro_batch below 99; bf16; a max_length below 1024."
    assert str(error.value) == f"CUDA out of memory.\nOut of memory in an evaluation. What lowers it: {expected}"
    with pytest.raises(RuntimeError, match="^something else$"):
        with explained_memory_errors(args):
            raise RuntimeError("something else")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_workers_error_names_the_instance(tmp_path, workers):
    args = arguments(tmp_path, dataloader_num_workers=workers, max_steps=1)
    rows = list(CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:8])).train_dataset)
    rows[3]["passage_input_ids"] = []
    broken = CoSupTrainer(make_model(), args, train_dataset=rows)
    with pytest.raises(ValueError, match=f"Instance '{NAMES[3]}' has .* 1 \\[NSP\\] and 0 passages"):
        broken.train()


@pytest.mark.parametrize("cut", ["state", "optimizer", "nothing written"])
def test_the_last_complete_checkpoint(tmp_path, cut):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    CoSupTrainer(make_model(), arguments(tmp_path, **options), train_dataset=world(NAMES[:16])).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    last = tmp_path / "checkpoint-3"
    if cut == "state":
        whole = (last / "trainer_state.json").read_text()
        (last / "trainer_state.json").write_text(whole[: len(whole) // 2])
    elif cut == "optimizer":
        whole = (last / "optimizer.pt").read_bytes()
        (last / "optimizer.pt").write_bytes(whole[: len(whole) // 2])
    else:
        (tmp_path / "checkpoint-10").mkdir()
    expected = tmp_path / ("checkpoint-3" if cut == "nothing written" else "checkpoint-2")
    assert last_complete_checkpoint(tmp_path) == str(expected)
    args = arguments(tmp_path, **options | {"max_steps": 4})
    trainer = CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:16]))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        last_complete_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device on which nothing can be written")
@pytest.mark.parametrize("file", ["scheduler.pt", "tokenizer.json"])
def test_a_full_disk_leaves_no_part_of_a_checkpoint(tmp_path, file):
    """The second checkpoint cannot be written; the first one remains, and the run resumes from it."""
    options = {"save_strategy": "steps", "save_steps": 1}
    folder = tmp_path / "checkpoint-2"

    class FillDisk(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                folder.mkdir()
                (folder / file).symlink_to("/dev/full")

    args = arguments(tmp_path, max_steps=3, **options)
    trainer = CoSupTrainer(make_model(), args, train_dataset=world(NAMES[:8]), callbacks=[FillDisk()])
    with pytest.raises(FullDiskError) as error:
        trainer.train()
    message = str(error.value)
    assert message.startswith(f"{folder} was not saved: the disk is full")
    assert (
        f"What had been written was removed; the last complete checkpoint is {tmp_path / 'checkpoint-1'}." in message
    )
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    resumed = CoSupTrainer(make_model(), arguments(tmp_path, max_steps=2), train_dataset=world(NAMES[:8]))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device on which nothing can be written")
def test_a_full_disk_removes_what_a_save_wrote_and_nothing_else(tmp_path):
    (tmp_path / "run.log").write_text("kept")
    (tmp_path / "config.json").symlink_to("/dev/full")
    trainer = CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=world(NAMES[:8]))
    with pytest.raises(FullDiskError, match=f"{tmp_path} was not saved.* has no complete checkpoint"):
        trainer.save_model()
    assert {path.name for path in tmp_path.iterdir()} <= {"run.log", "config.json"}
    assert (tmp_path / "run.log").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"supervision": "both"}, "supervision is 'both', expected one of 'co', 'ntp', 'nsp', 'separate'"),
        ({"gather": "all"}, "gather is 'all'"),
        ({"batch_sampler": "none"}, "batch_sampler is 'none'"),
        ({"nsp_batch_size": 0}, "nsp_batch_size is 0, expected an integer of 1 or more"),
        ({"max_tokens_per_micro_batch": 100}, "give nsp_batch_size too"),
        (
            {"max_tokens_per_micro_batch": 100, "nsp_batch_size": 8, "auto_find_batch_size": True},
            "auto_find_batch_size lowers per_device_train_batch_size, which max_tokens_per_micro_batch replaces",
        ),
    ],
)
def test_arguments_that_mean_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CoSupTrainingArguments(str(tmp_path), **options)


def test_arguments_that_do_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="query_from='emb_seq' or 'query_encoder'"):
        CoSupTrainer(make_model(), arguments(tmp_path, supervision="separate"))
    with pytest.raises(ValueError, match="train it with supervision='separate'"):
        CoSupTrainer(make_model(query_from="emb_seq"), arguments(tmp_path))
    for options in ({"freeze_emb_seq": True}, {"supervision": "ntp"}):
        with pytest.raises(ValueError, match="leaves nothing to train"):
            CoSupTrainer(make_model(), arguments(tmp_path, freeze_gen=True, **options))
    with pytest.raises(ValueError, match="Emb_seq makes the queries too"):
        CoSupTrainer(make_model(query_from="emb_seq"), arguments(tmp_path, supervision="nsp", freeze_emb_seq=True))
    for options, message in (
        ({"supervision": "separate"}, "this model is tied: its Gen makes them. Train it with 'co', 'ntp' or 'nsp'"),
        ({"freeze_gen": True}, "freeze_gen: Gen and Emb_seq of this model are one"),
        ({"freeze_emb_seq": True}, "freeze_emb_seq: Gen and Emb_seq of this model are one"),
    ):
        with pytest.raises(ValueError, match=message):
            CoSupTrainer(make_model(tie_emb_seq=True), arguments(tmp_path, **options))
    trainer = CoSupTrainer(make_model(), arguments(tmp_path), train_dataset=world(NAMES[:8]))
    stream = trainer.train_dataset.to_iterable_dataset()
    args = arguments(tmp_path, batch_sampler="no_duplicates", max_steps=1)
    trainer = CoSupTrainer(make_model(), args, train_dataset=stream)
    with pytest.raises(ValueError, match="the dataset cannot be streamed"):
        trainer._get_train_sampler(stream)


def test_what_a_step_logs_can_be_checked_by_hand(tmp_path):
    """The figures `num_negatives` and `padding` of one batch whose passages are known."""
    instances = []
    for i in range(6):
        segments = [{"text": "a", "passage": PASSAGES[i % 3]}]
        instances.append({"id": str(i), "input": f"q {i % 4}", "segments": segments})
    args = arguments(tmp_path, per_device_train_batch_size=6, max_steps=1)
    trainer = CoSupTrainer(make_model(), args, train_dataset=instances)
    trainer.data_collator.call_overhead = None
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "nsp_loss" in entry]
    # Of three distinct passages, 0 and 1 are right for q 0, and 1 and 2 for q 1: these are not negatives.
    assert entry["num_negatives"] == pytest.approx((4 * 1 + 2 * 2) / 6)
    facts = trainer.data_collator(list(trainer.train_dataset))["facts"]
    assert entry["padding"] == pytest.approx(1 - facts.num_tokens / facts.num_padded_tokens)
    json.dumps(entry)
