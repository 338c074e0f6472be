"""Formats, one file each: the meaning of a packed leaf's arrays, in a tree and in a file. `base.py` holds their
contract."""

from collections.abc import Mapping
from typing import Any, TypeVar

from btc_jax.formats.base import Format as Format
from btc_jax.formats.multilevel import MultilevelFormat as MultilevelFormat
from btc_jax.formats.uniform import UniformFormat as UniformFormat

_F = TypeVar("_F", bound=type[Format])

FORMATS: dict[str, type[Format]] = {form.id: form for form in (UniformFormat, MultilevelFormat)}
"""Every format by the id that files use for it."""


class UnknownFormatError(ValueError):
    """A file names a format that is not registered, or the format of a leaf to be saved is not.

    Attributes:
        id: the name.
    """

    def __init__(self, name: Any):
        known = ", ".join(map(repr, sorted(FORMATS)))
        super().__init__(
            f"unknown format {str(name)[:60]!r}; known are {known}. Register one of your own with "
            "btc_jax.formats.register_format before files of it are saved or loaded"
        )
        self.id = name


def register_format(form: _F) -> _F:
    """Registers a custom format for files; use it as a class decorator.

    Without it, a format works in memory, but `save` refuses its leaves, since no `load` could decode them. A custom
    codec that writes a format of the library needs no registration.

    Args:
        form: a subclass of `Format`, with an `id` of its own.

    Returns:
        The class itself.

    Raises:
        ValueError: if another format has the same `id`.
        TypeError: if it is not a subclass of `Format`, or its `id` is not text.

    Examples:
        >>> import dataclasses
        >>> from btc_jax.formats import UniformFormat, register_format
        >>> @register_format
        ... @dataclasses.dataclass(frozen=True)
        ... class Coarse(UniformFormat):
        ...     id = "doctest-coarse"
        ...     widths: tuple[int, ...] = (2,)
        >>> format_from_json({"id": "doctest-coarse"}).widths
        (2,)
    """
    if not (isinstance(form, type) and issubclass(form, Format)):
        raise TypeError(f"{form!r} is not a subclass of btc_jax.formats.Format")
    name = getattr(form, "id", None)
    if not isinstance(name, str) or not name:
        raise TypeError(f"{form.__name__}.id is {name!r}; it must be text, the name of the format in files")
    known = FORMATS.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (form.__module__, form.__qualname__):
        raise ValueError(f"{form.__name__} has the id {name!r} of {known.__name__}; give it one of its own")
    FORMATS[name] = form
    return form


def check_registered(form: Format) -> None:
    """Refuse a format that `format_from_json` could not recreate.

    Raises:
        UnknownFormatError: if its class is not registered.
    """
    if FORMATS.get(getattr(form, "id", "")) is not type(form):
        raise UnknownFormatError(getattr(form, "id", type(form).__name__))


def format_from_json(config: Mapping[str, Any]) -> Format:
    """The format that `form.to_json()` described.

    Raises:
        UnknownFormatError: if the id is unknown.
        ValueError: if a field is missing, unknown, or out of range.

    Examples:
        >>> format_from_json({"id": "uniform", "block_size": 32, "widths": [4]})
        UniformFormat(block_size=32, widths=(4,), header_dtype='float16')
    """
    fields = dict(config)
    name = fields.pop("id", None)
    if not isinstance(name, str) or name not in FORMATS:
        raise UnknownFormatError(name)
    try:
        return FORMATS[name].from_json(fields)
    except TypeError as error:
        raise ValueError(f"format {name!r} with fields {fields}: {error}") from error
