"""Causes in words: what keeps a run slow or stuck, from one status message. Each sentence cites its numbers."""

from heterorl.v1 import monitor_pb2, types_pb2
from services.monitor.views import human_bytes, phase_name

_IDLE_WORTH_SAYING = 0.10
_DROPPED_WORTH_SAYING = 0.01
_NOTHING = "nothing stands in the way"
_NO_ROOM = (
    "the learner is not serving: its disk is full, and groups stay in their spools until there is room (`disk_full` in "
    "its log says what waits), or it is about to end"
)


def findings(status: monitor_pb2.RunStatus, *, serving: bool = True) -> list[str]:
    """Sentences, most important first; a healthy run yields the one that says so. `serving`: the learner's health."""
    if not serving:
        return [_NO_ROOM, *(found for found in findings(status) if not found.startswith(_NOTHING))]
    standstill, causes = _standstill(status), [*_samplers(status), *_losses(status), *_lessons(status)]
    found = [*standstill, *_idle(status, explained=bool(standstill or causes)), *causes]
    return found or [f"{_NOTHING}: the learner is {phase_name(status)}, idle {status.idle_share:.0%}"]


def _standstill(status: monitor_pb2.RunStatus) -> list[str]:
    live = [sampler for sampler in status.samplers if sampler.state != types_pb2.SAMPLER_STATE_LOST]
    if status.phase == monitor_pb2.LEARNER_PHASE_PAUSED:
        return ["the run is paused by an operator: `heterorl admin resume` goes on"]
    if not status.samplers:
        return [
            f"no sampler has registered since the learner started {status.uptime_s:.0f} s ago: those that it had come "
            "back by themselves, a new one starts with `heterorl sampler --learner HOST:PORT`"
        ]
    if not live:
        return [f"all {len(status.samplers)} samplers are lost: the learner waits for one to come back"]
    if status.phase == monitor_pb2.LEARNER_PHASE_EVALUATING:
        return ["the learner waits for an evaluation round that the samplers work on"]
    return []


def _idle(status: monitor_pb2.RunStatus, *, explained: bool) -> list[str]:
    if status.idle_share < _IDLE_WORTH_SAYING:
        return []
    waiting = f"{status.groups_buffered} of {status.groups_per_step} groups wait, {status.leases_active} are leased"
    advice = "" if explained else "; more or faster samplers help"
    return [f"learner idle {status.idle_share:.0%} of the run so far: it waits for groups ({waiting}){advice}"]


def _samplers(status: monitor_pb2.RunStatus) -> list[str]:
    sentences: list[str] = []
    for sampler in status.samplers:
        report, name = sampler.report, sampler.sampler_id
        if sampler.evicted:
            sentences.append(f"{name} is evicted: `heterorl admin evict --allow {name}` lets it back")
        elif sampler.quarantined_for:
            sentences.append(
                f"{name} is in quarantine, the groups that it sent were invalid ({sampler.quarantined_for}): the "
                "learner's log has more; when that is mended, restart the sampler"
            )
        elif sampler.state == types_pb2.SAMPLER_STATE_LOST:
            sentences.append(f"{name} is lost: no heartbeat for {sampler.last_seen_s:.0f} s")
        elif report.HasField("fetch") and report.fetch.bytes_total:
            fetch = report.fetch
            left = fetch.bytes_total - fetch.bytes_done
            speed = f" at {fetch.bytes_per_s * 8 / 1e6:.1f} Mbit/s" if fetch.bytes_per_s else ""
            eta = f", {left / fetch.bytes_per_s:.0f} s left" if fetch.bytes_per_s else ""
            sentences.append(f"{name} is fetching v{fetch.target_version}: {human_bytes(left)} to go{speed}{eta}")
        elif sampler.state == types_pb2.SAMPLER_STATE_SPOOL_FULL:
            sentences.append(
                f"{name} stands still: its spool is at its limit or its disk is full, and {report.spool_groups} groups "
                "are not acknowledged"
            )
        made = report.groups_total + sum(report.groups_dropped.values())
        sentences += [
            f"{name} gave up {count} of {made} groups: {reason}; its log says why"
            for reason, count in sorted(report.groups_dropped.items())
            if count and count / made >= _DROPPED_WORTH_SAYING
        ]
        if report.grader_restarts:
            sentences.append(f"{name}'s grader workers restarted {report.grader_restarts} times")
        if report.engine_restarts:
            sentences.append(f"{name}'s engine restarted {report.engine_restarts} times")
        if sampler.restarts:
            sentences.append(f"{name} came back with a new process {sampler.restarts} times")
    return sentences


def _losses(status: monitor_pb2.RunStatus) -> list[str]:
    total = status.groups_acknowledged
    return [
        f"{count} groups ({count / total:.1%}) were dropped: {reason}"
        for reason, count in sorted(status.groups_dropped.items(), key=lambda item: -item[1])
        if total and count / total >= _DROPPED_WORTH_SAYING
    ]


def _lessons(status: monitor_pb2.RunStatus) -> list[str]:
    metrics = status.metrics
    groups, rows, cut = (metrics.get(name, 0.0) for name in ("groups", "rows", "excluded_overlong"))
    sentences: list[str] = []
    if groups and round(metrics.get("groups_zero_variance", 0.0)) >= groups:  # a sum of rows' shares
        sentences.append(
            f"each of the last step's {groups:.0f} groups had one reward for all its completions (mean "
            f"{metrics.get('reward_mean', 0.0):.3f}): there was nothing to learn from"
        )
    if cut > rows:
        made = rows + sum(count for name, count in metrics.items() if name.startswith("excluded_"))
        sentences.append(
            f"{cut:.0f} of the last step's {made:.0f} completions were cut at the token limit and left out of the "
            "loss: see sampling.max_completion_tokens, and loss.mask_overlong"
        )
    return sentences
