"""Codecs, one file each. `base.py` holds their contract."""

from collections.abc import Mapping
from typing import Any, TypeVar

from btc_jax.codecs.base import Codec as Codec
from btc_jax.codecs.base import Coded as Coded
from btc_jax.codecs.base import Setting as Setting
from btc_jax.codecs.multilevel import Multilevel as Multilevel
from btc_jax.codecs.uniform import Uniform as Uniform

_C = TypeVar("_C", bound=type[Codec])

CODECS: dict[str, type[Codec]] = {codec.id: codec for codec in (Uniform, Multilevel)}
"""Every codec by the id that a file names it with."""


class UnknownCodecError(ValueError):
    """A file names a codec that is not registered, or a codec is to be saved that no file could name.

    Attributes:
        id: the name.
    """

    def __init__(self, name: Any):
        known = ", ".join(map(repr, sorted(CODECS)))
        super().__init__(
            f"unknown codec {str(name)[:60]!r}; known are {known}. Register one of your own with "
            "btc_jax.register_codec before files of it are saved or loaded"
        )
        self.id = name


def register_codec(codec: _C) -> _C:
    """Makes a codec of your own known to files; use it as a decorator of the class.

    Without it a codec works in memory, but `save` refuses its leaves, since no `load` could decode them.

    Args:
        codec: a subclass of `Codec`, with an `id` of its own.

    Returns:
        The class itself.

    Raises:
        ValueError: another codec has the same `id`.
        TypeError: it is not a subclass of `Codec`, or its `id` is not text.

    Example:
        >>> import dataclasses
        >>> from btc_jax import Uniform, register_codec
        >>> @register_codec
        ... @dataclasses.dataclass(frozen=True)
        ... class Coarse(Uniform):
        ...     id = "doctest-coarse"
        ...     low_bits: int = 2
        >>> codec_from_json({"id": "doctest-coarse"}).low_bits
        2
    """
    if not (isinstance(codec, type) and issubclass(codec, Codec)):
        raise TypeError(f"{codec!r} is not a subclass of btc_jax.Codec")
    name = getattr(codec, "id", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"{codec.__name__}.id is {name!r}; it must be text, the name of the codec in files")
    known = CODECS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (codec.__module__, codec.__qualname__):
        raise ValueError(f"{codec.__name__} has the id {name!r} of {known.__name__}; give it one of its own")
    CODECS[name] = codec
    return codec


def check_registered(codec: Codec) -> None:
    """Refuses a codec that `codec_from_json` could not make again.

    Raises:
        UnknownCodecError: its class is not registered.
    """
    if CODECS.get(getattr(codec, "id", "")) is not type(codec):
        raise UnknownCodecError(getattr(codec, "id", type(codec).__name__))


def codec_from_json(config: Mapping[str, Any]) -> Codec:
    """The codec that `codec.to_json()` described.

    Raises:
        UnknownCodecError: the id is unknown.
        ValueError: a field is missing, unknown, or out of range.

    Example:
        >>> codec_from_json({"id": "uniform", "block_size": 32})
        Uniform(block_size=32, low_bits=4, high_bits=8, threshold=0.05, header_dtype='float16')
    """
    fields = dict(config)
    name = fields.pop("id", None)
    if not isinstance(name, str) or name not in CODECS:
        raise UnknownCodecError(name)
    try:
        return CODECS[name].from_json(fields)
    except TypeError as error:
        raise ValueError(f"codec {name!r} with fields {fields}: {error}") from error
