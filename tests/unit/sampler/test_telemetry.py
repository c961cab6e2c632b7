import re

from services.sampler.tally import Tally
from services.sampler.telemetry import Observed, metrics_of


def test_every_metric_has_the_projects_form_of_name_and_what_was_tallied() -> None:
    tally = Tally()
    tally.generated(tokens=12, seconds=1.5)
    tally.scored(seconds=0.5)
    tally.swapped(0.25)
    tally.dropped["lease_lost"] += 2
    tally.verdicts["accepted"] += 3
    observed = Observed(
        tally=tally,
        spool_groups=4,
        spool_bytes=5,
        spool_limit_bytes=6,
        leases=7,
        policy_version=8,
        learner_version=9,
        engine_restarts=10,
        relay_fallbacks=11,
        received_bytes={"relay": 12, "learner": 13},
    )
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for metric in metrics_of(observed)
        for sample in metric.samples
    }
    assert all(re.fullmatch(r"heterorl_sampler(_[a-z]+)+", name) for name, *_ in samples)
    expected = {
        ("generated_tokens_total",): 12,
        ("groups_generated_total",): 1,
        ("generation_seconds_total",): 1.5,
        ("scoring_seconds_total",): 0.5,
        ("swap_seconds_total",): 0.25,
        ("groups_dropped_total", "lease_lost"): 2,
        ("verdicts_total", "accepted"): 3,
        ("spool_groups",): 4,
        ("spool_bytes",): 5,
        ("policy_version_versions",): 8,
        ("engine_restarts_total",): 10,
        ("relay_fallbacks_total",): 11,
        ("weights_source_bytes_total", "relay"): 12,
        ("weights_source_bytes_total", "learner"): 13,
    }
    assert {key: samples[f"heterorl_sampler_{key[0]}", *key[1:]] for key in expected} == expected
