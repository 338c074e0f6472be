"""Codecs, one file each. `base.py` holds their contract."""

import math
from collections.abc import Mapping
from typing import Any

from btc_jax.codecs.base import Codec as Codec
from btc_jax.codecs.base import Coded as Coded
from btc_jax.codecs.base import LeafParams as LeafParams
from btc_jax.codecs.multilevel import Multilevel as Multilevel
from btc_jax.codecs.statistics import BlockStatistics as BlockStatistics
from btc_jax.codecs.statistics import LeafStatistics as LeafStatistics
from btc_jax.codecs.statistics import Leaves as Leaves
from btc_jax.codecs.uniform import Uniform as Uniform
from btc_jax.formats import Format, MultilevelFormat, UniformFormat

CODECS: dict[str, type[Codec]] = {codec.id: codec for codec in (Uniform, Multilevel)}
"""The codecs of the library by id."""


def codec_for(form: Format) -> Codec:
    """A codec that encodes blocks into this format of the library, at any slope.

    Raises:
        TypeError: if it is another format.

    Examples:
        >>> codec_for(UniformFormat(32, (4, 8)))
        Uniform(block_size=32, low_bits=4, high_bits=8, threshold='auto', header_dtype='float16')
    """
    if type(form) is MultilevelFormat:
        return Multilevel(form.block_size, form.width)
    if type(form) is not UniformFormat:
        raise TypeError(f"no codec of the library writes {form!r}")
    low, high = form.widths[0], form.widths[-1]
    dtype: Any = form.header_dtype  # one of the two that `Uniform` takes, or there would be no such format
    if low < high:
        return Uniform(form.block_size, low, high, "auto", dtype)
    one = (low, low + 1, math.inf) if low < 8 else (low - 1, low, 0.0)
    return Uniform(form.block_size, *one, dtype)


def codec_from_json(config: Mapping[str, Any]) -> Codec:
    """The codec of the library that `codec.to_json()` described, as in the records of plans and searches.

    Raises:
        ValueError: if the id is unknown, or a field is missing, unknown, or out of range.

    Examples:
        >>> codec_from_json({"id": "uniform", "block_size": 32})
        Uniform(block_size=32, low_bits=4, high_bits=8, threshold=0.05, header_dtype='float16')
    """
    fields = dict(config)
    name = fields.pop("id", None)
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"unknown codec {str(name)[:60]!r}; known are {', '.join(map(repr, sorted(CODECS)))}")
    try:
        return CODECS[name].from_json(fields)
    except TypeError as error:
        raise ValueError(f"codec {name!r} with fields {fields}: {error}") from error
