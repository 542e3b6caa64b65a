"""KILT's scores of answers, plain and gated by retrieval."""

import importlib

import datasets
import evaluate

DESCRIPTION = """
KILT's figures: accuracy, exact match, F1 and ROUGE-L of the answers; R-precision and KILT's recall@5 of the retrieved
passages; and KILT-accuracy, -EM, -F1 and -ROUGE-L, which count an answer only if R-precision is 1. On the same
predictions they equal the figures of KILT's own code.
"""
INPUTS = """
Args:
    predictions (list of dict): lines of predictions.jsonl: {"id", "output": text, "retrievals": [{"passages": [{"id"},
        best first]}, ...]}.
    references (list of dict): lines of an evaluation set, matched by id: {"id", "answers": [...], "provenance": [[ids
        of one evidence set], ...]}.
    rouge (bool): whether to compute ROUGE-L, which needs `pip install rouge`; True by default.

Returns:
    dict: accuracy, em, f1, rouge_l, kilt_accuracy, kilt_em, kilt_f1, kilt_rouge_l, r_precision and kilt_recall@5,
    between 0 and 1; num_without_provenance, the number of questions without provenance, whose retrieval counts as
    wrong, as in KILT; num_empty_answers, the number of questions with an answer that normalises to nothing, such as
    "The", which count as in KILT.
"""
CITATION = """
@inproceedings{petroni2021kilt,
  title={{KILT}: a Benchmark for Knowledge Intensive Language Tasks},
  author={Petroni, Fabio and Piktus, Aleksandra and Fan, Angela and Lewis, Patrick and Yazdani, Majid and
          De Cao, Nicola and Thorne, James and Jernite, Yacine and Karpukhin, Vladimir and Maillard, Jean and
          Plachouras, Vassilis and Rocktäschel, Tim and Riedel, Sebastian},
  booktitle={Proceedings of NAACL},
  year={2021}
}
"""
STRING = datasets.Value("string")
PREDICTION = {"id": STRING, "output": STRING, "retrievals": [{"passages": [{"id": STRING}]}]}
REFERENCE = {"id": STRING, "answers": [STRING], "provenance": [[STRING]]}


class KILT(evaluate.Metric):
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

    def _compute(self, predictions: list[dict], references: list[dict], rouge: bool = True) -> dict:
        from trainer.judging.correctness import check_answers, kilt_scores, num_with_empty_answers
        from trainer.judging.matching import match_by_id, retrieved_ids, with_provenance
        from trainer.judging.retrieval import kilt_recall_at_k, mean_scores, r_precision

        answers = [reference["answers"] or [] for reference in references]
        check_answers(answers)
        needing = {reference["id"] for reference in with_provenance(references)}
        rows = []
        for prediction, reference in match_by_id(predictions, references):
            retrieval = {"r_precision": 0.0, "kilt_recall@5": 0.0}
            if reference["id"] in needing:
                retrieved = retrieved_ids(prediction)
                retrieval["r_precision"] = r_precision(retrieved, reference["provenance"])
                retrieval["kilt_recall@5"] = kilt_recall_at_k(retrieved, reference["provenance"], 5)
            answer = kilt_scores(prediction["output"], reference["answers"], retrieval["r_precision"], rouge)
            rows.append(answer | retrieval)
        return mean_scores(rows) | {
            "num_without_provenance": len(rows) - len(needing),
            "num_empty_answers": num_with_empty_answers(answers),
        }
