"""placeholder"""

from pydantic import Field

from services.runtime.config import Section


class CodeOptions(Section):
    wall_s: float = Field(default=5.0)


class CodeGrader:
    def __init__(self, options: CodeOptions) -> None: ...
