"""The NLI judge with models trained on known entailments, asked about pairs they never saw."""

import json

import pytest
import torch
from transformers import BertConfig, BertModel

from support.nli_models import held_out_pairs, make_classifier, make_t5
from trainer.judging.grounding import grounding
from trainer.judging.nli import NLIJudge, entailment_label

PAIRS = held_out_pairs(120)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The two trained models as a user has them: folders."""
    folders = {}
    for name, make in (("classifier", make_classifier), ("t5", make_t5)):
        folders[name] = tmp_path_factory.mktemp(name)
        for part in make():
            part.save_pretrained(folders[name])
    return folders


@pytest.fixture(params=["classifier", "t5"])
def folder(folders, request):
    return folders[request.param]


def encoded(judge):
    """A list that receives the shape of every batch that the model reads."""
    shapes, module = [], judge.model.encoder if judge.writes else judge.model.bert
    module.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append((args or [inputs["input_ids"]])[0].shape), with_kwargs=True
    )
    return shapes


def test_learned_answers_on_held_out_pairs(folder):
    judge = NLIJudge.from_pretrained(folder, device="cpu")
    answers = judge([(premise, hypothesis) for premise, hypothesis, _ in PAIRS])
    right = sum(answer == entailed for answer, (*_, entailed) in zip(answers, PAIRS, strict=True))
    assert right >= 0.9 * len(PAIRS)
    assert 0.3 < sum(answers) / len(answers) < 0.7  # it says both
    assert all(isinstance(answer, bool) for answer in answers)


def test_batches_do_not_change_answers_and_a_pair_is_judged_once(folder):
    pairs = [(premise, hypothesis) for premise, hypothesis, _ in PAIRS[:25]]
    one_by_one = NLIJudge.from_pretrained(folder, device="cpu", batch_size=1)(pairs)
    judge = NLIJudge.from_pretrained(folder, device="cpu", batch_size=10)
    shapes = encoded(judge)
    assert judge(pairs + pairs[::-1]) == one_by_one + one_by_one[::-1]
    assert sum(rows for rows, _ in shapes) == len(set(pairs)) and len(shapes) == 3
    assert shapes[0][1] > shapes[-1][1]  # long ones first, together
    assert judge([]) == []


def test_truncation_cuts_the_end_of_the_premise_only(folder):
    """The first colour of a long premise is read, the last is cut off, and the hypothesis stays."""
    judge = NLIJudge.from_pretrained(folder, device="cpu", max_length=14)
    long = [f"{first} {'w1 ' * 40}{last}" for first, last in (("red", "blue"), ("blue", "red"))]
    shapes = encoded(judge)
    assert judge([(long[0], "w2 red"), (long[0], "w2 blue"), (long[1], "w2 red"), (long[1], "w2 blue")]) == [
        True,
        False,
        False,
        True,
    ]
    assert [tuple(shape) for shape in shapes] == [(4, 14)]
    with pytest.raises(ValueError, match=r"1 of 2 hypotheses leave no room for a premise: .* up to \d+ tokens of 14"):
        judge([("red", "w2 red"), ("red", "w2 " * 30)])


def test_grounding_with_a_trained_judge(folder):
    """The path of Gr from predictions to figures."""
    passages = [("", "w3 red w4"), ("", "blue w5")]

    def retrieval(passage, text):
        title, content = passages[passage]
        return {"passages": [{"title": title, "text": content}], "grounded_text": text}

    predictions = [
        {"retrievals": [retrieval(0, "w1 red . w2 blue"), retrieval(1, "w1 blue")]},
        {"retrievals": [retrieval(1, "w1 red")]},
        {"retrievals": []},
    ]
    assert grounding(predictions, NLIJudge.from_pretrained(folder, device="cpu")) == [pytest.approx(2 / 3), 0.0, None]


def test_answers_are_kept_by_content(folder, tmp_path):
    """A second judge of the same model asks nothing again; other weights or another length do; a torn line is judged again."""
    pairs, cache = [(premise, hypothesis) for premise, hypothesis, _ in PAIRS[:20]], tmp_path / "cache" / "nli.jsonl"
    answers = NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)(pairs)

    def asked(judge):
        shapes = encoded(judge)
        assert len(judge(pairs)) == len(pairs)
        return sum(rows for rows, _ in shapes)

    again = NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)
    assert asked(again) == 0 and again(pairs) == answers
    assert asked(NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache, max_length=20)) == len(set(pairs))
    other = NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.01)
    assert asked(NLIJudge(other.model, other.tokenizer, cache_file=cache)) == len(set(pairs))
    if not other.writes:  # the same weights, and another label says entailment
        other = NLIJudge.from_pretrained(folder, device="cpu", cache_file=tmp_path / "labels" / "nli.jsonl")
        other(pairs)
        labels = other.model.config.id2label
        other.model.config.id2label = {i: labels[len(labels) - 1 - i] for i in labels}
        assert asked(NLIJudge(other.model, other.tokenizer, cache_file=tmp_path / "labels" / "nli.jsonl")) == len(
            set(pairs)
        )
    lines = [line for line in cache.read_text().splitlines() if line]
    assert len(lines) == 3 * len(set(pairs)) and set(json.loads(lines[0])) == {"key", "entailed"}
    cache.write_text("\n".join([*lines[:5], lines[5][:20]]))
    assert asked(NLIJudge.from_pretrained(folder, device="cpu", cache_file=cache)) == len(set(pairs)) - 5


def test_weights_are_float32_on_a_cpu(folders):
    for device in ("cpu", "cpu:0", torch.device("cpu", 0)):
        assert NLIJudge.from_pretrained(folders["classifier"], device=device).model.dtype == torch.float32


def test_without_a_cache_file_nothing_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    NLIJudge.from_pretrained(folders["classifier"], device="cpu")([("red", "red")])
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_answer_is_an_error(folders):
    """An untrained T5 writes neither digit, and NaN scores are no answer."""
    untrained = NLIJudge(*make_t5(steps=0))
    with pytest.raises(ValueError, match='gave 3 of 3 pairs no answer: expected "1" or "0", found'):
        untrained([("red", "w1 red"), ("red", "w1 blue"), ("blue", "w1 red")])
    judge = NLIJudge.from_pretrained(folders["classifier"], device="cpu")
    with torch.no_grad():
        judge.model.classifier.bias[1] = float("nan")
    with pytest.raises(ValueError, match="gave 2 of 2 pairs no answer: expected finite scores"):
        judge([("red", "w1 red"), ("red", "w1 blue")])


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["entailment", "neutral", "contradiction"], 0),
        (["CONTRADICTION", "ENTAILMENT"], 1),
        (["not_entailment", "entailment"], 1),
        (["LABEL_0", "LABEL_1"], None),
        (["entailment"], None),
        (["entailed", "entailment"], None),
    ],
)
def test_the_label_of_entailment_is_found_by_name(labels, expected):
    config = BertConfig(id2label=dict(enumerate(labels)))
    if expected is None:
        with pytest.raises(ValueError, match=f"labels are .*{labels[0]}.* no NLI model"):
            entailment_label(config)
    else:
        assert entailment_label(config) == expected


def test_models_that_are_no_judges_are_refused(folders, tmp_path):
    """Weights without a classification head would be completed at random; weights that must be unpickled are not read."""
    BertModel(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="lacks 2 weights of a BertForSequenceClassification"):
        NLIJudge.from_pretrained(tmp_path / "bare", device="cpu")
    judge = NLIJudge.from_pretrained(folders["classifier"], device="cpu")
    judge.model.config.save_pretrained(tmp_path / "bin")
    torch.save(judge.model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        NLIJudge.from_pretrained(tmp_path / "bin", device="cpu")
