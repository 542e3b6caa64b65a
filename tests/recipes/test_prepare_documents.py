"""A corpus from documents: real files of every format, made here, to passages with their source, page and span."""

import json
import os
import random
import re
import shlex
import sys
import time
import tracemalloc
from io import StringIO
from pathlib import Path

import prepare_documents
import pyarrow as pa
import pyarrow.parquet
import pytest
from prepare_documents import DocumentArguments, prepare

from modeling_cosup import CoSupForCausalLM, RetrievalConfig
from modeling_cosup.tokenization_cosup import encode_passages_for_emb_seq, encode_passages_for_gen
from support.documents import write_pdf
from support.models import make_model, make_tokenizer

from shared import document_conversion, document_rows, document_word, document_work
from shared.document_cache import DocumentCache
from shared.document_conversion import convert
from shared.document_files import DocumentError, DocumentFile, find_documents
from shared.document_sections import SECTION_CHARACTERS, markdown_blocks, markdown_document, text_file_document
from shared.document_work import work_of
from shared.passage_splitting import PassageSplitter

docx = pytest.importorskip("docx", reason="python-docx is not installed")
pytest.importorskip("fpdf", reason="fpdf2 is not installed")
pytest.importorskip("pypdf", reason="pypdf is not installed")
pytest.importorskip("semantic_text_splitter", reason="semantic-text-splitter is not installed")
pytest.importorskip("trafilatura", reason="trafilatura is not installed")

MARKDOWN = """---
title: Notes on widgets
date: 2024-13-01
---
Read this first.

# Care

Oil them *twice* a year.

```python
# no heading
oil(widget)
```

Storage
-------
Keep them dry.
"""
HTML = """<html><head><title>Widget shop | ACME</title><link rel="canonical" href="https://acme.example/widgets">
<script>var heading = "# Cart";</script></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/cart">Shopping cart</a></li></ul></nav>
<main><h1>Widget shop</h1><p>We have sold widgets since 1902, in three sizes and in two colours.</p>
<h2>Prices</h2><p>A <b>small</b> widget costs two crowns.</p>
<table><tr><th>Size</th><th>Crowns</th></tr><tr><td>small</td><td>2</td></tr></table></main>
<footer>All rights reserved by ACME.</footer></body></html>"""
LONG = " ".join(f"Sentence {i} says that widget {i * i} can't turn." for i in range(60))
ROWS = [
    {"id": "a", "title": "Row", "text": "A row about widgets.", "metadata": {"page": 7}, "url": "https://x.org/a"},
    {"text": "Another row."},
    {"id": "empty", "text": " "},
]
UNREADABLE = {
    "bad/blank.md": "it holds no text",
    "bad/broken.docx": "it is no .docx file: it is encrypted, damaged, or of an old format",
    "bad/broken.pdf": "it is no PDF that can be read: ",
    "bad/empty.txt": "it is empty",
    "bad/locked.pdf": "it is encrypted: it needs a password",
    "bad/nul.txt": "it is no text: it holds NUL bytes",
    "bad/rows.jsonl, line 2": "text is 3, expected a string",
    "rows.jsonl, line 3": "it holds no text",
    "bad/scanned.pdf": "no page of 1 holds text; scanned pages need OCR",
}


def write_docx(path):
    file = docx.Document()
    file.add_heading("Report", 0)
    file.add_paragraph("Sales rose.")
    file.add_heading("North", 1)
    file.add_paragraph("# is no heading here")
    file.add_paragraph("by four percent", style="List Bullet")
    table = file.add_table(2, 2)
    for number, text in enumerate(("Size", "Load", "M4", "20 kg")):
        table.cell(number // 2, number % 2).text = text
    file.save(str(path))


def write_documents(folder):
    """Write a folder of documents of every format, bad ones among them, and other files."""
    for name in ("bad", ".git", "sub"):
        (folder / name).mkdir(parents=True)
    guide = [
        [
            ("Assembly",),
            "Put the widget on the axle, and then turn it as often as you can to the left, until it clicks.",
        ],
        ["Screws of steel last longer.", ("Care",), "Oil the widget twice a year."],
        [],
    ]
    write_pdf(folder / "guide.pdf", guide, "Widget guide")
    write_pdf(folder / "owner.pdf", [["Anyone may read this."]], owner_password="o")
    write_pdf(folder / "bad/locked.pdf", [["secret"]], owner_password="o", user_password="u")
    write_pdf(folder / "bad/scanned.pdf", [[]])
    (folder / "bad/broken.pdf").write_bytes((folder / "guide.pdf").read_bytes()[:500])
    write_docx(folder / "report.docx")
    (folder / "bad/broken.docx").write_bytes((folder / "report.docx").read_bytes()[:500])
    (folder / "page.html").write_text(HTML)
    (folder / "notes.md").write_text(MARKDOWN)
    (folder / "latin.txt").write_bytes("Das Zahnrad läuft größer und schöner über die Brücke.".encode("latin-1"))
    (folder / "sub/long.txt").write_bytes(LONG.replace(" Sentence 30", "\r\n\r\nSentence 30").encode("utf-8-sig"))
    (folder / "sub/z_copy.md").write_text("# Notes on widgets\n\nRead this first.\n\n# Others\n\nKeep them dry.\n")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = {"text": ["A row of a table."], "url": ["https://x.org/t"], "urls": ["other"], "ids": [3]}
    pyarrow.parquet.write_table(pa.table(table), folder / "table.PARQUET")
    (folder / "bad/empty.txt").write_bytes(b"")
    (folder / "bad/blank.md").write_text("# Only a heading\n\n \n---\n")
    (folder / "bad/nul.txt").write_bytes(b"MZ\0\0")
    (folder / "bad/rows.jsonl").write_text('{"text": "one"}\n{"text": 3}\n')
    (folder / "picture.PNG").write_bytes(b"")
    (folder / "Makefile").write_text("all:")
    (folder / ".git/config.md").write_text("hidden")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(max_passage_length=128).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    write_documents(folder)
    return folder


def arguments(model_folder, output, *inputs, **changes):
    options = {"inputs": [str(path) for path in inputs], "output_file": str(output), "model": model_folder}
    return DocumentArguments(**{**options, **changes})


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("output") / "corpus.jsonl"


@pytest.fixture(scope="module")
def result(model_folder, folder, output):
    """The report, and the passages by source."""
    report = prepare(arguments(model_folder, output, folder))
    passages = {}
    for passage in read(output):
        passages.setdefault(passage["metadata"]["source"], []).append(passage)
    return report, passages


@pytest.fixture(scope="module")
def splitter(model_folder):
    return PassageSplitter.from_pretrained(model_folder)


def check_passages(passages, expected):
    """Compare passages with `(title, text, metadata)`."""
    assert [(passage["title"], passage["text"], passage["metadata"]) for passage in passages] == expected


# ------------------------------------------------------------------ formats


def test_pages_of_a_pdf(result):
    report, passages = result
    text = "Put the widget on the axle, and then turn it as often as you can to the left, until it clicks."
    second = 9 + len(text) + 1  # after "Assembly\\n", the text and a form feed
    metadata = {"source": "guide.pdf"}
    expected = [
        ("Widget guide › Assembly", text, {**metadata, "page": 1, "start": 9, "end": second - 1}),
        (
            "Widget guide › Assembly",
            "Screws of steel last longer.",
            {**metadata, "page": 2, "start": second, "end": second + 28},
        ),
        (
            "Widget guide › Care",
            "Oil the widget twice a year.",
            {**metadata, "page": 2, "start": second + 34, "end": second + 62},
        ),
    ]
    check_passages(passages["guide.pdf"], expected)
    check_passages(
        passages["owner.pdf"],
        [("owner", "Anyone may read this.", {"source": "owner.pdf", "page": 1, "start": 0, "end": 21})],
    )
    assert {"source": "guide.pdf", "reason": "no text on 1 of 3 pages: 3"} in report["notes"]


def test_headings_lists_and_tables_of_word(result):
    _, passages = result
    table = "| Size | Load |\n|---|---|\n| M4 | 20 kg |"
    north = f"# is no heading here\n\n- by four percent\n\n{table}"
    start = len("# Report\n\n")
    second = start + len("Sales rose.\n\n# North\n\n")
    expected = [
        ("Report", "Sales rose.", {"source": "report.docx", "start": start, "end": start + 11}),
        ("Report › North", north, {"source": "report.docx", "start": second, "end": second + len(north)}),
    ]
    check_passages(passages["report.docx"], expected)


def test_html_without_navigation(result):
    _, passages = result
    texts = "\n".join(passage["text"] for passage in passages["page.html"])
    assert "since 1902" in texts and "| small | 2 |" in texts
    assert not re.search("Home|cart|rights|var", texts)
    assert [passage["title"] for passage in passages["page.html"]] == ["Widget shop", "Widget shop › Prices"]
    first = passages["page.html"][0]["metadata"]
    assert first == {"url": "https://acme.example/widgets", "source": "page.html", "start": 15, "end": 82}


def test_markdown_with_front_matter_and_code(result):
    _, passages = result
    expected = []
    code = "Oil them *twice* a year.\n\n```python\n# no heading\noil(widget)\n```"
    titles = ["Notes on widgets", "Notes on widgets › Care", "Notes on widgets › Care › Storage"]
    for title, text in zip(titles, ("Read this first.", code, "Keep them dry."), strict=True):
        start = MARKDOWN.index(text)
        expected.append((title, text, {"source": "notes.md", "start": start, "end": start + len(text)}))
    check_passages(passages["notes.md"], expected)


@pytest.mark.parametrize(
    ("titles", "expected"),
    [("document", ["Notes on widgets"] * 3), ("heading", ["Notes on widgets", "Care", "Storage"])],
)
def test_titles_of_one_kind(model_folder, folder, tmp_path, titles, expected):
    prepare(arguments(model_folder, tmp_path / "c.jsonl", folder / "notes.md", titles=titles))
    assert [passage["title"] for passage in read(tmp_path / "c.jsonl")] == expected


def test_rows(result):
    report, passages = result
    first, second = passages["rows.jsonl"]
    metadata = {"page": 7, "source": "rows.jsonl", "row": "a", "url": "https://x.org/a", "start": 0, "end": 20}
    check_passages([first], [("Row", "A row about widgets.", metadata)])
    check_passages([second], [("", "Another row.", {"source": "rows.jsonl", "row": 1, "start": 0, "end": 12})])
    metadata = {"source": "table.PARQUET", "row": 0, "url": "https://x.org/t", "start": 0, "end": 17}
    check_passages(passages["table.PARQUET"], [("", "A row of a table.", metadata)])


def test_encodings(result, tmp_path):
    report, passages = result
    assert passages["latin.txt"][0]["text"] == "Das Zahnrad läuft größer und schöner über die Brücke."
    assert {"source": "latin.txt", "reason": "read as cp1252, as it is not UTF-8"} in report["notes"]
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        path = tmp_path / f"{encoding}.txt"
        path.write_text("Größe", encoding=encoding)
        (section,) = text_file_document(path, "x", False).sections
        assert (section.text, section.start) == ("Größe", 0)


RUSSIAN = "Москва является столицей России.\n"
JAPANESE = "これは日本語の文章です。東京は日本の首都です。図書館で本を借りました。天気がいいので公園を散歩した。\n"
CHINESE = "北京是中国的首都，有很多人住在那里。图书馆里可以借书，天气好的时候大家都去公园散步。\n"
KOREAN = "서울은 대한민국의 수도이다. 많은 사람들이 그곳에 살고 있다. 도서관에서 책을 빌렸다.\n"
ENGLISH = "An English line.\n" * 5000  # more than a sample


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("shift_jis", JAPANESE * 2000),  # a sample may end within a character
        ("shift_jis", "a" + JAPANESE * 2000),
        ("euc_jp", JAPANESE * 2000),
        ("euc_jp", "a" + JAPANESE * 2000),
        ("gbk", CHINESE * 2000),
        ("gbk", "a" + CHINESE * 2000),
        ("gbk", CHINESE.strip() * 2000),  # one line
        ("gbk", "a" + CHINESE.strip() * 2000),
        ("euc_kr", KOREAN * 2000),
        ("euc_kr", "a" + KOREAN * 2000),
        ("cp1251", ENGLISH + RUSSIAN),
        ("shift_jis", ENGLISH + JAPANESE),
        ("cp1252", ENGLISH + "Größe"),
    ],
)
def test_encodings_of_long_files(tmp_path, encoding, text):
    path = tmp_path / "long.txt"
    path.write_bytes(text.encode(encoding))
    assert "".join(section.text for section in text_file_document(path, "x", False).sections) == text


def test_what_cannot_be_read_is_listed(result, model_folder, folder, output):
    report, passages = result
    reasons = {entry["source"]: entry["reason"] for entry in report["unreadable"]}
    assert sorted(reasons) == sorted(UNREADABLE)
    for source, reason in UNREADABLE.items():
        assert reason in reasons[source]
        assert source not in passages
    assert report["ignored"] == {".png": 1, "hidden": 1, "no suffix": 1}
    assert report == json.loads(output.with_name("corpus.report.json").read_text())
    assert (report["documents"], report["duplicates"]) == (len(passages), 1)
    assert [passage["title"] for passage in passages["sub/z_copy.md"]] == ["Notes on widgets › Others"]
    corpus = output.read_bytes()
    message = r"7 of 18 documents and 2 rows cannot be read; no corpus was written(.|\n)*needs a pass"
    with pytest.raises(ValueError, match=message):
        prepare(arguments(model_folder, output, folder, on_error="fail"))
    assert output.read_bytes() == corpus


def test_limits_on_what_a_file_unpacks_to(folder, monkeypatch):
    limits = {
        "MAX_HTML_BYTES": (10, "page.html", "bytes, expected at most 10"),
        "MAX_DOCX_TEXT_BYTES": (1000, "report.docx", "of them XML; expected at most .* and 1,000"),
        "MAX_PAGES": (2, "guide.pdf", "it has 3 pages, expected at most 2"),
        "MAX_PAGE_CHARACTERS": (50, "guide.pdf", "a page holds .* characters, expected at most 50"),
    }
    for name, (limit, file, message) in limits.items():
        with monkeypatch.context() as context:
            context.setattr(document_word if "DOCX" in name else document_conversion, name, limit)
            with pytest.raises(DocumentError, match=message):
                convert(file.rpartition(".")[2], folder / file, file)


# ------------------------------------------------------------------ splitting


def test_passages_fit_keep_every_word_and_cut_none(result, splitter, model_folder):
    report, passages = result
    model = CoSupForCausalLM.from_pretrained(model_folder)
    everything = [passage for of_source in passages.values() for passage in of_source]
    cut = set()
    ids = encode_passages_for_emb_seq(model.emb_seq_tokenizer, everything, model.config, cut)
    assert not cut
    lengths = [len(row) - 2 for row in ids]
    assert report["tokens"] == {"mean": round(sum(lengths) / len(lengths), 1), "longest": max(lengths)}
    text = LONG.replace(" Sentence 30", "\n\nSentence 30")
    long = passages["sub/long.txt"]
    assert len(long) > 10
    for passage in long:
        start, end = passage["metadata"]["start"], passage["metadata"]["end"]
        assert text[start:end] == passage["text"] == passage["text"].strip() != ""
        assert not re.match(r"\w\w", text[max(0, start - 1) : start + 1]) or start == 0
        assert not re.match(r"\w\w", text[end - 1 : end + 1])
    assert " ".join(passage["text"] for passage in long).split() == text.split()
    short = [passage for passage in long[:-1] if len(passage["text"]) < 40]
    assert len(short) < len(long) / 4


def test_neighbours_share_the_overlap(model_folder, folder, tmp_path):
    prepare(arguments(model_folder, tmp_path / "c.jsonl", folder / "sub/long.txt", overlap=60))
    spans = [(passage["metadata"]["start"], passage["metadata"]["end"]) for passage in read(tmp_path / "c.jsonl")]
    shared = [end - start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)]
    assert sum(length > 0 for length in shared) > 0.5 * len(shared)


def split(splitter, text, title, is_markdown=True, headings=()):
    from shared.document_sections import Document, Section

    document = Document("x", title, [Section(text, 0, headings)], is_markdown=is_markdown)
    return list(splitter.passages(document))


def test_long_titles_words_and_emphasis(splitter):
    title = "A title that is far too long for a passage, with many words " * 5
    headings = ("outer heading that is left out first " * 2, "inner")
    passages = split(splitter, LONG, title, headings=headings)
    titles = {passage["title"] for passage, _ in passages}
    assert len(titles) == 1 and "inner" in titles.pop()
    assert max(length for _, length in passages) <= 128
    word = "x" * 500  # too long for a passage: the only thing that is cut
    passages = split(splitter, f"before {word} after", "T")
    assert max(length for _, length in passages) <= 128
    assert "".join(passage["text"].replace(" ", "") for passage, _ in passages) == f"before{word}after"
    emphasis = " ".join(f"re**{i}mark**able{i}" for i in range(200))
    for passage, _ in split(splitter, emphasis, "T"):
        start = passage["metadata"]["start"]
        assert start == 0 or not (emphasis[start - 1].isalnum() and emphasis[start].isalnum())
    assert split(splitter, "* * *\n\n---\n", "T") == []


def test_a_passage_fits_for_both_tokenizers():
    other = make_tokenizer(vocab_size=300, bos="<cls>", eos="<sep>", texts=["entirely other words"])
    options = {"emb_seq_tokenizer": other, "max_passage_length": 48, "passage_prompt": "passage: "}
    model = make_model("gpt2", "bert", **options)
    splitter = PassageSplitter(model.config, [model.emb_seq_tokenizer, model.tokenizer], 48)
    passages = [passage for passage, _ in split(splitter, LONG, "Night Watch", is_markdown=False)]
    cut = set()
    encode_passages_for_gen(model.tokenizer, passages, model.config, cut)
    encode_passages_for_emb_seq(model.emb_seq_tokenizer, passages, model.config, cut)
    assert passages and not cut


@pytest.mark.parametrize(
    ("first_line", "expected"),
    [("```", False), ("  ~~~~ a`b`", False), ("```python", False), ("```x```", True), ("```x`", True), ("``", True)],
)
def test_headings_after_a_line_with_backticks(first_line, expected):
    blocks = list(markdown_blocks([f"{first_line}\n", "# head\n"]))
    assert (blocks[-1].level == 1) is expected


def test_a_long_line_of_backticks_is_read_quickly():
    start = time.perf_counter()
    assert len(list(markdown_blocks(["`" * 200_000 + "x`\n"]))) == 1
    assert time.perf_counter() - start < 5


LINES = "# head\n|## h2 #\n|```\n|~~~\n|===\n|---\n|\n|\n\n|- item\n|1. a\n|> q\n|    code\n"
WORDS = "word |don't |東京は|😀|é|e\u0301|\u200d|**b**|`c`|[l](u)|\t|<div>|&amp;|\u00a0|\u2028|\x0b|[NSP]|</s>|﷽"
PIECES = [*LINES.split("|"), *WORDS.split("|"), "| a | b |\n", "|---|---|\n", "x" * 70]


@pytest.mark.parametrize("overlap", [0, 40])
def test_any_text_is_kept_and_fits(splitter, overlap):
    splitter = PassageSplitter(make_model().config, splitter.tokenizers, 48, min(overlap, 24))
    for seed in range(60):
        draw = random.Random(seed)
        text = "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 120)))
        converted = StringIO(text, newline=None).read()
        document = markdown_document(StringIO(text, newline=None), "x", "stem")
        document.sections = list(document.sections)
        passages = list(splitter.passages(document))
        for passage, length in passages:
            assert converted[passage["metadata"]["start"] : passage["metadata"]["end"]] == passage["text"]
            assert passage["text"].strip() and length <= 48
        assert len({passage["id"] for passage, _ in passages}) == len(passages), seed
        if not overlap:
            before = "".join(filter(str.isalnum, "".join(section.text for section in document.sections)))
            assert "".join(filter(str.isalnum, "".join(passage["text"] for passage, _ in passages))) == before


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_a_large_file_is_never_in_memory(tmp_path, kind):
    line = "word " * 2000
    if kind == "rows":
        line = json.dumps({"text": line})
    path = tmp_path / ("large.txt" if kind == "text" else "large.jsonl")
    path.write_text(f"{line}\n" * 500)
    tracemalloc.start()
    try:
        largest = 0
        with DocumentCache(tmp_path / "cache") as cache:
            for work in work_of(DocumentFile(path.name, kind, path), "text", cache):
                for document in work.documents:
                    largest = max(largest, *(len(section.text) for section in document.sections))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 5_000_000
    assert largest <= SECTION_CHARACTERS
    assert peak < 2_000_000


# ------------------------------------------------------------------ ids, duplicates, what is kept


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.md").write_text(f"# Guide\n\nText of {name}.\n\n## Same\n\nThe same everywhere.\n")
    return folder


def count_splits(monkeypatch, fail_at=None):
    """Record the sources that are split; the `fail_at`-th one is interrupted."""
    sources = []
    split_work = document_work.split_work

    def counted(work, splitter):
        sources.append(work.file.source if work.file else work.documents[0].id)
        if len(sources) == fail_at:
            raise KeyboardInterrupt
        return split_work(work, splitter)

    monkeypatch.setattr(document_work, "split_work", counted)
    return sources


def test_ids_depend_on_path_and_span_alone(model_folder, small, tmp_path):
    prepare(arguments(model_folder, tmp_path / "one.jsonl", small))
    passages = read(tmp_path / "one.jsonl")
    assert len({passage["id"] for passage in passages}) == len(passages) == 4
    (small / "0.md").write_text("Something new.")
    (small / "b.md").unlink()
    report = prepare(arguments(model_folder, tmp_path / "two.jsonl", small))
    again = [passage for passage in read(tmp_path / "two.jsonl") if passage["metadata"]["source"] == "a.md"]
    assert again == [passage for passage in passages if passage["metadata"]["source"] == "a.md"]
    assert report["duplicates"] == 1


def test_equal_passages_are_written_once(model_folder, small, tmp_path):
    report = prepare(arguments(model_folder, tmp_path / "c.jsonl.gz", small))
    assert (report["passages"], report["duplicates"]) == (4, 2)
    from modeling_cosup.corpus_cosup import read_files

    same = [
        row["metadata"]["source"] for _, row in read_files([tmp_path / "c.jsonl.gz"]) if "everywhere" in row["text"]
    ]
    assert same == ["a.md"]
    assert (tmp_path / "c.report.json").exists()


def test_unchanged_documents_are_not_split_again(model_folder, small, tmp_path, monkeypatch):
    args = arguments(model_folder, tmp_path / "c.jsonl", small)
    prepare(args)
    before = (tmp_path / "c.jsonl").read_bytes()
    sources = count_splits(monkeypatch)
    assert prepare(args)["unchanged"] == 3
    assert sources == [] and (tmp_path / "c.jsonl").read_bytes() == before
    (small / "a.md").write_text("Other text.\n")  # its passage "Same" is now that of b.md
    report = prepare(args)
    assert sources == ["a.md"] and report["unchanged"] == 2
    assert [passage["metadata"]["source"] for passage in read(tmp_path / "c.jsonl")] == [
        "a.md",
        "b.md",
        "b.md",
        "c.md",
    ]
    prepare(arguments(model_folder, tmp_path / "c.jsonl", small, passage_length=60))
    assert sources == ["a.md", "a.md", "b.md", "c.md"]
    (tmp_path / "c.jsonl.cache").write_bytes(b"no database" * 100)
    prepare(args)
    assert len(sources) == 7


def test_an_interrupted_run_resumes_and_writes_nothing(model_folder, small, tmp_path, monkeypatch):
    args = arguments(model_folder, tmp_path / "c.jsonl", small)
    with monkeypatch.context() as context:
        count_splits(context, fail_at=3)
        with pytest.raises(KeyboardInterrupt):
            prepare(args)
    assert not (tmp_path / "c.jsonl").exists() and not (tmp_path / "c.report.json").exists()
    sources = count_splits(monkeypatch)
    prepare(args)
    assert sources[-1] == "c.md" and len(sources) <= 3
    prepare(arguments(model_folder, tmp_path / "other.jsonl", small))
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "other.jsonl").read_bytes()


def test_one_run_at_a_time(model_folder, small, tmp_path):
    with DocumentCache(tmp_path / "c.jsonl.cache"), pytest.raises(ValueError, match="is in use by another process"):
        prepare(arguments(model_folder, tmp_path / "c.jsonl", small))


def test_several_workers_write_the_same(model_folder, folder, result, output, tmp_path):
    prepare(arguments(model_folder, tmp_path / "c.jsonl", folder, num_workers=2))
    assert (tmp_path / "c.jsonl").read_bytes() == output.read_bytes()


def test_the_output_is_no_document(model_folder, small):
    for _ in range(2):
        report = prepare(arguments(model_folder, small / "rows.jsonl", small))
        assert (report["documents"], report["passages"], report["ignored"]) == (3, 4, {})


# ------------------------------------------------------------------ inputs


ALL = ["a.md", "b.md", "c.md", "deep/a.md", "deep/file.md"]
SKIPPED = {"links to folders": 2, "hidden": 1}
PATTERNS = {
    "**/*.md": (ALL, SKIPPED),
    "**": (ALL, SKIPPED),
    "**/deep/**": (ALL[3:], SKIPPED),
    "*/*.md": (ALL[3:], {}),
    "*/.hidden/*.md": (["deep/.hidden/h.md"], {}),
    "deep/circle/*.md": (ALL[:3], {}),
}


def test_inputs(small, tmp_path, monkeypatch):
    (small / "deep").mkdir()
    (small / "deep" / "a.md").write_text("deep")
    documents, ignored = find_documents([f"{small}/**/*.md"], ())
    assert [document.source for document in documents] == ["a.md", "b.md", "c.md", "deep/a.md"]
    documents, _ = find_documents([str(small / "a.md"), str(small), str(small)], [small / "b.md"])
    assert [document.source for document in documents] == ["a.md", "c.md", "deep/a.md"]
    (small / "deep" / "circle").symlink_to(small)
    (small / "deep" / "away").symlink_to(tmp_path)
    (small / "deep" / ".hidden").mkdir()
    (small / "deep" / ".hidden" / "h.md").write_text("hidden")
    (small / "deep" / "file.md").symlink_to(small / "a.md")
    for pattern, expected in PATTERNS.items():
        documents, ignored = find_documents([f"{small}/{pattern}"], ())
        assert ([document.source for document in documents], ignored) == expected, pattern
    with pytest.raises(ValueError, match="have the same relative path 'a.md'"):
        find_documents([str(small), str(small / "deep")], ())
    (small / "x.xyz").write_text("x")
    with pytest.raises(ValueError, match="the format is not known, expected a file that ends in .txt"):
        find_documents([str(small / "x.xyz")], ())
    with pytest.raises(ValueError, match="a.md is an input, and would be overwritten: name another output_file"):
        find_documents([str(small / "a.md")], [small / "deep" / ".." / "a.md"])
    for missing in (small / "nothing.pdf", small / "*.docx"):
        with pytest.raises(FileNotFoundError):
            find_documents([str(missing)], ())


def test_odd_names_links_and_pipes(model_folder, small, tmp_path):
    """Of a folder that is named by another path than the output's, with a name that is not UTF-8."""
    Path(os.fsdecode(os.fsencode(small) + b"/caf\xe9.md")).write_text("A cafe.")
    Path(os.fsdecode(os.fsencode(small) + b"/rows\xe9.jsonl")).write_text("[]")
    (small / "link").symlink_to(tmp_path)
    os.mkfifo(small / "pipe.md")
    (tmp_path / "other").symlink_to(small)
    for _ in range(2):
        report = prepare(arguments(model_folder, small / "corpus.jsonl", tmp_path / "other"))
    assert (report["documents"], report["ignored"]) == (4, {"links to folders": 1, "pipes and devices": 1})
    (unreadable,) = report["unreadable"]
    assert unreadable["source"] == "rows\ufffd.jsonl" and "line 1: found list" in unreadable["reason"]
    (passage,) = (passage for passage in read(small / "corpus.jsonl") if passage["text"] == "A cafe.")
    assert (passage["title"], passage["metadata"]["source"]) == ("caf\ufffd", "caf\ufffd.md")


def test_a_folder_that_cannot_be_read_is_an_error(small, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="small"):
        find_documents([str(small)], ())


def test_a_dataset_is_streamed(model_folder, tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        return iter([{"body": "From the Hub.", "id": 5}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prepare(arguments(model_folder, tmp_path / "c.jsonl", "some/dataset", text_column="body"))
    assert calls == [("some/dataset", "train", True)]
    (passage,) = read(tmp_path / "c.jsonl")
    assert passage["metadata"] == {"source": "some/dataset", "row": "5", "start": 0, "end": 13}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_file": "corpus.csv"}, "output_file is 'corpus.csv', expected a name that ends in .jsonl"),
        ({"num_workers": 0}, "num_workers is 0, expected at least 1"),
        ({"passage_length": 129}, "passage_length is 129, expected 16 to 128, the model's max_passage_length"),
        ({"passage_length": 8}, "passage_length is 8, expected 16 to 128"),
        ({"overlap": 65}, "overlap is 65, expected 0 to 64, half of passage_length"),
        ({"inputs": ["empty"]}, "empty: no document, but 1 other files"),
    ],
)
def test_bad_options_are_errors_before_anything_is_written(
    model_folder, small, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        prepare(arguments(model_folder, "out/c.jsonl", small, **changes))
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_missing_is_named_before_anything_is_written(model_folder, small, tmp_path, monkeypatch):
    (small / "x.html").write_text(HTML)
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(ImportError, match=r'need further packages: pip install "cosup\[documents\]" \(.*trafilatura'):
        prepare(arguments(model_folder, tmp_path / "out" / "c.jsonl", small))
    assert not (tmp_path / "out").exists()


BAD_ROWS = {
    "row 1": "text is None, expected a string",
    "row 2": "a value cannot be read: 'utf-8' codec can't decode byte 0xff",
    "row 3": "malformed JSON (Expecting property name",
    "row 5": "an earlier row has the id 'a' too; ids must be unique",
}
BAD_LINES = {
    "line 2": "malformed JSON (Expecting property name",
    "line 3": "found list, expected a JSON object",
    "line 5": "title is 7, expected a string",
    "line 6": "an earlier row has the id '0' too",
}


def bad_tables(folder):
    """Write a Parquet and a JSON Lines file of two good rows each among bad ones."""
    texts = pa.array([b"one", None, b"\xff", b"two", b"three", b"four"]).view(pa.string())
    ids = ["a", "b", "c", "d", None, "a"]
    columns = {"id": ids, "text": texts, "metadata": ["", "", "", "{", '{"page": 9}', ""]}
    pyarrow.parquet.write_table(pa.table(columns), folder / "rows.parquet")
    lines = ['{"text": "five"}', "{", "[]", '{"text": "six"}', '{"text": "x", "title": 7}', '{"id": 0, "text": "x"}']
    (folder / "rows.jsonl").write_text("\n".join(lines))


def test_bad_rows_are_listed_and_the_others_are_kept(model_folder, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    bad_tables(folder)
    output = tmp_path / "c.jsonl"
    for num_unchanged in (0, 2):  # the second time from the cache
        report = prepare(arguments(model_folder, output, folder))
        assert (report["documents"], report["unchanged"], report["unreadable_rows"]) == (2, num_unchanged, 8)
        reasons = {entry["source"]: entry["reason"] for entry in report["unreadable"]}
        for name, bad in (("rows.parquet", BAD_ROWS), ("rows.jsonl", BAD_LINES)):
            for place, reason in bad.items():
                assert reason in reasons.pop(f"{name}, {place}")
        assert not reasons
        assert report["unreadable_documents"] == 0
        texts = {passage["text"]: passage["metadata"]["row"] for passage in read(output)}
        assert texts == {"one": "a", "three": 4, "five": 0, "six": 3}  # numbers as if all rows were good
    output.unlink()
    words = ["prepare_documents.py", str(folder), "--output_file", str(output), "--model", model_folder]
    monkeypatch.setattr("sys.argv", [*words, "--on_error", "fail"])
    with pytest.raises(SystemExit) as error:
        prepare_documents.main()
    assert str(error.value).startswith("error: 8 rows cannot be read; no corpus was written.")
    assert "\n  rows.parquet, row 1: text is None, expected a string" in str(error.value)
    assert not output.exists()


def test_many_bad_rows_are_counted_and_a_file_of_nothing_else_is_unreadable(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(document_rows, "MAX_BAD_ROWS", 2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "some.jsonl").write_text('{"text": "one"}\n' + "{\n" * 5)
    (tmp_path / "in" / "none.jsonl").write_text("{\n" * 5)
    report = prepare(arguments(model_folder, tmp_path / "c.jsonl", tmp_path / "in"))
    assert (report["unreadable_documents"], report["unreadable_rows"]) == (1, 5)
    none, *rows = report["unreadable"]
    assert none["source"] == "none.jsonl"
    assert none["reason"].startswith("none of its 5 rows can be used: line 1: ")
    assert [row["source"] for row in rows] == [
        f"some.jsonl, {place}" for place in ("line 2", "line 3", "further rows")
    ]
    assert rows[2]["reason"] == "3 that are not listed"


# ------------------------------------------------------------------ the whole way


def test_from_a_page_to_its_citation(model_folder, folder, result, tmp_path, monkeypatch, capsys):
    output = tmp_path / "my corpus.jsonl"
    words = ["prepare_documents.py", str(folder / "guide.pdf"), "--output_file", str(output)]
    monkeypatch.setattr("sys.argv", [*words, "--model", model_folder])
    prepare_documents.main()
    printed = capsys.readouterr().out
    assert "no text on 1 of 3 pages: 3" in printed
    command = shlex.split(printed.splitlines()[-1])  # can be pasted as it is
    assert command[:6] == ["python", "recipes/build_index.py", "--model", model_folder, "--corpus_file", str(output)]
    assert command[6:] == ["--output_dir", f"{model_folder}/index"]
    of_the_hub = arguments("me/cosup", output, folder)  # a folder of this name would hide it
    assert prepare_documents.summary(result[0], of_the_hub).endswith(" --output_dir index")
    model = CoSupForCausalLM.from_pretrained(model_folder)
    index = model.build_index(str(output), show_progress_bar=False)
    prompt = [*model.tokenizer("oil?")["input_ids"], model.config.nsp_token_id]
    care = read(output)[2]
    settings = RetrievalConfig(candidates=[[care["id"]]], max_retrievals=1)
    options = {"retriever": index, "retrieval_config": settings, "max_new_tokens": 4, "show_progress_bar": False}
    (completion,) = model.generate_many([prompt], **options)
    assert completion.retrievals[0].passages == [care]
    assert care["metadata"]["source"] == "guide.pdf" and care["metadata"]["page"] == 2
    assert "[1] Widget guide › Care (guide.pdf, page 2): Oil the widget" in completion.cited_text
