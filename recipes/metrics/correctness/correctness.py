"""Cor and Cor⁻: is the answer right, by the metric of its dataset, and right with right retrieval."""

import importlib

import datasets
import evaluate

DESCRIPTION = """
Cor: correctness by the metric of the dataset: the short answer is contained (NQ, TriviaQA, HotpotQA, zsRE, T-REx), F1 (WoW), ROUGE-L (ELI5), NLI (FEVER; by
its label without an NLI model). Cor⁻ counts an answer as wrong where no gold passage was retrieved.
"""
INPUTS = """
Args:
    predictions (list of dict): {"id", "output": text, "retrievals": [{"passages": [{"id"}, best first]}, ...]}: lines of predictions.jsonl.
    references (list of dict): {"id", "dataset", "input", "answers": [...], "provenance": [[ids of one evidence set], ...]}: lines of one evaluation set,
        matched by id. ASQA and ALCE's ELI5 are for the metric `alce`.
    metric (str, optional): accuracy, em, f1, rouge_l, short_answer, fever_label or fever_nli; that of the dataset by default.
    nli (callable or str, optional): a judge, `list[(premise, hypothesis)]` -> `list[bool]`, or the name of an NLI model.

Returns:
    dict: cor, over all questions; cor_minus and, where retrieval succeeded and where it failed, cor_success and cor_failure, over those with provenance, NaN
    where there is none; metric, the name of what was counted. Between 0 and 1.
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
PREDICTION = {"id": STRING, "output": STRING, "retrievals": [{"passages": [{"id": STRING}]}]}
REFERENCE = {"id": STRING, "dataset": STRING, "input": STRING, "answers": [STRING], "provenance": [[STRING]]}


class Correctness(evaluate.Metric):
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

        return super().compute(
            predictions=select_fields(predictions, PREDICTION),
            references=select_fields(references, REFERENCE),
            **options,
        )

    def _compute(self, predictions, references, metric=None, nli=None):
        from trainer.judging.correctness import cor_metric, correctness
        from trainer.judging.grounding import fever_nli
        from trainer.judging.intervals import Mean
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.nli import as_judge
        from trainer.judging.retrieval import by_retrieval, cor_minus, ret

        metrics = {metric or cor_metric(x["dataset"], nli is not None) for x in references}
        if len(metrics) > 1:
            raise ValueError(
                f"The questions are of datasets with different metrics, {sorted(metrics)}: compute one dataset at a time, or give one metric."
            )
        pairs, needing, metric = (
            match_by_id(predictions, references),
            {x["id"] for x in with_provenance(references)},
            metrics.pop(),
        )
        outputs = [prediction["output"] for prediction, _ in pairs]
        if metric == "fever_nli":
            if nli is None:
                raise ValueError("metric is 'fever_nli', which needs an NLI model: give nli.")
            correct = fever_nli(
                outputs, [x["input"] for _, x in pairs], [x["answers"] for _, x in pairs], as_judge(nli)
            )
        else:
            correct = [
                correctness(output, x["answers"], metric) for output, (_, x) in zip(outputs, pairs, strict=True)
            ]
        hits = [
            ret(retrieved_ids(prediction), x["provenance"]) if x["id"] in needing else None for prediction, x in pairs
        ]
        scores = {"cor": correct, "cor_minus": cor_minus(correct, hits), **by_retrieval("cor", correct, hits)}
        return {**{name: Mean.of(values).value for name, values in scores.items()}, "metric": metric}
