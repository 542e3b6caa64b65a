"""Documents of each format to sections: what counts as a heading, what is text, and where a long text is cut."""

from io import StringIO

import pytest

from support.documents import write_pdf

from shared.document_conversion import convert, join_lines
from shared.document_sections import (
    SAMPLE_BYTES,
    SECTION_CHARACTERS,
    markdown_blocks,
    markdown_document,
    plain_title,
    row_sections,
    sections_of,
    text_file_document,
)

docx = pytest.importorskip("docx", reason="python-docx is not installed")
pytest.importorskip("pypdf", reason="pypdf is not installed")


def check_sections(document, expected):
    """Compare the sections of a document with `(headings, text)`, white space apart."""
    found = [(section.headings, " ".join(section.text.split())) for section in document.sections]
    assert [section for section in found if section[1]] == expected


# ------------------------------------------------------------------ PDF


def test_a_bookmark_is_a_heading_where_it_is_a_line_of_its_own(tmp_path):
    pages = [
        [("Start",), "We are starting with a summary of it all.", ("Art", "The art of starting, in three steps.")],
        ["More of art.", ("Summary", "2.1 SUMMARY"), "It begins.", ("__init__",), "It ends."],
        [("Part two", "PART 2"), "A picture.", ("> Care", "Care"), "Oil it."],
    ]
    write_pdf(tmp_path / "x.pdf", pages)
    expected = [
        (("Start",), "We are starting with a summary of it all. The art of starting, in three steps."),
        (("Art",), "More of art."),
        (("Summary",), "It begins."),
        (("__init__",), "It ends."),
        (("__init__",), "PART 2 A picture."),
        (("Part two", "Care"), "Oil it."),
    ]
    check_sections(convert("pdf", tmp_path / "x.pdf", "x.pdf"), expected)


# ------------------------------------------------------------------ Word


def run(text, tag="t"):
    return f"<w:r><w:{tag}>{text}</w:{tag}></w:r>"


def control(content, properties=""):
    return f"<w:sdt><w:sdtPr>{properties}</w:sdtPr><w:sdtContent>{content}</w:sdtContent></w:sdt>"


def cell(content, properties=""):
    return f"<w:tc><w:tcPr>{properties}</w:tcPr>{content}</w:tc>"


def paragraph(content):
    return f"<w:p>{content}</w:p>"


TOC = '<w:docPartObj><w:docPartGallery w:val="Table of Contents"/></w:docPartObj>'
TWO_COLUMNS = '<w:gridSpan w:val="2"/>'
TABLE_IN_A_CELL = f"<w:tbl><w:tr>{cell(paragraph(run('M4')))}{cell(paragraph(run('M5')))}</w:tr></w:tbl><w:p/>"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (control(paragraph(run("In a control."))), "In a control."),
        (paragraph(run("Signed by ") + control(run("Ann")) + run(".")), "Signed by Ann."),
        (
            paragraph(f"{run('We ')}<w:ins>{run('may ')}</w:ins><w:del>{run('must ', 'delText')}</w:del>{run('go.')}"),
            "We may go.",
        ),
        (
            paragraph(
                f"<w:pPr><w:tabs><w:tab/></w:tabs></w:pPr><w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/></w:r>{run('c')}"
            ),
            "a\tb\nc",
        ),
        (control(paragraph(run("Care 3")), TOC), ""),
        (paragraph(run("Name: ") + control(run("Click here."), "<w:showingPlcHdr/>")), "Name: "),
        (
            f"<w:tbl><w:tr>{cell(paragraph(run('Load')), TWO_COLUMNS)}{cell(TABLE_IN_A_CELL)}</w:tr>"
            + control(f"<w:tr>{cell(paragraph(run('a')))}{control(cell(paragraph(run('b'))))}{cell('<w:p/>')}</w:tr>")
            + "</w:tbl>",
            "| Load |  | M4 M5 |\n|---|---|---|\n| a | b |  |",
        ),
    ],
    ids=["control", "inline control", "revisions", "marks", "contents", "hint", "table"],
)
def test_text_of_word(tmp_path, content, expected):
    file = docx.Document()
    body = f"<w:body {docx.oxml.ns.nsdecls('w')}>{content}</w:body>"
    for element in list(docx.oxml.parse_xml(body)):
        file.element.body.insert_element_before(element, "w:sectPr")
    file.save(tmp_path / "x.docx")
    document = convert("docx", tmp_path / "x.docx", "x.docx")
    assert "".join(section.text for section in document.sections).strip("\n") == expected


# ------------------------------------------------------------------ text and Markdown


def test_spans_of_a_long_row_count_its_line_ends():
    text = "".join(f"Line {i}\r\n" for i in range(SECTION_CHARACTERS // 6))
    sections = list(row_sections(text))
    assert len(sections) > 1 and "".join(section.text for section in sections) == text
    assert all(text.startswith(section.text, section.start) for section in sections)


@pytest.mark.parametrize(
    ("front", "title"),
    [
        ("title: Widgets\ntags:\n- a\n", "Widgets"),
        ("title: Widgets: a guide\ntags:\n- a\n  # b\n", "Care"),  # no valid YAML
        (f"title: {'[' * 400}\n", "Care"),
        ("\n# First slide\n\nHello.\n\n", "First slide"),
        ("Hello: all\nof you.\n", "Care"),
        ("", "Care"),
    ],
)
def test_only_front_matter_is_left_out(front, title):
    document = markdown_document(StringIO(f"---\n{front}---\n# Care\n\nOil them.\n"), "x", "x")
    assert document.title == title
    text = "".join(section.text for section in document.sections)
    assert ("Hello" in text) == ("Hello" in front)
    assert "title" not in text and "Oil them." in text


def test_a_few_bad_bytes_leave_a_text_utf_8(tmp_path):
    text = "Größe, Länge \ufffd und Höhe"  # a real U+FFFD is no bad byte
    data = text.encode()
    (tmp_path / "x.txt").write_bytes(data.replace(b" und ", b" \xff "))
    document = text_file_document(tmp_path / "x.txt", "x.txt", False)
    check_sections(document, [((), text.replace("und", "\ufffd"))])
    assert document.note == "places that are not UTF-8, read as U+FFFD: 1"
    (tmp_path / "x.txt").write_bytes(data)
    assert text_file_document(tmp_path / "x.txt", "x.txt", False).note == ""
    (tmp_path / "x.txt").write_bytes(b"x" * (SAMPLE_BYTES - 1) + data + b"\xc3")  # characters across pieces
    assert text_file_document(tmp_path / "x.txt", "x.txt", False).note.endswith("U+FFFD: 1")


@pytest.mark.parametrize("line", ["| a row | of a table |\n", "```\n", "```\ncode\n"])
def test_a_long_text_without_blank_lines_is_cut(line):
    text = line + "| a row | of a table |\n" * (8 * SECTION_CHARACTERS // 23)
    sections = list(sections_of(markdown_blocks(text.splitlines(keepends=True))))
    assert "".join(section.text for section in sections) == text
    assert max(len(section.text) for section in sections) < 2 * SECTION_CHARACTERS + 100
    assert all(text.startswith(section.text, section.start) for section in sections)


def test_headings_of_markdown():
    text = (
        "Setext *one*\n===\n\na\n# Two {#anchor} #\n####### seven\n #hash\n````\n# code\n```\n````\n"
        "- item\n---\n### [Link](http://x) `code`\n\n    # indented\nlast line\nof two\n---\n"
    )
    blocks = list(markdown_blocks(text.splitlines(keepends=True)))
    assert "".join(block.text for block in blocks) == text
    levels = [(block.level, block.title) for block in blocks if block.level]
    assert levels == [(1, "Setext one"), (1, "Two"), (3, "Link code")]
    sections = list(sections_of(blocks))
    assert [section.headings for section in sections] == [("Setext one",), ("Two",), ("Two", "Link code")]
    for section in sections:
        assert text[section.start :].startswith(section.text)
    assert plain_title(r"snake_case \*kept\* _gone_") == "snake_case *kept* gone"


def test_lines_of_a_page_are_joined():
    page = (
        "Heading\nThis is the first line of a para-\ngraph, and it goes on up to here.\nThe next one begins\nItem A\n"
    )
    joined = "Heading\nThis is the first line of a paragraph, and it goes on up to here.\nThe next one begins\nItem A"
    assert join_lines(page) == joined
    page = "The axle is of steel\n1 Care of the axle\nOil it."
    assert join_lines(page) == page.replace("\n", " ")
    assert join_lines(page, ["care of the axle"]) == page
    assert join_lines(" \n\n") == ""
