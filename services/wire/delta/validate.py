"""Whether weights are the policy that they claim to be: names, types, shapes and finite values."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from services.runtime.errors import InvalidWeightsError
from services.wire.delta.tensors import BITS_TYPE, EXPONENT_MASK, Bits, BitTensor, TensorForm, Weights, forms_of

FINITE_BLOCK = 128 << 10
"""Elements of a block that stays in a core's own cache."""

ONLY_NANS = {"F8_E4M3": (0x7F, 0xFF), "F8_E8M0": (0xFF,), "F8_E4M3FNUZ": (0x80,), "F8_E5M2FNUZ": (0x80,)}
"""The NaN patterns of the types that have no infinity."""

ALL_BUT_SIGN = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFF_FFFF, 8: 0x7FFF_FFFF_FFFF_FFFF}
EXPLOSION_EXPONENT = 4
"""A tensor whose largest magnitude grows more than 2^4-fold between two versions, and beyond 1, has exploded: steps of
training change large weights by parts of a per cent, and small ones never to such sizes."""

MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23, "F64": 52}
BITS_OF_ONE = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F80_0000, "F64": 0x3FF0_0000_0000_0000}


def check_same_forms(found: Iterable[TensorForm], expected: Iterable[TensorForm], what: str = "the weights") -> None:
    """Raises InvalidWeightsError that names the first tensor that is unknown, missing, or of another type or shape."""
    ours = {form.name: form for form in expected}
    theirs = {form.name: form for form in found}
    for name in sorted(theirs.keys() | ours.keys()):
        form, reference = theirs.get(name), ours.get(name)
        if form is None:
            raise InvalidWeightsError(f"{what} lack the tensor {name}: they belong to another model")
        if reference is None:
            raise InvalidWeightsError(f"{what} have the unknown tensor {name}: they belong to another model")
        if form != reference:
            raise InvalidWeightsError(
                f"{name} is {form.dtype} {list(form.shape)} in {what}, where {reference.dtype} "
                f"{list(reference.shape)} is expected: they belong to another model"
            )


def largest_magnitude(bits: Bits) -> int:
    """The bits of the largest magnitude among the elements, 0 where there are none.

    Without the sign, the bits of floating-point numbers sort like their magnitudes, infinities and NaNs last.
    """
    unsigned = BITS_TYPE[bits.dtype.itemsize](ALL_BUT_SIGN[bits.dtype.itemsize])
    blocks = (bits[start : start + FINITE_BLOCK] for start in range(0, bits.size, FINITE_BLOCK))
    return max((int((block & unsigned).max()) for block in blocks), default=0)


def is_finite(tensor: BitTensor) -> bool:
    """Whether no element is infinite or NaN. Integers always are finite."""
    mask = EXPONENT_MASK.get(tensor.dtype)
    if mask is None:
        return not any(bool((tensor.bits == nan).any()) for nan in ONLY_NANS.get(tensor.dtype, ()))
    return largest_magnitude(tensor.bits) < mask


def has_exploded(tensor: BitTensor, before: BitTensor) -> bool:
    """Whether the largest magnitude is beyond 1 and more than 2^EXPLOSION_EXPONENT times what it was `before`.

    `before` is looked at only where the first holds: few tensors of a model have elements beyond 1.
    """
    return tensor.dtype in MANTISSA_BITS and _is_explosion(largest_magnitude(tensor.bits), before)


def may_follow(tensor: BitTensor, before: BitTensor, peak: int) -> bool:
    """Whether it is finite and has not exploded, where that is known of `before`: then only what changed can be wrong.

    `peak`: largest_magnitude of what changed.
    """
    if tensor.dtype in ONLY_NANS:
        return is_finite(tensor)
    if tensor.dtype in EXPONENT_MASK and peak >= EXPONENT_MASK[tensor.dtype]:
        return False
    return tensor.dtype not in MANTISSA_BITS or not _is_explosion(peak, before)


def validate_names_shapes(weights: Weights, reference: Weights, workers: int = 1) -> None:
    """Refuses weights that must not be loaded into the model that `reference`, an earlier version, belongs to.

    Unknown or missing names, another type or shape, infinite or NaN values, magnitudes that exploded:
    InvalidWeightsError with one sentence.
    """
    check_same_forms(forms_of(weights), forms_of(reference))
    names = sorted(weights)
    with ThreadPoolExecutor(workers) as pool:
        ours, theirs = ([tensors[name] for name in names] for tensors in (weights, reference))
        for problem in pool.map(_problem, names, ours, theirs):
            if problem:
                raise InvalidWeightsError(problem)


def _problem(name: str, tensor: BitTensor, before: BitTensor) -> str:
    if not is_finite(tensor):
        return f"{name} has infinite or NaN values: keep the version before this one"
    if tensor is not before and has_exploded(tensor, before):
        return f"{name} grew more than {1 << EXPLOSION_EXPONENT}-fold: keep the version before this one"
    return ""


def _is_explosion(largest: int, before: BitTensor) -> bool:
    return largest > BITS_OF_ONE[before.dtype] and largest > largest_magnitude(before.bits) + (
        EXPLOSION_EXPONENT << MANTISSA_BITS[before.dtype]
    )
