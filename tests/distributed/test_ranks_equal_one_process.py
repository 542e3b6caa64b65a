"""W ranks x b equal one process x W·b: loss and parameters after a step, in gloo process groups (DDP and FSDP2)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from modeling_cosup import CoSupForCausalLM
from support.forks import run_forked
from support.models import make_model

SCRIPT = Path(__file__).with_name("run_training.py")
EMB_SEQ = {"hidden_size": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CACHED = {"nsp_batch_size": 12, "per_device_train_batch_size": 2}
BUDGET = {"nsp_batch_size": 12, "max_tokens_per_micro_batch": 150}
CLIPPED = {"clip_gen_only": True, "max_grad_norm": 0.01}
SEPARATE = {"supervision": "separate", "model": {"query_from": "emb_seq"}, "max_grad_norm": 0.01}
TIED = {"model": {"tie_emb_seq": True, "emb_head_size": 24}}
# no passage is on two ranks, where it would be read, and counted, twice
SMOOTHED = {
    "pattern": "zero",
    "label_smoothing_factor": 0.2,
    "include_num_input_tokens_seen": "non_padding",
    "predict": True,
}
DISTILLED = {
    "pattern": "asked",
    "accumulation": 2,
    "supervision": "attention_distillation",
    "candidates_from": "instance",
    "num_candidates": 3,
    "max_length": 512,
}
SYMMETRIC = {"symmetric_nsp": True, "gradient_cosine_steps": 1, "isolate_queries": True}
CASES = {
    "ragged": {},
    "zero": {"pattern": "zero"},
    "none": {"pattern": "none"},
    "accumulated": {"accumulation": 2},
    "checkpointed": CHECKPOINTING,
    "cached": CACHED,
    "cached, checkpointed": CACHED | CHECKPOINTING,
    "cached, budget": BUDGET,
    "cached, accumulated": CACHED | {"nsp_batch_size": 6, "accumulation": 2, "per_device_train_batch_size": 1},
    "cached, zero": CACHED | {"pattern": "zero"},
    "padded": {"padding_free": False},
    "packed": {"padding_free": True},
    "cached, packed": CACHED | {"padding_free": True},
    "clipped": CLIPPED,
    "control tokens": {"control_token_lr": 10.0},
    "separate": SEPARATE,
    "cached, separate": CACHED | SEPARATE,
    "counted duplicates": {"mask_duplicates": False},
    "nsp": {"supervision": "nsp"},
    "lone": {"pattern": "lone", "accumulation": 2},
    "lone, local": {"pattern": "lone", "gather": "local"},
    "cached, lone": CACHED | {"nsp_batch_size": 6, "pattern": "lone", "accumulation": 2},
    "evaluated first": {"evaluate_first": True},
    "unlogged": {"logging_steps": 5},  # whose loss is in the output of train() alone
    "streamed evaluation": {"stream_held_out": True, "max_length": 512},
    "ntp": {"supervision": "ntp"},
    "smoothed": SMOOTHED,
    "cached, packed, smoothed": CACHED | SMOOTHED | {"padding_free": True},
    "tied": TIED,
    "tied, zero": TIED | {"pattern": "zero", "accumulation": 2},
    "tied, cached, packed": TIED | CACHED | CHECKPOINTING | {"padding_free": True},
    "symmetric": SYMMETRIC,
    "cached, symmetric": CACHED | SYMMETRIC,
    "gradient to Emb_seq": {"nsp_gradient": "emb_seq"},
    "distilled": DISTILLED,
    "cached, distilled": DISTILLED | {"nsp_batch_size": 6, "per_device_train_batch_size": 2},
}
# the case that one process runs in place of another, whose results must be the same
REFERENCES = {
    "cached": "ragged",
    "cached, checkpointed": "ragged",
    "cached, budget": "ragged",
    "checkpointed": "ragged",
    "padded": "ragged",
    "packed": "ragged",
    "cached, packed": "ragged",
    "evaluated first": "ragged",
    "streamed evaluation": "ragged",
    "cached, zero": "zero",
    "cached, accumulated": "accumulated",
    "cached, separate": "separate",
    "cached, lone": "lone",
    "lone, local": "lone",  # each rank's six instances are one of two accumulated batches
    "cached, packed, smoothed": "smoothed",
    "tied, cached, packed": "tied",
    "cached, symmetric": "symmetric",
    "cached, distilled": "distilled",
}
THREE_RANKS = ["ragged", "zero", "accumulated", "cached", "separate"]
SHARDED = [
    "ragged",
    "zero",
    "accumulated",
    "checkpointed",
    "cached",
    "clipped",
    "control tokens",
    "separate",
    "packed",
    "cached, packed",
    "symmetric",
    "tied",
    "tied, cached, packed",
]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
UNREACHED = {"unreached": {"model": {"gen": "gemma3", "emb_seq": "longformer", "emb_seq_kwargs": NO_DROPOUT}}}
DETACHED = {"detached": {"gather": "detached"}, "local": {"gather": "local"}}


def launch(folder, world_size, cases):
    done = run_forked(SCRIPT, folder, json.dumps(cases), world_size=world_size, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Cases on one process, on 2 and 3 ranks under DDP, and on 2 under FSDP2; one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    reference_cases = {name: case for name, case in CASES.items() if name not in REFERENCES}
    sharded_cases = {f"fsdp, {name}": CASES[name] | {"fsdp": True} for name in SHARDED}
    launch(folder, 1, reference_cases | DETACHED | UNREACHED)
    launch(folder, 2, CASES | DETACHED | UNREACHED | sharded_cases)
    launch(folder, 3, {name: CASES[name] for name in THREE_RANKS})
    return folder


def load(folder, name, world_size):
    """Parameters and log of a case."""
    with safe_open(folder / f"{name}-{world_size}.safetensors", "pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
        log = {key: float(value) for key, value in file.metadata().items() if key != "format"}
    return state, log


def start_of(name):
    """The parameters of a case before its step."""
    settings = CASES[name].get("model", {})
    return dict(make_model(**{"emb_seq": "gpt2", "emb_seq_kwargs": EMB_SEQ, **settings}).named_parameters())


def gradients(state, name="ragged"):
    """What an SGD step at a learning rate of 1 has subtracted from each parameter of a case."""
    start = start_of(name)
    return {name: start[name].detach() - parameter for name, parameter in state.items()}


def relative_error(actual, expected):
    difference = torch.stack([(actual[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    return float(difference / torch.stack([gradient.norm() for gradient in expected.values()]).norm())


COMPARED = [(2, name) for name in CASES]
COMPARED += [(3, name) for name in THREE_RANKS]
COMPARED += [(2, f"fsdp, {name}") for name in SHARDED]


@pytest.mark.parametrize(("world_size", "name"), COMPARED)
def test_ranks_equal_one_process(results, world_size, name):
    reference = name.removeprefix("fsdp, ")
    one, log_one = load(results, REFERENCES.get(reference, reference), 1)
    many, log_many = load(results, name, world_size)
    assert log_many == pytest.approx(log_one, rel=1e-5, abs=1e-6)
    expected = gradients(one, reference)
    actual = gradients(many, reference)
    for key, gradient in expected.items():
        error = (actual[key] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-6, key  # subtracting weights of float32 leaves about 1e-6
    assert relative_error(actual, expected) <= 1e-5
    trained = {key.split(".")[0] for key, gradient in expected.items() if gradient.any()}
    has_trained_passages = "emb_head" in trained if reference.startswith("tied") else "emb_seq" in trained
    assert has_trained_passages == (reference not in ("none", "ntp"))


def test_parts_that_text_never_reaches_are_not_waited_for(results):
    """The vision tower of Gemma 3 and Longformer's global projections, under DDP without find_unused_parameters."""
    one, log_one = load(results, "unreached", 1)
    two, log_two = load(results, "unreached", 2)
    assert log_two == pytest.approx(log_one, rel=1e-5, abs=1e-6)
    start = make_model(**UNREACHED["unreached"]["model"]).state_dict()
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter, rtol=1e-5, atol=1e-5)
        is_unreached = any(part in name for part in ("vision_tower", "multi_modal_projector", "_global."))
        assert torch.equal(parameter, start[name]) == is_unreached, name


def test_clipping_gen_alone_uses_the_norm_over_all_shards(results):
    _, plain = load(results, "ragged", 1)
    state, log = load(results, "fsdp, clipped", 2)
    norms = {}
    for part in ("gen", "emb_seq"):
        parameter_norms = [gradient.norm() for key, gradient in gradients(state).items() if key.startswith(part)]
        norms[part] = torch.stack(parameter_norms).norm()
    assert norms["gen"] == pytest.approx(0.01, rel=1e-3)
    assert norms["emb_seq"] > 0.02
    assert 0.02 < log["grad_norm"] <= plain["grad_norm"]


def test_control_tokens_have_a_learning_rate_of_their_own(results):
    """Their rows, which the second of two shards holds, move ten times as far; all others as without the option."""
    plain, _ = load(results, "ragged", 1)
    state, _ = load(results, "control tokens", 1)
    config = make_model(emb_seq="gpt2", emb_seq_kwargs=EMB_SEQ).config
    ids = [config.nsp_token_id, config.cs_token_id, config.ce_token_id]
    expected = gradients(plain)
    for name, gradient in gradients(state).items():
        if name == "gen.model.embed_tokens.weight":
            assert min(ids) > len(gradient) / 2 and expected[name][ids].any(1).all()
            expected[name][ids] *= 10
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["ragged", "tied"])
def test_a_sharded_model_is_saved_as_what_it_is(results, name):
    """`fully_shard` gives the model a class of torch's; the checkpoint must still have our code and name our class."""
    folder = results / f"fsdp, {name}-saved"
    assert (folder / "modeling_cosup.py").is_file()
    assert not list(folder.glob("_fsdp*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_cosup.CoSupForCausalLM"
    model = CoSupForCausalLM.from_pretrained(folder)
    state, _ = load(results, f"fsdp, {name}", 2)
    assert all(torch.equal(parameter, state[key]) for key, parameter in model.named_parameters())
    assert config["fingerprint"]["emb_seq"] == model.fingerprint()["emb_seq"]  # hashed anew


def test_detached_and_local_gathering_give_other_gradients(results):
    """`"detached"` has the global loss but, like the paper's code, another gradient; `"local"` has another loss."""
    exact, log = load(results, "ragged", 1)
    for name in DETACHED:
        state, _ = load(results, name, 1)
        assert relative_error(gradients(state), gradients(exact)) < 1e-6  # one process: all the same
    detached, detached_log = load(results, "detached", 2)
    assert detached_log["nsp_loss"] == pytest.approx(log["nsp_loss"], rel=1e-5)
    assert relative_error(gradients(detached), gradients(exact)) > 0.01
    local, local_log = load(results, "local", 2)
    assert local_log["num_negatives"] < log["num_negatives"]
    assert local_log["nsp_loss"] < log["nsp_loss"]
