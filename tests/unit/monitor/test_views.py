import io
import json

from rich.console import Console

from heterorl.v1 import control_pb2, monitor_pb2, types_pb2
from services.monitor.views import as_json, human_bytes, render, sparkline
from services.monitor.why import findings


def text_of(status: monitor_pb2.RunStatus, **extra: object) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    console.print(render(status, **extra))
    return console.file.getvalue()


def test_bytes_are_written_in_the_nearest_unit():
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 << 20, 5 << 30, 7 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "7.0 TiB",
    ]


def test_a_sparkline_spans_from_the_smallest_to_the_largest_value():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(100)], width=10)) == 10


def test_the_view_shows_step_accuracy_staleness_bytes_idle_share_and_each_samplers_state():
    status = monitor_pb2.RunStatus(
        run_id="demo",
        phase=monitor_pb2.LEARNER_PHASE_WAITING_FOR_GROUPS,
        step=12,
        steps_total=100,
        policy_version=12,
        max_staleness=8,
        staleness_histogram={0: 5, 2: 10},
        idle_share=0.25,
        weights_bytes_full=4 << 20,
        weights_bytes_sent=1 << 20,
        evals=[monitor_pb2.EvalPoint(accuracy=0.3), monitor_pb2.EvalPoint(accuracy=0.6)],
        samplers=[
            monitor_pb2.SamplerStatus(
                sampler_id="eu-1",
                state=types_pb2.SAMPLER_STATE_SWAPPING,
                report=control_pb2.HeartbeatRequest(policy_version=9),
            )
        ],
    )
    text = text_of(status, rewards=[0.1, 0.2], events=["something happened"])
    for expected in (
        "12 of 100",
        "waiting for groups",
        "30.0% → 60.0%",
        "1.0 MiB sent of 4.0 MiB full  (4.0 × smaller)",
        "25%",
        "bound 8",
        "eu-1",
        "SWAPPING",
        "something happened",
    ):
        assert expected in text
    row = next(line for line in text.splitlines() if "eu-1" in line)
    assert row.split()[2:4] == ["9", "3"], "version and lag"


def test_an_empty_status_is_drawn_too():
    assert "0 trained" in text_of(monitor_pb2.RunStatus())


def test_what_a_sampler_reports_is_text_and_no_markup():
    report = control_pb2.HeartbeatRequest(groups_total=1, groups_dropped={"[/bold][link=x]": 5})
    status = monitor_pb2.RunStatus(
        run_id="r[/]", samplers=[monitor_pb2.SamplerStatus(sampler_id="eu[1]", report=report)]
    )
    text = text_of(status, events=findings(status))
    assert "r[/] · " in text
    assert "eu[1] gave up 5 of 6 groups: [/bold][link=x]; its log says why" in text


def test_the_json_of_a_status_is_one_line_with_every_field():
    (line,) = as_json(monitor_pb2.RunStatus(run_id="demo"), indent=None).splitlines()
    assert json.loads(line)["policy_version"] == "0"
