"""What parent and child say to each other: one JSON value per frame (services.reward.frames), told apart by "kind".

    parent   start · generate · cancel · load · stop
    child    ready | refused · generated | failed · loaded | load_failed · alive

JSON and not pickle: the child runs a model and a tokenizer of others. A float32 comes through JSON with all its bits.
"""

from typing import Literal, TypedDict


class Start(TypedDict):
    """`arguments` are vLLM's EngineArgs. `version`: of the weights in the model's folder."""

    kind: Literal["start"]
    model_dir: str
    arguments: dict[str, object]
    version: int
    root: str
    in_flight: bool


class Generate(TypedDict):
    """One completion per seed. `max_tokens` is also bounded by the context, in the child."""

    kind: Literal["generate"]
    id: int
    prompt: list[int]
    seeds: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list[str]


class Cancel(TypedDict):
    kind: Literal["cancel"]
    id: int


class Load(TypedDict):
    """`path`: a .safetensors file of complete fused groups; empty when the version before had the same weights."""

    kind: Literal["load"]
    path: str
    version: int
    root: str


class Stop(TypedDict):
    kind: Literal["stop"]


Command = Start | Generate | Cancel | Load | Stop


class Ready(TypedDict):
    kind: Literal["ready"]
    vllm: str
    device: str
    vocab_size: int
    context_tokens: int


class Refused(TypedDict):
    """The model cannot run here. `fault` is whose: "config" (a setting or the model) or "engine"."""

    kind: Literal["refused"]
    fault: Literal["config", "engine"]
    message: str


class DrawnTokens(TypedDict):
    """`spans`: [end, version] pairs, empty when all is of the group's version."""

    token_ids: list[int]
    logprobs: list[float]
    stopped: bool
    spans: list[tuple[int, int]]


class GeneratedGroup(TypedDict):
    kind: Literal["generated"]
    id: int
    completions: list[DrawnTokens]
    version: int
    root: str
    seconds: float


class Failed(TypedDict):
    kind: Literal["failed"]
    id: int
    message: str


class Loaded(TypedDict):
    kind: Literal["loaded"]
    version: int
    pause_s: float


class LoadFailed(TypedDict):
    """The child's weights are of no version now: it ends after this."""

    kind: Literal["load_failed"]
    message: str


class Alive(TypedDict):
    """At least every second while there is work: its absence means that the engine hangs."""

    kind: Literal["alive"]


Report = Ready | Refused | GeneratedGroup | Failed | Loaded | LoadFailed | Alive
