"""Random steps of a small policy, published for real, followed by three samplers that are cut off all the time."""

import random
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.lab.wan import LinkProfile, WanLink
from services.runtime import failpoints
from services.wire.delta import BitTensor, Weights
from tests.support.weight_site import ANY_PORT, Following, following, learner_site, relay_site
from tests.unit.learner.weights_of_tests import make_weights

_NEAR = LinkProfile(rate_bit_s=1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`loaded`: versions that each sampler generated with. `cuts`: fetches ended by a server, resets of the link."""

    root: str
    roots: dict[str, str]
    loaded: dict[str, int]
    cuts: int
    keyframes_refetched: int


def stepped(weights: Weights, draws: np.random.Generator) -> dict[str, BitTensor]:
    """What an optimizer step does to bits, and worse: single steps up or down, now and then any magnitude up to 1."""
    result: dict[str, BitTensor] = {}
    for name, tensor in weights.items():
        bits = tensor.bits.copy()
        places = draws.choice(bits.size, int(draws.integers(0, 200)), replace=False)
        bits[places] += draws.choice(np.array([1, 0xFFFF], np.uint16), places.size)
        if draws.random() < 0.1:
            bits[int(draws.integers(bits.size))] = int(draws.integers(0x3F80))
        finite = np.where(bits & 0x7F80 == 0x7F80, tensor.bits, bits)
        result[name] = BitTensor(dtype=tensor.dtype, shape=tensor.shape, bits=finite)
    return result


def random_cuts(draws: random.Random, point: str, count: int) -> str:
    """A failpoint that ends a fetch before a random chunk, again and again."""
    terms = [f"{draws.randrange(1, 16)}*off->1*error(UnavailableError)" for _ in range(count)]
    return f"{point}={'->'.join([*terms, 'off'])}"


def cuts_made() -> int:
    """Error terms that have acted."""
    points = (failpoints._points or {}).values()
    return sum(term.action == "error" and term.left == 0 for point in points for term in point.terms)


async def random_steps(folder: Path, *, steps: int, seed: int) -> Outcome:
    """*Produces* `steps` versions as fast as they can be published; one of three followers is behind a relay, and
    the link of all is reset at random moments."""
    draws, bits = random.Random(seed), np.random.default_rng(seed)
    failpoints.arm(";".join(random_cuts(draws, point, steps) for point in ("fetch.before_chunk", "relay.before_chunk")))
    try:
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(learner_site(folder / "learner"))
            link = await stack.enter_async_context(WanLink(ANY_PORT, site.address, _NEAR))
            await site.publisher.publish(0, weights := make_weights(seed, 4000))
            relay = await stack.enter_async_context(relay_site(folder / "relay", link.address))
            samplers: dict[str, Following] = {}
            for name in ("a", "b", "behind-relay"):
                samplers[name] = await stack.enter_async_context(
                    following(
                        folder / name,
                        link.address,
                        site.public_key,
                        relay=relay.address if name == "behind-relay" else None,
                        name=name,
                        aside_s=0.05,
                    )
                )
            resets = 0
            for version in range(1, steps + 1):
                await site.publisher.publish(version, weights := stepped(weights, bits))
                if draws.random() < 0.03:
                    link.reset()
                    resets += 1
                if draws.random() < 0.02:  # or they would skip nearly everything
                    await draws.choice(list(samplers.values())).reach(version)
                if version % 50 == 0:
                    await site.planner.collect((), site.traffic)
            roots = {name: await sampler.reach(steps, 60.0) for name, sampler in samplers.items()}
            return Outcome(
                root=site.root,
                roots=roots,
                loaded={name: len(sampler.engine.loaded) for name, sampler in samplers.items()},
                cuts=resets + cuts_made(),
                keyframes_refetched=sum(sampler.tally.keyframes_refetched for sampler in samplers.values()),
            )
    finally:
        failpoints.arm("")
