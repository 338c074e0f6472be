"""How bits are allocated over the leaves of a tree: the target, and how much the error of each leaf counts."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

import jax
import numpy as np

from btc_jax._errors import ArgumentError, ConflictingArgumentsError
from btc_jax._paths import leaf_path
from btc_jax._typing import PyTree
from btc_jax.allocate.target import Target, target_of

_TARGETS = ("bits", "size", "rmse", "sqnr_db")
_OF_ANSWERS = ("bits", "size")
"""Targets that leave open which error is minimized; the others name the error of the weights."""


class Goal(TypedDict, total=False):
    """The keyword arguments of bit allocation: at most one target, and how errors count. `sharing_of` makes the object.

    Attributes:
        bits: effective bits per weight over the leaves that are packed, at most; everything stored counts.
        size: bytes of the whole tree at most, dense leaves included: a number, or `"25MB"`. A file adds its header.
        rmse: root mean squared error over the packed weights at most, in their units, before they are rounded to the
            dtype of their leaf.
        sqnr_db: signal to quantization noise over the packed weights at least, in dB.
        sensitivity: how much errors of a leaf move the answers of the model: a tree of numbers, from `btc_sensitivity`;
            `"shape"`, estimated from the shapes and scales of the leaves; or `"equal"`, for the least error of the
            weights, whatever the answers. `None` is `"shape"` for `bits` and `size`, and `"equal"` for the others.
        taps: whether convolution kernels may be transformed over their taps where that lowers the cost.
    """

    bits: float | None
    size: float | str | None
    rmse: float | None
    sqnr_db: float | None
    sensitivity: PyTree | Literal["shape", "equal"] | None
    taps: bool


class Sharing(NamedTuple):
    """The same, checked.

    Attributes:
        target: the target, or `None` for the codecs' default.
        sensitivity: numbers by path, or one of the words.
        taps: as in `Goal`.
    """

    target: Target | None = None
    sensitivity: Mapping[str, float] | Literal["shape", "equal"] = "shape"
    taps: bool = True

    def sensitivities(self, paths: Iterable[str]) -> list[float] | None:
        """The sensitivity of each leaf; `None` if they were not measured.

        Raises:
            ValueError: if the sensitivities are of another tree.
        """
        known = self.sensitivity
        if isinstance(known, str):
            return None
        paths = list(paths)
        if missing := [path for path in paths if path not in known]:
            has = f"it has {next(iter(known))!r}" if known else "it is empty"
            raise ArgumentError(
                "sensitivity", f"is of another tree: it has no number for {missing[0]}; {has}, of {len(known)} leaves"
            )
        return [known[path] for path in paths]


def sharing_of(**goal: Unpack[Goal]) -> Sharing:
    """What the keywords say.

    Raises:
        ValueError: if several targets are given, or one is not a positive number; or if sensitivities are negative or
            not numbers, or given for a target that names the error of the weights.
        TypeError: if there is no keyword of that name.

    Examples:
        >>> sharing_of(bits=4.5, sensitivity={"a": {"kernel": 2.0}}).sensitivity
        {'a/kernel': 2.0}
    """
    for name in goal.keys() - Goal.__annotations__.keys():
        known = ", ".join(Goal.__annotations__)
        raise TypeError(f"unexpected keyword argument {name!r}; the keywords of targets are {known}")
    target = target_of(**{name: goal.get(name) for name in _TARGETS})
    given = goal.get("sensitivity")
    of_answers = target is None or target.kind in _OF_ANSWERS
    if given is None:
        given = "shape" if of_answers else "equal"
    elif not of_answers and given != "equal":
        assert target is not None
        raise ConflictingArgumentsError(
            {"sensitivity": given if isinstance(given, str) else "a tree", target.kind: target.value},
            "are given; a target of the error asks for the least error of the weights: give bits or size instead",
        )
    sensitivity = _word(given) if isinstance(given, str | Real) else _by_path(given)
    return Sharing(target, sensitivity, bool(goal.get("taps", True)))


def _word(word: Any) -> Literal["shape", "equal"]:
    if word not in ("shape", "equal"):
        raise ArgumentError("sensitivity", f"is {word!r}; it can be a tree of numbers, 'shape' or 'equal'")
    return word


def _by_path(tree: PyTree) -> dict[str, float]:
    found = {}
    for keys, value in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = leaf_path(keys)
        number = _number(value)
        if not 0 <= number < math.inf:
            what = f"{value!r:.40}" if np.ndim(value) == 0 else f"an array of shape {np.shape(value)}"
            raise ArgumentError("sensitivity", f"of {path} is {what}; it must be a number of 0 or more")
        found[path] = number
    return found


def _number(value: Any) -> float:
    if isinstance(value, Real) or (hasattr(value, "dtype") and np.ndim(value) == 0):
        return float(value)
    return math.nan
