"""Cor and Cor⁻: whether an answer is right by the metric of its dataset, and whether its retrieval is right too."""

import importlib
from collections.abc import Callable

import datasets
import evaluate

DESCRIPTION = """
Cor is correctness by the metric of the dataset: containment of the short answer (NQ, TriviaQA, HotpotQA, zsRE, T-REx),
F1 (WoW), ROUGE-L (ELI5), or NLI (FEVER; without an NLI model, its label). Cor⁻ counts an answer as wrong if no gold
passage was retrieved.
"""
INPUTS = """
Args:
    predictions (list of dict): lines of predictions.jsonl: {"id", "output": text, "retrievals": [{"passages": [{"id"},
        best first]}, ...]}.
    references (list of dict): lines of one evaluation set, matched by id: {"id", "dataset", "input", "answers": [...],
        "provenance": [[ids of one evidence set], ...]}. For ASQA and ALCE's ELI5 use the metric `alce`.
    metric (str, optional): accuracy, em, f1, rouge_l, short_answer, fever_label or fever_nli; defaults to the metric
        of the dataset.
    nli (callable or str, optional): a judge, `list[(premise, hypothesis)]` -> `list[bool]`, or the name of an NLI
        model.

Returns:
    dict: cor, over all questions; cor_minus, over the questions with provenance; cor_success, over the questions with
    provenance for which a gold passage was retrieved; cor_failure, over the other questions with provenance; metric,
    the name of the metric; num_empty_answers, the number of questions with an answer that normalises to nothing, such
    as "The", which every output contains. Figures are between 0 and 1, or NaN if there is no such question.
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
PREDICTION = {"id": STRING, "output": STRING, "retrievals": [{"passages": [{"id": STRING}]}]}
REFERENCE = {"id": STRING, "dataset": STRING, "input": STRING, "answers": [STRING], "provenance": [[STRING]]}


class Correctness(evaluate.Metric):
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
        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(
        self,
        predictions: list[dict],
        references: list[dict],
        metric: str | None = None,
        nli: Callable | str | None = None,
    ) -> dict:
        from trainer.judging.correctness import check_answers, cor_metric, correctness, num_with_empty_answers
        from trainer.judging.grounding import fever_nli
        from trainer.judging.intervals import Mean
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.nli import as_judge
        from trainer.judging.retrieval import by_retrieval, cor_minus, ret

        pairs = match_by_id(predictions, references)
        answers = [reference["answers"] or [] for _, reference in pairs]
        check_answers(answers)
        metrics = {metric or cor_metric(reference["dataset"], nli is not None) for reference in references}
        if len(metrics) > 1:
            raise ValueError(
                f"The questions are of datasets with different metrics, {sorted(metrics)}: compute one dataset at a "
                "time, or give one metric."
            )
        needing = {reference["id"] for reference in with_provenance(references)}
        metric = metrics.pop()
        if metric == "fever_nli":
            if nli is None:
                raise ValueError("metric is 'fever_nli', which needs an NLI model: give nli.")
            outputs = [prediction["output"] for prediction, _ in pairs]
            claims = [reference["input"] for _, reference in pairs]
            cor = fever_nli(outputs, claims, answers, as_judge(nli))
        else:
            cor = [correctness(prediction["output"], reference["answers"], metric) for prediction, reference in pairs]
        hits = []
        for prediction, reference in pairs:
            if reference["id"] in needing:
                hits.append(ret(retrieved_ids(prediction), reference["provenance"]))
            else:
                hits.append(None)
        scores = {"cor": cor, "cor_minus": cor_minus(cor, hits), **by_retrieval("cor", cor, hits)}
        figures = {name: Mean.of(values).value for name, values in scores.items()}
        return {**figures, "metric": metric, "num_empty_answers": num_with_empty_answers(answers)}
