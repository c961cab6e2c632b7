from heterorl.v1 import control_pb2, monitor_pb2, types_pb2
from services.monitor.why import findings


def sampler(name: str = "eu-1", **fields: object) -> monitor_pb2.SamplerStatus:
    return monitor_pb2.SamplerStatus(sampler_id=name, **{"state": types_pb2.SAMPLER_STATE_GENERATING, **fields})


def test_a_healthy_run_says_that_nothing_stands_in_the_way():
    status = monitor_pb2.RunStatus(phase=monitor_pb2.LEARNER_PHASE_TRAINING, samplers=[sampler()])
    assert findings(status) == ["nothing stands in the way: the learner is training, idle 0%"]


def test_a_learner_that_is_not_serving_is_told_first_and_never_called_healthy():
    status = monitor_pb2.RunStatus(phase=monitor_pb2.LEARNER_PHASE_TRAINING, samplers=[sampler()])
    (sentence,) = findings(status, serving=False)
    assert sentence.startswith("the learner is not serving: its disk is full")
    status.groups_acknowledged, status.groups_dropped["STALE"] = 4, 1
    assert findings(status, serving=False) == [sentence, *findings(status)]


def test_a_run_without_samplers_says_how_to_start_one():
    (sentence,) = findings(monitor_pb2.RunStatus())
    assert "no sampler has registered" in sentence
    assert "heterorl sampler" in sentence


def test_an_idle_learner_cites_what_it_waits_for_first():
    status = monitor_pb2.RunStatus(
        idle_share=0.41, groups_buffered=3, groups_per_step=32, leases_active=9, samplers=[sampler()]
    )
    assert findings(status)[0].startswith(
        "learner idle 41% of the run so far: it waits for groups (3 of 32 groups wait, 9 are leased)"
    )


def test_what_stands_in_the_way_comes_before_how_idle_the_learner_was_and_no_more_samplers_are_asked_for():
    found = findings(monitor_pb2.RunStatus(phase=monitor_pb2.LEARNER_PHASE_PAUSED, idle_share=0.41))
    assert "paused" in found[0]
    assert "learner idle 41%" in found[1]
    assert not any("more or faster samplers" in sentence for sentence in found)


def test_a_sampler_that_cannot_write_is_not_said_to_have_a_full_spool_without_groups():
    full = sampler(state=types_pb2.SAMPLER_STATE_SPOOL_FULL, report=control_pb2.HeartbeatRequest(spool_groups=0))
    (sentence,) = findings(monitor_pb2.RunStatus(samplers=[full]))
    assert sentence == (
        "eu-1 stands still: its spool is at its limit or its disk is full, and 0 groups are not acknowledged"
    )


def test_a_sampler_in_quarantine_is_named_with_the_reason():
    (sentence,) = findings(monitor_pb2.RunStatus(samplers=[sampler(quarantined_for="UNKNOWN_ROOT")]))
    assert sentence.startswith("eu-1 is in quarantine, the groups that it sent were invalid (UNKNOWN_ROOT)")


def test_a_report_of_no_groups_at_all_breaks_nothing():
    report = control_pb2.HeartbeatRequest(groups_dropped={"scoring_failed": 0})
    assert not any(
        "gave up" in sentence for sentence in findings(monitor_pb2.RunStatus(samplers=[sampler(report=report)]))
    )


def test_groups_that_a_sampler_gave_up_are_told_with_the_reason():
    report = control_pb2.HeartbeatRequest(groups_total=51, groups_dropped={"scoring_failed": 149, "bad_gold": 1})
    (sentence,) = findings(monitor_pb2.RunStatus(samplers=[sampler(report=report)]))
    assert sentence == "eu-1 gave up 149 of 201 groups: scoring_failed; its log says why"


def test_a_step_whose_rewards_were_all_equal_is_told():
    status = monitor_pb2.RunStatus(
        samplers=[sampler()], metrics={"groups": 32, "groups_zero_variance": 32 - 4e-15, "reward_mean": 1.0}
    )
    (sentence,) = findings(status)
    assert "32 groups" in sentence
    assert "nothing to learn" in sentence
    status.metrics["groups_zero_variance"] = 31
    assert "nothing stands in the way" in findings(status)[0]


def test_a_step_that_was_mostly_cut_at_the_token_limit_is_told():
    """Such a run ends well, with hardly a gradient in it."""
    status = monitor_pb2.RunStatus(
        samplers=[sampler()], metrics={"groups": 4, "rows": 1, "excluded_overlong": 14, "excluded_empty": 1}
    )
    (sentence,) = findings(status)
    assert "14 of the last step's 16 completions were cut" in sentence
    assert "sampling.max_completion_tokens" in sentence
    status.metrics["rows"] = 14
    assert "nothing stands in the way" in findings(status)[0]


def test_a_fetch_in_progress_is_told_with_speed_and_time_left():
    report = control_pb2.HeartbeatRequest(
        fetch=control_pb2.FetchProgress(
            target_version=118, bytes_done=1_000_000, bytes_total=2_000_000, bytes_per_s=1_250_000
        )
    )
    (sentence,) = findings(monitor_pb2.RunStatus(samplers=[sampler(report=report)]))
    assert sentence == "eu-1 is fetching v118: 976.6 KiB to go at 10.0 Mbit/s, 1 s left"


def test_lost_samplers_and_their_silence_are_named():
    status = monitor_pb2.RunStatus(samplers=[sampler(state=types_pb2.SAMPLER_STATE_LOST, last_seen_s=63.0, restarts=2)])
    assert findings(status) == [
        "all 1 samplers are lost: the learner waits for one to come back",
        "eu-1 is lost: no heartbeat for 63 s",
        "eu-1 came back with a new process 2 times",
    ]


def test_drops_of_one_percent_and_more_are_told_largest_first():
    status = monitor_pb2.RunStatus(
        groups_acknowledged=1000, groups_dropped={"stale": 50, "invalid": 9, "nonfinite": 100}, samplers=[sampler()]
    )
    assert findings(status) == [
        "100 groups (10.0%) were dropped: nonfinite",
        "50 groups (5.0%) were dropped: stale",
    ]


def test_a_pause_is_told_with_its_end():
    (sentence,) = findings(monitor_pb2.RunStatus(phase=monitor_pb2.LEARNER_PHASE_PAUSED))
    assert "heterorl admin resume" in sentence
