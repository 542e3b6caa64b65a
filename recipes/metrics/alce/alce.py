"""ALCE's scores: str_em, str_hit, claim recall, citation recall and precision."""

import importlib
from collections.abc import Callable

import datasets
import evaluate

DESCRIPTION = """
ALCE's figures for answers with citations: str_em and str_hit (ASQA), list F1 (QAMPARI), claim recall (ELI5), citation
recall and precision. The first three need no model, the others need an NLI model. On the same predictions they equal
the figures of ALCE's own code, except for the sentence splitter (see the README).
"""
INPUTS = """
Args:
    predictions (list of dict): lines of predictions.jsonl: {"id", "output_with_citations", "retrievals":
        [{"passages": [{"id", "title", "text"}, ...]}, ...]}. The output has [n] before the end of a sentence, where n
        counts the distinct retrieved passages.
    references (list of dict): {"id", "qa_pairs": [{"short_answers": [...]}, ...] or None, "claims": [...] or None,
        "answers": [[aliases], ...] of QAMPARI, with "input", the question}, at the top level or under "meta", matched
        by id.
    nli (callable or str, optional): a judge, `list[(premise, hypothesis)]` -> `list[bool]`, or the name of an NLI
        model. Without it there are only str_em, str_hit and list_f1.

Returns:
    dict: str_em and str_hit, between 0 and 1, if the references have qa_pairs, with num_empty_answers, the number of
    questions with a short answer that normalises to nothing, such as "The", which every output contains; claim_recall
    if they have claims; list_f1 if they have lists of aliases; citation_recall and citation_precision over the outputs
    that are not empty, or are lists; num_cited_outputs, the number of these outputs.
"""
CITATION = """
@inproceedings{gao2023enabling,
  title={Enabling Large Language Models to Generate Text with Citations},
  author={Gao, Tianyu and Yen, Howard and Yu, Jiatong and Chen, Danqi},
  booktitle={Proceedings of EMNLP},
  year={2023}
}
"""
STRING = datasets.Value("string")
PASSAGE = {"id": STRING, "title": STRING, "text": STRING}
PREDICTION = {"id": STRING, "output_with_citations": STRING, "retrievals": [{"passages": [PASSAGE]}]}
REFERENCE = {
    "id": STRING,
    "input": STRING,
    "qa_pairs": [{"short_answers": [STRING]}],
    "claims": [STRING],
    "answers": [[STRING]],
}


def fields_of_alce(reference: dict) -> dict:
    """Return a reference with what ALCE compares with at the top level: `prepare_alce.py` writes it under `meta`."""
    from trainer.questions import answer_lists

    fields = {**(reference.get("meta") or {}), **reference}
    lists = answer_lists(reference) or answer_lists({"meta": reference})  # other answers are no lists of aliases
    return {**fields, "qa_pairs": fields.get("qa_pairs") or [], "input": fields.get("input") or "", "answers": lists}


def list_question(reference: dict) -> str | None:
    """Return the question if its answer is a list, `None` if it is not."""
    if not reference["answers"]:
        return None
    if not reference["input"]:
        raise ValueError(f"Reference {reference['id']!r} has lists of answers, but no input: each item follows it.")
    return reference["input"]


def all_short_answers(reference: dict) -> list[str]:
    """Return the short answers of all readings of a question."""
    answers: list[str] = []
    for pair in reference["qa_pairs"]:
        answers.extend(pair["short_answers"])
    return answers


class ALCE(evaluate.Metric):
    """A thin wrapper: `trainer.judging` computes the figures."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": PREDICTION, "references": REFERENCE}),
        )

    def _download_and_prepare(self, dl_manager) -> None:
        # Not imported at the top of the file, or evaluate would tell the user to install PyPI's other `trainer`.
        try:
            importlib.import_module("trainer.judging")
        except ImportError as error:
            raise ImportError(
                "This metric needs the package cosup (`pip install cosup`), whose `trainer` is not PyPI's package of "
                "that name."
            ) from error

    def compute(self, *, predictions: list[dict], references: list[dict], **options) -> dict:
        """Accept whole lines of predictions and of an evaluation set; fields that are not needed are dropped."""
        from trainer.judging.matching import check_rows, select_fields

        check_rows(predictions=predictions, references=references)
        references = [fields_of_alce(reference) for reference in references]
        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(self, predictions: list[dict], references: list[dict], nli: Callable | str | None = None) -> dict:
        from trainer.judging.correctness import list_f1, num_with_empty_answers, str_em
        from trainer.judging.grounding import citation_scores, cited_passages, claim_recall
        from trainer.judging.matching import match_by_id
        from trainer.judging.nli import as_judge
        from trainer.judging.retrieval import mean_scores

        pairs = match_by_id(predictions, references)
        outputs = [prediction["output_with_citations"] for prediction, _ in pairs]
        scores = {}
        if any(reference["qa_pairs"] for _, reference in pairs):
            rows = []
            for prediction, reference in pairs:
                share, hit = str_em(prediction["output_with_citations"], reference["qa_pairs"])
                rows.append({"str_em": share, "str_hit": hit})
            scores |= mean_scores(rows)
            scores["num_empty_answers"] = num_with_empty_answers(map(all_short_answers, references))
        if any(reference["answers"] for _, reference in pairs):
            lists = [(output, reference["answers"]) for output, (_, reference) in zip(outputs, pairs, strict=True)]
            scores |= mean_scores([{"list_f1": list_f1(output, answers)} for output, answers in lists])
        if nli is None:
            return scores
        entail = as_judge(nli)
        if any(reference["claims"] for _, reference in pairs):
            recalls = claim_recall(outputs, [reference["claims"] or [] for _, reference in pairs], entail)
            scores |= mean_scores([{"claim_recall": recall} for recall in recalls])
        passages = [cited_passages(prediction) for prediction, _ in pairs]
        list_questions = [list_question(reference) for _, reference in pairs]
        citations = citation_scores(outputs, passages, entail, list_questions=list_questions)
        rows = [row for row in citations if row is not None]
        scores |= mean_scores(rows, ("citation_recall", "citation_precision"))
        scores["num_cited_outputs"] = len(rows)
        return scores
