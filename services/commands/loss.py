"""`heterorl loss`: evaluates losses on cases from a file. docs/gepo.md has the format."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=Path, required=True, metavar="FILE", help="JSON: one case or a list of cases")
    parser.add_argument("--json", action="store_true", help="print one JSON list, an object per case, instead of text")


def run(arguments: argparse.Namespace) -> int:
    """Prints nothing unless every case is sound."""
    from services.learner.loss_cases import read_cases

    cases = read_cases(arguments.cases)

    from services.learner.loss_report import as_text, evaluate_case

    results = [evaluate_case(case) for case in cases]
    if arguments.json:
        lines = [json.dumps(result.as_json(), allow_nan=False) for result in results]
        print("[\n" + ",\n".join(lines) + "\n]")
    else:
        print("\n\n".join(as_text(result) for result in results))
    return 0
