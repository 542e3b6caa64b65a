"""
Compare two results folders of run_evaluation.py, question by question: differences with 95 % intervals and p-values of the paired bootstrap.

    python recipes/compare.py results-separate results-co --output_dir comparison
"""

import argparse

from shared.cli import clear_errors

from trainer.judging.figures import MAIN
from trainer.reports.comparison import compare_results, show_row, verdict, write_comparison
from trainer.reports.evaluation import MODE_NAMES


def main():
    """Compare, print the main figures, write the rest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", help="results folder that is compared with")
    parser.add_argument("b", metavar="B", help="results folder that may be better")
    parser.add_argument("--output_dir", help="also write comparison.md, comparison.html and comparison.json there")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    args = parser.parse_args()
    with clear_errors():
        comparison = compare_results(args.a, args.b, args.resamples, args.seed)
        print(f"A = {args.a}, B = {args.b}; B - A in percentage points, 95 % interval, two-sided p")
        sections = {**comparison["tasks"], **{f"average, {split}": modes for split, modes in comparison["averages"].items()}}
        for name, modes in sections.items():
            for mode, found in modes.items():
                rows = [(*show_row(metric, own), verdict(metric, own)) for metric, own in found.items() if is_main(metric)]
                print_rows(f"{name}, {MODE_NAMES.get(mode, 'query embedding')}", rows)
        for note in comparison["notes"]:
            print(f"\nnote: {note}")
        if args.output_dir:
            write_comparison(comparison, args.output_dir, (args.a, args.b))
            print(f"\nReport: {args.output_dir}/comparison.html")


def is_main(metric):
    """Whether a metric is printed; the report holds all."""
    return metric in MAIN or metric.endswith((" mrr", " query_recall@1"))


def print_rows(title, rows):
    """One section of the table."""
    if rows:
        print(f"\n{title}\n")
    for name, first, second, (difference, interval), p, n, found in rows:
        print(f"  {name:14} {first:>6} {second:>6}  {difference:>6} {interval:18} p {p:7}  n = {n:5}  {found}")


if __name__ == "__main__":
    main()
