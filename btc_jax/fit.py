"""Packed leaves in the shapes of others, so that a function compiled for one tree accepts others of the same model.

Under `jax.jit` the numbers of rows of planes are shapes. A leaf that is packed like another gets as many bits as fit
into the planes of that one, and rows without a block where there is room left. They are counted in `nbytes`, and are
not stored in files.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from btc_jax import coding
from btc_jax._mesh import like_leaf, off_mesh, refuse_staging
from btc_jax.allocate.sample import Sample, samples_of
from btc_jax.codecs import Leaves, codec_for
from btc_jax.codecs.statistics import whole
from btc_jax.coding import Packed, Recipe
from btc_jax.decoding import wanted_rows
from btc_jax.formats import Format
from btc_jax.packing import placed
from btc_jax.pieces import Cut, parts_of
from btc_jax.planes import fitted, plane_specs, row_layout
from btc_jax.processes import is_spread
from btc_jax.seal import SEAL
from btc_jax.tensor import BTCTensor, is_packed, pieces_in
from btc_jax.tiles import Blocks, blocks_in

_LOWEST, _HIGHEST = -26.0, 30.0
"""Range of slopes as powers of two; at the last, no bit is worth its cost."""
_SAMPLED = 2**14
"""Sampled blocks of a leaf, to find the slope roughly."""
_WASTE = 0.1
"""Fraction of the bytes of a tree that may stay empty."""
_MOST = 0.1
"""The largest room that can be requested, as a fraction of the bytes."""
_STEP = 2.0**-6
"""Octaves by which a slope that leaves too many rows is raised."""


def leaves_like(leaves: Iterable[tuple[str, Any]], models: Mapping[str, Any]) -> list[Any]:
    """Each leaf, given with its path, packed as the model of the same path, or left as it is where that is dense.

    Raises:
        ValueError: if a leaf does not fit, or too much of the models would stay empty.
    """
    made: dict[tuple[int, int], BTCTensor] = {}  # one object at two paths stays one

    def packed(path: str, leaf: Any) -> Any:
        if not is_packed(model := models[path]):
            return leaf
        refuse_staging(path)
        key = id(leaf), id(model)
        if key not in made:
            made[key] = packed_like(leaf, model, path)
        return made[key]

    found = [packed(*pair) for pair in leaves]
    _refuse_waste(made.values())
    return found


def packed_like(leaf: Any, like: BTCTensor, path: str) -> BTCTensor:
    """A leaf in the format, order and shapes of a packed one, with as many bits as fit in.

    Args:
        leaf: weights of the shape and dtype of `like`; or a packed leaf of its format, which is only given room.

    Raises:
        ValueError: if shape or dtype differ, or a packed leaf has another format or order, or more rows.
        TypeError: if the format is not one of the library's.
    """
    _refuse_spread(leaf if not is_packed(leaf) else leaf.seal, like.seal, path)
    if (np.shape(leaf), np.dtype(leaf.dtype)) != (like.shape, np.dtype(like.dtype)):
        found, wanted = (f"{np.dtype(x.dtype)}{list(np.shape(x))}" for x in (leaf, like))
        raise ValueError(f"{path} is {found}, and the leaf that it is to be packed like is {wanted}")
    if like.stacks is not None:
        return _pieces_like(leaf, like, like.stacks, path)
    if not is_packed(leaf):
        leaf = _packed(leaf, like, path)
    if (leaf.format, leaf.order) != (like.format, like.order):
        raise ValueError(
            f"{path} is packed as {leaf.format!r} in order {leaf.order!r}, and not as {like.format!r} in order "
            f"{like.order!r}; quantize its weights with like="
        )
    return _within(leaf, like, path)


def _refuse_spread(*arrays_and_path: Any) -> None:
    *arrays, path = arrays_and_path
    if any(map(is_spread, arrays)):
        raise ValueError(
            f"{path} lies in several processes, where leaves have no room and are not packed like others; leave out "
            "room and like, and share how bits are allocated instead: policy=btc_allocate(params, bits=4.5)"
        )


def _pieces_like(leaf: Any, like: BTCTensor, stacks: tuple[int, ...], path: str) -> BTCTensor:
    """Each piece of a leaf packed like the one of another in its place."""
    cut, models = Cut(like.pieces, stacks), pieces_in(like)
    if is_packed(leaf):
        if (leaf.pieces, leaf.stacks) != (like.pieces, like.stacks):
            raise ValueError(
                f"{path} is cut into {leaf.pieces} pieces, and not into {like.pieces}; quantize its weights"
            )
        parts: Mapping[Any, Any] = pieces_in(leaf)
    else:
        parts = parts_of(leaf, cut)
    found = {index: packed_like(part, models[index], path) for index, part in parts.items()}
    arrays = {index: jax.tree.map(np.asarray, (one.planes, one.header, one.seal)) for index, one in found.items()}
    planes, header, seal = placed(arrays, cut, leaf.seal if is_packed(leaf) else leaf)
    return dataclasses.replace(like, planes=planes, header=header, seal=seal)


def _refuse_waste(leaves: Iterable[BTCTensor]) -> None:
    """Refuse packed leaves whose planes stay largely empty, since they were sized for leaves of another kind."""
    # Planes of pieces are as long as those of the largest one, whatever their own.
    sizes = [(leaf.nbytes, _spare_nbytes(leaf)) for leaf in leaves if leaf.stacks is None]
    whole, spare = sum(nbytes for nbytes, _ in sizes), sum(nbytes for _, nbytes in sizes)
    if spare > _WASTE * whole:
        raise ValueError(
            f"few blocks fit into the planes of the tree that this is to be packed like: {100 * spare / whole:.0f} % "
            "of its bytes would stay empty. Quantize that tree with room=0.01; or this one without like, if its "
            "weights are of another kind"
        )


def _spare_nbytes(leaf: BTCTensor) -> int:
    """Bytes of rows without a block."""
    rows = zip(_room(leaf), wanted_rows(leaf.format, np.asarray(leaf.widths)), _row_nbytes(leaf.format), strict=True)
    return sum((found - wanted) * nbytes for found, wanted, nbytes in rows)


def _packed(leaf: Any, like: BTCTensor, path: str) -> BTCTensor:
    form, room = like.format, _room(like)
    recipe = Recipe(codec_for(form), form, like.order)
    packed = coding.pack(leaf, recipe, path) if len(form.widths) == 1 else _packed_within(room, leaf, recipe, path)
    planes, header, seal = like_leaf((packed.planes, packed.header, SEAL), leaf)
    return BTCTensor(planes, header, like.shape, np.dtype(like.dtype), form, like.order, seal)


def _packed_within(room: list[int], leaf: Any, recipe: Recipe, path: str) -> Packed:
    octave = _octave(leaf, recipe, room)
    while True:
        packed = coding.pack(leaf, recipe._replace(slope=2.0**octave), path)
        rows = [len(plane) for plane in packed.planes]
        if octave > _HIGHEST or all(count <= most for count, most in zip(rows, room, strict=False)):
            return packed
        octave += _STEP


@off_mesh
def _octave(leaf: Any, recipe: Recipe, room: list[int]) -> float:
    """The least slope at which all rows fit, as a power of two, estimated from sampled blocks."""
    blocks = blocks_in(leaf, recipe.form.block_size, recipe.order)
    statistics = coding.statistics_in(blocks)
    (sample,) = samples_of(blocks, statistics, [_SAMPLED])
    low, high = _LOWEST, _HIGHEST
    while high - low > _STEP:
        middle = (low + high) / 2
        rows = _rows_at(2.0**middle, sample, recipe, whole(statistics, Leaves()))
        fits = all(count <= most for count, most in zip(rows, room, strict=True))
        low, high = (low, middle) if fits else (middle, high)
    return high


def _rows_at(slope: float, sample: Sample, recipe: Recipe, leaf: Any) -> list[int]:
    leaf_params = coding.params_of_leaf(recipe, leaf, sample.statistics, Leaves(), np.float64(slope))
    blocks = Blocks(sample.rows.reshape(-1), sample.spare, recipe.form.block_size)
    widths = np.concatenate([tile.widths for tile in coding.encoded(blocks, recipe, leaf_params, 1.0)])
    return [round(float(sample.share[widths >= spec.end].sum())) for spec in plane_specs(recipe.form.widths)]


def _room(like: BTCTensor) -> list[int]:
    """Rows of each plane of the format."""
    rows = [len(plane) for plane in like.planes]
    return rows + [0] * (len(plane_specs(like.format.widths)) - len(rows))


def check_room(room: float) -> None:
    if not 0 <= room <= _MOST:
        raise ValueError(f"room is {room}; it is a part of the bytes of a leaf, from 0 to {_MOST}, such as 0.01")


def with_room(leaf: BTCTensor, part: float) -> BTCTensor:
    """The leaf with room for more blocks in its planes, at most this part of its bytes, spread over them evenly."""
    _refuse_spread(leaf.seal, "a leaf")
    if leaf.stacks is None:
        return _with_room(leaf, wanted_rows(leaf.format, np.asarray(leaf.widths)), part)
    found = {index: _with_room(piece, _room(piece), part) for index, piece in pieces_in(leaf).items()}
    arrays = {index: jax.tree.map(np.asarray, (one.planes, one.header, one.seal)) for index, one in found.items()}
    planes, header, seal = placed(arrays, Cut(leaf.pieces, leaf.stacks), leaf.seal)
    return dataclasses.replace(leaf, planes=planes, header=header, seal=seal)


def _with_room(leaf: BTCTensor, rows: list[int], part: float) -> BTCTensor:
    more = [int(part * leaf.nbytes / len(rows) / nbytes) for nbytes in _row_nbytes(leaf.format)]
    return _roomy(leaf, [min(count + spare, leaf.num_blocks) for count, spare in zip(rows, more, strict=True)])


def _within(leaf: BTCTensor, like: BTCTensor, path: str) -> BTCTensor:
    """A packed leaf in the shapes of another."""
    rows, room = wanted_rows(leaf.format, np.asarray(leaf.widths)), _room(like)
    if any(count > most for count, most in zip(rows, room, strict=True)):
        raise ValueError(
            f"{path} has {rows} rows in its planes, more than the {room} of the leaf that it is to be packed like; "
            "quantize its weights with like="
        )
    return _roomy(leaf, room[: len(like.planes)])


def _roomy(leaf: BTCTensor, rows: list[int]) -> BTCTensor:
    """With so many rows in the first planes."""
    widths, planes = np.asarray(leaf.widths), [np.asarray(plane) for plane in leaf.planes]
    for spec, nbytes in list(zip(plane_specs(leaf.format.widths), _row_nbytes(leaf.format), strict=True))[
        len(planes) :
    ]:
        layout = row_layout(leaf.format.block_size, spec.bits)
        planes.append(np.zeros((0, nbytes // layout.dtype.itemsize), layout.dtype))
    present = [widths >= spec.end for spec in plane_specs(leaf.format.widths)]
    planes = [fitted(*plane) for plane in zip(planes, present, rows, strict=False)]
    kept = max((i + 1 for i, plane in enumerate(planes) if len(plane)), default=0)
    return dataclasses.replace(leaf, planes=like_leaf(tuple(planes[:kept]), leaf.seal))


def _row_nbytes(form: Format) -> list[int]:
    """Bytes of a row of each plane."""
    return [row_layout(form.block_size, spec.bits).nbytes for spec in plane_specs(form.widths)]
