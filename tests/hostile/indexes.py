"""Invalid indexes of several files."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.forge import checkpoint, crc, dense, dense_format, manifest, signed, tensors, text


def _shard(path: Path, name: str, number: float) -> tuple[list[Any], list[str]]:
    """Write a shard; return its entry in an index, and its tensors."""
    array = np.full((2, 3), number, np.float32)
    fields = manifest([dense_format()], [dense(name, array)]) | {"tree": None}
    checkpoint(path, fields, {name: array.tobytes()})
    return [path.name, crc(text(fields).encode()), 1], [tensor[0] for tensor in tensors(fields)]


def index(folder: Path, change: Callable[[list[Any]], Any] = lambda shards: None, **fields: Any) -> Path:
    """An index of two shards with valid checksums; `change` changes its list of files."""
    listed, homes = [], {}
    for i, name in enumerate("ab"):
        entry, tensors = _shard(folder / f"m-{i}.safetensors", name, i)
        listed.append(entry)
        homes |= dict.fromkeys(tensors, entry[0])
    changed = change(listed)
    listed = listed if changed is None else changed
    written = {"version": 1, "tree": ["dict", ["a", "b"], [0, 1]], "shards": listed} | fields
    path = folder / "m.safetensors.index.json"
    path.write_text(text({"metadata": signed(written) | {"total_size": 48}, "weight_map": homes}))
    return path


def _named(folder: Path, name: Any) -> Path:
    return index(folder, lambda shards: shards[0].__setitem__(0, name))


def shard_above(folder: Path) -> Path:
    (folder / "inner").mkdir()
    _shard(folder / "x.safetensors", "a", 0)
    return _named(folder / "inner", "../x.safetensors")


def shard_below(folder: Path) -> Path:
    (folder / "inner").mkdir()
    _shard(folder / "inner/x.safetensors", "a", 0)
    return _named(folder, "inner/x.safetensors")


def shard_absolute(folder: Path) -> Path:
    _shard(folder / "x.safetensors", "a", 0)
    return _named(folder, str(folder / "x.safetensors"))


def shard_missing(folder: Path) -> Path:
    return _named(folder, "m-2.safetensors")


def shard_of_another_checkpoint(folder: Path) -> Path:
    path = index(folder)
    _shard(folder / "m-0.safetensors", "a", 7)
    return path


def shard_twice(folder: Path) -> Path:
    return index(folder, lambda shards: [shards[0], shards[0]])


def shard_many_times(folder: Path) -> Path:
    return index(folder, lambda shards: shards * 20_000)


def shards_without_end(folder: Path) -> Path:
    return index(folder, lambda shards: [[f"{i}.safetensors", "00000000", 1] for i in range(50_000)])


def shards_of_all_leaves(folder: Path) -> Path:
    """As many files and leaves as the reader accepts, and an index that is wrong about the last."""
    listed, homes, array = [], {}, np.zeros((1,), np.uint8)
    for i in range(4096):
        names = [f"model.layers.{i}.mlp.experts.{j}.gate_proj.weight" for j in range(24)]
        fields = manifest([dense_format("uint8")], [dense(name, array) for name in names]) | {"tree": None}
        file = checkpoint(folder / f"m-{i}.safetensors", fields, dict.fromkeys(names, array.tobytes()))
        listed.append([file.name, crc(text(fields).encode()), len(names)])
        homes |= dict.fromkeys(names, file.name)
    written = {"version": 1, "tree": ["paths", len(homes), 0], "shards": listed}
    homes[next(reversed(homes))] = "m-0.safetensors"
    path = folder / "m.safetensors.index.json"
    path.write_text(text({"metadata": signed(written) | {"total_size": len(homes)}, "weight_map": homes}))
    return path


def shard_left_out(folder: Path) -> Path:
    return index(folder, lambda shards: shards[:1])


def shards_exchanged(folder: Path) -> Path:
    return index(folder, lambda shards: shards[::-1])


def shard_of_another_count(folder: Path) -> Path:
    return index(folder, lambda shards: shards[0].__setitem__(2, 2))


def shard_count_true(folder: Path) -> Path:
    return index(folder, lambda shards: shards[0].__setitem__(2, True))


def shard_of_another_kind(folder: Path) -> Path:
    (folder / "m.txt").write_text("secret")
    return _named(folder, "m.txt")


def shard_with_nul(folder: Path) -> Path:
    return _named(folder, "m\0.safetensors")


def shard_of_a_long_name(folder: Path) -> Path:
    return _named(folder, "m" * 5000 + ".safetensors")


def shard_of_half_a_character(folder: Path) -> Path:
    return _named(folder, "\ud800.safetensors")


def shard_no_text(folder: Path) -> Path:
    return _named(folder, 7)


def shard_a_folder(folder: Path) -> Path:
    (folder / "x.safetensors").mkdir()
    return _named(folder, "x.safetensors")


def shard_a_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "x.safetensors")
    return _named(folder, "x.safetensors")


def shard_a_circle(folder: Path) -> Path:
    (folder / "x.safetensors").symlink_to("x.safetensors")
    return _named(folder, "x.safetensors")


def shard_with_a_leaf_of_another(folder: Path) -> Path:
    entry, _ = _shard(folder / "x.safetensors", "a", 0)
    return index(folder, lambda shards: [*shards, entry])


def shards_no_list(folder: Path) -> Path:
    return index(folder, lambda shards: {"a": 1})


def shards_too_long(folder: Path) -> Path:
    return index(folder, lambda shards: shards[0].append(1))


def index_of_newer_version(folder: Path) -> Path:
    return index(folder, version=2)


def index_with_another_tree(folder: Path) -> Path:
    return index(folder, tree=["dict", ["a"], [0]])


def index_without_a_tree(folder: Path) -> Path:
    return index(folder, tree=None)


def index_with_an_infinite_tree(folder: Path) -> Path:
    path = folder / "m.safetensors.index.json"
    infinite = text({"version": 1, "tree": 0, "shards": []}).replace(":0,", ":1e999,")
    path.write_text(text({"metadata": signed(infinite) | {"total_size": 0}, "weight_map": {}}))
    return path


def index_of_another_map(folder: Path) -> Path:
    path = index(folder)
    path.write_text(path.read_text().replace('"b":"m-1', '"b":"m-0'))
    return path


def index_of_another_size(folder: Path) -> Path:
    path = index(folder)
    path.write_text(path.read_text().replace(":48}", ":49}"))
    return path


def index_of_hugging_face(folder: Path) -> Path:
    path = folder / "m.safetensors.index.json"
    path.write_text(text({"metadata": {"total_size": 48}, "weight_map": {"a": "m-0.safetensors"}}))
    return path


def index_too_large(folder: Path) -> Path:
    path = folder / "m.safetensors.index.json"
    path.write_bytes(b'{"a":"' + b"a" * 100_000_000 + b'"}')
    return path


def index_deep(folder: Path) -> Path:
    path = folder / "m.safetensors.index.json"
    path.write_bytes(b"[" * 4_000_000)
    return path


def index_of_wrong_utf8(folder: Path) -> Path:
    path = folder / "m.safetensors.index.json"
    path.write_bytes(b'{"metadata":"\xff"}')
    return path


def index_empty(folder: Path) -> Path:
    path = folder / "m.safetensors.index.json"
    path.touch()
    return path


def index_a_folder(folder: Path) -> Path:
    path = folder / "m.safetensors.index.json"
    path.mkdir()
    return path
