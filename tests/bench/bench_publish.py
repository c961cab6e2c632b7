"""What publishing adds to a training step: real steps of an 84M-parameter policy, with and without it, in turn.

    python -m tests.bench.bench_publish [--pairs 8] [--tokens 1024 8192] [--out tests/bench/results/publish.json]

With publishing a step is followed by the snapshot in wire format, and the version is encoded, stored and announced
while the next step computes, as services/learner/run_loop.py does. `snapshot_share` is what the step itself waits for;
`added_share` has the encoder's share of the processor in it too, which on a machine that trains on CPUs is not free.
Both are medians over pairs of neighbouring steps, one with and one without, in changing order, so that a machine that
is slower for a while spoils neither. `cpu_share` is the processor time that publishing took, per step's. `most_share`
is a bound: publishing adds at most the snapshot and its own duration, as if training stood still meanwhile.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3ForCausalLM

from services.learner.batches import TrainGroup
from services.learner.config import OptimizerSection, PublishSection
from services.learner.losses.settings import LossName, LossSettings
from services.learner.object_store import ObjectStore
from services.learner.policy import Policy
from services.learner.publisher import Publisher, RunFacts
from services.learner.snapshots import Snapshots
from services.learner.trainer import Trainer, TrainerSettings
from services.learner.versions import VersionFiles
from services.wire.types import Completion, FinishReason, LeasePurpose, ScoredGroup
from tests.bench.machine import machine
from tests.bench.weight_traces import VOCABULARY, model_config

RESULTS = Path(__file__).parent / "results" / "publish.json"
ROWS = 4


def group(draws: random.Random, tokens: int) -> TrainGroup:
    def ids(count: int) -> tuple[int, ...]:
        return tuple(draws.randrange(VOCABULARY) for _ in range(count))

    completions = tuple(
        Completion(
            token_ids=ids(tokens),
            sampler_logprobs=tuple(-draws.uniform(8.0, 10.0) for _ in range(tokens)),
            reward=float(row % 2),
            finish_reason=FinishReason.STOP,
        )
        for row in range(ROWS)
    )
    scored = ScoredGroup(
        lease_id="l",
        prompt_id="p",
        purpose=LeasePurpose.TRAIN,
        policy_version=0,
        policy_root="0" * 64,
        prompt_token_ids=ids(8),
        completions=completions,
        generation_s=0.1,
        scoring_s=0.1,
        temperature=1.0,
        seed=0,
    )
    return TrainGroup(group=scored, sampler_id="s", staleness=0, age_s=0.0)


async def measure(folder: Path, pairs: int, tokens: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(model_config()).float()
    policy = Policy(model=model, files={}, device=torch.device("cpu"), vocab_size=VOCABULARY)
    settings = TrainerSettings(
        optimizer=OptimizerSection(),
        loss=LossSettings(name=LossName.GEPO, mask_overlong=False),
        temperature=1.0,
        micro_batch_tokens=4096,
        autocast=False,
    )
    trainer = Trainer(policy, settings)
    snapshots = Snapshots(policy, on_device=False)
    publisher = Publisher(
        store=ObjectStore(folder / "objects"),
        versions=VersionFiles(folder / "versions"),
        facts=RunFacts(run_id="bench", learner_epoch=1, model_files_sha256=""),
        signer=None,
        settings=PublishSection(workers=1),
    )
    draws = random.Random(0)
    groups = [group(draws, max(1, tokens // ROWS // 2)) for _ in range(2)]
    for _ in range(3):  # Adam's first steps change every weight
        trainer.step(groups)
    snapshots.take()
    await publisher.publish(0, snapshots.finish()[0])
    rows: list[dict[str, float]] = []
    for pair in range(pairs):
        row: dict[str, float] = {}
        for publishing in (False, True) if pair % 2 else (True, False):
            cpu, began = time.process_time(), time.perf_counter()
            if publishing:
                await asyncio.to_thread(snapshots.take)
                row["snapshot"] = time.perf_counter() - began
                task = asyncio.create_task(publisher.publish(pair + 1, *snapshots.finish()))
                await asyncio.to_thread(trainer.step, groups)
                row["with_publishing"] = time.perf_counter() - began
                row["publish"] = (await task).seconds
                row["cpu_with_publishing"] = time.process_time() - cpu
            else:
                await asyncio.to_thread(trainer.step, groups)
                row["alone"] = time.perf_counter() - began
                row["cpu_alone"] = time.process_time() - cpu
        rows.append(row)

    def median(*names: str) -> float:
        """Of a column, or of the difference of two."""
        return statistics.median(row[names[0]] - sum(row[name] for name in names[1:]) for row in rows)

    step, added = median("alone"), median("with_publishing", "alone")
    return {
        "machine": {**machine(), "torch_threads": torch.get_num_threads()},
        "parameters": sum(tensor.numel() for tensor in policy.parameters().values()),
        "tokens_per_step": tokens,
        "step_s": step,
        "snapshot_s": median("snapshot"),
        "publish_s": median("publish"),
        "added_s": added,
        "snapshot_share": median("snapshot") / step,
        "added_share": added / step,
        "most_share": (median("snapshot") + median("publish")) / step,
        "cpu_share": median("cpu_with_publishing", "cpu_alone") / median("cpu_alone"),
        "pairs": [{name: round(value, 3) for name, value in row.items()} for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192], help="of a step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, object]] = []
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory() as name:
            results.append(asyncio.run(measure(Path(name), arguments.pairs, tokens)))
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
