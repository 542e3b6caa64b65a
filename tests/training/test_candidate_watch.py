"""What a training with candidates warns of: what teaches little, or the wrong thing."""

import pytest

from support.models import make_model
from support.training import NAMES, arguments, questions
from trainer import CoSupTrainer, candidate_watch
from trainer.candidate_watch import FLATNESS, LEFT_OUT, UNTAUGHT, CandidateWatch

K = 3
DISTILLED = {"supervision": "attention_distillation", "num_candidates": K}
RETRIEVED = {"supervision": "ntp", "candidates_from": "index", "num_candidates": K}
ASKED, CORPUS = questions(NAMES[:20])


@pytest.fixture
def warnings(monkeypatch):
    """What training warns of, as to candidates."""
    messages = []
    monkeypatch.setattr(candidate_watch.logger, "warning", messages.append)
    return messages


def check(watch, warnings, hit_rate=0.5, flatness=0.5, left_out=0, untaught=0):
    """Give a log to a watch, and return what it warns of."""
    figures = {f"hit_rate@{K}": hit_rate, "target_entropy": 1.05, FLATNESS: flatness}
    before = len(warnings)
    watch.check({**figures, LEFT_OUT: left_out, UNTAUGHT: untaught}, {f"hit_rate@{K}": 100})
    return warnings[before:]


def test_a_flat_target_and_a_falling_hit_rate_are_warned_of_once(tmp_path, warnings):
    watch = CandidateWatch(arguments(tmp_path, **DISTILLED))
    assert not check(watch, warnings, 0.5)
    assert not check(watch, warnings, 0.45)  # within noise
    (flat,) = check(watch, warnings, flatness=0.96)
    assert "1.050 nats, 96.0 %" in flat and "lower target_temperature=0.02" in flat
    assert not check(watch, warnings, flatness=0.99)
    (fallen,) = check(watch, warnings, 0.2)
    assert f"hit_rate@{K} has fallen from 50.0 % in the first log to 20.0 %" in fallen
    assert "A flat or wrong target does that" in fallen
    assert not check(watch, warnings, 0.1)


def test_instances_left_out_or_untaught_are_warned_of_each_time_their_number_doubles(tmp_path, warnings):
    watch = CandidateWatch(arguments(tmp_path, **DISTILLED))
    for name in ("left_out", "untaught"):
        assert [len(check(watch, warnings, **{name: 1})) for _ in range(5)] == [1, 1, 0, 1, 0]  # at 1, 2 and 4


def test_a_hit_rate_falls_by_itself_if_the_retriever_is_frozen(tmp_path, warnings):
    """With supervision="ntp" it learns nothing, unless Gen makes the queries: then these change with Gen."""
    frozen, of_gen = make_model(query_from="emb_seq"), make_model()
    for model, trains in ((frozen, False), (of_gen, True)):
        args = arguments(tmp_path, **RETRIEVED, max_steps=1)
        trainer = CoSupTrainer(model, args, train_dataset=ASKED[:4], corpus=CORPUS)
        trainer.train()
        watch = CandidateWatch(args, trainer._candidate_watch.trains_retriever)
        check(watch, warnings, 0.9)
        fallen = check(watch, warnings, 0.1)
        assert len(fallen) == trains
        if trains:
            assert "Gen makes the queries, and supervision='ntp' does not teach it to" in fallen[0]
            assert "target" not in fallen[0]


def test_the_only_instance_with_its_number_of_candidates_is_warned_of(tmp_path, warnings):
    candidates = [CORPUS[:3], CORPUS[3:6], CORPUS[6:8], CORPUS[8:9]]
    instances = []
    for question, own in zip(ASKED, candidates, strict=False):
        instances.append({**question, "candidates": own})
    args = arguments(tmp_path, **DISTILLED, candidates_from="instance", max_steps=1)
    trainer = CoSupTrainer(make_model(query_from="emb_seq"), args, train_dataset=instances)
    trainer.train()
    (message,) = [text for text in warnings if "have taught the retriever nothing" in text]
    assert message.startswith("2 instance(s)") and "no other instance of their step has as many" in message
    assert UNTAUGHT not in trainer.state.log_history[0]
