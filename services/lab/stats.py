"""Means over seeds with their 95 % confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, by degrees of freedom; beyond them that of 16, a little wide.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T95_BEYOND = 2.12


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """`half` is half the width of the interval mean ± half; None for a single value."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Student's interval, which takes the values for independent and normal. Raises ValueError for no values."""
        if not values:
            raise ValueError("no values to take a mean of")
        count, mean = len(values), math.fsum(values) / len(values)
        if count == 1:
            return cls(mean=mean, half=None, count=1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        t = _T95[count - 2] if count - 2 < len(_T95) else _T95_BEYOND
        return cls(mean=mean, half=t * math.sqrt(variance / count), count=count)

    def text(self, digits: int = 3) -> str:
        """Like `.954 ±.003`, or `1.2e+04` for what is too large to read so."""
        if abs(self.mean) >= 1000 or 0 < abs(self.mean) < 10**-digits:
            return f"{self.mean:.2g}" + ("" if self.half is None else f" ±{self.half:.1g}")
        return _short(self.mean, digits) + ("" if self.half is None else f" ±{_short(self.half, digits)}")

    def as_json(self) -> dict[str, float | int | None]:
        half = None if self.half is None else float(f"{self.half:.6g}")
        return {"mean": float(f"{self.mean:.6g}"), "half_95": half, "n": self.count}


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of first - second over seeds that both have: what the seeds share falls out."""
    return Estimate.of([one - other for one, other in zip(first, second, strict=True)])


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"
