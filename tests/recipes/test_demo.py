"""The demo in a real browser: questions, retrieval, uploads and refusals; and its parts without a browser."""

import ast
import gzip
import json
import re
import sys
import threading
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml

from support.memories import mlp_memory
from support.models import PASSAGES, make_gen, make_model
from support.pages import DEMO, PARTS, Space, ask, chromium, upload, visitors

RECIPES = DEMO.parent
KEY = "secret"  # of the server
ATTACK = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>${window.hacked=1}{{value}}"
MINE = [{"title": f"Mine {ATTACK}", "text": f"Uploaded passage {number}. {ATTACK}"} for number in range(3)]


@torch.no_grad()
def eager_model():
    """Return a random Gen that retrieves whenever it can: the bias of its last layer norm points at `[NSP]`."""
    model = make_model("gpt2", gen_kwargs={"tie_word_embeddings": False, "max_position_embeddings": 2048})
    weight = model.gen.lm_head.weight
    weight[:, 0] = 0
    weight[model.config.nsp_token_id, 0] = 10
    model.gen.transformer.ln_f.bias[0] = 8
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = eager_model()
    model.save_pretrained(folder / "tiny-model")
    model.build_index(PASSAGES, show_progress_bar=False).save_pretrained(folder / "index")
    return folder


# ------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    pytest.importorskip("gradio", reason="the demo is a Gradio app")
    variables = {
        "COSUP_MODEL": checkpoint / "tiny-model",
        "COSUP_INDEX": checkpoint / "index",
        "COSUP_EXAMPLES": "who painted it?|where?",
    }
    space = Space(tmp_path_factory.mktemp("space"), variables)
    try:
        space.wait()
        yield space
    finally:
        space.stop()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def visit(server, browser):
    with visitors(browser) as visit:
        yield partial(visit, server.url)


WATCH_THE_ANSWER = """
    window.seen = [];
    const look = () => window.seen.push(
        [document.querySelector('.cosup-caret') != null, document.querySelectorAll('mark').length]
    );
    new MutationObserver(look).observe(document.querySelector('#answer'), {childList: true, subtree: true});
"""


def test_an_answer_streams_with_its_passages(visit):
    page = visit()
    assert "An index of 6 passages is searched." in page.inner_text("#status")
    page.evaluate(WATCH_THE_ANSWER)
    text, cards = ask(page, "who painted the Night Watch?")
    seen = page.evaluate("window.seen")
    assert any(caret and 0 < marks < 16 for caret, marks in seen)  # a part of the answer was shown before all of it
    assert seen[-1] == [False, 16]
    cited = [int(number) for number in re.findall(r"\[(\d+)\]", text)]
    assert len(cited) == 16
    assert page.locator("mark.cosup-grounded").count() == 16
    assert len(cards) < 16  # a passage that is cited again keeps its number
    assert list(dict.fromkeys(cited)) == list(range(1, len(cards) + 1))
    assert len(text) > 16 * 4  # there is text, not only citations
    for number, card in enumerate(cards, 1):
        assert card.startswith(f"[{number}]")
        assert "cosine" in card
        assert any(passage["text"] in card for passage in PASSAGES)
    page.get_by_text("More settings").click()
    page.get_by_label("number input for Passages for each [NSP]").fill("3")
    text, cards = ask(page, "and with three passages?", "Forced")
    assert text.lstrip().startswith("[1][2][3]")
    assert len(cards) >= 3
    page.locator("#min-score textarea").fill("2")
    assert ask(page, "and with none that is good enough?")[1] == []
    page.get_by_text("where?", exact=True).click()  # an example
    page.wait_for_function("document.querySelector('#question textarea').value == 'where?'")


def test_retrieval_can_be_switched_off_and_forced(visit):
    page = visit()
    text, cards = ask(page, "without?", "Off")
    assert text.strip()
    assert "[1]" not in text
    assert cards == []
    assert "Nothing was retrieved." in page.inner_text("#answer")
    text, cards = ask(page, "with?", "Forced")
    assert cards
    assert text.lstrip().startswith("[1]")


def test_a_corpus_is_searched_only_by_the_visitor_who_uploaded_it(visit, tmp_path):
    page, other_page = visit(), visit()
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, MINE * 50)).encode()))
    upload(page, path)
    page.locator("#status").get_by_text("Your corpus of 150 passages is now searched, for you alone.").wait_for()
    _, cards = ask(page, f"mine? {ATTACK}")
    assert ATTACK in page.inner_text(".cosup-question")  # shown unchanged, not run
    assert cards
    for card in cards:
        assert f"Mine {ATTACK}" in card
        assert card.count(ATTACK) == 2
    assert page.evaluate("window.hacked") is None
    assert page.locator("#answer img, #answer script").count() == 0
    assert "searched: your corpus" in page.inner_text("#answer")
    _, cards = ask(other_page, "theirs?")
    assert cards
    assert "Uploaded" not in str(cards)
    assert "An index of 6 passages is searched." in other_page.inner_text("#status")
    page.click("#back")
    page.locator("#status").get_by_text("An index of 6 passages is searched.").wait_for()
    _, cards = ask(page, "the first again?")
    assert cards
    assert "Uploaded" not in str(cards)


def test_errors_are_shown_and_the_demo_keeps_running(visit, server, tmp_path):
    page = visit()
    page.click("#ask")
    page.get_by_text("Write a question first.").wait_for()
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(MINE[0] | {"id": ATTACK}) + "\n" + json.dumps(MINE[1] | {"id": ATTACK}))
    upload(page, path)
    page.locator("#status").get_by_text("Not indexed. Line 2: id '<img src=x onerror").wait_for()
    toast = page.locator("[data-testid=toast-body]")
    toast.get_by_text("Line 2: id '<img").wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.locator("[data-testid=toast-body] img, #status img").count() == 0
    page.fill("#question textarea", "é" * 1900)
    page.click("#ask")
    toast.get_by_text("tokens, but Gen reads 2,048").wait_for()
    assert str(tmp_path) not in page.content()
    assert "Traceback" not in page.content()
    assert ask(page, "still there?")[1]
    assert "Traceback" not in server.log.read_text()


def test_a_visitor_whose_corpus_is_gone_is_told(module, checkpoint, browser, tmp_path):
    demo = module.Demo(module.parse(["--model", str(checkpoint / "tiny-model"), "--index", str(checkpoint / "index")]))
    page = demo.page()
    _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(MINE[0]))
    try:
        with visitors(browser) as visit:
            visit = visit(url)
            upload(visit, path)
            visit.locator("#status").get_by_text("Your corpus of 1 passages is now searched").wait_for()
            assert "Uploaded" in str(ask(visit, "mine?")[1])
            page.app.state_holder.session_data.clear()  # as after too many sessions, or a restart
            visit.click("#ask")
            visit.locator("[data-testid=toast-body]").get_by_text("Your corpus was deleted").wait_for()
            visit.click("#back")
            visit.locator("#status").get_by_text("An index of 6 passages is searched.").wait_for()
            assert "Uploaded" not in str(ask(visit, "theirs?")[1])
    finally:
        page.close()


# ------------------------------------------------------------------ without a browser


@pytest.fixture(scope="module")
def module():
    """What the tests use of the demo and its parts."""
    pytest.importorskip("gradio", reason="the demo is a Gradio app")
    import demo

    from demo_parts.answers import Card
    from demo_parts.options import parse
    from demo_parts.page import Demo, gr
    from demo_parts.uploads import read_upload

    return SimpleNamespace(main=demo.main, parse=parse, Demo=Demo, Card=Card, read_upload=read_upload, gr=gr)


@pytest.fixture(scope="module")
def demo(module, checkpoint):
    return module.Demo(module.parse(["--model", str(checkpoint / "tiny-model"), "--index", str(checkpoint / "index")]))


def test_a_folder_that_does_not_exist_is_named_before_the_hub_is_asked(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", "out/modle"])
    with pytest.raises(SystemExit, match="^error: "):
        module.main()
    assert capsys.readouterr().err.startswith("out/modle: no such folder; looking for it on the Hugging Face Hub.\n")


def test_a_plain_language_model_is_refused_in_one_line(module, tmp_path, monkeypatch):
    make_gen().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"error: {tmp_path} is a plain llama model.*from_gen_and_emb_seq.*--gen.$"):
        module.main()


def visitor(name="a session"):
    return SimpleNamespace(session_hash=name)


def test_the_files_need_nothing_of_the_project():
    def packages(nodes):
        names = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        return names - sys.stdlib_module_names

    used = {}
    for path in (DEMO, *PARTS.glob("*.py")):
        used[path.stem] = packages(ast.walk(ast.parse(path.read_text()))) - {"demo_parts"}
        assert len(path.read_text().splitlines()) <= 300
    assert set().union(*used.values()) == {"gradio", "openai", "torch", "transformers"}
    assert [name for name, packages in used.items() if "torch" in packages] == ["local_model"]
    assert used["demo"] == set()


def test_the_files_of_a_space():
    _, front, _ = (RECIPES / "space" / "README.md").read_text().split("---\n", 2)
    matter = yaml.safe_load(front)
    assert (matter["sdk"], matter["app_file"]) == ("gradio", "app.py")
    assert isinstance(matter["sdk_version"], str)
    requirements = set()
    for line in (RECIPES / "space" / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirements.add(line.split(">")[0])
    commands = (RECIPES / "space" / "README.md").read_text()
    for path in (DEMO, PARTS):  # what is uploaded, and as what
        target = "app.py" if path == DEMO else path.name
        assert f"hf upload me/cosup-demo recipes/{path.name} {target} --type space" in commands
    assert requirements == {"torch", "transformers", "faiss-cpu", "pyarrow"}  # gradio comes with the SDK


@pytest.fixture
def slow(module, monkeypatch):
    """A Gen that waits after a few tokens until it is stopped, or for a minute."""

    from demo_parts import local_model

    class Slow(local_model.Stop):
        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if self.calls > 5:
                self.event.wait(60)
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(local_model, "Stop", Slow)


def test_stop_ends_the_answer(demo, slow):
    pages = demo.ask("who?", "Off", 1, 512, "", None, False, visitor())
    next(pages)
    next(pages)
    demo.stop(visitor("another session"))
    assert not demo.running["a session"].is_set()
    demo.stop(visitor())
    last_pages = [page for page, _ in pages]
    assert 1 <= len(last_pages) <= 6
    assert "cosup-caret" not in last_pages[-1]
    assert demo.running == {}


def test_a_visitor_who_leaves_stops_generation(demo, slow):
    pages = demo.ask("who?", "Off", 1, 512, "", None, False, visitor())
    next(pages)
    next(pages)
    num_threads = threading.active_count()
    pages.close()
    assert threading.active_count() == num_threads - 1
    assert demo.running == {}
    demo.stop(visitor())  # nothing is running


def test_an_error_of_the_search_is_shown_without_its_path(module, demo, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("cannot read /srv/secret/index.bin: gone")

    monkeypatch.setattr(demo.backend.index, "search", fail)
    with pytest.raises(module.gr.Error) as error:
        list(demo.ask("who?", "Forced", 1, 8, "", None, False, visitor()))
    assert error.value.message == "The search failed."
    monkeypatch.undo()
    *_, (page, _) = demo.ask("who?", "Forced", 1, 8, "", None, False, visitor())
    assert "cosup-passage-1" in page


@pytest.mark.parametrize(
    ("kind", "message"), [(RuntimeError, "The demo failed (RuntimeError)."), (ValueError, "milvus.internal")]
)
def test_errors_of_an_answer_are_in_the_log(module, demo, monkeypatch, caplog, kind, message):
    """Those that no check of ours raised are nowhere else."""

    def fail(*args, **kwargs):
        raise kind("milvus.internal")

    caplog.set_level("INFO", "demo_parts")
    monkeypatch.setattr(demo.backend, "stream", fail)
    with pytest.raises(module.gr.Error) as error:
        list(demo.ask("who?", "Forced", 1, 8, "", None, False, visitor()))
    assert error.value.message == message
    assert "in fail" in caplog.text and "milvus.internal" in caplog.text


def test_a_corpus_that_is_gone_is_not_replaced_by_the_index_of_the_demo(module, demo, tmp_path, monkeypatch):
    monkeypatch.setattr("demo_parts.page.MAX_CORPORA", 2)
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(MINE[0]))

    def uploaded():
        *_, (_, corpus, has_corpus, _) = demo.take_corpus(str(path))
        return corpus, has_corpus

    def note_of(*corpus):
        *_, (page, _) = demo.ask("who?", "Forced", 1, 8, "", *corpus, visitor())
        return re.search('cosup-note">([^<]*)<', page)[1]

    first = uploaded()
    replaced = uploaded()
    del replaced  # by a corpus of the same visitor, and no longer one of the two
    second = uploaded()
    assert note_of(*first) == note_of(*second) == "searched: your corpus"
    third = uploaded()
    for gone in (first, (None, True)):  # too many corpora, or a session that has ended
        with pytest.raises(module.gr.Error, match="Your corpus was deleted .*: upload it again"):
            next(demo.ask("who?", "Forced", 1, 8, "", *gone, visitor()))
        *_, (page, _) = demo.ask("who?", "Off", 1, 8, "", *gone, visitor())  # searches nothing
        assert "retrieval is switched off" in page and "cosup-passage-1" not in page
    assert note_of(*second) == note_of(*third) == "searched: your corpus"
    assert note_of(*demo.drop_corpus()[1:3]) == "searched: the index of this demo"


@pytest.mark.parametrize(
    ("question", "min_score", "message"),
    [
        ("  ", "", "Write a question"),
        ("a" * 2001, "", "2,001 characters, expected 2,000 at most"),
        ("who?", "high", "The minimum score is .*high"),
        ("who?", "nan", "The minimum score is .*nan"),
        ("who?", "-inf", "The minimum score is .*inf"),
    ],
    ids=["no question", "a long question", "no number", "not a number", "an infinite number"],
)
def test_a_bad_question_is_refused(module, demo, question, min_score, message):
    with pytest.raises(module.gr.Error, match=message):
        next(demo.ask(question, "Off", 1, 8, min_score, None, False, visitor()))


def test_without_an_index_and_without_emb_seq(module, checkpoint):
    demo = module.Demo(module.parse(["--model", str(checkpoint / "tiny-model"), "--no-upload"]))
    assert demo.backend.model.emb_seq is None
    assert "There is no index" in demo.default_status()
    assert "without Emb_seq" in str(demo.page().get_config_file()["components"])
    *_, (page, _) = demo.ask("who?", "Automatic", 1, 8, "", None, False, visitor())
    assert "there is no index" in page
    assert "cosup-passage-1" not in page
    with pytest.raises(module.gr.Error, match="There is no index to retrieve from"):
        next(demo.ask("who?", "Forced", 1, 8, "", None, False, visitor()))


def test_a_token_memory_speaks_in_the_answer(module, checkpoint, tmp_path):
    options = ["--model", str(checkpoint / "tiny-model"), "--no-upload"]
    demo = module.Demo(module.parse(options))
    *_, (page, _) = demo.ask("who?", "Off", 1, 8, "", None, False, visitor())
    mlp_memory(demo.backend.model).save_pretrained(tmp_path / "memory")
    demo = module.Demo(module.parse([*options, "--memory", str(tmp_path / "memory")]))
    assert type(demo.backend.memory).__name__ == "MLPMemory"
    *_, (other_page, _) = demo.ask("who?", "Off", 1, 8, "", None, False, visitor())
    assert other_page != page
    *_, (again, _) = demo.ask("who?", "Off", 1, 8, "", None, False, visitor())
    assert again == other_page


def test_a_model_must_be_named(module, capsys, monkeypatch):
    monkeypatch.delenv("COSUP_MODEL", raising=False)
    with pytest.raises(SystemExit):
        module.parse([])
    assert "set COSUP_MODEL" in capsys.readouterr().err
    monkeypatch.setenv("COSUP_EXAMPLES", "one?| two? |")
    monkeypatch.setenv("COSUP_UPLOAD", "0")
    args = module.parse(["--model", "here"])
    assert args.examples == ["one?", "two?"]
    assert args.upload is False
    assert args.allow_faiss_files is False


VARIABLES = ("COSUP_INDEX", "COSUP_INDEX_URI", "COSUP_BASE_URL", "COSUP_UPLOAD", "COSUP_ALLOW_FAISS_FILES")


@pytest.mark.parametrize(
    ("value", "upload", "allow_faiss"),
    [("0", False, False), ("False", False, False), ("1", True, True), ("true", True, True), ("", True, False)],
)
def test_switches_from_variables(module, monkeypatch, value, upload, allow_faiss):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # as if it were not set
    monkeypatch.setenv("COSUP_UPLOAD", value)
    monkeypatch.setenv("COSUP_ALLOW_FAISS_FILES", value)
    args = module.parse(["--model", "here", "--memory", "m"])
    assert (args.upload, args.allow_faiss_files) == (upload, allow_faiss)
    assert args.index is args.index_uri is args.base_url is None


@pytest.mark.parametrize("name", ["COSUP_UPLOAD", "COSUP_ALLOW_FAISS_FILES"])
def test_a_switch_that_might_mean_either_is_refused(module, monkeypatch, capsys, name):
    monkeypatch.setenv(name, "no")
    with pytest.raises(SystemExit):
        module.parse(["--model", "here", "--index", "i"])
    assert f"the variable {name} is 'no', expected 0 or 1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("《一》。", "二"),
        ("一", "two"),
        ("one", "(two"),
        ("one (", "two"),
        ("one", ", two"),
        ("one", "“two”"),
        ("1", "$2"),
    ],
)
def test_texts_are_joined_as_the_server_joins_them(before, after):
    from demo_parts import answers
    from serving.answers import CLOSING, OPENING, WITHOUT_SPACES, _run_together

    assert (answers.OPENING, answers.CLOSING) == (OPENING, CLOSING)
    assert answers.WITHOUT_SPACES.pattern == WITHOUT_SPACES.pattern
    answer = answers.Answer("who?", "cosine", "")
    answer.write(before)
    answer.begin_grounded([PASSAGES[0]], [0.5])
    answer.write("")
    answer.write(after)
    assert answer.text == before + " " * _run_together(before, after) + after


def test_a_passage_shows_where_it_comes_from(module):
    def source(**metadata):
        passage = {"id": "a", "title": "T", "text": "x", "metadata": metadata}
        page = module.Card(1, passage, [0.5]).to_html("cosine")
        return page.partition("</strong>")[2].partition('<span class="cosup-score">')[0]

    text = '<span class="cosup-source">%s</span>'
    link = text % '<a href="%s" target="_blank" rel="noopener noreferrer">%s</a>'
    assert source(source="a <b>.pdf", page=3) == text % "a &lt;b&gt;.pdf, page 3"
    assert source(source="a.md", url='https://x.org/?a&b"') == link % ("https://x.org/?a&amp;b&quot;", "a.md")
    assert source(source="HTTP://x.org/a.pdf#top", page=2) == link % (
        "HTTP://x.org/a.pdf#page=2",
        "HTTP://x.org/a.pdf#top, page 2",
    )
    assert source(url="javascript:alert(1)") == text % "javascript:alert(1)"
    assert source(source=["a"], page="3") == source() == ""


# ------------------------------------------------------------------ a model in a server


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("openai", reason="the client with which the demo asks a server")
    support = pytest.importorskip("support.served_world", reason="needs the packages of a server")
    with support.served_world(api_keys=[KEY], max_running=1) as world:
        yield world


@pytest.fixture(scope="module")
def served_demo(module, world):
    return module.Demo(module.parse(["--base_url", f"{world.url}/v1", "--api_key", KEY]))


def test_a_served_answer_in_the_browser(served_demo, world, browser):
    page = served_demo.page()
    _, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
    try:
        with visitors(browser) as visit:
            visit = visit(url)
            text, cards = ask(visit, "who?", "Forced")
            assert re.sub(r"\[\d+\]", "", text).split() == world.expected("who?", 128, force_nsp_first=True).split()
            assert text.startswith("[1]") or visit.locator("mark.cosup-grounded").count() >= 1
            assert any(passage["text"] in cards[0] for passage in PASSAGES)
            assert "Answers come from a server." in visit.inner_text("#status")
            assert "This demo takes no corpora: its model runs in a server" in visit.content()
            visit.get_by_text("More settings").click()
            visit.get_by_label("number input for Maximum number of tokens").fill("512")
            visit.locator("#retrieval").get_by_text("Off", exact=True).click()
            visit.fill("#question textarea", "when?")
            slowed = world.model.register_forward_pre_hook(lambda *args: time.sleep(0.1))  # browsers are slow too
            visit.click("#ask")
            visit.locator(".cosup-question").get_by_text("when?", exact=True).wait_for()
            world.wait_for(lambda load: load.running == 1)
            visit.click("#stop")
            world.wait_until_idle()
            slowed.remove()
            visit.wait_for_selector(".cosup-caret", state="detached")
            assert len(visit.inner_text(".cosup-answer")) < len(world.expected("when?", 512, forbid_nsp=True))
    finally:
        page.close()


def test_stopping_frees_a_place_in_the_queue_too(served_demo, world):
    running = served_demo.ask("when?", "Off", 1, 1500, "", None, False, visitor("the first"))
    next(running)
    next(running)
    waiting = served_demo.ask("when?", "Off", 1, 1500, "", None, False, visitor("the second"))
    next(waiting)
    stopping = threading.Thread(target=list, args=[waiting])  # nothing comes while the first answer is written
    stopping.start()
    world.wait_for(lambda load: load.waiting == 1)
    served_demo.stop(visitor("the second"))
    stopping.join(timeout=30)
    world.wait_for(lambda load: load.waiting == 0 and load.running == 1)
    running.close()  # the visitor leaves
    world.wait_until_idle()
    assert served_demo.running == {}


def test_errors_of_the_server_are_shown(module, served_demo, world, monkeypatch):
    with pytest.raises(module.gr.Error, match="The server answers: The prompt has [0-9,]+ tokens, expected"):
        list(served_demo.ask("é" * 1900, "Off", 1, 8, "", None, False, visitor()))
    with pytest.raises(module.gr.Error, match="The minimum score is"):
        next(served_demo.ask("who?", "Off", 1, 8, "high", None, False, visitor()))

    def fail(*args, **kwargs):
        raise OSError("cannot read /srv/secret/index.bin")

    monkeypatch.setattr(world.index, "search", fail)
    with pytest.raises(module.gr.Error, match="The server answers: ") as error:
        list(served_demo.ask("who?", "Forced", 1, 8, "", None, False, visitor()))
    assert "secret" not in error.value.message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--api_key", "wrong"], "--base_url URL: The server answers: Incorrect API key provided."),
        (["--api_key", KEY, "--model", "other"], "--model is 'other', expected a model of URL: tiny."),
        (["--base_url", "http://127.0.0.1:9/v1"], "The server does not answer"),
    ],
    ids=["a wrong key", "another model", "no server"],
)
def test_a_server_that_cannot_be_used_is_reported_at_the_start(module, world, options, message):
    url = f"{world.url}/v1"
    with pytest.raises(ValueError, match=re.escape(message.replace("URL", url))):
        module.Demo(module.parse(["--base_url", url, *options]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base_url", "127.0.0.1:8000"], "--base_url is '127.0.0.1:8000', expected a URL such as"),
        (["--base_url", "http://a/v1", "--index", "out/index"], "--index cannot be used with --base_url"),
        (
            ["--model", "here", "--index_revision", "v1"],
            "--index_revision (or COSUP_INDEX_REVISION) is for an index on the Hub",
        ),
        (
            ["--model", "here", "--allow_faiss_files"],
            "--allow_faiss_files (or COSUP_ALLOW_FAISS_FILES) is for an index in a folder and for a memory",
        ),
        (
            ["--model", "m", "--index", "wiki", "--index_uri", "a.db", "--allow_faiss_files"],
            "--allow_faiss_files (or COSUP_ALLOW_FAISS_FILES) is for an index in a folder",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(module, capsys, options, message):
    with pytest.raises(SystemExit):
        module.parse(options)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------ corpora

GOOD = {  # file name -> content and passages
    "corpus.jsonl": (
        '\ufeff{"id": "a", "title": "T", "text": "one", "titles": 3, "metadata": {"page": 2}}\n\n'
        '{"text": "two\u2028still", "title": null, "metadata": "no object"}\n',
        [
            {"id": "a", "title": "T", "text": "one", "metadata": {"page": 2}},
            {"id": "line 3", "title": "", "text": "two\u2028still"},
        ],
    ),
    "corpus.csv": (
        'id,title,text\na,T,one\n,,"two\n\nstill"\n',
        [{"id": "a", "title": "T", "text": "one"}, {"id": "line 5", "title": "", "text": "two\n\nstill"}],
    ),
    "corpus.TXT": (
        "\n\none\nmore\n \ntwo\n",
        [{"id": "line 3", "title": "", "text": "one\nmore"}, {"id": "line 6", "title": "", "text": "two"}],
    ),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_a_corpus_is_read(module, tmp_path, name, is_packed):
    text, passages = GOOD[name]
    path = tmp_path / name
    path.write_bytes(text.encode())
    if is_packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress(text.encode()))
    assert module.read_upload(str(path)) == passages


BAD = {  # name -> file name, content and message
    "an object without text": (
        "a.jsonl",
        b'{"text": "a"}\n{"title": "b"}',
        "Line 2: text is None, expected a string that is not empty",
    ),
    "a misspelt key": ("a.jsonl", b'{"text": "a", "titel": "b"}', "Line 1: unknown key 'titel'; did you mean 'title'"),
    "a misspelt column": ("a.csv", b"text,Title\na,b\n", "Line 2: unknown key 'Title'; did you mean 'title'"),
    "an empty text": ("a.jsonl", b'{"text": " "}', "Line 1: text is only white space, expected a text."),
    "a number": ("a.jsonl", b'{"text": "a", "id": 7.5}', "Line 1: id is 7.5, expected a string"),
    "an id twice, once as a number": (
        "a.jsonl",
        b'{"text": "a", "id": 0}\n{"text": "b", "id": "0"}',
        "Line 2: id '0' is already in line 1",
    ),
    "no object": ("a.jsonl", b'{"text": "a"}\n[1]', "Line 2: found .1., expected a JSON object"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": }', r"Line 2: malformed JSON \(Expecting value, column 10\)"),
    "deep JSON": ("a.jsonl", b"[" * 200_000, "Line 1: this JSON cannot be read"),
    "a long number": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "Line 1: this JSON cannot be read"),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}', "Line 1: text holds half a surrogate pair"),
    "an id twice": ("a.csv", b"id,text\na,b\nc,d\na,e\n", "Line 4: id 'a' is already in line 2"),
    "no column": ("a.csv", b"title,body\na,b\n", "Line 1: found the columns 'title, body', expected one named text"),
    "too many cells": ("a.csv", b"text\na\nb,c\n", "Line 3: found more cells than the 1 columns"),
    "too few cells": ("a.csv", b"text,title\na\n", "Line 2: found fewer cells than the 2 columns"),
    "a quote left open": ("a.csv", b'text\n"a\n', "malformed CSV"),
    "another encoding": ("a.txt", "one\n\ntw\xf6".encode("latin-1"), "Line 3: the byte 0xf6 is not UTF-8"),
    "nothing": ("a.txt", b"\n \n", "holds no passage"),
    "no gzip": ("a.txt.gz", b"one", "not a complete .gz file"),
    "a gzip cut off": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}')[:-9], "not a complete .gz file"),
    "a bomb": ("a.jsonl.gz", gzip.compress(bytes(6 * 2**20)), "more than 5 MB when it is unpacked"),
    "too many": ("a.txt", b"a\n\n" * 2001, "Line 4001: the corpus holds more than 2,000 passages"),
    "a long text": ("a.txt", b"a\n\n" + b"b" * 10_001, "Line 3: text has 10,001 characters, expected 10,000 at most"),
    "another format": ("a.pkl", b"", "ends in '.pkl', expected .jsonl"),
    "no format": ("a", b"", "ends in 'nothing', expected .jsonl"),
    "gzip of no format": ("a.gz", b"", "ends in '.gz', expected .jsonl"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_a_bad_corpus_is_refused_with_its_line(module, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        module.read_upload(str(tmp_path / name))
    assert str(tmp_path) not in str(error.value)
