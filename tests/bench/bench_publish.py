"""What publishing adds to a training step: real steps of an 84M-parameter policy, with and without it, in turn.

    python -m tests.bench.bench_publish [--pairs 6] [--tokens 2048] [--out tests/bench/results/publish.json]

With publishing a step is followed by the snapshot in wire format, and the version is encoded, stored and announced
while the next step computes, as services/learner/run_loop.py does. `snapshot_share` is what the step itself waits for;
`added_share` has the encoder's share of the processor in it too, which on a machine that trains on CPUs is not free.
"""

import argparse
import asyncio
import json
import os
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
    await publisher.publish(0, snapshots.take()[0])
    alone: list[float] = []
    beside: list[float] = []
    waits: list[float] = []
    published: list[float] = []
    for version in range(1, pairs + 1):
        began = time.perf_counter()
        await asyncio.to_thread(trainer.step, groups)
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        weights, comparison = await asyncio.to_thread(snapshots.take)
        waits.append(time.perf_counter() - began)
        publishing = asyncio.create_task(publisher.publish(version, weights, comparison))
        await asyncio.to_thread(trainer.step, groups)
        beside.append(time.perf_counter() - began)
        published.append((await publishing).seconds)
    step, with_publishing = statistics.median(alone), statistics.median(beside)
    return {
        "machine": {"cpus": os.cpu_count(), "load_1m": os.getloadavg()[0], "torch_threads": torch.get_num_threads()},
        "parameters": sum(tensor.numel() for tensor in policy.parameters().values()),
        "tokens_per_step": tokens,
        "step_s": step,
        "snapshot_s": statistics.median(waits),
        "publish_s": statistics.median(published),
        "step_with_publishing_s": with_publishing,
        "snapshot_share": statistics.median(waits) / step,
        "added_share": with_publishing / step - 1,
        "added_share_of_best": min(beside) / min(alone) - 1,
        "seconds": {"alone": alone, "with_publishing": beside, "snapshot": waits, "publish": published},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        results = asyncio.run(measure(Path(name), arguments.pairs, arguments.tokens))
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
