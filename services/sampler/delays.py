"""Delays of a bad link, as a model: the `[delay]` section, and draws from it.

The same section delays a real sampler, in real seconds, and the laboratory's samplers, in virtual ones. docs/lab.md has
the formulas. Source of the defaults: arXiv 2508.17850, where samplers get weights late by 60 to 1,800 s.
"""

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import cast

from pydantic import Field, model_validator

from services.runtime.config import Section
from services.runtime.errors import BadInputError, InputMissingError


class DelayKind(StrEnum):
    """Distribution of one delay, before it is clipped to [min_s, max_s]."""

    NONE = "none"
    CONSTANT = "constant"
    UNIFORM = "uniform"
    EXPONENTIAL = "exponential"
    LOGNORMAL = "lognormal"
    WEIBULL = "weibull"
    TRACE = "trace"


class DelayModel(Section):
    """One distribution of delays. Keys of other kinds are ignored."""

    kind: DelayKind = DelayKind.NONE
    """none, constant, uniform (between min_s and max_s), exponential, lognormal, weibull or trace."""
    mean_s: float = Field(default=420.0, ge=0)
    """constant and exponential: the mean before clipping, in seconds."""
    mu: float = 5.827
    """lognormal: mean of ln(seconds); the paper's (ln 60 + ln 1920) / 2."""
    sigma: float = Field(default=0.617, ge=0)
    """lognormal: standard deviation of ln(seconds)."""
    shape: float = Field(default=2.245, gt=0)
    """weibull: its shape k."""
    scale_s: float = Field(default=865.0, gt=0)
    """weibull: its scale λ, in seconds."""
    trace: Path | None = None
    """trace: a text file with one delay in seconds per line, taken in order from a place that the seed picks, and over
    again from its start."""
    min_s: float = Field(default=60.0, ge=0)
    """Shorter delays are raised to this, in seconds; kind none stays 0."""
    max_s: float = Field(default=1800.0, ge=0)
    """Longer delays are cut to this, in seconds."""

    @model_validator(mode="after")
    def _sound(self) -> "DelayModel":
        if self.min_s > self.max_s:
            raise ValueError(f"min_s = {self.min_s:g} is above max_s = {self.max_s:g}")
        if self.kind is DelayKind.TRACE and self.trace is None:
            raise ValueError('kind = "trace" needs trace, a file with one delay in seconds per line')
        return self


class DelaySection(Section):
    """Delays added on purpose, to see how a run bears them; docs/lab.md has the formulas."""

    weights: DelayModel = DelayModel()
    """Added to each new version but the first, after it was fetched and before it is used; versions that come out
    meanwhile are skipped, but for the newest."""
    rollouts: DelayModel = DelayModel()
    """Added to each group between its score and its way to the learner; groups do not hold up each other."""
    seed: int = 0
    """Of all draws; every sampler draws its own, from this and its name."""


class Delays:
    """Endless draws from one model, in seconds: the same for the same model, seed, sampler and link.

    Raises InputMissingError or BadInputError for a trace that is not there, or holds no delays.
    """

    def __init__(self, model: DelayModel, seed: int, sampler_id: str, link: str) -> None:
        digest = hashlib.sha256(f"{seed}:{sampler_id}:{link}".encode()).digest()
        self._rng = random.Random(int.from_bytes(digest[:8]))
        self._model = model
        self._draw = _drawer(model, self._rng)

    def next_s(self) -> float:
        """The next delay, clipped."""
        if self._model.kind is DelayKind.NONE:
            return 0.0
        try:
            drawn = self._draw()
        except OverflowError:  # beyond every float: a mu of 1,800, say
            drawn = math.inf
        return min(max(drawn, self._model.min_s), self._model.max_s)


def _drawer(model: DelayModel, rng: random.Random) -> Callable[[], float]:
    match model.kind:
        case DelayKind.NONE:
            return lambda: 0.0
        case DelayKind.CONSTANT:
            return lambda: model.mean_s
        case DelayKind.UNIFORM:
            return lambda: rng.uniform(model.min_s, model.max_s)
        case DelayKind.EXPONENTIAL:
            return lambda: rng.expovariate(1.0) * model.mean_s
        case DelayKind.LOGNORMAL:
            return lambda: rng.lognormvariate(model.mu, model.sigma)
        case DelayKind.WEIBULL:
            return lambda: rng.weibullvariate(model.scale_s, model.shape)
        case DelayKind.TRACE:
            return _replay(read_trace(cast(Path, model.trace)), rng)


def _replay(delays: Sequence[float], rng: random.Random) -> Callable[[], float]:
    place = rng.randrange(len(delays))

    def draw() -> float:
        nonlocal place
        place = (place + 1) % len(delays)
        return delays[place]

    return draw


def read_trace(path: Path) -> tuple[float, ...]:
    """Seconds, one per line; empty lines do not count. Raises InputMissingError, BadInputError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissingError(f"the trace of delays {path} cannot be read ({error}): check delay.*.trace") from None
    delays: list[float] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            delay = float(line)
        except ValueError:
            delay = math.nan
        if not (math.isfinite(delay) and delay >= 0):
            raise BadInputError(f"{path}:{number}: {line.strip()[:40]!r} is not a delay: write seconds, 0 or more")
        delays.append(delay)
    if not delays:
        raise BadInputError(f"the trace of delays {path} is empty: write one delay in seconds per line")
    return tuple(delays)


NO_DELAYS = Delays(DelayModel(), 0, "", "")
"""0.0, for ever."""
