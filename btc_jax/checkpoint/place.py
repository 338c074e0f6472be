"""Puts leaves that were read on devices, each object once."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from btc_jax.tensor import is_packed

Device = jax.Device | Sharding


class Placing:
    """Puts leaves on devices, and gives tied leaves the same object if they go to the same place.

    Args:
        device: a device or a sharding for all leaves, or a function of the path that returns one or `None`.
        dense: decode packed leaves.
        shared: paths under which more than one leaf is stored; only those are kept.
    """

    def __init__(self, device: Device | Callable[[str], Device | None] | None, dense: bool, shared: set[str]):
        self._device, self._dense, self._shared = device, dense, shared
        self._placed: dict[Any, Any] = {}

    def leaf(self, path: str, home: str, read: Callable[[], Any]) -> Any:
        """The leaf of a path that is stored under `home`, which `read` reads."""
        device: Any = self._device(path) if callable(self._device) else self._device
        if home not in self._shared:
            return placed(read(), self._dense, device)
        if (home, device) not in self._placed:
            self._placed[home, device] = placed(read(), self._dense, device)
        return self._placed[home, device]


def placed(leaf: Any, dense: bool, device: Device | None) -> Any:
    """A leaf of numpy arrays on a device, or decoded there."""
    if is_packed(leaf):
        target = device
        if isinstance(device, NamedSharding) and leaf.stacks is None:
            target = NamedSharding(device.mesh, PartitionSpec())
        packed = jax.device_put(leaf, target)
        return jax.device_put(packed.dequantize(), device) if dense else packed
    if isinstance(leaf, np.ndarray) and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype:
        return leaf  # 64-bit numbers stay in numpy where jax would cut them to 32
    return jax.device_put(leaf, device) if isinstance(leaf, np.ndarray | jax.Array) else leaf
