"""Metric names, and registries that do not touch each other."""

import pytest
from prometheus_client import generate_latest

from services.runtime.metrics import Metrics


def test_names_carry_role_what_and_unit():
    metrics = Metrics("sampler")
    metrics.counter("groups_dropped", "Groups dropped.", labels=("reason",)).labels(reason="grader").inc(2)
    metrics.counter("weights_received", "Bytes of weights.", unit="bytes").inc(10)
    metrics.gauge("spool_depth", "bytes", "Bytes in the spool.").set(5)
    metrics.histogram("swap", "seconds", "Time of a swap.", buckets=(1.0, 2.0)).observe(1.5)
    text = generate_latest(metrics.registry).decode()
    for line in (
        'heterorl_sampler_groups_dropped_total{reason="grader"} 2.0',
        "heterorl_sampler_weights_received_bytes_total 10.0",
        "heterorl_sampler_spool_depth_bytes 5.0",
        'heterorl_sampler_swap_seconds_bucket{le="2.0"} 1.0',
    ):
        assert line in text.splitlines()


def test_two_processes_of_one_interpreter_keep_their_metrics_apart():
    Metrics("learner").gauge("version", "versions", "Newest version.")
    Metrics("learner").gauge("version", "versions", "Newest version.")


def test_a_name_of_another_form_is_a_fault_of_ours():
    with pytest.raises(ValueError, match="is not a metric name"):
        Metrics("learner").gauge("Step-Time", "seconds", "x")
