"""
Does what was written follow from what was retrieved: Gr and K-precision of grounded text, ALCE's citations and claims, FEVER by NLI.

What needs an NLI model takes `entail`, a function from pairs (premise, hypothesis) to one bool each, e.g. a judge of
`trainer.judging.nli`. It is called with the pairs of all instances at once, so that the model can work in batches.
"""

import re
from collections import Counter
from collections.abc import Callable
from string import Formatter

from .correctness import alce_output, fever_verdict, normalize_answer, remove_citations

Judge = Callable[[list[tuple[str, str]]], list[bool]]  # pairs (premise, hypothesis) -> does each premise entail it

HYPOTHESIS = "{sentence}"  # of Gr
# Words that end in a full stop within a sentence, lower case.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st sr jr gen col lt maj capt sgt cmdr adm rev hon gov sen rep pres vs etc ed eds al approx ca cf "
    "inc ltd co corp bros dept univ est jan feb mar apr jun jul aug sep sept oct nov dec mt ft".split()
)
BEFORE_NUMBERS = frozenset("no nos vol vols pp fig figs".split())  # "He said no." ends a sentence, "No. 5" does not
_SENTENCE_END = re.compile(r"(?:[!?]+|(?<!\.)\.)[\"'”’)\]]*\s+")
_INITIALS = re.compile(r"[^\W\d](\.[^\W\d])*")  # J., U.S., p.m.


def split_sentences(text: str) -> list[str]:
    """
    Sentences of an English text: `list[str]`, none of them empty.

    A sentence ends at `.`, `!` or `?` (with closing quotes and brackets) before white space, unless the full stop
    belongs to an ellipsis, an abbreviation or initials. ALCE splits with NLTK's Punkt model, which is a download. Of the
    splitters that need none (blingfire, syntok, pysbd) none was closer to Punkt than this rule, so it stays. Most ends
    that differ are initials (`U.S.|Senator`) that Punkt takes for an end. To count exactly as ALCE does, pass
    `nltk.sent_tokenize` where a function here takes `split`.
    """
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        word = re.split(r"[\s(\[\"'“‘]", text[start : end.start()])[-1].lower()
        inner = (
            word in ABBREVIATIONS
            or _INITIALS.fullmatch(word)
            or (word in BEFORE_NUMBERS and text[end.end() : end.end() + 1].isdigit())
        )
        if end.group().rstrip() != "." or not inner:
            sentences.append(text[start : end.end()].strip())
            start = end.end()
    return [sentence for sentence in [*sentences, text[start:].strip()] if sentence]


def premise(title: str, text: str) -> str:
    """A passage as ALCE gives it to the NLI model, also where the title is empty."""
    return f"Title: {title}\n{text}"


# ---------------------------------------------------------------------- between [Cs] and [CE]


def check_hypothesis(template: str) -> str:
    """
    The hypothesis template of [`grounding`] as it is.

    Raises:
        `ValueError`: when it lacks `{sentence}`, or holds another field than that and `{question}`.
    """
    try:
        fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"The hypothesis of Gr is {template!r}: {error}.") from None
    if "sentence" not in fields or set(fields) - {"question", "sentence"}:
        raise ValueError(
            f"The hypothesis of Gr is {template!r}, expected a template with {{sentence}} and, if need be, {{question}}."
        )
    return template


def grounding(
    predictions: list[dict],
    entail: Judge,
    split: Callable[[str], list[str]] = split_sentences,
    hypothesis: str = HYPOTHESIS,
) -> list[float | None]:
    """
    Gr: share of the sentences between `[Cs]` and `[CE]` that follow from the passages retrieved for that very span.

    Args:
        predictions (`list[dict]`): with `retrievals`, each `{"passages", "grounded_text"}`, and `input` where `hypothesis`
            asks for it.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`.
        split (`Callable`): a text -> its sentences.
        hypothesis (`str`): how the NLI model reads a sentence. `"{sentence}"`, as the paper has it, or `"{question} {sentence}"`: a short answer states
            nothing by itself (ALCE reads its lists of short answers so).

    Returns:
        `list[float | None]`: one per prediction; `None` where no sentence is grounded on a passage (nothing was retrieved): Gr says nothing about it.

    Raises:
        `ValueError`: for a template that is none, with counts for pairs that the judge leaves without an answer.
    """
    check_hypothesis(hypothesis)
    pairs, owners = [], []
    for owner, prediction in enumerate(predictions):
        for retrieval in prediction["retrievals"]:
            passages = "\n".join(premise(passage["title"], passage["text"]) for passage in retrieval["passages"])
            for sentence in split(retrieval["grounded_text"]):
                pairs.append((passages, hypothesis.format(question=prediction.get("input", ""), sentence=sentence)))
                owners.append(owner)
    labels = _ask(entail, pairs)
    total, entailed = Counter(owners), Counter(owner for owner, label in zip(owners, labels, strict=True) if label)
    return [entailed[owner] / total[owner] if total[owner] else None for owner in range(len(predictions))]


def k_precision(prediction: dict) -> float | None:
    """
    K-precision: share of the words between `[Cs]` and `[CE]` that are in the passages retrieved for that span. Lexical,
    needs no model.

    Words are those of [`normalize_answer`]; one counts at most as often as the passages hold it.

    Args:
        prediction (`dict`): as for [`grounding`].

    Returns:
        `float`, or `None` where no word is grounded on a passage.
    """
    supported = total = 0
    for retrieval in prediction["retrievals"]:
        words = Counter(normalize_answer(retrieval["grounded_text"]).split())
        passages = " ".join(f"{passage['title']} {passage['text']}" for passage in retrieval["passages"])
        supported += (words & Counter(normalize_answer(passages).split())).total()
        total += words.total()
    return supported / total if total else None


# ---------------------------------------------------------------------- ALCE


def cited_passages(prediction: dict) -> list[dict]:
    """The distinct passages `{"id", "title", "text"}` of all `retrievals` in order of first appearance, as `[n]` counts them."""
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
) -> list[dict | None]:
    """
    ALCE's citation recall and precision.

    Recall: share of the sentences that follow from the passages they cite, taken together; a sentence without citation, or with one out of range, does not.
    Precision: share of the citations that are of use. In a sentence that follows from its passages, a citation is of no use if its passage alone does not
    entail the sentence and the others do without it; in any other sentence none is of use.

    Args:
        outputs (`list[str]`): with `[n]` before the sentence's end; only the first line counts. `[1]` is the first passage; `[0]` is out of range.
        passages (`list[list[dict]]`): for each output, the passages that `n` counts, `{"title", "text"}`.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`; called three times.
        at_most_citations (`int`): further ones of a sentence are ignored.
        split (`Callable`): a text -> its sentences.

    Returns:
        `list[dict | None]`: for each output `citation_recall`, `citation_precision` and, to sum up over outputs, the numbers of `sentences`, of those
        with `several` citations, of those `supported` by them, and of `unneeded` citations there. `None` for an empty output, which ALCE leaves out.
    """
    sentences = [
        _Sentence(sentence, row, passages[row], at_most_citations)
        for row, output in enumerate(outputs)
        for sentence in split(alce_output(output))
    ]
    cited = [s for s in sentences if s.premises]
    for sentence, label in zip(cited, _ask(entail, [(s.joint(s.premises), s.claim) for s in cited]), strict=True):
        sentence.entailed = label
    several = [(s, ref) for s in cited if s.entailed and len(s.premises) > 1 for ref in s.refs]
    alone = _ask(entail, [(s.passage(ref), s.claim) for s, ref in several])
    doubtful = [pair for pair, label in zip(several, alone, strict=True) if not label]
    without = _ask(entail, [(s.joint(s.others(ref)), s.claim) for s, ref in doubtful])
    for (sentence, _), label in zip(doubtful, without, strict=True):
        sentence.unneeded += label
    return [_citation_scores([s for s in sentences if s.row == row]) for row in range(len(outputs))]


class _Sentence:
    """A sentence of an output: what it claims, and the passages it cites (none where a citation is out of range)."""

    def __init__(self, text, row, passages, at_most):
        self.row, self.claim, self.entailed, self.unneeded = row, remove_citations(text).strip(), False, 0
        refs = [int(number) - 1 for number in re.findall(r"\[(\d+)", text)]
        self.refs = refs[:at_most] if all(0 <= ref < len(passages) for ref in refs) else []
        self.several = len(self.refs or refs) > 1
        self._passages = passages
        self.premises = [self.passage(ref) for ref in self.refs]

    def passage(self, ref):
        return premise(self._passages[ref]["title"], self._passages[ref]["text"])

    def others(self, ref):
        """The cited passages without one citation of `ref`."""
        refs = list(self.refs)
        refs.remove(ref)
        return [self.passage(other) for other in refs]

    @staticmethod
    def joint(premises):
        return "\n".join(premises)


def _citation_scores(sentences):
    if not sentences:
        return None
    citations = sum(len(s.refs) for s in sentences)
    useful = sum(len(s.refs) - s.unneeded if s.entailed else 0 for s in sentences)
    return {
        "citation_recall": sum(s.entailed for s in sentences) / len(sentences),
        "citation_precision": useful / citations if citations else 0.0,
        "sentences": len(sentences),
        "several": sum(s.several for s in sentences),
        "supported": sum(s.several and s.entailed for s in sentences),
        "unneeded": sum(s.unneeded for s in sentences),
    }


def claim_recall(outputs: list[str], claims: list[list[str]], entail: Judge) -> list[float]:
    """
    ALCE's correctness on ELI5: share of the claims of a reference answer that follow from the output.

    Args:
        outputs (`list[str]`): may hold citations; only the first line counts.
        claims (`list[list[str]]`): of each question.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`.

    Returns:
        `list[float]`.

    Raises:
        `ValueError`: with counts, when a question has no claims.
    """
    if without := sum(not each for each in claims):
        raise ValueError(f"{without} of {len(claims)} questions have no claims: claim recall is for ALCE's ELI5.")
    pairs = [
        (remove_citations(alce_output(output)), claim)
        for output, each in zip(outputs, claims, strict=True)
        for claim in each
    ]
    labels = iter(_ask(entail, pairs))
    return [sum(next(labels) for _ in each) / len(each) for each in claims]


def fever_nli(outputs: list[str], inputs: list[str], answers: list[list[str]], entail: Judge) -> list[float]:
    """
    The paper's Cor on FEVER: the output must entail a claim that is supported, and must not entail one that is refuted.

    An empty output is wrong (the paper's script, which asks the model all the same, would mostly count it right on refuted claims).

    Args:
        outputs (`list[str]`), inputs (`list[str]`): what was written about which claim.
        answers (`list[list[str]]`): "SUPPORTS" or "REFUTES", in any case.
        entail (`Callable`): `list[(premise, hypothesis)]` -> `list[bool]`.

    Returns:
        `list[float]`.
    """
    verdicts = []
    for each in answers:
        if len(found := {fever_verdict(answer) for answer in each}) != 1:
            raise ValueError(f"The answers to a FEVER claim are {each!r}, expected one verdict.")
        verdicts.append(found.pop() == "supports")
    outputs = [remove_citations(output).strip() for output in outputs]
    labels = iter(_ask(entail, [(output, claim) for output, claim in zip(outputs, inputs, strict=True) if output]))
    return [float(bool(output) and next(labels) == verdict) for output, verdict in zip(outputs, verdicts, strict=True)]


def _ask(entail: Judge, pairs: list[tuple[str, str]]) -> list[bool]:
    """One bool for each pair; a judge that leaves pairs without an answer is an error."""
    labels = list(entail(pairs)) if pairs else []
    if len(labels) != len(pairs) or any(label is None for label in labels):
        raise ValueError(f"The NLI model answered {sum(label is not None for label in labels)} of {len(pairs)} pairs.")
    return [bool(label) for label in labels]
