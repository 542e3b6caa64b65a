"""Experiment files: what they may hold, which trainings and evaluations follow, and the corpora that they cut."""

import json
import re
from pathlib import Path

from shared.cli import parse

import pytest
import run_experiments
import yaml

from support.experiments import write_experiment
from support.models import PASSAGES
from support.recipes import write
from trainer import CoSupTrainingArguments, load_corpus, load_evaluation_set
from trainer.judging.results import FORMAT
from trainer.judging.tasks import read_tasks

from experiments import definition, task_files
from experiments.definition import load_experiment
from experiments.keys import evaluation_key, key_of, launch_settings
from experiments.task_files import cut_corpora, expand_tasks
from shared.arguments import ScriptArguments

ROOT = Path(__file__).parents[2]
MEMORY_EXPERIMENTS = ("macondo", "macondo_paper", "softmax_bottleneck")  # of run_memory_experiments.py
SHIPPED = [
    path for path in sorted((ROOT / "recipes" / "experiments").glob("*.yaml")) if path.stem not in MEMORY_EXPERIMENTS
]
EXTRA_PASSAGES = [{"id": f"extra{i}", "title": "", "text": f"passage {i}"} for i in range(20)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with an experiment, its evaluation set and its corpus."""
    folder = tmp_path_factory.mktemp("inputs")
    write_experiment(folder)
    return folder


def test_a_tied_arm_takes_no_emb_seq_of_the_world(monkeypatch):
    import train

    world = {name: f"W/{file}" for name, file in definition.WORLD_FILES.items()}
    assert run_experiments.complete({}, 0, world)["emb_seq"] == "W/emb_seq"
    tied = run_experiments.complete({"tie_emb_seq": True}, 0, world)
    assert "emb_seq" not in tied and tied["gen"] == "W/gen"
    # nor does train.py --prepare quickstart
    paths = dict.fromkeys(["gen", "emb_seq", "train", "validation", "corpus", "eval"], "made")
    monkeypatch.setattr(train, "prepare_world", lambda args: paths)
    for tie_emb_seq, emb_seq in ((False, "made"), (True, None)):
        script = ScriptArguments(prepare="quickstart", tie_emb_seq=tie_emb_seq)
        train.prepare(script, CoSupTrainingArguments("out", report_to="none"))
        assert (script.gen, script.emb_seq) == ("made", emb_seq)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(path, tmp_path, monkeypatch):
    experiment = load_experiment(path)  # checks every option of train.py and run_evaluation.py
    assert experiment.baseline in (experiment.arms if len(experiment.arms) > 1 else experiment.modes)
    if experiment.axis:
        assert sum(experiment.axis in options for options in experiment.arms.values()) >= 2
    monkeypatch.chdir(tmp_path)
    Path("W").mkdir()
    world = {name: f"W/{file}" for name, file in definition.WORLD_FILES.items()}
    for place in (*world.values(), "W/pairs.jsonl", "W/start.jsonl"):
        Path(place).touch()
    Path("D").mkdir()
    for kind in ("title", "sentence", "span", "all", "supervised", "train", "validation"):
        Path("D", f"{kind}.jsonl").write_text(kind)
    Path("D", "long").mkdir()
    Path("D", "long", "train.jsonl").write_text("long")
    arms = []
    for arm in experiment.arms:
        options = run_experiments.fill(experiment.options(arm), {"world": "W", "models": "M", "data": "D"})
        arms.append(run_experiments.complete(options, 0, world))
    assert len({key_of(options) for options in arms}) == len(arms)  # no two arms are the same training
    config = tmp_path / "options.yaml"
    for options in arms:
        if "{arm:" in str(options.get("model_name_or_path")):
            options["model_name_or_path"] = "W/gen"
        config.write_text(yaml.safe_dump(options))
        argv = ["--config", str(config), "--output_dir", str(tmp_path)]
        script, args = parse([ScriptArguments, CoSupTrainingArguments], "", argv)
        gen = "W/gen" if experiment.world else options["gen"]
        assert script.model_name_or_path == options.get("model_name_or_path")  # if given, Gen is that model's
        assert script.model_name_or_path or script.gen == gen
        assert args.seed == 0
        assert args.gradient_accumulation_steps * args.train_batch_size in (16, 32, 64, 128, 512)


def test_shipped_experiments_share_trainings(tmp_path):
    arms = {
        "main_table": "co",
        "corpus_size": "co",
        "controls": "co",
        "general_retriever": "co",
        "emb_seq": "same",
        "nsp_loss_weight": "ours",
        "passages_trained": "masked",
        "similarity": "cosine-0.05",
    }
    keys = set()
    for name, arm in arms.items():
        options = load_experiment(ROOT / "recipes" / "experiments" / f"{name}.yaml").options(arm)
        keys.add(key_of(run_experiments.complete(options, 0, {"gen": "G", "train_file": "T"})))
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rat=1"], "train.py has no option 'learning_rat'"),
        (["seed=7"], "base: seed has no effect, the runner sets it"),
        (["index=folder"], "base: index has no effect, the runner sets it"),
        (["arms.co.eval_file=eval.jsonl"], "arm co: eval_file has no effect, the runner sets it"),
        (["hub_token=hf_x"], "arm co: the report would publish hub_token: log in, or set HF_TOKEN."),
        (["arms.separate.hub_token=hf_x"], "arm separate: the report would publish hub_token"),
        (["evaluation.pools=1"], "run_evaluation.py has no option 'pools'"),
        (["tasks=null"], "there are no tasks"),
        (["baseline=other"], "baseline is 'other', expected one of co, separate"),
        (["axis=colour"], "axis is 'colour'"),
        (
            ["axis=similarity", "arms.co.similarity=dot"],
            "axis is similarity, whose values in the arms are ['dot'], expected numbers",
        ),
        (
            ["axis=max_steps", "arms.co.max_steps=2", "arms.separate.max_steps=2.0"],
            "whose values in the arms are [2, 2.0], expected numbers, each in one arm",
        ),
        (["seeds=3"], "seeds is 3, expected a list"),
        (["seeds=[0, 1, 0]"], "seeds is [0, 1, 0], which holds a seed twice"),
        (["corpus_sizes=[]"], "corpus_sizes is [], expected a list of positive integers or full"),
        (["corpus_sizes=100"], "corpus_sizes is 100, expected a list of positive integers or full"),
        (["corpus_sizes=[0]"], "corpus_sizes is [0], expected a list of positive integers or full"),
        (["pools=[all]"], "pools is ['all'], expected a list of positive integers or full"),
        (["tasks=[{name: a, eval_fil: b}]"], "unknown field 'eval_fil'"),
        (["max_steps"], "expected key=value"),
        (["title.a.b=1"], "title holds no options"),
        (["seeds=[1"], "--override seeds=[1: malformed YAML"),
        (["arms.co.model_name_or_path={arm:c}"], "arm co starts from arm c, expected one of co, separate."),
        (
            ["arms.co.model_name_or_path={arm:separate}", "arms.separate.model_name_or_path={arm:co}"],
            "arm co starts from its own model: co -> separate -> co.",
        ),
        (
            ["arms.co={model_name_or_path: '{arm:separate}', query_from: gen}"],
            "arm co: query_from is that of the arm whose model it starts from",
        ),
        (["arms.co.gen={arm:separate}"], "gen is '{arm:separate}', but only model_name_or_path can be"),
        (
            ["arms.co.model_name_or_path={arm:separate}/model"],
            "model_name_or_path is '{arm:separate}/model', but only",
        ),
    ],
)
def test_errors_of_an_experiment_file_name_the_key(inputs, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_experiment(inputs / "experiment.yaml", overrides)


PLAN = "{arm: co, against: separate, figure: cor, setting: Top-2}"


def test_planned_comparisons_are_completed(inputs):
    """The first mode, all tasks, and the only setting if there is one."""
    experiment = load_experiment(inputs / "experiment.yaml", [f"comparisons=[{PLAN}]"])
    expected = {"arm": "co", "against": "separate", "figure": "cor", "name": "co against separate"}
    expected |= {"mode": "retrieval", "group": "all", "setting": "Top-2"}
    assert experiment.comparisons == [expected]
    plan = "{name: r, arm: separate, against: co, figure: query_recall@5, mode: query, group: known}"
    overrides = ["pools=[full]", "evaluation.modes=[off, query]", f"comparisons=[{plan}]"]
    (comparison,) = load_experiment(inputs / "experiment.yaml", overrides).comparisons
    assert (comparison["name"], comparison["setting"]) == ("r", "full corpus")
    assert (comparison["mode"], comparison["group"]) == ("query", "known")


def test_planned_comparisons_of_a_world_name_its_tasks():
    path = ROOT / "recipes" / "experiments" / "main_table.yaml"
    plan = "arm: co, against: separate, figure: ret, setting: Top-20"
    (comparison,) = load_experiment(path, [f"comparisons=[{{{plan}, group: people}}]"]).comparisons
    assert comparison["group"] == "people"
    with pytest.raises(ValueError, match="group is 'nq', expected one of all, in-domain, out-of-domain, people, "):
        load_experiment(path, [f"comparisons=[{{{plan}, group: nq}}]"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("arm: c", "comparison 2: arm is 'c', expected one of co, separate."),
        ("against: c", "comparison 2: against is 'c', expected one of co, separate."),
        ("against: co", "comparison 2: arm and against are both co."),
        ("figure: core", "comparison 2: figure is 'core', expected one of ret, "),
        ("figure: ntp_loss", "comparison 2: figure is 'ntp_loss', which has no value for each question"),
        ("figure: eval_ret", "comparison 2: figure is 'eval_ret', which has no value for each question"),
        ("figure: 'query_recall@k'", "figure is 'query_recall@k', expected one with a number in place of k"),
        ("figure: null", "comparison 2: figure is missing."),
        ("mode: forced", "comparison 2: mode is 'forced', expected one of retrieval, gold, off."),
        ("mode: gold, figure: ret", "ret is not measured in mode gold, expected mode retrieval or forced."),
        ("figure: cor_success", "cor_success is a figure of the evaluate module correctness, not of an evaluation."),
        ("figure: gr", "gr needs an NLI model: set evaluation.nli_model."),
        ("mode: gold, figure: kilt_em", "kilt_em is not measured in mode gold, expected mode retrieval or forced."),
        ("mode: gold, figure: mrr", "mrr is not measured in mode gold, expected mode retrieval or query."),
        ("figure: query_recall@10", "'query_recall@10', expected one of query_recall@1, query_recall@5, "),
        ("figure: query_recall@01", "figure is 'query_recall@01', expected one of query_recall@1, "),
        ("figure: hit_rate@0", "figure is 'hit_rate@0', expected one of hit_rate@1, "),
        ("figure: ndcg@5", "figure is 'ndcg@5', expected one of ndcg@10."),
        ("figure: kilt_recall@20", "figure is 'kilt_recall@20', expected one of kilt_recall@1, kilt_recall@5."),
        ("figure: ann_recall@5", "figure is 'ann_recall@5', which no evaluation measures."),
        ("figure: query_recall@5, setting: Top-4", "query_recall@5 is not measured in setting Top-4, which"),
        ("mode: gold, figure: em_not_needed", "em_not_needed is not measured in mode gold, expected mode "),
        ("mode: off, figure: k_precision", "k_precision is not measured in mode off, expected mode retrieval or "),
        ("group: others", "group is 'others', expected one of all, in-domain, out-of-domain, known, other."),
        ("setting: null", "comparison 2: setting is missing, expected one of Top-2, Top-4."),
        ("setting: Top-3", "comparison 2: setting is 'Top-3', expected one of Top-2, Top-4."),
        ("metric: cor", "comparison 2: unknown field 'metric', expected one of arm, against, figure, name"),
        ("name: again", "comparison 2 is comparison 1: counting it twice makes all others look worse."),
    ],
)
def test_errors_of_planned_comparisons_name_what_was_expected(inputs, changes, message):
    changed = yaml.safe_dump(yaml.safe_load(PLAN) | yaml.safe_load(f"{{{changes}}}"), default_flow_style=True)
    overrides = ["evaluation.modes=[retrieval, gold, off]", f"comparisons=[{PLAN}, {changed.strip()}]"]
    with pytest.raises(ValueError, match=re.escape(message)):
        load_experiment(inputs / "experiment.yaml", overrides)


@pytest.mark.parametrize(
    ("value", "message"), [("3", "comparisons is 3, expected a list"), ("[3]", "comparison 1 is 3")]
)
def test_planned_comparisons_are_a_list_of_mappings(inputs, value, message):
    with pytest.raises(ValueError, match=message):
        load_experiment(inputs / "experiment.yaml", [f"comparisons={value}"])


def test_yaml_files_may_begin_with_a_byte_order_mark_and_errors_name_them(tmp_path):
    (tmp_path / "good.yaml").write_text("name: Zürich\n", encoding="utf-8-sig")
    assert definition.read_yaml(tmp_path / "good.yaml") == {"name": "Zürich"}
    for content in (b"a: " + b"[" * 5000, b"a: " + b"1" * 5000, b"a: \xff"):
        (tmp_path / "bad.yaml").write_bytes(content)
        with pytest.raises(ValueError, match="bad.yaml: malformed YAML"):
            definition.read_yaml(tmp_path / "bad.yaml")


def test_the_planned_seeds_are_those_of_the_file():
    path = ROOT / "recipes" / "experiments" / "main_table.yaml"
    overrides = ["seeds=[7, 8]", "max_steps=3"]
    assert load_experiment(path, overrides).seeds == [7, 8]
    assert run_experiments.seeds_of_file(path, overrides) == [0, 1, 2]


def test_overrides_of_several_kinds(inputs):
    required = ["--experiment", str(inputs / "experiment.yaml"), "--output_dir", "out"]
    first = ["--override", "max_steps=7", "seeds=[4]", "--only", "co"]
    second = ["--override", "arms.co.gen=small", "--override=evaluation.top_k=2"]
    (args,) = parse([run_experiments.RunnerArguments], "", [*required, *first, *second])
    assert args.only == ["co"]
    assert args.override == ["max_steps=7", "seeds=[4]", "arms.co.gen=small", "evaluation.top_k=2"]
    experiment = load_experiment(args.experiment, args.override)
    assert (experiment.seeds, experiment.evaluation["top_k"]) == ([4], 2)
    assert [experiment.options(arm).get("gen") for arm in experiment.arms] == ["small", None]
    assert {experiment.options(arm)["max_steps"] for arm in experiment.arms} == {7}


def test_a_training_is_identified_by_its_options_and_data(tmp_path):
    (tmp_path / "train.jsonl").write_text("a")
    (tmp_path / "copy.jsonl").write_text("a")
    options = {"train_file": str(tmp_path / "train.jsonl"), "learning_rate": 0.1, "seed": 0}
    key = key_of(options)
    same_result = {"train_file": str(tmp_path / "copy.jsonl"), "num_threads": 3, "logging_steps": 1}
    assert key == key_of({**options, **same_result})
    assert key != key_of({**options, "seed": 1})
    # without a similarity, the files of Emb_seq may decide it, and with it the default of the temperature
    assert key != key_of({**options, "temperature": 0.05})
    cosine = {**options, "similarity": "cosine"}
    assert key_of(cosine) == key_of({**cosine, "temperature": 0.05})
    (tmp_path / "train.jsonl").write_text("b")
    assert key != key_of(options)


def test_an_arm_is_identified_by_the_training_that_it_starts_from(inputs, tmp_path):
    """Its key changes with that of the other arm, down a chain, and does not depend on where the models are."""
    chain = [
        "arms.last={supervision: nsp, model_name_or_path: '{arm:co}'}",
        "arms.co.model_name_or_path={arm:separate}",
        "arms.separate.gen=G",
        "train_file=T",
        f"data={inputs}",
    ]
    experiment = load_experiment(inputs / "experiment.yaml", chain)
    assert experiment.training_order() == ["separate", "co", "last"]
    runs = {run.arm: run for run in run_experiments.plan_seed(experiment, 0, tmp_path / "a", [])}
    assert list(runs) == ["co", "separate", "last"]
    assert (runs["last"].start, runs["co"].start, runs["separate"].start) == (runs["co"], runs["separate"], None)
    keys = {arm: run.folder.name for arm, run in runs.items()}
    assert len(set(keys.values())) == 3
    elsewhere = run_experiments.plan_seed(experiment, 0, tmp_path / "b", [])
    assert {run.arm: run.folder.name for run in elsewhere} == keys
    other = load_experiment(inputs / "experiment.yaml", [*chain, "arms.separate.max_steps=3"])
    for run in run_experiments.plan_seed(other, 0, tmp_path / "a", []):
        assert run.folder.name != keys[run.arm]


def test_arms_that_retrieve_candidates_get_a_corpus(tmp_path):
    world = {name: f"W/{file}" for name, file in definition.WORLD_FILES.items()}
    for retrieves in ({"supervision": "attention_distillation"}, {"supervision": "ntp", "candidates_from": "index"}):
        assert run_experiments.complete(retrieves, 0, world)["corpus_file"] == "W/corpus.jsonl"
        options = {**retrieves, "corpus_file": str(tmp_path / "corpus.jsonl"), "gen": "G", "train_file": "T"}
        complete = run_experiments.complete(options, 0, world)
        assert complete["corpus_file"] == options["corpus_file"]
        keys = []
        for passages in ("a", "b"):
            (tmp_path / "corpus.jsonl").write_text(passages)
            keys.append(key_of(complete))
        assert keys[0] != keys[1]
        with pytest.raises(ValueError, match="retrieve candidates from: set corpus_file"):
            run_experiments.complete({**options, "corpus_file": None}, 0, {})
    assert "corpus_file" not in run_experiments.complete({"corpus_file": "C"}, 0, world)


def test_results_of_another_format_have_another_key(monkeypatch):
    """The results of another version are in another folder, so they do not block the report."""
    before = evaluation_key("model", [], {"modes": ["off"]})
    assert before == evaluation_key("model", [], {"modes": ["off"], "num_threads": 3})
    monkeypatch.setattr("experiments.keys.FORMAT", FORMAT + 1)
    assert before != evaluation_key("model", [], {"modes": ["off"]})


def test_a_plan_names_the_trainings_of_a_world_that_is_not_made(inputs, tmp_path):
    """--dry_run looks for the same trainings as a run, also with models that come with the world."""
    small_world = {
        "num_train_entities": 60,
        "num_unseen_entities": 10,
        "num_train_instances": 40,
        "num_validation": 10,
        "num_eval_no_passage": 5,
        "drill_max_steps": 0,
    }
    task = {"name": "known", "eval_file": str(inputs / "eval.jsonl"), "corpus_file": str(inputs / "corpus.jsonl")}
    overrides = [
        f"world_options={json.dumps(small_world)}",
        "model_options={retriever_steps: 1}",
        f"tasks={json.dumps([task])}",
        "pools=[4]",
        "comparisons=null",
    ]
    experiment = load_experiment(ROOT / "recipes/experiments/emb_seq.yaml", overrides)
    before = {arm: run_experiments.planned_options(experiment, arm, 3, tmp_path) for arm in experiment.arms}
    assert not list(tmp_path.iterdir())
    runs = run_experiments.plan_seed(experiment, 3, tmp_path, [])
    assert {run.arm: run.options for run in runs} == before
    assert [run.folder.name for run in runs] == [key_of(options) for options in before.values()]


def test_a_missing_folder_is_an_error(inputs):
    needs_models = "arms.co.emb_seq={models}/retriever"
    experiment = load_experiment(inputs / "experiment.yaml", [needs_models])
    with pytest.raises(ValueError, match="data=FOLDER"):
        run_experiments.plan_seed(experiment, 0, Path("unused"), [])
    experiment = load_experiment(inputs / "experiment.yaml", [needs_models, f"data={inputs}"])
    with pytest.raises(ValueError, match="needs world: quickstart"):
        run_experiments.plan_seed(experiment, 0, Path("unused"), [])


def test_corpora_of_growing_size(inputs, tmp_path):
    corpus_file = write(tmp_path / "corpus.jsonl", [*EXTRA_PASSAGES, *PASSAGES])
    experiment = load_experiment(inputs / "experiment.yaml", ["corpus_sizes=[8, 12, full, 100]", f"data={inputs}"])
    tasks = [{"name": "t", "eval_file": str(inputs / "eval.jsonl"), "corpus_file": str(corpus_file)}]
    entries, meaning = expand_tasks(experiment, tasks)
    settings = [about["setting"] for about in meaning.values()]
    assert settings == ["corpus of 8", "corpus of 12", "full corpus", "corpus of 100"]

    entries, notes = cut_corpora(entries, meaning, tmp_path / "cut")
    assert notes == [f"t-100: {corpus_file} has only 26 passages"]
    assert list(meaning) == [entry["name"] for entry in entries] == ["t-8", "t-12", "t-full"]
    ids = [{passage["id"] for passage in load_corpus(entry["corpus_file"])} for entry in entries]
    assert [len(corpus_ids) for corpus_ids in ids] == [8, 12, 26]
    assert ids[0] < ids[1] < ids[2]
    assert {passage["id"] for passage in PASSAGES} <= ids[0]
    for entry in entries:
        corpus = load_corpus(entry["corpus_file"])
        load_evaluation_set(entry["eval_file"], corpus=corpus)  # no question has candidates that the corpus lacks

    entries, meaning = expand_tasks(load_experiment(inputs / "experiment.yaml", ["corpus_sizes=[3]"]), tasks)
    with pytest.raises(ValueError, match="corpus_sizes holds 3, but 6 gold passages"):
        cut_corpora(entries, meaning, tmp_path / "cut")


def test_tasks_of_one_file_keep_the_gold_passages_of_all_their_questions(inputs, tmp_path):
    """The smallest corpus would otherwise lack gold passages of the task that asks more questions, and look harder."""
    fields = {"eval_file": str(inputs / "eval.jsonl"), "corpus_file": str(inputs / "corpus.jsonl")}
    tasks = [{"name": "many", **fields, "max_eval_samples": 4}, {"name": "few", **fields, "max_eval_samples": 1}]
    sizes = ["corpus_sizes=[4]", f"data={inputs}"]
    entries, meaning = expand_tasks(load_experiment(inputs / "experiment.yaml", sizes), tasks)
    entries, _ = cut_corpora(entries, meaning, tmp_path / "cut")
    gold = {passage["id"] for passage in PASSAGES[:4]}
    for entry in entries:
        assert {passage["id"] for passage in load_corpus(entry["corpus_file"])} == gold


def test_corpora_that_are_all_too_large_are_an_error_before_anything_is_trained(inputs, tmp_path):
    tasks = [{"name": "t", "eval_file": str(inputs / "eval.jsonl"), "corpus_file": str(inputs / "corpus.jsonl")}]
    entries, meaning = expand_tasks(load_experiment(inputs / "experiment.yaml", ["corpus_sizes=[99]"]), tasks)
    with pytest.raises(ValueError, match="No task is left, .*has only 6 passages"):
        cut_corpora(entries, meaning, tmp_path / "cut")


def test_a_plan_and_seeds_are_readable(inputs, tmp_path, capsys):
    overrides = [f"data={inputs}", "evaluation.gr_hypothesis='{question} → {sentence}'", "gen=G", "train_file=T"]
    overrides.append(f"comparisons=[{PLAN}]")
    run_experiments.show_plan(load_experiment(inputs / "experiment.yaml", overrides), tmp_path)
    plan = capsys.readouterr().out
    assert "{question} → {sentence}" in plan
    assert "comparisons:\n- arm: co\n  against: separate\n  figure: cor\n" in plan
    assert run_experiments.parse_seeds("0,2") == [0, 2]
    with pytest.raises(ValueError, match="--seeds 0,x: expected integers with commas"):
        run_experiments.parse_seeds("0,x")


def test_corpora_cut_to_what_pools_hold(inputs, tmp_path):
    corpus_file = write(tmp_path / "corpus.jsonl", [*EXTRA_PASSAGES, *PASSAGES])
    questions = load_evaluation_set(inputs / "eval.jsonl")
    for question in questions:
        question["candidates"] = ["extra3", question["provenance"][0][0], "extra4"]
    eval_file = write(tmp_path / "eval.jsonl", questions)
    tasks = [{"name": "t", "eval_file": str(eval_file), "corpus_file": str(corpus_file)}]
    experiment = load_experiment(inputs / "experiment.yaml", ["pools=[1, 2]", "pools_only=true"])
    entries, _ = expand_tasks(experiment, tasks)

    cut_entries = task_files.cut_to_pools(entries, tmp_path / "cut", {"max_eval_samples": 2})
    (cut_file,) = {entry["corpus_file"] for entry in cut_entries}  # embedded once for both pools
    gold = [question["provenance"][0][0] for question in questions[:2]]
    assert [passage["id"] for passage in load_corpus(cut_file)] == ["extra3", *gold]

    # The corpus holds all passages of the questions, also if gold passages are not added to the pools.
    options = {"max_eval_samples": 2, "gold_in_pool": False}
    cut_entries = task_files.cut_to_pools(entries, tmp_path / "cut", options)
    for task in read_tasks(cut_entries, **options):
        corpus_ids = {passage["id"] for passage in load_corpus(task.corpus_file)}
        for question in task.read_questions():
            assert {*question["candidates"], *question["provenance"][0]} <= corpus_ids


def test_corpora_that_cannot_be_cut(inputs, tmp_path):
    entries = [{"name": "t", "eval_file": str(inputs / "eval.jsonl"), "index": "x"}]
    message = "1 of 1 tasks have no corpus_file that .* could cut, e.g. t"
    with pytest.raises(ValueError, match=message):
        task_files.cut_to_pools(entries, tmp_path / "cut")
    with pytest.raises(ValueError, match=message):
        cut_corpora(entries, {}, tmp_path / "cut")
    with pytest.raises(ValueError, match="pools_only leaves out"):
        load_experiment(inputs / "experiment.yaml", ["pools=[full]", "pools_only=true"])


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"pool": "full"}, "pools_only=true", "Task t searches the full corpus, of which pools_only leaves out"),
        ({"pools": ["full", 2]}, "pools_only=true", "Task t searches the full corpus, of which pools_only leaves out"),
        ({"pool": 2}, "corpus_sizes=[8]", "Task t sets its own pool, which corpus_sizes replaces"),
        ({"pools": [2, 4]}, "corpus_sizes=[8]", "Task t sets its own pool, which corpus_sizes replaces"),
    ],
)
def test_a_task_cannot_set_a_pool_against_the_experiment(inputs, fields, settings, message):
    """Its figures over a cut corpus would be called figures over the full corpus, and be better."""
    task = {"name": "t", "eval_file": str(inputs / "eval.jsonl"), "corpus_file": "c", **fields}
    with pytest.raises(ValueError, match=message):
        load_experiment(inputs / "experiment.yaml", [f"tasks={json.dumps([task])}", settings])


def test_the_number_of_processes_is_part_of_the_key_of_a_training(tmp_path):
    configs = ROOT / "recipes" / "accelerate_configs"
    options = {"gen": "g", "train_file": "t", "max_steps": 3}
    assert launch_settings(configs / "single.yaml") == {}
    keys = {key_of(options), key_of(options, launch_settings(configs / "single.yaml"))}
    assert len(keys) == 1
    several = launch_settings(configs / "multi_gpu.yaml")
    assert several["num_processes"] == 8
    (tmp_path / "other_port.yaml").write_text((configs / "multi_gpu.yaml").read_text() + "main_process_port: 5\n")
    assert key_of(options, launch_settings(tmp_path / "other_port.yaml")) == key_of(options, several) not in keys


@pytest.mark.parametrize(
    ("decisive", "name", "values"),
    [
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5}, "save_steps", (50, 200)),
        ({"eval_strategy": "steps"}, "logging_steps", (10, 20)),
    ],
)
def test_what_decides_checkpoints_and_evaluations_is_part_of_the_key(decisive, name, values):
    options = {"gen": "g", "train_file": "t"}
    first, second = ({**options, name: value} for value in values)
    assert key_of(first) == key_of(second) == key_of(options)
    assert key_of({**first, **decisive}) != key_of({**second, **decisive})


def test_files_of_settings_count_by_their_content(tmp_path):
    options = {"gen": "g", "train_file": "t", "deepspeed": str(tmp_path / "zero.json")}
    keys = []
    for text in ("{}", '{"a": 1}'):
        (tmp_path / "zero.json").write_text(text)
        keys.append(key_of(options))
    assert keys[0] != keys[1] != key_of({**options, "deepspeed": {"a": 1}})


def test_worlds_with_other_options_have_other_folders(inputs, tmp_path):
    experiment = load_experiment(inputs / "experiment.yaml")
    folders = [run_experiments.world_folder(experiment, 0, tmp_path)]
    experiment.world_options = {"num_train_entities": 50}
    folders.append(run_experiments.world_folder(experiment, 0, tmp_path))
    experiment.task_options = {"max_questions": 5}
    folders.append(run_experiments.world_folder(experiment, 0, tmp_path))
    assert folders[0] == tmp_path / "worlds" / "seed-0"
    assert len(set(folders)) == 3
    assert all(folder.name.startswith("seed-0-") for folder in folders[1:])


def test_the_content_of_an_index_is_part_of_the_key_of_an_evaluation(tmp_path):
    (tmp_path / "index").mkdir()
    entry = {"name": "t", "eval_file": "e", "index": str(tmp_path / "index")}
    keys = set()
    for text in ("{}", '{"deleted": [1]}'):
        (tmp_path / "index" / "index_config.json").write_text(text)
        keys.add(evaluation_key("m", [entry], {}))
    assert len(keys) == 2
