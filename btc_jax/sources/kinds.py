"""Kinds of files that are not supported: how they are recognised, and how to convert them to one that is."""

import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Foreign(NamedTuple):
    """A kind of file that is not read, and what to do with one."""

    name: str
    way: str


TORCH = Foreign(
    "a PyTorch file",
    "load it in Python, state = torch.load(FILE, weights_only=True, map_location='cpu'), and write "
    "safetensors.torch.save_file(state, 'model.safetensors')",
)
TORCHSCRIPT = Foreign(
    "a TorchScript file",
    "write safetensors.torch.save_file(torch.jit.load(FILE).state_dict(), 'model.safetensors')",
)
PICKLE = Foreign(
    "a Python pickle, which can run code when it is opened",
    "if you trust it, load it in Python and save its arrays with numpy.savez('weights.npz', **arrays), or its tree "
    "with flax.serialization.to_bytes",
)
HDF5 = Foreign(
    "an HDF5 file",
    "if Keras wrote it, load the model there, model.load_weights(FILE), and write "
    "numpy.savez('weights.npz', **{w.path: w.numpy() for w in model.weights}); else read it with h5py",
)
KERAS = Foreign(
    "a Keras model",
    "load it in Python, model = keras.saving.load_model(FILE), and write "
    "numpy.savez('weights.npz', **{w.path: w.numpy() for w in model.weights})",
)
TENSORFLOW = Foreign(
    "a TensorFlow checkpoint or SavedModel",
    "read its variables in Python, r = tf.train.load_checkpoint(PREFIX), which is variables/variables in a SavedModel, "
    "and write numpy.savez('weights.npz', **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})",
)
TFLITE = Foreign("a TensorFlow Lite model, packed for devices", "take the weights that it was made from")
GGUF = Foreign("a GGUF file, mostly of quantized weights", "take the .safetensors files that it was made from")
ONNX = Foreign(
    "an ONNX model",
    "write numpy.savez('weights.npz', **{t.name: onnx.numpy_helper.to_array(t) for t in "
    "onnx.load(FILE).graph.initializer})",
)
NPY = Foreign("a single array of numpy", "give it a name: numpy.savez('weights.npz', kernel=numpy.load(FILE))")
EQUINOX = Foreign(
    "a file of equinox.tree_serialise_leaves, which has no names",
    "load it with equinox.tree_deserialise_leaves, and pass the model to btc_jax.btc_quantize",
)
ARCHIVE = Foreign("an archive or a compressed file", "unpack it, and open what is in it")
ZARR = Foreign("a folder of zarr arrays, as T5X writes it", "restore it there, and save it with Orbax")
LFS = Foreign("a Git LFS pointer and not the file itself", "fetch the file: git lfs pull")
WEB_PAGE = Foreign("a web page, so the download failed", "download the file again")
PART_OF_ORBAX = Foreign("a part of an Orbax checkpoint", "open its folder")

MAX_HEADER = 100_000_000  # bytes: the cap of safetensors itself

_MAGIC = (
    (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", TORCH),  # before 1.6, when it wrote no zip
    *((0, b"\x80" + bytes([protocol]), PICKLE) for protocol in (2, 3, 4, 5)),
    (0, b"\x89HDF\r\n\x1a\n", HDF5),
    (0, b"GGUF", GGUF),
    *((0, magic, GGUF) for magic in (b"tjgg", b"lmgg", b"fmgg")),  # its predecessors
    (4, b"TFL3", TFLITE),
    (0, b"\x93NUMPY", NPY),
    (0, b"version https://git-lfs", LFS),
    *((0, magic, WEB_PAGE) for magic in (b"<!doctype", b"<!DOCTYPE", b"<html", b"<HTML", b"<?xml")),
    (257, b"ustar", ARCHIVE),
    *(
        (0, magic, ARCHIVE)
        for magic in (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!")
    ),
)
_PROTOBUF = re.compile(rb"\x08(?:(\x01)|[\x03-\x20])\x12")
"""Version 1 of a SavedModel, or 3 and more of ONNX, and the second field, as both write it."""

_SUFFIXES = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), TORCH),
    **dict.fromkeys((".pkl", ".pickle", ".joblib", ".pdparams"), PICKLE),
    **dict.fromkeys((".h5", ".hdf5"), HDF5),
    **dict.fromkeys((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z"), ARCHIVE),
    **{".keras": KERAS, ".gguf": GGUF, ".ggml": GGUF, ".onnx": ONNX, ".pb": TENSORFLOW, ".tflite": TFLITE},
    **{".npy": NPY, ".eqx": EQUINOX, ".index": TENSORFLOW},
}
_NAMES: dict[str, Foreign] = dict.fromkeys(
    ("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "manifest.ocdbt"), PART_OF_ORBAX
)


def by_content(file: Path) -> Foreign | None:
    """What a file is, if its first bytes, or the names in it if it is a zip, say that it is of a foreign kind."""
    with file.open("rb") as stream:
        start = stream.read(512)
    if is_safetensors(start):  # first: it begins with the length of its header, which can equal the magic of others
        return None
    found = next((kind for at, magic, kind in _MAGIC if start[at:].startswith(magic)), None)
    if found in (PICKLE, NPY):
        named = by_name(file)
        return named if named in (TORCH, EQUINOX) else found  # who wrote it
    if found or not (protobuf := _PROTOBUF.match(start)):
        return found or (_zip(file) if is_zip(start) else None)
    return TENSORFLOW if protobuf[1] else ONNX


def by_name(file: Path) -> Foreign | None:
    """What a file is, if its name says that it is of a foreign kind."""
    if re.search(r"\.data-\d{5}-of-\d{5}$", file.name):
        return TENSORFLOW
    return _NAMES.get(file.name) or _SUFFIXES.get(file.suffix.lower())


def in_folder(folder: Path) -> tuple[Path, Foreign | None]:
    """The folder if it is of a foreign kind as a whole, or else a foreign file in it, and the kind."""
    files = sorted(folder.iterdir())
    if any(file.name == "saved_model.pb" or by_name(file) is TENSORFLOW for file in files):
        return folder, TENSORFLOW
    if any(file.name == ".zarray" for file in (*files, *folder.glob("*/.zarray"))):
        return folder, ZARR
    return next(((file, kind) for file in files if file.is_file() and (kind := by_name(file))), (folder, None))


def is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER


def is_zip(start: bytes) -> bool:
    return start[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def members(file: Path) -> Iterable[str]:
    """The names in a zip; none if it is damaged."""
    with suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError), zipfile.ZipFile(file) as opened:
        return opened.namelist()
    return ()


def _zip(file: Path) -> Foreign | None:
    names = members(file)
    if any(name.endswith("data.pkl") for name in names):
        return TORCHSCRIPT if any(name.endswith("constants.pkl") for name in names) else TORCH
    if any(name == "model.weights.h5" or name == "metadata.json" for name in names):
        return KERAS
    return ARCHIVE if names and not any(name.endswith(".npy") for name in names) else None
