"""Prometheus metrics of the learner, made from the same RunStatus that `heterorl status` shows."""

import re
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from heterorl.v1 import monitor_pb2, types_pb2

_PREFIX = "heterorl_learner"
_BIN = re.compile(r"staleness_\d+")

_GAUGES: dict[str, tuple[str, Callable[[monitor_pb2.RunStatus], float]]] = {
    "run_steps": ("Optimizer steps taken", lambda s: s.step),
    "policy_version_versions": ("Newest published version", lambda s: s.policy_version),
    "uptime_seconds": ("Since the process started", lambda s: s.uptime_s),
    "idle_ratio": ("Share of training time spent waiting for groups", lambda s: s.idle_share),
    "groups_buffered_groups": ("Groups waiting for a step", lambda s: s.groups_buffered),
    "leases_active_leases": ("Leases out", lambda s: s.leases_active),
    "delta_ratio": ("Median of full size / update size", lambda s: s.delta_ratio_median),
}
_COUNTERS: dict[str, tuple[str, Callable[[monitor_pb2.RunStatus], float]]] = {
    "groups_acknowledged": ("Groups in the journal", lambda s: s.groups_acknowledged),
    "groups_trained": ("Groups trained", lambda s: s.groups_trained),
    "groups_duplicate": ("Groups that came again", lambda s: s.groups_duplicate),
    "groups_eval": ("Evaluation groups", lambda s: s.groups_eval),
    "weights_full_bytes": ("Bytes that full weights would have cost", lambda s: s.weights_bytes_full),
    "weights_sent_bytes": ("Bytes of weight objects sent", lambda s: s.weights_bytes_sent),
}
_SAMPLER: dict[str, tuple[str, Callable[[monitor_pb2.SamplerStatus], float]]] = {
    "sampler_last_seen_seconds": ("Since its last call", lambda s: s.last_seen_s),
    "sampler_version_versions": ("Version that it generates with", lambda s: s.report.policy_version),
    "sampler_tokens_per_second": ("Its generation speed", lambda s: s.report.tokens_per_s),
    "sampler_spool_groups": ("Groups in its spool", lambda s: s.report.spool_groups),
    "sampler_process_restarts": ("Times that it came back", lambda s: s.restarts),
    "sampler_logprob_mismatch_nats": ("Mean |log p - log q| at staleness 0", lambda s: s.logprob_mismatch),
    "sampler_logprob_mismatch_max_nats": ("Largest |log p - log q| at staleness 0", lambda s: s.logprob_mismatch_max),
    "sampler_logprob_mismatch_kl_nats": ("KL(q|p) per token at staleness 0", lambda s: s.logprob_mismatch_kl),
    "sampler_lost_ratio": ("1 where it is lost", lambda s: float(s.state == types_pb2.SAMPLER_STATE_LOST)),
}


def metrics_of(status: monitor_pb2.RunStatus) -> Iterator[Metric]:
    """Everything that the status says in numbers; the last step's metrics under one name each."""
    for name, (text, read) in _GAUGES.items():
        yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=read(status))
    for name, (text, count) in _COUNTERS.items():
        yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=count(status))
    yield _labelled_counter("groups_dropped", "Groups dropped", "reason", status.groups_dropped)
    histogram = {str(versions): count for versions, count in status.staleness_histogram.items()}
    yield _labelled_counter("staleness_groups", "Groups trained, by staleness", "versions", histogram)
    yield _labelled_counter("activity_seconds", "Where time went", "activity", status.seconds_by_activity)
    for name, value in sorted(status.metrics.items()):
        if not _BIN.fullmatch(name):  # the histogram above has it, over all steps
            yield GaugeMetricFamily(f"{_PREFIX}_step_{name}", "Of the last step: docs/summary.md", value=value)
    if status.evals:
        accuracy = status.evals[-1].accuracy
        yield GaugeMetricFamily(f"{_PREFIX}_eval_accuracy_ratio", "Of the last evaluation", value=accuracy)
    for name, (text, read_one) in _SAMPLER.items():
        family = GaugeMetricFamily(f"{_PREFIX}_{name}", text, labels=("sampler",))
        for sampler in status.samplers:
            family.add_metric((sampler.sampler_id,), read_one(sampler))
        yield family


def _labelled_counter(name: str, text: str, label: str, values: Mapping[str, float]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=(label,))
    for key, value in sorted(values.items()):
        family.add_metric((key,), value)
    return family
