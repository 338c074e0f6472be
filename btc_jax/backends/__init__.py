"""Implementations of encoding and decoding by format and platform. XLA's, on tiles, is the reference everywhere."""

from collections.abc import Callable
from typing import Any, NamedTuple

from btc_jax.backends import xla
from btc_jax.formats import Format
from btc_jax.native import library, why_not


class Backend(NamedTuple):
    """Functions of tiles, with the arguments and results of `btc_jax.backends.xla`."""

    encode: Callable[..., xla.Encoded]
    decode: Callable[..., Any]


REFERENCE = Backend(xla.encode, xla.decode)

_BACKENDS: dict[tuple[type[Format], str], Backend] = {}


def register_backend(form: type[Format], platform: str, backend: Backend) -> None:
    """Register an implementation other than the reference for leaves of a format on a platform such as `"cpu"`."""
    _BACKENDS[form, platform] = backend


def backend() -> str:
    """What decodes packed weights on the CPUs of this process.

    Returns:
        One line, such as `"native kernels: avx512, /path/of/the/library.so"`, or the reason why there are none.

    Raises:
        ValueError: if the environment variable `BTC_JAX_NATIVE` has an unknown value.

    Examples:
        >>> backend().split(":")[0] in ("native kernels", "XLA")
        True
    """
    found = library()
    return f"native kernels: {found.instructions}, {found.path}" if found else f"XLA: {why_not()}"


def backend_for(form: Format, platform: str) -> Backend:
    """What codes tiles of a format on a platform."""
    return _BACKENDS.get((type(form), platform), REFERENCE)
