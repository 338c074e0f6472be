"""Invalid leaves of the codec `multilevel`, and of the orders that transform taps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.forge import SEAL, checkpoint, manifest, packed, packed_format

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]
CODEC = {"id": "multilevel", "block_size": 32, "width": None}


def multilevel(folder: Path, change: Change = lambda record, arrays: None) -> Path:
    """A leaf of four blocks of 32, 0, 1, 2 and 8 bits wide; `change` changes its record and its arrays in place."""
    arrays = {"centre": np.zeros(1, np.float32), "header": np.array([0, 10, 37, 252], np.uint8)}
    arrays["step"] = np.full(1, 0.125, np.float32)
    arrays |= {f"plane{i}": np.full((3 if i == 0 else 2 if i == 1 else 1, 1), 7, np.uint32) for i in range(8)}
    record: dict[str, Any] = {"shape": [4, 4, 8], "codec": dict(CODEC), "order": "stored-taps"}
    change(record, arrays)
    data = SEAL + b"".join(array.tobytes() for array in arrays.values())
    fields = manifest([packed_format(record["codec"], record["order"])], [packed(data, record["shape"])])
    return checkpoint(folder / "m.safetensors", fields, {"w": data})


def _array(folder: Path, name: str, *values: Any, dtype: Any = np.float32) -> Path:
    return multilevel(folder, lambda _, arrays: arrays.update({name: np.array(values, dtype)}))


def _codec(folder: Path, **fields: Any) -> Path:
    return multilevel(folder, lambda record, _: record["codec"].update(fields))


def _without(folder: Path, name: str) -> Path:
    return multilevel(folder, lambda _, arrays: arrays.pop(name))


def _taps(folder: Path, shape: list[int], order: str) -> Path:
    """A leaf of this many blocks without payload."""

    def change(record, arrays):
        record.update(shape=shape, order=order)
        arrays["header"] = np.zeros(-(-int(np.prod(shape)) // 32), np.uint8)
        for name in [name for name in arrays if name.startswith("plane")]:
            del arrays[name]

    return multilevel(folder, change)


def headers_that_ask_for_wider_blocks(folder: Path) -> Path:
    return _array(folder, "header", 0, 10, 252, 252, dtype=np.uint8)


def headers_that_ask_for_narrower_blocks(folder: Path) -> Path:
    return _array(folder, "header", 0, 10, 37, 0, dtype=np.uint8)


def header_of_an_escape_without_payload(folder: Path) -> Path:
    return _array(folder, "header", 3, 10, 37, 252, dtype=np.uint8)


def headers_too_few(folder: Path) -> Path:
    return _array(folder, "header", 0, 10, 37, dtype=np.uint8)


def headers_too_many(folder: Path) -> Path:
    return _array(folder, "header", 0, 10, 37, 252, 0, dtype=np.uint8)


def headers_of_wider_numbers(folder: Path) -> Path:
    return _array(folder, "header", 0, 10, 37, 252, dtype=np.uint32)


def headers_missing(folder: Path) -> Path:
    return _without(folder, "header")


def step_for_each_block(folder: Path) -> Path:
    return _array(folder, "step", 1, 1, 1, 1)


def step_of_other_floats(folder: Path) -> Path:
    return _array(folder, "step", 0.125, dtype=np.float64)


def step_missing(folder: Path) -> Path:
    return _without(folder, "step")


def centre_of_other_floats(folder: Path) -> Path:
    return _array(folder, "centre", 0, dtype=np.float16)


def centre_missing(folder: Path) -> Path:
    return _without(folder, "centre")


def middle_plane_missing(folder: Path) -> Path:
    return _without(folder, "plane3")


def ninth_plane(folder: Path) -> Path:
    return _array(folder, "plane8", [7], dtype=np.uint32)


def width_left_open(folder: Path) -> Path:
    return _codec(folder, width="leaf")


def width_of_nine(folder: Path) -> Path:
    return _codec(folder, width=9)


def width_below_zero(folder: Path) -> Path:
    return _codec(folder, width=-1)


def width_as_text(folder: Path) -> Path:
    return _codec(folder, width="4")


def width_fixed_and_planes_of_all(folder: Path) -> Path:
    return _codec(folder, width=8)


def width_of_none_and_planes_of_all(folder: Path) -> Path:
    return _codec(folder, width=0)


def width_true(folder: Path) -> Path:
    def change(record, arrays):
        record["codec"]["width"] = True
        for i in range(1, 8):
            del arrays[f"plane{i}"]
        arrays["plane0"] = np.full((4, 1), 7, np.uint32)

    return multilevel(folder, change)


def blocks_too_small(folder: Path) -> Path:
    return _codec(folder, block_size=8)


def blocks_too_large(folder: Path) -> Path:
    return _codec(folder, block_size=2**40)


def blocks_of_other_size(folder: Path) -> Path:
    return _codec(folder, block_size=64)


def effort_in_a_file(folder: Path) -> Path:
    return _codec(folder, effort="exhaustive")


def usual_effort_in_a_file(folder: Path) -> Path:
    return _codec(folder, effort="fast")


def slope_in_a_file(folder: Path) -> Path:
    return _codec(folder, slope=0.5)


def taps_too_many(folder: Path) -> Path:
    return _taps(folder, [2, 2, 17, 17], "stored-taps")


def taps_too_many_in_one_axis(folder: Path) -> Path:
    return _taps(folder, [257, 2, 2], "output-major-taps")


def taps_without_end(folder: Path) -> Path:
    """The matrix of the transform would fill the memory."""
    return _taps(folder, [1, 1, 2**17], "stored-taps")


def taps_twice(folder: Path) -> Path:
    return multilevel(folder, lambda record, _: record.update(order="stored-taps-taps"))


def taps_of_no_order(folder: Path) -> Path:
    return multilevel(folder, lambda record, _: record.update(order="-taps"))


def more_weights_than_headers(folder: Path) -> Path:
    return multilevel(folder, lambda record, _: record.update(shape=[2**40, 4, 8]))
