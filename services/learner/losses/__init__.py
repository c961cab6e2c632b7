"""Losses: pure torch functions over log-probabilities.

    Batch ─prepare─► Prepared ─rows─► loss_of(slice, learner's log-probs) ─► loss, PartialMetrics ─► finish_metrics
         once per batch              once per micro-batch                                          once per step

Everything that needs more than one row (baselines, GEPO's expectation, normalisers) is settled by `prepare`, so that
loss and gradient cannot depend on how the batch is cut, ordered, padded or spread over ranks. This package imports
torch, and of ours only the configuration's base class. docs/gepo.md has the formulas and how to add a loss.
"""
