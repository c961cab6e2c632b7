"""Whether weights are the policy that they claim to be: names, types, shapes and finite values."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from services.runtime.errors import InvalidWeightsError
from services.wire.delta.tensors import BITS_TYPE, EXPONENT_MASK, BitTensor, TensorForm, Weights, forms_of

FINITE_BLOCK = 1 << 20
ONLY_NANS = {"F8_E4M3": (0x7F, 0xFF), "F8_E8M0": (0xFF,), "F8_E4M3FNUZ": (0x80,), "F8_E5M2FNUZ": (0x80,)}
"""The NaN patterns of the types that have no infinity."""

ALL_BUT_SIGN = {1: 0x7F, 2: 0x7FFF, 4: 0x7FFF_FFFF, 8: 0x7FFF_FFFF_FFFF_FFFF}


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


def is_finite(tensor: BitTensor, max_abs_bits: int | None = None) -> bool:
    """Whether no element is infinite or NaN, nor above the magnitude whose bits are `max_abs_bits`.

    Without the sign, the bits of floating-point numbers sort like their magnitudes: one integer maximum answers both.
    """
    mask = EXPONENT_MASK.get(tensor.dtype)
    if tensor.bits.size == 0:
        return True
    if mask is None:
        nans = ONLY_NANS.get(tensor.dtype, ())
        return not any(bool((tensor.bits == nan).any()) for nan in nans)
    size = tensor.bits.dtype.itemsize
    limit = mask - 1 if max_abs_bits is None else min(mask - 1, max_abs_bits)
    unsigned = BITS_TYPE[size](ALL_BUT_SIGN[size])
    for start in range(0, tensor.bits.size, FINITE_BLOCK):
        if int((tensor.bits[start : start + FINITE_BLOCK] & unsigned).max()) > limit:
            return False
    return True


def validate_names_shapes(weights: Weights, reference: Weights, workers: int = 1) -> None:
    """Refuses weights that must not be loaded into the model that `reference` belongs to.

    Unknown or missing names, another type or shape, infinite or NaN values: InvalidWeightsError with one sentence.
    """
    check_same_forms(forms_of(weights), forms_of(reference))
    names = sorted(weights)
    with ThreadPoolExecutor(workers) as pool:
        for name, finite in zip(names, pool.map(is_finite, (weights[name] for name in names)), strict=True):
            if not finite:
                raise InvalidWeightsError(f"{name} has infinite or NaN values: keep the version before this one")
