"""Whether grounded text follows from the passage it was written on: Gr by an NLI model, K-precision by words."""

import importlib
from collections.abc import Callable

import datasets
import evaluate

DESCRIPTION = """
Gr: share of the sentences between [Cs] and [CE] that follow from the passages retrieved for that very span, by an NLI
model. K-precision: share of the words between [Cs] and [CE] that are in those passages. It compares words only, needs
no model, and does not replace Gr.
"""
INPUTS = """
Args:
    predictions (list of dict): lines of predictions.jsonl: {"id", "retrievals": [{"passages": [{"id", "title",
        "text"}, ...], "grounded_text"}, ...]}.
    references (list of dict): lines of an evaluation set, matched by id, to split Gr by retrieval: {"id",
        "provenance": [[ids of one evidence set], ...]}.
    nli (callable or str, optional): a judge, `list[(premise, hypothesis)]` -> `list[bool]`, or the name of an NLI
        model. Without it there is no Gr.
    hypothesis (str): template of the text that the NLI model gets for a sentence, "{sentence}" by default. "{question}
        {sentence}" is for answers of a few words, and needs the field "input" of the predictions.

Returns:
    dict: means over the answers with grounded text: k_precision and, with nli, gr; gr_success and gr_failure, Gr over
    those for which a gold passage was retrieved and over the others. They are between 0 and 1, NaN if there is no such
    answer. num_grounded is the number of answers with grounded text.
"""
CITATION = """
@inproceedings{lee2024semiparametric,
  title={Semiparametric Token-Sequence Co-Supervision},
  author={Lee, Hyunji and Kim, Doyoung and Jun, Jihoon and Joo, Sejune and Jang, Joel and On, Kyoung-Woon and
          Seo, Minjoon},
  booktitle={Proceedings of ACL},
  year={2024}
}
"""
STRING = datasets.Value("string")
RETRIEVAL = {"passages": [{"id": STRING, "title": STRING, "text": STRING}], "grounded_text": STRING}
PREDICTION = {"id": STRING, "input": STRING, "retrievals": [RETRIEVAL]}
REFERENCE = {"id": STRING, "provenance": [[STRING]]}


class Grounding(evaluate.Metric):
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
        if "{question" not in options.get("hypothesis", ""):
            predictions = [{"input": "", **prediction} for prediction in predictions]
        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(
        self,
        predictions: list[dict],
        references: list[dict],
        nli: Callable | str | None = None,
        hypothesis: str = "{sentence}",
    ) -> dict:
        from trainer.judging.grounding import grounding, k_precision
        from trainer.judging.intervals import Mean
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.nli import as_judge
        from trainer.judging.retrieval import by_retrieval, ret

        pairs = match_by_id(predictions, references)
        needing = {reference["id"] for reference in with_provenance(references)}
        precision = Mean.of(k_precision(prediction) for prediction, _ in pairs)
        scores = {"k_precision": precision.value, "num_grounded": precision.n}
        if nli is None:
            return scores
        gr = grounding([prediction for prediction, _ in pairs], as_judge(nli), hypothesis=hypothesis)
        hits = []
        for prediction, reference in pairs:
            if reference["id"] in needing:
                hits.append(ret(retrieved_ids(prediction), reference["provenance"]))
            else:
                hits.append(None)
        figures = {"gr": gr, **by_retrieval("gr", gr, hits)}
        return scores | {name: Mean.of(values).value for name, values in figures.items()}
