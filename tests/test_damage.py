"""No damage is silent: each flipped bit, missing byte and extra byte of a checkpoint is an error.

No flip is harmless. The length and the whole header are compared, byte for byte, with what the manifest implies,
including trailing spaces; the manifest and each tensor have a checksum; and there is nothing between or after them.
"""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btc_jax import Uniform, load, open_checkpoint, save, verify
from btc_jax.checkpoint import BTCFormatError, BTCIntegrityError
from btc_jax.packing import quantize_leaf

FLIPS = 1000


def tree():
    weights = jnp.asarray(np.linspace(-1, 1, 400, dtype=np.float32).reshape(20, 20) ** 3)
    return {
        "packed": (packed := quantize_leaf(weights, Uniform(32))),
        "tied": packed,
        "dense": np.arange(40, dtype=np.float32),
        "complex": np.ones(5, np.complex64),
        "half": jnp.ones(7, jnp.bfloat16),
        "bytes": np.arange(3, dtype=np.uint8),
        "none": None,
        "number": 3,
        "empty": np.zeros((0, 3), np.float32),
        "key": jax.random.key(0),
    }


def parts(file: Path) -> dict[str, range]:
    """The parts of a file that a flip can hit."""
    data = file.read_bytes()
    if file.suffix == ".json":
        return {"index": range(len(data))}
    start = 8 + int.from_bytes(data[:8], "little")
    text = data[8:start]
    tensors = text.index(b'"btc_jax_crc32c":"') + 28
    end = len(text.rstrip(b" "))
    return {
        "length": range(8),
        "manifest": range(8, 8 + tensors),
        "header": range(8 + tensors, 8 + end),
        "padding": range(8 + end, start),
        "payload": range(start, len(data)),
    }


def read_all(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for leaf in checkpoint.records:
            checkpoint.read_numpy(leaf)


@pytest.fixture(params=[None, 300], ids=["file", "files"])
def checkpoint(request, tmp_path):
    """A checkpoint, and its files."""
    path = tmp_path / "m.safetensors"
    tree_ = tree()
    while True:  # until a header has padding, so that some flips can hit it
        save(path, tree_, max_shard_bytes=request.param)
        files = sorted(tmp_path.iterdir())
        if any(len(places.get("padding", ())) > 1 for places in map(parts, files)):
            return path, files
        tree_["number"] *= 10


def test_every_flipped_bit_is_an_error(checkpoint):
    path, files = checkpoint
    rng, hit = random.Random(0), {}
    good = {file: file.read_bytes() for file in files}
    places = [(file, part, span) for file in files for part, span in parts(file).items() if span]
    names = {part for _, part, _ in places}
    for flip in range(FLIPS):
        # Half of the flips fall anywhere; the others are spread evenly over the parts, since some are small.
        if flip % 2:
            file, part, span = places[flip // 2 % len(places)]
            offset = rng.choice(span)
        else:
            file = rng.choices(files, [len(good[file]) for file in files])[0]
            offset = rng.randrange(len(good[file]))
            part = next(part for part, span in parts(file).items() if offset in span)
        bad = bytearray(good[file])
        bad[offset] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(BTCFormatError) as caught:
            read_all(path)
        if part == "payload":
            assert caught.type is BTCIntegrityError
        hit[part] = hit.get(part, 0) + 1
        file.write_bytes(good[file])
    read_all(path)
    assert hit.keys() == names
    assert sum(hit.values()) == FLIPS
    assert min(hit.values()) > 20, hit


def test_every_bit_of_length_and_padding(checkpoint):
    path, files = checkpoint
    for file in files:
        good, spans = file.read_bytes(), parts(file)
        for offset in (*spans.get("length", ()), *spans.get("padding", ())):
            for bit in range(8):
                bad = bytearray(good)
                bad[offset] ^= 1 << bit
                file.write_bytes(bad)
                with pytest.raises(BTCFormatError):
                    open_checkpoint(path)
        file.write_bytes(good)
    read_all(path)


def test_every_truncation_and_every_byte_too_many(checkpoint):
    path, files = checkpoint
    with open_checkpoint(path) as opened:
        starts = {file.path: {file.start + place for place in file.places.values()} for file in opened._files}
    for file in files:
        good = file.read_bytes()
        ends = {0, 1, 7, 8, 9, len(good) - 1, *range(10, len(good), 97)}
        for boundary in starts.get(file, {100}):
            ends |= {boundary - 1, boundary, boundary + 1}
        for end in sorted(end for end in ends if end < len(good)):
            file.write_bytes(good[:end])
            with pytest.raises(BTCFormatError):
                open_checkpoint(path)
        for more in (b"\0", b" ", b"\n", bytes(8), bytes(4096)):
            file.write_bytes(good + more)
            with pytest.raises(BTCFormatError):
                open_checkpoint(path)
        file.write_bytes(good)
    read_all(path)


def test_messages_name_what_is_damaged(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, tree())
    data = bytearray(path.read_bytes())
    with open_checkpoint(path) as opened:
        file = opened._files[0]
        data[file.start + file.places["packed"] + 100] ^= 1
        data[file.start + file.places["dense"]] ^= 1
    path.write_bytes(data)
    with pytest.raises(BTCIntegrityError, match=r"m\.safetensors: tensor 'dense' does not match its checksum"):
        load(path)
    result = verify(path)
    assert (result.ok, len(result.damaged), result.leaves) == (False, 2, 9)
    assert "'dense'" in result.damaged[0]
    assert "'packed'" in result.damaged[1]
    assert not result.unknown_formats
    assert set(load(path, select=["half", "bytes"])) == {"half", "bytes"}
    assert load(path, checksums=False)["dense"].shape == (40,)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BTCFormatError, match="truncated"):
        load(path)


def test_a_shard_lost_or_exchanged(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, tree(), max_shard_bytes=300)
    shards = sorted(tmp_path.glob("*of*"))
    first, second = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(second)
    with pytest.raises(BTCIntegrityError, match="is not the file that was saved with this index"):
        load(path)
    shards[0].write_bytes(first)
    shards[1].unlink()
    with pytest.raises(BTCFormatError, match="missing next to it"):
        load(path)


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, tree())
    with open_checkpoint(path) as opened:
        path.write_bytes(path.read_bytes()[:-1])
        (last,) = (leaf for leaf, record in opened.records.items() if record.tensors[-1:] == (_last_tensor(opened),))
        with pytest.raises(BTCFormatError, match="truncated"):
            opened.read_numpy(last)


def _last_tensor(opened):
    return opened._files[0].manifest.tensors()[-1]
