"""Codecs, one file each. `base.py` holds their contract."""

from collections.abc import Mapping
from typing import Any

from btc_jax.codecs.base import Codec as Codec
from btc_jax.codecs.base import Coded as Coded
from btc_jax.codecs.base import Setting as Setting
from btc_jax.codecs.multilevel import Multilevel as Multilevel
from btc_jax.codecs.uniform import Uniform as Uniform

CODECS: dict[str, type[Codec]] = {codec.id: codec for codec in (Uniform, Multilevel)}
"""Every codec by the id that a file names it with."""


def codec_from_json(config: Mapping[str, Any]) -> Codec:
    """The codec that `codec.to_json()` described.

    Raises:
        ValueError: the id is unknown, or a field is missing, unknown, or out of range.

    Example:
        >>> codec_from_json({"id": "uniform", "block_size": 32})
        Uniform(block_size=32, low_bits=4, high_bits=8, threshold=0.05, header_dtype='float16')
    """
    fields = dict(config)
    name = fields.pop("id", None)
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}; this version of btc_jax knows {sorted(CODECS)}")
    try:
        return CODECS[name].from_json(fields)
    except TypeError as error:
        raise ValueError(f"codec {name!r} with fields {fields}: {error}") from error
