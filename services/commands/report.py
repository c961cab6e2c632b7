"""`heterorl report`: one self-contained HTML page from a run's folder."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder that holds summary.json and metrics.jsonl")
    parser.add_argument("-o", "--out", type=Path, help="file to write (RUN/report.html)")
    parser.add_argument("--json", action="store_true", help='print {"report": PATH}')


def run(arguments: argparse.Namespace) -> int:
    from services.monitor.report import write_report

    path = write_report(arguments.run, arguments.out)
    print(json.dumps({"report": str(path)}) if arguments.json else path)
    return 0
