"""The suite that the transformers engine passes too."""

from tests.support.engine_conformance import EngineConformance


class TestVllmEngine(EngineConformance):
    LOGPROB_TOLERANCE = 2e-5
