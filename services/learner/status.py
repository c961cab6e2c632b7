"""The state of the run in words of the contract (RunStatus), and at its end (Summary)."""

from dataclasses import dataclass, replace

from heterorl.v1 import monitor_pb2, types_pb2
from services.learner.config import LearnerConfig
from services.learner.data_plane import DataPlane
from services.learner.publisher import Publisher
from services.learner.records import SamplerSummary, Summary
from services.learner.run_state import Phase, RunState
from services.learner.sessions import Sampler
from services.learner.traffic import Traffic
from services.wire.convert import to_heartbeat
from services.wire.types import SamplerReport, SamplerState, Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that a status is made of; reading it changes nothing."""

    config: LearnerConfig
    state: RunState
    plane: DataPlane
    publisher: Publisher
    traffic: Traffic

    def status(self) -> monitor_pb2.RunStatus:
        """The state now. Field meanings: monitor.proto."""
        state, plane, tally = self.state, self.plane, self.plane.tally
        return monitor_pb2.RunStatus(
            run_id=self.config.run.id,
            learner_epoch=plane.learner_epoch,
            phase=monitor_pb2.LearnerPhase.ValueType(self._phase.value),
            step=state.step,
            steps_total=self.config.run.steps,
            policy_version=max(0, plane.learner_version),
            policy_root=plane.versions.current_root,
            uptime_s=state.uptime_s,
            idle_share=state.idle_share,
            loss_name=self.config.loss.name.value,
            max_staleness=self.config.staleness.max_staleness,
            staleness_histogram=dict(tally.staleness),
            groups_acknowledged=tally.acknowledged,
            groups_trained=tally.trained,
            groups_dropped=dict(tally.dropped),
            groups_duplicate=tally.duplicates,
            groups_buffered=max(0, tally.buffered),
            groups_per_step=self.config.batch.groups_per_step,
            leases_active=plane.leases.active,
            weights_bytes_full=self.traffic.bytes_full,
            weights_bytes_sent=self.traffic.bytes_sent,
            delta_ratio_median=state.delta_ratio_median,
            metrics=state.metrics,
            evals=[
                monitor_pb2.EvalPoint(
                    round=point.round,
                    policy_version=point.policy_version,
                    accuracy=point.accuracy,
                    prompts=point.prompts,
                    wall_s=point.wall_s,
                )
                for point in state.evals
            ],
            samplers=[self._sampler(sampler) for sampler in plane.sessions.all()],
            groups_eval=tally.evaluated,
            seconds_by_activity=state.seconds,
        )

    @property
    def _phase(self) -> Phase:
        """PAUSED from the request on where the learner waits: the loop looks for a pause between two steps only, and
        while no leases are granted no next step may come."""
        phase = self.state.phase
        waits = phase in (Phase.WAITING_FOR_GROUPS, Phase.EVALUATING)
        return Phase.PAUSED if waits and self.plane.sessions.paused else phase

    def _sampler(self, sampler: Sampler) -> monitor_pb2.SamplerStatus:
        sessions = self.plane.sessions
        mismatch = self.state.mismatch.get(sampler.sampler_id)
        return monitor_pb2.SamplerStatus(
            sampler_id=sampler.sampler_id,
            session_epoch=sampler.session_epoch,
            state=types_pb2.SamplerState.ValueType(sessions.state(sampler).value),
            last_seen_s=sessions.last_seen_s(sampler),
            report=to_heartbeat(self._session(sampler), _report(sampler)),
            groups_accepted=sampler.groups_accepted,
            tokens_accepted=sampler.tokens_accepted,
            restarts=sampler.restarts,
            bytes_sent=self.traffic.bytes_sent_to(sampler.sampler_id),
            hostname=sampler.hostname,
            logprob_mismatch=mismatch.mean if mismatch else 0.0,
            logprob_mismatch_max=mismatch.largest if mismatch else 0.0,
            logprob_mismatch_kl=mismatch.kl if mismatch else 0.0,
            evicted=sessions.is_evicted(sampler.sampler_id),
            quarantined_for=sampler.invalid_for if sampler.quarantined else "",
        )

    def _session(self, sampler: Sampler) -> Session:
        return Session(
            run_id=self.config.run.id,
            sampler_id=sampler.sampler_id,
            learner_epoch=self.plane.learner_epoch,
            session_epoch=sampler.session_epoch,
        )

    def summary(self) -> Summary:
        """What summary.json says. Meanings: docs/summary.md."""
        state, plane, tally = self.state, self.plane, self.plane.tally
        manifest = self.publisher.latest.version.manifest.decoded
        return Summary(
            steps=state.step,
            wall_s=round(state.wall_s, 3),
            loss=self.config.loss.name.value,
            accuracy_start=state.evals[0].accuracy if state.evals else None,
            accuracy_end=state.evals[-1].accuracy if state.evals else None,
            max_staleness=self.config.staleness.max_staleness,
            staleness_max=max(tally.staleness, default=0),
            staleness_histogram={str(versions): count for versions, count in sorted(tally.staleness.items())},
            groups_trained=tally.trained,
            groups_acknowledged=tally.acknowledged,
            groups_duplicate=tally.duplicates,
            groups_dropped=dict(sorted(tally.dropped.items())),
            weights_bytes_full=self.traffic.bytes_full,
            weights_bytes_sent=self.traffic.bytes_sent,
            delta_ratio_median=state.delta_ratio_median,
            learner_idle_share=state.idle_share,
            final_version=manifest.version,
            final_root=manifest.root,
            samplers=tuple(self._sampler_summary(sampler) for sampler in plane.sessions.all()),
        )

    def _sampler_summary(self, sampler: Sampler) -> SamplerSummary:
        """Bytes by the learner's count, which outlives the sampler's restarts; by its own where a relay sent them."""
        report = _report(sampler)
        return SamplerSummary(
            id=sampler.sampler_id,
            version=report.policy_version,
            root=report.policy_root,
            groups=sampler.groups_accepted,
            tokens=sampler.tokens_accepted,
            restarts=sampler.restarts,
            bytes_received=self.traffic.bytes_sent_to(sampler.sampler_id) or report.weights_bytes_received,
        )


def _report(sampler: Sampler) -> SamplerReport:
    """Its last report, or what is known before the first; without its leases, or many samplers' would make a status too
    large to be sent."""
    if sampler.report is not None:
        return replace(sampler.report, lease_ids=())
    return SamplerReport(state=SamplerState.STARTING, policy_version=0, policy_root="", engine=sampler.engine)
