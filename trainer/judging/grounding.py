"""
Judge whether an answer follows from what was retrieved: Gr and K-precision of grounded text, ALCE's citations and
claims, and FEVER by NLI.

A function that needs an NLI model takes `entail`, which maps each pair (premise, hypothesis) to a bool; a judge of
`trainer.judging.nli` does so. It gets the pairs of all instances together, so that the model works in batches.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from string import Formatter

from ..questions import normalize_answer
from .correctness import alce_output, fever_verdict, listed_items, remove_citations

Judge = Callable[[list[tuple[str, str]]], list[bool]]  # pairs (premise, hypothesis) -> whether each premise entails it

HYPOTHESIS = "{sentence}"  # default template of the hypotheses of Gr
# Words, in lower case, after which a full stop does not end the sentence.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr gen col lt maj capt sgt cmdr adm rev hon gov sen rep pres vs etc ed eds al approx ca "
    "cf inc ltd co corp bros dept univ est jan feb mar apr jun jul aug sep sept oct nov dec mt ft".split()
)
# Words of which this is true only before a number: "He said no." ends a sentence, "No. 5" does not.
BEFORE_NUMBERS = frozenset("no nos vol vols pp fig figs".split())
_SENTENCE_END = re.compile(r"(?:[!?]+|(?<!\.)\.)[\"'”’)\]]*\s+")
_INITIALS = re.compile(r"[^\W\d](\.[^\W\d])*")  # J., U.S., p.m.
_BEFORE_A_WORD = re.compile(r"[\s(\[\"'“‘]")


def split_sentences(text: str) -> list[str]:
    """
    Split an English text into sentences, none of them empty.

    A sentence ends at `.`, `!` or `?` (with closing quotes and brackets) before white space, unless the full stop
    belongs to an ellipsis, an abbreviation or initials.

    ALCE splits with NLTK's Punkt model, which must be downloaded. Of the splitters that need no download (blingfire,
    syntok, pysbd), none was closer to Punkt than this rule. Most differences are initials (`U.S.|Senator`) at which
    Punkt ends the sentence. To count exactly as ALCE does, pass `nltk.sent_tokenize` as `split` to the functions
    below.
    """
    sentences = []
    start = 0
    for end in _SENTENCE_END.finditer(text):
        word = _BEFORE_A_WORD.split(text[start : end.start()])[-1].lower()
        before_number = word in BEFORE_NUMBERS and text[end.end() : end.end() + 1].isdigit()
        is_abbreviation = word in ABBREVIATIONS or before_number or _INITIALS.fullmatch(word) is not None
        if is_abbreviation and end.group().rstrip() == ".":
            continue
        sentences.append(text[start : end.end()].strip())
        start = end.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def premise(title: str, text: str) -> str:
    """Format a passage for the NLI model as ALCE does. The form stays the same if the title is empty."""
    return f"Title: {title}\n{text}"


# ---------------------------------------------------------------------- between [Cs] and [CE]


def check_hypothesis(template: str) -> str:
    """
    Return the hypothesis template of [`grounding`], or raise if it is not valid.

    Raises:
        `ValueError`: if the template lacks `{sentence}`, or has a field other than `{sentence}` and `{question}`.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"The hypothesis of Gr is {template!r}: {error}.") from None
    if "sentence" not in fields or fields - {"question", "sentence"}:
        raise ValueError(
            f"The hypothesis of Gr is {template!r}, expected a template with {{sentence}} and, optionally, "
            "{question}."
        )
    return template


def grounding(
    predictions: list[dict],
    entail: Judge,
    split: Callable[[str], list[str]] = split_sentences,
    hypothesis: str = HYPOTHESIS,
) -> list[float | None]:
    """
    Return Gr: the share of the sentences between `[Cs]` and `[CE]` that follow from the passages retrieved for that
    very span. Pieces without a letter or digit are no sentences. Without a passage, no sentence follows.

    Args:
        predictions (`list[dict]`): with `retrievals`, each `{"passages", "grounded_text"}`, and with `input` if
            `hypothesis` contains `{question}`.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`.
        split (`Callable`): splits a text into its sentences.
        hypothesis (`str`): template of the text that the NLI model gets for a sentence: `"{sentence}"`, as in the
            paper, or `"{question} {sentence}"`, because a short answer alone states nothing. (ALCE does this for its
            lists of short answers.)

    Returns:
        `list[float | None]`: one value per prediction, `None` if it has no grounded sentence, e.g. because nothing was
        retrieved.

    Raises:
        `ValueError`: if the template is not valid, or if the judge leaves pairs without an answer, with counts.
    """
    check_hypothesis(hypothesis)
    pairs = []
    rows = []  # for each pair, the index of its prediction
    num_sentences: Counter[int] = Counter()
    for row, prediction in enumerate(predictions):
        question = prediction.get("input", "")
        for retrieval in prediction["retrievals"]:
            passages = "\n".join(premise(passage["title"], passage["text"]) for passage in retrieval["passages"])
            for sentence in split(retrieval["grounded_text"]):
                if not any(character.isalnum() for character in sentence):
                    continue
                num_sentences[row] += 1
                if retrieval["passages"]:
                    pairs.append((passages, hypothesis.format(question=question, sentence=sentence)))
                    rows.append(row)
    labels = _ask(entail, pairs)
    num_entailed = Counter(row for row, label in zip(rows, labels, strict=True) if label)
    shares: list[float | None] = [None] * len(predictions)
    for row, total in num_sentences.items():
        shares[row] = num_entailed[row] / total
    return shares


def k_precision(prediction: dict) -> float | None:
    """
    Return K-precision: the share of the words between `[Cs]` and `[CE]` that are in the passages retrieved for that
    span. It compares words only and needs no model.

    Words are normalised, see [`~trainer.questions.normalize_answer`]. A word counts at most as often as it
    occurs in the passages.

    Args:
        prediction (`dict`): as for [`grounding`].

    Returns:
        `float`, or `None` if there is no grounded word.
    """
    num_supported = num_words = 0
    for retrieval in prediction["retrievals"]:
        words = Counter(normalize_answer(retrieval["grounded_text"]).split())
        passages = " ".join(f"{passage['title']} {passage['text']}" for passage in retrieval["passages"])
        passage_words = Counter(normalize_answer(passages).split())
        num_supported += (words & passage_words).total()
        num_words += words.total()
    return num_supported / num_words if num_words else None


# ---------------------------------------------------------------------- ALCE


def cited_passages(prediction: dict) -> list[dict]:
    """
    Return the distinct passages `{"id", "title", "text"}` of all `retrievals`, in order of first appearance. A
    citation `[n]` refers to the n-th of them.
    """
    passages: dict[str, dict] = {}
    for retrieval in prediction["retrievals"]:
        for passage in retrieval["passages"]:
            passages.setdefault(passage["id"], passage)
    return list(passages.values())


def citation_scores(
    outputs: list[str],
    passages: list[list[dict]],
    entail: Judge,
    at_most_citations: int = 3,
    split: Callable[[str], list[str]] = split_sentences,
    list_questions: Sequence[str | None] | None = None,
) -> list[dict[str, float] | None]:
    """
    Return ALCE's citation recall and precision of each output.

    Recall is the share of the sentences that follow from the passages they cite, taken together. A sentence without a
    citation, or with one out of range, does not.

    Precision is the share of the citations that are needed. In a sentence that follows from its passages, a citation
    is unneeded if its passage alone does not entail the sentence, but the other cited passages do. In any other
    sentence, no citation is needed.

    Of an output that is a list, as for QAMPARI, each item after its question counts as a sentence.

    Args:
        outputs (`list[str]`): with `[n]` before the end of a sentence; only the first line counts. `[1]` is the first
            passage; `[0]` is out of range.
        passages (`list[list[dict]]`): for each output, the passages `{"title", "text"}` to which `[n]` refers.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`; called three times.
        at_most_citations (`int`): further citations of a sentence are ignored.
        split (`Callable`): splits a text into its sentences.
        list_questions (`list[str | None]`, *optional*): for each output that is a list, its question; `None` for any
            other.

    Returns:
        `list[dict | None]`: for each output its scores, or `None` if it is empty, because ALCE leaves it out then. An
        empty list counts as one item without a citation, as in ALCE:

        - `citation_recall` and `citation_precision`.
        - `sentences`, `several`, `supported`: the number of sentences, of those with several citations, and of those
          among the latter that follow from their passages.
        - `unneeded`: the number of citations that are not needed.
    """
    sentences = []
    for row, output in enumerate(outputs):
        question = None if list_questions is None else list_questions[row]
        text = alce_output(output)
        for sentence_text in split(text) if question is None else _list_sentences(question, text):
            sentences.append(_Sentence(sentence_text, row, passages[row], at_most_citations))

    citing = [sentence for sentence in sentences if sentence.citations]
    together = _ask(entail, [(sentence.premise_of(sentence.citations), sentence.claim) for sentence in citing])
    for sentence, label in zip(citing, together, strict=True):
        sentence.entailed = label

    # A citation can be unneeded only if the sentence has others, and follows from all of them together.
    citations: list[tuple[_Sentence, int]] = []
    for sentence in citing:
        if sentence.entailed and len(sentence.citations) > 1:
            citations.extend((sentence, citation) for citation in sentence.citations)
    alone = _ask(entail, [(sentence.premise_of([citation]), sentence.claim) for sentence, citation in citations])
    doubtful = [pair for pair, label in zip(citations, alone, strict=True) if not label]
    without = _ask(entail, [(sentence.premise_without(citation), sentence.claim) for sentence, citation in doubtful])
    for (sentence, _), label in zip(doubtful, without, strict=True):
        if label:
            sentence.num_unneeded += 1

    by_output: list[list[_Sentence]] = [[] for _ in outputs]
    for sentence in sentences:
        by_output[sentence.row].append(sentence)
    return [_summarize(output_sentences) for output_sentences in by_output]


def _list_sentences(question: str, output: str) -> list[str]:
    """Return each item of a list with the question before it: the item alone states nothing."""
    return [f"{question} {item.strip()}" for item in listed_items(output)]


class _Sentence:
    """
    A sentence of an output, with the passages that it cites.

    Attributes:
        row (`int`): index of the output.
        claim (`str`): the sentence without its citations.
        citations (`list[int]`): index of each cited passage, the first `at_most_citations` of them; empty if any
            citation is out of range.
        has_several (`bool`): whether it has several citations, in range or not.
        entailed (`bool`): whether it follows from the cited passages together.
        num_unneeded (`int`): number of citations that are not needed.
    """

    def __init__(self, text: str, row: int, passages: list[dict], at_most_citations: int) -> None:
        self.row = row
        self.claim = remove_citations(text).strip()
        self.entailed = False
        self.num_unneeded = 0
        self._passages = passages
        indices = [int(number) - 1 for number in re.findall(r"\[(\d+)", text)]
        in_range = all(0 <= index < len(passages) for index in indices)
        self.citations = indices[:at_most_citations] if in_range else []
        self.has_several = len(self.citations or indices) > 1

    def premise_of(self, citations: list[int]) -> str:
        """Return the passages of some citations as one premise."""
        passages = [self._passages[index] for index in citations]
        return "\n".join(premise(passage["title"], passage["text"]) for passage in passages)

    def premise_without(self, citation: int) -> str:
        """Return the passages of all citations but one occurrence of `citation` as one premise."""
        others = list(self.citations)
        others.remove(citation)
        return self.premise_of(others)


def _summarize(sentences: list[_Sentence]) -> dict[str, float] | None:
    """Return the scores of one output, given its sentences."""
    if not sentences:
        return None
    entailed = [sentence for sentence in sentences if sentence.entailed]
    num_citations = sum(len(sentence.citations) for sentence in sentences)
    num_needed = sum(len(sentence.citations) - sentence.num_unneeded for sentence in entailed)
    return {
        "citation_recall": len(entailed) / len(sentences),
        "citation_precision": num_needed / num_citations if num_citations else 0.0,
        "sentences": len(sentences),
        "several": sum(sentence.has_several for sentence in sentences),
        "supported": sum(sentence.has_several for sentence in entailed),
        "unneeded": sum(sentence.num_unneeded for sentence in sentences),
    }


def claim_recall(outputs: list[str], claims: list[list[str]], entail: Judge) -> list[float]:
    """
    Return ALCE's correctness on ELI5: the share of the claims of a reference answer that follow from the output.

    Args:
        outputs (`list[str]`): the answers, with or without citations; only the first line counts.
        claims (`list[list[str]]`): the reference claims of each question.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`.

    Returns:
        `list[float]`: one share per question.

    Raises:
        `ValueError`: if a question has no claims, with counts.
    """
    num_missing = sum(not question_claims for question_claims in claims)
    if num_missing:
        raise ValueError(f"{num_missing} of {len(claims)} questions have no claims: claim recall is for ALCE's ELI5.")
    pairs: list[tuple[str, str]] = []
    for output, question_claims in zip(outputs, claims, strict=True):
        text = remove_citations(alce_output(output))
        pairs.extend((text, claim) for claim in question_claims)
    labels = iter(_ask(entail, pairs))
    recalls = []
    for question_claims in claims:
        num_entailed = sum(next(labels) for _ in question_claims)
        recalls.append(num_entailed / len(question_claims))
    return recalls


def fever_nli(outputs: list[str], inputs: list[str], answers: list[list[str]], entail: Judge) -> list[float]:
    """
    Return the paper's Cor on FEVER: 1.0 if the output entails a supported claim, or does not entail a refuted one.

    An empty output is wrong. (The paper's script gives it to the NLI model, so it would be right on most refuted
    claims.)

    Args:
        outputs (`list[str]`): what was written about each claim.
        inputs (`list[str]`): the claims.
        answers (`list[list[str]]`): "SUPPORTS" or "REFUTES" for each claim, in any case.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`.

    Returns:
        `list[float]`: one score per claim.

    Raises:
        `ValueError`: if the answers to a claim do not agree on one verdict.
    """
    supported = []
    for claim_answers in answers:
        verdicts = {fever_verdict(answer) for answer in claim_answers}
        if len(verdicts) != 1:
            raise ValueError(f"The answers to a FEVER claim are {claim_answers!r}, expected one verdict.")
        supported.append(verdicts == {"supports"})
    texts = [remove_citations(output).strip() for output in outputs]
    pairs = [(text, claim) for text, claim in zip(texts, inputs, strict=True) if text]
    labels = iter(_ask(entail, pairs))
    scores = []
    for text, is_supported in zip(texts, supported, strict=True):
        if not text:
            scores.append(0.0)
        else:
            scores.append(float(next(labels) == is_supported))
    return scores


def _ask(entail: Judge, pairs: list[tuple[str, str]]) -> list[bool]:
    """Return the judge's answer to each pair, or raise if it leaves pairs without an answer."""
    labels = list(entail(pairs)) if pairs else []
    if len(labels) != len(pairs) or any(label is None for label in labels):
        num_answered = sum(label is not None for label in labels)
        raise ValueError(f"The NLI model answered {num_answered} of {len(pairs)} pairs.")
    return [bool(label) for label in labels]
