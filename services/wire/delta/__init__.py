"""Weights as bit-exact deltas: whole policies, what changed between two of them, and their files (docs/weights.md)."""

from services.wire.delta.codec import Codec, WrongBaseError
from services.wire.delta.decode import apply_update, inspect
from services.wire.delta.encode import encode_delta, encode_keyframe, iter_encode
from services.wire.delta.files import read_weights, write_weights
from services.wire.delta.fold import fold, iter_fold
from services.wire.delta.tensors import BitTensor, Weights, digests_of, root_of
from services.wire.delta.update import EncodedUpdate, UpdateInfo, UpdateKind
from services.wire.delta.validate import validate_names_shapes

__all__ = [
    "BitTensor",
    "Codec",
    "EncodedUpdate",
    "UpdateInfo",
    "UpdateKind",
    "Weights",
    "WrongBaseError",
    "apply_update",
    "digests_of",
    "encode_delta",
    "encode_keyframe",
    "fold",
    "inspect",
    "iter_encode",
    "iter_fold",
    "read_weights",
    "root_of",
    "validate_names_shapes",
    "write_weights",
]
