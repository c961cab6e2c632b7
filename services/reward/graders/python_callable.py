"""The grader `python`: a function of the operator's own, named by import path, called inside a worker.

The learner sends the path, so the host that runs it lists the modules that may be called (`Permissions.python`).
"""

import importlib
import math
import re
from collections.abc import Callable
from typing import SupportsFloat, cast

from pydantic import Field

from services.reward.graders.base import Verdict
from services.reward.scorer import ScoreRequest
from services.runtime.config import Section
from services.runtime.errors import EngineError, ScoreError

_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class PythonOptions(Section):
    callable: str
    """Import path, "package.module:function". Called with the keywords prompt, completion, answer and metadata,
    and with `arguments`; returns a number, or a pair of a number and a reason."""
    arguments: dict[str, object] = Field(default_factory=dict[str, object])
    """More keyword arguments."""
    timeout_s: float = Field(default=5.0, gt=0.0, le=60.0)
    """CPU and wall seconds that one call may take beyond the pool's own limits."""


class PythonGrader:
    """An exception of the function is a failure of the grader, never a reward of 0.

    The module is imported by `load`, which only workers call: nowhere else may an operator's code run, and the time and
    memory that it takes are no completion's.
    """

    def __init__(self, options: PythonOptions, allowed: tuple[str, ...]) -> None:
        if _PATH.fullmatch(options.callable) is None:
            raise ScoreError(f"The callable {options.callable!r:.80} is not of the form package.module:function.")
        module = options.callable.partition(":")[0]
        if not any(module == one or module.startswith(f"{one}.") for one in allowed):
            raise ScoreError(
                f"This host does not allow functions of {module}; its owner allows them with --allow-python {module}."
            )
        self._options = options
        self._function: Callable[..., object] | None = None

    def check_answer(self, answer: str) -> str | None:
        return None

    def load(self) -> None:
        """Imports the function, once. Raises EngineError: another host may have what this one has not."""
        module, _, name = self._options.callable.partition(":")
        try:
            function: object = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise EngineError(f"The callable {self._options.callable} cannot be imported: {error}.") from error
        if not callable(function):
            raise EngineError(f"{self._options.callable} is not a function.")
        self._function = function

    def grade(self, request: ScoreRequest) -> Verdict:
        assert self._function is not None, "load it first"
        try:
            result = self._function(
                prompt=request.prompt,
                completion=request.completion,
                answer=request.answer,
                metadata=dict(request.metadata),
                **self._options.arguments,
            )
        except RecursionError as error:  # of a parser it is the text's fault, of a function nobody knows
            raise RuntimeError(f"{self._options.callable} called itself too deeply") from error
        reward, reason = self._pair(result)
        return Verdict(reward=reward, extracted=None, reason=reason or f"from {self._options.callable}")

    def _pair(self, result: object) -> tuple[float, str]:
        value, reason = result, ""
        if isinstance(result, tuple):
            several = cast("tuple[object, ...]", result)
            if len(several) != 2:
                raise TypeError(f"{self._options.callable} returned {len(several)} values, not a number and a reason")
            value, reason = several[0], str(several[1])
        # Scalars of numpy and tensors of one number are numbers too; a text that looks like one is not.
        reward = float(value) if isinstance(value, SupportsFloat) else math.nan
        if not math.isfinite(reward):
            raise TypeError(f"{self._options.callable} returned {value!r:.60}, not a finite number")
        return reward, reason
