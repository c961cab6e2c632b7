"""The exception tree of the project, and the exit codes that its processes end with.

    HeteroRLError ................ 1   a fault of ours
    ├─ UsageError ................ 2   the command line is wrong
    ├─ BadInputError ............ 65   a file, message or object does not say what it must
    │  ├─ ScoreError ............ 65   a prompt's reference answer cannot be graded
    │  ├─ CorruptObjectError .... 65   bytes do not have the digest, checksum or form that they claim
    │  └─ InvalidWeightsError ... 65   names, shapes, dtypes or values that no policy may load
    ├─ InputMissingError ........ 66   a file or folder is not there
    ├─ UnavailableError ......... 69   the peer does not answer: try again
    ├─ ObjectGoneError .......... 69   the object was collected: ask for a new plan
    ├─ EngineError .............. 70   the generation engine or a grader failed
    ├─ StorageError ............. 74   a read or write failed
    │  └─ DiskFullError ......... 74   the disk is full, or a quota used up: making room heals it
    ├─ ExhaustedError ........... 75   over a limit for now: try again later
    ├─ SessionLostError ......... 75   the learner restarted and knows no such session: register again
    ├─ RefusedError ............. 77   identity, role or certificate is refused: needs a person
    ├─ ConfigError .............. 78   a setting is wrong: restarting does not help
    │  └─ MismatchError ......... 78   the peer runs another model, tokenizer, dtype or protocol
    └─ FencedError .............. 79   a newer process with this identity took over

Each class is also the nearest stdlib type, so that callers who know only those still catch it. A message is
one sentence that says what is wrong and what to do. `services.wire.errors` maps the tree to gRPC codes.
"""

from typing import ClassVar


class HeteroRLError(Exception):
    """Root of the tree."""

    exit_code: ClassVar[int] = 1


class UsageError(HeteroRLError, ValueError):
    exit_code = 2


class BadInputError(HeteroRLError, ValueError):
    exit_code = 65


class ScoreError(BadInputError):
    pass


class CorruptObjectError(BadInputError):
    pass


class InvalidWeightsError(BadInputError):
    pass


class InputMissingError(HeteroRLError, FileNotFoundError):
    exit_code = 66


class UnavailableError(HeteroRLError, ConnectionError):
    exit_code = 69


class ObjectGoneError(HeteroRLError, LookupError):
    exit_code = 69


class EngineError(HeteroRLError, RuntimeError):
    exit_code = 70


class StorageError(HeteroRLError, OSError):
    exit_code = 74


class DiskFullError(StorageError):
    pass


class ExhaustedError(HeteroRLError, RuntimeError):
    """Over a limit now. `retry_after_s` is the wait that the refusing side proposes."""

    exit_code = 75

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SessionLostError(HeteroRLError, ConnectionError):
    exit_code = 75


class RefusedError(HeteroRLError, PermissionError):
    exit_code = 77


class ConfigError(HeteroRLError, ValueError):
    exit_code = 78


class MismatchError(ConfigError):
    pass


class FencedError(HeteroRLError, RuntimeError):
    exit_code = 79
