"""Leaves on meshes, encoded on one device.

Bit allocation and the numbers of rows of planes are computed from whole leaves, or whole pieces, on the host. So a leaf
on a mesh that is not cut into its shards is gathered to one device, whatever the kind of the mesh's axes, and its
packed arrays are put back on the mesh.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from btc_jax._typing import Array, PyTree

_P = ParamSpec("_P")
_R = TypeVar("_R")


def staging() -> bool:
    """Whether operations are recorded for later, even those on concrete arrays that a traced function closes over."""
    return isinstance(jax.numpy.zeros((), np.uint8), Tracer)


def refuse_staging(path: str) -> None:
    """Raise if values are to be read on the host while operations are only recorded."""
    if staging():
        raise TypeError(
            f"{path} is read on the host while jax.jit, scan or the like trace a function, even if that closes over "
            "its values; do it before the function is called, or use btc_reconstruct inside"
        )


def gathered(leaf: Array) -> Array:
    """The whole leaf on one device; unchanged if it is there already, or traced."""
    if isinstance(leaf, Tracer) or isinstance(leaf.sharding, SingleDeviceSharding):
        return leaf
    if len(leaf.devices()) == 1:
        return jax.device_put(leaf, SingleDeviceSharding(*leaf.devices()))
    if not leaf.is_fully_replicated:
        leaf = jax.device_put(leaf, NamedSharding(_mesh_of(leaf), PartitionSpec()))
    return leaf.addressable_shards[0].data


def like_leaf(tree: PyTree, leaf: Any) -> PyTree:
    """Puts arrays from the host where `leaf` is: whole on each device of its mesh, and committed only if it is."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, Tracer) or not leaf.committed:
        return jax.device_put(tree)
    alone = isinstance(leaf.sharding, SingleDeviceSharding)
    return jax.device_put(tree, leaf.sharding if alone else NamedSharding(_mesh_of(leaf), PartitionSpec()))


def constants(tree: PyTree) -> PyTree:
    """Arrays that a `jax.shard_map` closes over, off the mesh: it cannot index those whose mesh is not manual."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    return jax.tree.map(lambda array: array if isinstance(array, Tracer) else np.asarray(array), tree)


def off_mesh(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function` of arrays on one device, outside of the mesh that `jax.set_mesh` may have set."""

    @functools.wraps(function)
    def outside(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _one_device(args):
            return function(*args, **kwargs)

    return outside


@contextlib.contextmanager
def _one_device(args: Any) -> Iterator[None]:
    if staging() or jax.sharding.get_abstract_mesh().empty:
        yield
        return
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    device = next((d for array in arrays for d in array.devices()), jax.local_devices()[0])
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # under grad and vmap the mesh has to stay, and does no harm
            mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
            stack.enter_context(jax.set_mesh(mesh))
        yield


def automatic(function: Callable[[Array], Array], leaf: Array) -> Array:
    """`function(leaf)`, of the same shape and sharding, where axes of a mesh may be explicit in the types of arrays."""
    mesh = jax.typeof(leaf).sharding.mesh
    explicit = [name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit]
    if not explicit:
        return function(leaf)
    spec = jax.typeof(leaf).sharding.spec
    inside: Any = jax.sharding.auto_axes(function, axes=tuple(explicit), out_sharding=spec)
    with jax.sharding.use_abstract_mesh(mesh):
        return inside(leaf)


def _mesh_of(leaf: Array) -> Any:
    if isinstance(leaf.sharding, NamedSharding):
        return leaf.sharding.mesh
    # Positional and other shardings have devices and no mesh.
    return Mesh(np.array(sorted(leaf.devices(), key=lambda device: device.id)), ("device",))
