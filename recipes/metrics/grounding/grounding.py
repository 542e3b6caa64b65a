"""Whether grounded text follows from the passage it was written on: Gr by an NLI model, K-precision by words."""

import importlib

import datasets
import evaluate

DESCRIPTION = """
Gr: share of the sentences between [Cs] and [CE] that an NLI model finds entailed by the passages retrieved for that very span. K-precision: share of the
words between [Cs] and [CE] that are in those passages; lexical, needs no model, and is no stand-in for Gr.
"""
INPUTS = """
Args:
    predictions (list of dict): {"id", "retrievals": [{"passages": [{"id", "title", "text"}, ...], "grounded_text"}, ...]}: lines of predictions.jsonl.
    references (list of dict): {"id", "provenance": [[ids of one evidence set], ...]}: lines of an evaluation set, matched by id; for the split by retrieval.
    nli (callable or str, optional): a judge, `list[(premise, hypothesis)]` -> `list[bool]`, or the name of an NLI model. Without it there is no Gr.
    hypothesis (str): how the NLI model reads a sentence, "{sentence}" by default. "{question} {sentence}", for answers of a few words, needs the field
        "input" of the predictions.

Returns:
    dict: k_precision and, with nli, gr, gr_success and gr_failure (where a gold passage was retrieved, and where not), between 0 and 1, NaN where there is
    no such answer; num_grounded: answers that hold grounded text. Others do not count.
"""
CITATION = """
@inproceedings{lee2024semiparametric,
  title={Semiparametric Token-Sequence Co-Supervision},
  author={Lee, Hyunji and Kim, Doyoung and Jun, Jihoon and Joo, Sejune and Jang, Joel and On, Kyoung-Woon and Seo, Minjoon},
  booktitle={Proceedings of ACL},
  year={2024}
}
"""
STRING = datasets.Value("string")
RETRIEVAL = {"passages": [{"id": STRING, "title": STRING, "text": STRING}], "grounded_text": STRING}
PREDICTION = {"id": STRING, "input": STRING, "retrievals": [RETRIEVAL]}
REFERENCE = {"id": STRING, "provenance": [[STRING]]}


class Grounding(evaluate.Metric):
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

        if "{question" not in options.get("hypothesis", ""):
            predictions = [{"input": "", **prediction} for prediction in predictions]
        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(self, predictions, references, nli=None, hypothesis="{sentence}"):
        from trainer.judging.grounding import grounding, k_precision
        from trainer.judging.intervals import Mean
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.nli import as_judge
        from trainer.judging.retrieval import by_retrieval, ret

        pairs, needing = match_by_id(predictions, references), {x["id"] for x in with_provenance(references)}
        words = Mean.of(k_precision(prediction) for prediction, _ in pairs)
        scores = {"k_precision": words.value, "num_grounded": words.n}
        if nli is None:
            return scores
        values = grounding([prediction for prediction, _ in pairs], as_judge(nli), hypothesis=hypothesis)
        hits = [
            ret(retrieved_ids(prediction), x["provenance"]) if x["id"] in needing else None for prediction, x in pairs
        ]
        figures = {"gr": values, **by_retrieval("gr", values, hits)}
        return scores | {name: Mean.of(own).value for name, own in figures.items()}
