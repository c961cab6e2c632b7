"""The table of graders. Names, options and permissions are checked here, before any text is graded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from pydantic import ValidationError

from services.reward.graders import text
from services.reward.graders.base import Grader
from services.reward.graders.code import CodeGrader, CodeOptions
from services.reward.graders.math_answer import MathGrader, MathOptions
from services.reward.graders.python_callable import PythonGrader, PythonOptions
from services.reward.spec import GraderSpec, nearest
from services.runtime.config import Section
from services.runtime.errors import ScoreError

Options = TypeVar("Options", bound=Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """What this host lets a learner ask for: graders that run code are off until the host's owner turns them on."""

    code: Literal["refused", "isolated", "rlimits"] = "refused"
    """Whether the grader `code` may run what a policy wrote. isolated: only in namespaces of its own, without network
    and without this host's files; rlimits: also without them where this host has none."""
    python: tuple[str, ...] = ()
    """Modules, with their submodules, whose functions the grader `python` may call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedGrader:
    """One built grader. `extra_s` is the time that it may take beyond the pool's limits for one completion."""

    name: str
    weight: float
    grader: Grader
    extra_s: float


def build(specs: Sequence[GraderSpec], permissions: Permissions) -> tuple[WeightedGrader, ...]:
    """Builds graders without running any; safe in any process. Raises ScoreError with one sentence."""
    return tuple(_build(spec, permissions) for spec in specs)


def load(graders: Sequence[WeightedGrader]) -> None:
    """Imports what the graders call: for workers alone, and before any completion's time runs.

    Raises EngineError, and whatever an operator's module raises.
    """
    for weighted in graders:
        if isinstance(weighted.grader, PythonGrader):
            weighted.grader.load()


def check_gold(answer: str, specs: Sequence[GraderSpec], permissions: Permissions | None = None) -> str | None:
    """Why a reference answer cannot be graded, or None: for checking a data set before a run.

    Parses the answer in this process and without limits: for data that the operator chose, not for a policy's text.
    """
    for weighted in build(specs, permissions or Permissions()):
        reason = weighted.grader.check_answer(answer)
        if reason is not None:
            return reason
    return None


def _build(spec: GraderSpec, permissions: Permissions) -> WeightedGrader:
    builder = _BUILDERS.get(spec.name)
    if builder is None:
        raise ScoreError(f"There is no grader {spec.name!r:.60}: {nearest(spec.name, list(_BUILDERS))}")
    grader, extra_s = builder(spec.options, permissions)
    return WeightedGrader(name=spec.name, weight=spec.weight, grader=grader, extra_s=extra_s)


def _read(name: str, options_class: type[Options], values: Mapping[str, object]) -> Options:
    known = list(options_class.model_fields)
    for key in values:
        if key not in known:
            raise ScoreError(f"The grader {name} has no option {key!r:.60}: {nearest(key, known)}")
    try:
        return options_class.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(str(part) for part in first["loc"])
        raise ScoreError(f"The option {option} of the grader {name} is wrong: {first['msg']}.") from error


def _math(values: Mapping[str, object], _: Permissions) -> tuple[Grader, float]:
    return MathGrader(_read("math", MathOptions, values)), 0.0


def _exact(values: Mapping[str, object], _: Permissions) -> tuple[Grader, float]:
    return text.ExactGrader(_read("exact", text.ExactOptions, values)), 0.0


def _regex(values: Mapping[str, object], _: Permissions) -> tuple[Grader, float]:
    return text.RegexGrader(_read("regex", text.RegexOptions, values)), 0.0


def _format(values: Mapping[str, object], _: Permissions) -> tuple[Grader, float]:
    return text.FormatGrader(_read("format", text.FormatOptions, values)), 0.0


def _code(values: Mapping[str, object], permissions: Permissions) -> tuple[Grader, float]:
    if permissions.code == "refused":
        raise ScoreError("This host does not run code that a policy wrote; its owner allows it with --allow-code.")
    options = _read("code", CodeOptions, values)
    return CodeGrader(options, permissions.code == "rlimits"), options.wall_s + 1.0


def _python(values: Mapping[str, object], permissions: Permissions) -> tuple[Grader, float]:
    options = _read("python", PythonOptions, values)
    return PythonGrader(options, permissions.python), options.timeout_s


_BUILDERS: dict[str, Callable[[Mapping[str, object], Permissions], tuple[Grader, float]]] = {
    "math": _math,
    "exact": _exact,
    "regex": _regex,
    "format": _format,
    "code": _code,
    "python": _python,
}
