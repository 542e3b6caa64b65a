"""
Compare two results folders of run_evaluation.py, question by question, by the paired bootstrap: differences with 95 %
intervals and p-values.

    python recipes/compare.py results-separate results-co --output_dir comparison
"""

from dataclasses import dataclass, field

from shared.cli import clear_errors, parse

from trainer.judging.figures import MAIN
from trainer.reports.cells import verdict
from trainer.reports.comparison import compare_results, comparison_row, section_label, task_count, write_comparison

PRINTED = (*MAIN, "mrr", "query_recall@1", "hit_rate@5")  # the report shows all figures


@dataclass
class ComparisonArguments:
    """Which results to compare, and how often to resample them."""

    a: str = field(metadata={"help": "results folder of the baseline", "metavar": "A", "positional": True})
    b: str = field(metadata={"help": "results folder to compare with it", "metavar": "B", "positional": True})
    output_dir: str | None = field(
        default=None, metadata={"help": "also write comparison.md, comparison.html and comparison.json there"}
    )
    resamples: int = field(default=10_000, metadata={"help": "number of resamples of the bootstrap"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap"})


def main() -> None:
    """Compare the results, print the main figures, and write the report if `--output_dir` is set."""
    (args,) = parse([ComparisonArguments], __doc__)
    with clear_errors():
        comparison = compare_results(args.a, args.b, args.resamples, args.seed)
        print(f"A = {args.a}, B = {args.b}; B - A in percentage points, 95 % interval, two-sided p")
        for task, sections in comparison["tasks"].items():
            print_sections(task, sections)
        for split, sections in comparison["averages"].items():
            print_sections(f"average, {split}", sections)
        for note in comparison["notes"]:
            print(f"\nnote: {note}")
        if args.output_dir:
            write_comparison(comparison, args.output_dir, (args.a, args.b))
            print(f"\nReport: {args.output_dir}/comparison.html")


def print_sections(title: str, sections: dict) -> None:
    """Print the main figures of a task, or of an average, section by section."""
    for section, comparisons in sections.items():
        names = [name for name in PRINTED if name in comparisons]
        if not names:
            continue
        print(f"\n{title}, {section_label(section)}\n")
        for name in names:
            compared = comparisons[name]
            label, first, second, (difference, interval), p, (n, left_out) = comparison_row(name, compared)
            outcome = verdict(name, compared["interval"])
            if left_out:
                outcome += f" {left_out}"
            if compared.get("tasks") != compared.get("of_tasks"):
                outcome += f", {task_count(compared)} tasks"
            print(f"  {label:14} {first:>6} {second:>6}  {difference:>6} {interval:18} p {p:7}  n = {n:5}  {outcome}")


if __name__ == "__main__":
    main()
