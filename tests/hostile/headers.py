"""Invalid files: their length, their JSON, the offsets of their tensors."""

import io
import pickle
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.hostile.forge import checkpoint, header_of, honest, signed, text, with_header, write


def empty_file(folder: Path) -> Path:
    (folder / "m.safetensors").touch()
    return folder / "m.safetensors"


def seven_bytes(folder: Path) -> Path:
    (folder / "m.safetensors").write_bytes(b"\x01" * 7)
    return folder / "m.safetensors"


def only_a_length(folder: Path) -> Path:
    return write(folder / "m.safetensors", b"")


def a_folder(folder: Path) -> Path:
    return folder


def a_pickle(folder: Path) -> Path:
    (folder / "m.pkl").write_bytes(pickle.dumps({"a": list(range(100))}))
    return folder / "m.pkl"


def an_npz(folder: Path) -> Path:
    file = io.BytesIO()
    np.savez(file, a=np.ones(9))
    (folder / "m.npz").write_bytes(file.getvalue())
    return folder / "m.npz"


def plain_safetensors(folder: Path) -> Path:
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float32)}, folder / "m.safetensors", {"format": "np"})
    return folder / "m.safetensors"


def header_of_100_mb_claimed(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":0}', length=100_000_000)


def header_of_100_mb(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"' + b"a" * 100_000_000 + b'":0}')


def header_of_all_bits(folder: Path) -> Path:
    return write(folder / "m.safetensors", b"{}", length=2**64 - 1)


def header_longer_than_the_file(folder: Path) -> Path:
    return write(folder / "m.safetensors", b"{}", length=9)


def header_of_many_objects(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":[' + b"{}," * (2**20) + b"{}]}")


def header_of_many_lists(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":[' + b"[]," * (2**20) + b"[]]}")


def header_of_many_parts(folder: Path) -> Path:
    """A manifest of as many small parts as the parser accepts, with its checksum."""
    return _manifest(folder, "[" + ",".join(["[1.5]"] * 750_000) + "]")


def header_of_many_parts_too_many(folder: Path) -> Path:
    return _manifest(folder, "[" + ",".join(["[]"] * 6_000_000) + "]")


def header_of_many_numbers(folder: Path) -> Path:
    return _manifest(folder, "[" + ",".join(["0.5"] * 3_000_000) + "]")


def header_of_many_objects_with_keys(folder: Path) -> Path:
    return _manifest(folder, "[" + ",".join(f'{{"{i:x}":0}}' for i in range(400_000)) + "]")


def header_of_many_texts(folder: Path) -> Path:
    return _manifest(folder, "[" + ",".join(f'["{i:x}"]' for i in range(700_000)) + "]")


def header_of_many_bytes(folder: Path) -> Path:
    """As much text as the reader accepts."""
    return _manifest(folder, '{"version":1,"formats":["' + "a" * (32 * 2**20 - 200) + '"]}')


def _manifest(folder: Path, manifest: str) -> Path:
    return write(folder / "m.safetensors", text({"__metadata__": signed(manifest)}).encode())


def header_of_many_keys(folder: Path) -> Path:
    return write(folder / "m.safetensors", b"{" + b",".join(b'"%x":0' % i for i in range(400_000)) + b"}")


def deep_header(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":' + b"[" * 2_000_000)


def deep_header_that_ends(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":' + b"[" * 990 + b"]" * 990 + b"}")


def deep_objects(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":' * 500_000)


def wrong_utf8(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"\xff\xfe":0}')


def byte_order_mark(folder: Path) -> Path:
    return write(folder / "m.safetensors", b"\xef\xbb\xbf{}")


def not_a_number(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":NaN}')


def endless_number(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"a":' + b"1" * 3_000_000 + b"}")


def no_object(folder: Path) -> Path:
    return write(folder / "m.safetensors", b"[1,2]")


def metadata_no_object(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"__metadata__":"btc_jax"}')


def manifest_no_text(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"__metadata__":{"btc_jax":{}}}')


def manifest_of_half_a_character(folder: Path) -> Path:
    return write(folder / "m.safetensors", b'{"__metadata__":{"btc_jax":"\\ud800","btc_jax_crc32c":"00000000"}}')


def manifest_without_checksum(folder: Path) -> Path:
    return with_header(folder, lambda header: header["__metadata__"].pop("btc_jax_crc32c"))


def duplicate_tensor(folder: Path) -> Path:
    fields, data = honest()
    header = text(header_of(fields))
    header = header[:-1] + ',"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    return write(folder / "m.safetensors", header.encode(), data["a"] + data["w"])


def duplicate_metadata(folder: Path) -> Path:
    fields, data = honest()
    header = text(header_of(fields)).replace("{", '{"__metadata__":{},', 1)
    return write(folder / "m.safetensors", header.encode(), data["a"] + data["w"])


def overlapping_offsets(folder: Path) -> Path:
    def change(header):
        header["w"]["data_offsets"] = header["a"]["data_offsets"]

    return with_header(folder, change)


def escaping_offsets(folder: Path) -> Path:
    return with_header(folder, lambda header: header["a"].update(data_offsets=[2**40, 2**40 + 24]))


def negative_offsets(folder: Path) -> Path:
    return with_header(folder, lambda header: header["a"].update(data_offsets=[-24, 0]))


def backward_offsets(folder: Path) -> Path:
    return with_header(folder, lambda header: header["a"]["data_offsets"].reverse())


def offsets_that_overflow(folder: Path) -> Path:
    return with_header(folder, lambda header: header["a"].update(data_offsets=[2**64 - 24, 2**64]))


def tensor_of_another_shape(folder: Path) -> Path:
    return with_header(folder, lambda header: header["a"].update(shape=[3, 2]))


def tensor_of_another_dtype(folder: Path) -> Path:
    return with_header(folder, lambda header: header["a"].update(dtype="I32"))


def tensor_too_many(folder: Path) -> Path:
    return with_header(folder, lambda header: header.update(b={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}))


def tensor_missing(folder: Path) -> Path:
    return with_header(folder, lambda header: header.pop("a"))


def tensors_in_another_order(folder: Path) -> Path:
    return with_header(folder, lambda header: header.update(a=header.pop("a")))


def spaces_in_the_header(folder: Path) -> Path:
    fields, data = honest()
    header = text(header_of(fields)).replace(":", ": ", 1)
    return write(folder / "m.safetensors", header.encode(), data["a"] + data["w"])


def too_little_data(folder: Path) -> Path:
    path = checkpoint(folder / "m.safetensors", *honest())
    path.write_bytes(path.read_bytes()[:-1])
    return path


def too_much_data(folder: Path) -> Path:
    path = checkpoint(folder / "m.safetensors", *honest())
    path.write_bytes(path.read_bytes() + b"\0")
    return path
