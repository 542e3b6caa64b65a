"""ALCE's scores: str_em, str_hit, claim recall, citation recall and precision."""

import importlib

import datasets
import evaluate

DESCRIPTION = """
ALCE's figures of answers with citations: str_em and str_hit (ASQA), claim recall (ELI5), citation recall and precision. The first two need no model, the
others an NLI model. They equal ALCE's own code on the same predictions, but for the sentence splitter (see the README).
"""
INPUTS = """
Args:
    predictions (list of dict): {"id", "output_with_citations": text with [n] before the ends of sentences, "retrievals": [{"passages": [{"id",
        "title", "text"}, ...]}, ...]}: lines of predictions.jsonl; n counts the distinct retrieved passages.
    references (list of dict): {"id", "qa_pairs": [{"short_answers": [...]}, ...] or None, "claims": [...] or None}, matched by id.
    nli (callable or str, optional): a judge, `list[(premise, hypothesis)]` -> `list[bool]`, or the name of an NLI model. Without it there are no figures that
        need one.

Returns:
    dict: str_em, str_hit where the references have qa_pairs; claim_recall where they have claims; citation_recall, citation_precision (over the outputs that
    are not empty: num_cited_outputs). Between 0 and 1.
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
REFERENCE = {"id": STRING, "qa_pairs": [{"short_answers": [STRING]}], "claims": [STRING]}


class ALCE(evaluate.Metric):
    """Thin: the figures are computed by `trainer.judging`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": PREDICTION, "references": REFERENCE}),
        )

    def _download_and_prepare(self, dl_manager):
        try:
            importlib.import_module(
                "trainer.judging"
            )  # named at the top, evaluate would tell the user to install PyPI's other `trainer`
        except ImportError as error:
            raise ImportError(
                "This metric needs the package cosup (`pip install cosup`), whose `trainer` is not PyPI's package of that name."
            ) from error

    def compute(self, *, predictions, references, **options):
        """Whole lines of predictions and of an evaluation set will do: other fields are dropped."""
        from trainer.judging.matching import select_fields

        references = [
            {"qa_pairs": [], **(x.get("meta") or {}), **x} for x in references
        ]  # prepare_alce.py keeps what is ALCE's under `meta`
        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(self, predictions, references, nli=None):
        from trainer.judging.correctness import str_em
        from trainer.judging.grounding import citation_scores, cited_passages, claim_recall
        from trainer.judging.matching import match_by_id
        from trainer.judging.nli import as_judge
        from trainer.judging.retrieval import mean_scores

        pairs, scores = match_by_id(predictions, references), {}
        outputs = [prediction["output_with_citations"] for prediction, _ in pairs]
        if any(x["qa_pairs"] for _, x in pairs):
            rows = [str_em(output, x["qa_pairs"]) for output, (_, x) in zip(outputs, pairs, strict=True)]
            scores |= mean_scores([{"str_em": share, "str_hit": hit} for share, hit in rows])
        if nli is None:
            return scores
        entail = as_judge(nli)
        if any(x["claims"] for _, x in pairs):
            scores |= mean_scores(
                [
                    {"claim_recall": recall}
                    for recall in claim_recall(outputs, [x["claims"] or [] for _, x in pairs], entail)
                ]
            )
        cited_by_output = [cited_passages(prediction) for prediction, _ in pairs]
        cited = [output_scores for output_scores in citation_scores(outputs, cited_by_output, entail) if output_scores]
        return (
            scores | mean_scores(cited, ("citation_recall", "citation_precision")) | {"num_cited_outputs": len(cited)}
        )
