"""A grader whose module takes longer to import than a completion may take to be graded, as one with a model does."""

import time

IMPORT_CPU_S = 0.8

while time.process_time() < IMPORT_CPU_S:
    pass


def score(prompt: str, completion: str, answer: str, metadata: dict[str, object]) -> float:
    return 1.0
