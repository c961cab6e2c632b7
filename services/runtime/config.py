"""Typed configuration: one pydantic tree per process, each key documented by the docstring below it."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A table of a config file. Unknown keys are errors; attribute docstrings are the keys' documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
