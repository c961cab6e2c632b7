"""What every sampler of the run must share, from the learner's configuration and its model directory."""

import json

from services.learner.config import LearnerConfig
from services.learner.object_store import ObjectStore
from services.learner.policy import WIRE_DTYPE, Policy
from services.wire.convert import model_files_sha256
from services.wire.types import GraderSpec, ModelFile, RunSettings, SamplingSettings


def store_model_files(policy: Policy, store: ObjectStore) -> tuple[ModelFile, ...]:
    """Puts config, tokenizer and chat template into the store. Blocks."""
    return tuple(ModelFile(name=name, object=store.put(data)) for name, data in sorted(policy.files.items()))


def run_settings(config: LearnerConfig, files: tuple[ModelFile, ...], policy: Policy, public_key: bytes) -> RunSettings:
    """The settings that registration hands out. `public_key` is empty where manifests are not signed."""
    sampling = config.sampling
    return RunSettings(
        model_files=files,
        model_files_sha256=model_files_sha256(files),
        vocab_size=policy.vocab_size,
        weights_dtype=WIRE_DTYPE,
        group_size=sampling.group_size,
        max_staleness=config.staleness.max_staleness,
        max_prompt_tokens=config.data.max_prompt_tokens,
        sampling=SamplingSettings(
            temperature=sampling.temperature,
            max_completion_tokens=sampling.max_completion_tokens,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop=tuple(sampling.stop),
        ),
        eval_sampling=SamplingSettings(
            temperature=config.eval.temperature,
            max_completion_tokens=sampling.max_completion_tokens,
            stop=tuple(sampling.stop),
        ),
        graders=tuple(
            GraderSpec(name=grader.name, weight=grader.weight, options_json=_options(grader.options))
            for grader in config.reward
        ),
        system_prompt=config.data.system_prompt,
        manifest_public_key=public_key,
    )


def _options(options: object) -> str:
    return json.dumps(options, sort_keys=True) if options else ""
