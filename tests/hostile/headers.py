"""Lies of the file itself: its length, its JSON, the places of its tensors."""

import io
import pickle
from pathlib import Path

import numpy as np
import safetensors.numpy

from tests.hostile.forge import checkpoint, header_of, honest, text, with_header, write


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
    return write(folder / "m.safetensors", header.encode(), b"".join(data.values()))


def duplicate_metadata(folder: Path) -> Path:
    fields, data = honest()
    header = text(header_of(fields)).replace("{", '{"__metadata__":{},', 1)
    return write(folder / "m.safetensors", header.encode(), b"".join(data.values()))


def overlapping_offsets(folder: Path) -> Path:
    def change(header):
        header["w#plane0"]["data_offsets"] = header["w#plane1"]["data_offsets"]

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
    return with_header(folder, lambda header: header.update({"w#wide": header.pop("w#wide")}, a=header.pop("a")))


def spaces_in_the_header(folder: Path) -> Path:
    fields, data = honest()
    header = text(header_of(fields)).replace(":", ": ", 1)
    return write(folder / "m.safetensors", header.encode(), b"".join(data.values()))


def too_little_data(folder: Path) -> Path:
    path = checkpoint(folder / "m.safetensors", *honest())
    path.write_bytes(path.read_bytes()[:-1])
    return path


def too_much_data(folder: Path) -> Path:
    path = checkpoint(folder / "m.safetensors", *honest())
    path.write_bytes(path.read_bytes() + b"\0")
    return path


HEADERS = (
    *(empty_file, seven_bytes, only_a_length, a_folder, a_pickle, an_npz, plain_safetensors),
    *(header_of_100_mb_claimed, header_of_100_mb, header_of_all_bits, header_longer_than_the_file),
    *(header_of_many_objects, header_of_many_lists, header_of_many_keys),
    *(deep_header, deep_header_that_ends, deep_objects, wrong_utf8, byte_order_mark, not_a_number, endless_number),
    *(no_object, metadata_no_object, manifest_no_text, manifest_of_half_a_character, manifest_without_checksum),
    *(duplicate_tensor, duplicate_metadata, overlapping_offsets, escaping_offsets, negative_offsets),
    *(backward_offsets, offsets_that_overflow, tensor_of_another_shape, tensor_of_another_dtype),
    *(tensor_too_many, tensor_missing, tensors_in_another_order, spaces_in_the_header, too_little_data, too_much_data),
)
