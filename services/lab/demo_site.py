"""The demo's world on one machine: certificates, data, configs, and the processes of a learner and two sampler sites.

sampler-1 ── reward-1          ┌── wan-1 (RTT 100 ms, 50 Mbit/s) ──┐
sampler-2 ── reward-2   TLS ───┤                                   ├──► learner ◄── monitor (the demo itself)
                               └── wan-2 (RTT 200 ms, 20 Mbit/s) ──┘
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from services.lab import arithmetic, processes
from services.lab.processes import Child
from services.learner import config as learner_config
from services.learner.losses.settings import LossName, LossSettings
from services.runtime.config_render import render_toml
from services.sampler import config as sampler_config
from services.wire.credentials import utc_now
from services.wire.pki import make_dev_pki
from services.wire.tls import TlsFiles

POLICY = Path(__file__).parent / "assets" / "tiny-policy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An emulated wide-area link: round-trip time and rate in each direction."""

    rtt_ms: int
    rate_mbit_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """What a demo trains, and over what."""

    steps: int = 100
    loss: LossName = LossName.GEPO
    max_staleness: int = 8
    groups_per_step: int = 32
    group_size: int = 8
    lr: float = 1e-4
    seed: int = 0
    links: tuple[Link, ...] = (Link(rtt_ms=100, rate_mbit_s=50), Link(rtt_ms=200, rate_mbit_s=20))
    eval_every_steps: int = 20
    eval_prompts: int = 200
    grader: str = "exact"
    engine: Literal["transformers", "vllm"] = "transformers"
    """What the samplers generate with; the processes must run in an environment that has it."""


@dataclass(slots=True, kw_only=True)
class Site:
    """Folders and processes of one demo."""

    out: Path
    settings: DemoSettings
    learner: Child | None = None
    samplers: dict[str, Child] = field(default_factory=dict[str, Child])
    others: list[Child] = field(default_factory=list[Child])

    @property
    def work(self) -> Path:
        """What only the processes need: certificates, data, states, logs."""
        return self.out / "work"

    @property
    def learner_state(self) -> Path:
        return self.work / "learner"

    def tls(self, name: str) -> TlsFiles:
        return TlsFiles.in_directory(self.work / "pki", name)

    @property
    def learner_address(self) -> str:
        return (self.learner_state / "address").read_text().strip()

    def prepare(self) -> None:
        """Writes certificates, data set and the learner's run.toml."""
        for folder in ("logs", "learner", "pki"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        names = [f"sampler-{number}" for number in range(1, len(self.settings.links) + 1)]
        make_dev_pki(self.work / "pki", names, (), utc_now())
        difficulty, seed = arithmetic.Difficulty(), self.settings.seed
        arithmetic.write_dataset(self.work / "train.jsonl", arithmetic.Split.TRAIN, 20_000, seed, difficulty)
        arithmetic.write_dataset(
            self.work / "eval.jsonl", arithmetic.Split.HELD_OUT, self.settings.eval_prompts, seed, difficulty
        )
        text = render_toml(learner_config.LearnerConfig, self.learner_config())
        (self.work / "run.toml").write_text(text, encoding="utf-8")

    def learner_config(self) -> learner_config.LearnerConfig:
        """The run that the demo trains."""
        s = self.settings
        return learner_config.LearnerConfig(
            run=learner_config.RunSection(
                id="demo",
                state_dir=self.learner_state,
                steps=s.steps,
                seed=s.seed,
                export_dir=self.out / "policy",
            ),
            listen=learner_config.ListenSection(address="127.0.0.1:0"),
            tls=self.tls("learner"),
            policy=learner_config.PolicySection(path=POLICY, device="cpu"),
            data=learner_config.DataSection(
                train=self.work / "train.jsonl", eval=self.work / "eval.jsonl", max_prompt_tokens=32
            ),
            sampling=learner_config.SamplingSection(group_size=s.group_size, max_completion_tokens=8),
            eval=learner_config.EvalSection(every_steps=s.eval_every_steps, prompts=s.eval_prompts),
            reward=[learner_config.GraderSection(name=s.grader)],
            staleness=learner_config.StalenessSection(max_staleness=s.max_staleness),
            batch=learner_config.BatchSection(groups_per_step=s.groups_per_step),
            loss=LossSettings(name=s.loss),
            optimizer=learner_config.OptimizerSection(lr=s.lr, warmup_steps=5),
            lease=learner_config.LeaseSection(ttl_s=10, heartbeat_s=1, session_ttl_s=4, ahead=0.5),
            checkpoint=learner_config.CheckpointSection(every_steps=0),
        )

    def engine(self) -> sampler_config.EngineSection:
        """One thread and one batch for each sampler. vLLM is not compiled: that would take longer than the demo."""
        small = sampler_config.VllmSection(kv_cache_gb=0.25, arguments='{"enforce_eager": true}')
        return sampler_config.EngineSection(
            kind=self.settings.engine, device="cpu", dtype="float32", threads=1, max_batch_rows=256, vllm=small
        )

    async def start_learner(self) -> None:
        """Starts the learner and waits until it listens."""
        arguments = ["learner", "-c", str(self.work / "run.toml")]
        self.learner = await processes.start("learner", "services.cli", arguments, self.work / "logs")
        await processes.appears(self.learner_state / "address", self.learner, 120)

    async def start_sites(self) -> None:
        """Starts, for each sampler, its link, its reward service and itself."""
        for number, link in enumerate(self.settings.links, 1):
            name = f"sampler-{number}"
            wan_arguments = [
                *("--listen", "127.0.0.1:0", "--upstream", self.learner_address),
                *("--rtt-ms", str(link.rtt_ms), "--rate-mbit", str(link.rate_mbit_s)),
            ]
            wan = await processes.start(f"wan-{number}", "services.lab.wan", wan_arguments, self.work / "logs")
            self.others.append(wan)
            port = json.loads(await processes.first_line(wan, 30))["port"]
            socket = f"unix://{self.work.resolve()}/reward-{number}.sock"
            reward_arguments = ["reward", "serve", "--listen", socket, "--workers", "1"]
            reward = await processes.start(f"reward-{number}", "services.cli", reward_arguments, self.work / "logs")
            self.others.append(reward)
            config = sampler_config.SamplerConfig(
                connect=sampler_config.ConnectSection(learner=f"127.0.0.1:{port}"),
                tls=self.tls(name),
                state_dir=self.work / name,
                engine=self.engine(),
                reward=sampler_config.RewardSection(address=socket),
                metrics_address="127.0.0.1:0",
            )
            (self.work / f"{name}.toml").write_text(render_toml(sampler_config.SamplerConfig, config), encoding="utf-8")
            await self.start_sampler(name)

    async def start_sampler(self, name: str) -> None:
        """Starts a sampler, or starts it again on the state that its last process left."""
        arguments = ["sampler", "-c", str(self.work / f"{name}.toml")]
        self.samplers[name] = await processes.start(name, "services.cli", arguments, self.work / "logs")

    async def stop(self) -> None:
        """Ends whatever still runs: samplers first, so that they hand in what they have."""
        for child in (*self.samplers.values(), *([self.learner] if self.learner else []), *self.others):
            await child.stop()
