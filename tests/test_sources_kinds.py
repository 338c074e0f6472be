"""Files and folders of other kinds, and what all sources share."""

import gzip
import io
import os
import pickle
import re
import tarfile
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import save_file

import btc_jax
from btc_jax.sources import open_source
from tests.sources_support import Unpickled as Unpickled
from tests.sources_support import assert_holds as assert_holds
from tests.sources_support import raw as raw
from tests.sources_support import refused as refused
from tests.sources_support import shards as shards
from tests.sources_support import small as small


def zipped(*names):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, b"{}")
    return data.getvalue()


def tarred():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        file.addfile(tarfile.TarInfo("model.safetensors"))
    return data.getvalue()


FOREIGN = [
    ("pytorch_model.bin", pickle.dumps(Unpickled()), "PyTorch"),
    ("params.pkl", pickle.dumps(Unpickled()), "pickle"),
    ("nameless", pickle.dumps({"a": 1}, 2), "pickle"),
    ("old.pickle", pickle.dumps({"a": 1}, 0), "pickle"),
    ("download", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(9), "PyTorch"),
    ("model.ckpt", zipped("archive/data.pkl", "archive/data/0"), "PyTorch"),
    ("download", zipped("net/data.pkl", "net/constants.pkl"), "TorchScript"),
    ("broken.pth", zipped("archive/data.pkl")[:-5], "PyTorch"),
    ("w.weights.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    ("damaged.hdf5", b"", "HDF5"),
    ("m.keras", zipped("metadata.json", "config.json", "model.weights.h5"), "Keras"),
    ("model.gguf", b"GGUF\3\0\0\0", "GGUF"),
    ("net.onnx", b"\x08\x07\x12\x07pytorch", "ONNX"),
    ("download", b"\x08\x09\x12\x07pytorch", "ONNX"),
    ("saved_model.pb", b"\x08\x01\x12\xb3\x05", "TensorFlow"),
    ("model.ckpt-1.index", bytes(48), "TensorFlow"),
    ("model.ckpt-1.data-00000-of-00002", bytes(48), "TensorFlow"),
    ("net.tflite", b"\x1c\0\0\0TFL3" + bytes(20), "TensorFlow Lite"),
    ("kernel.npy", b"\x93NUMPY\1\0", "numpy.savez"),
    ("model.eqx", b"\x93NUMPY\1\0", "equinox"),
    ("model.safetensors.gz", gzip.compress(b"x"), "unpack"),
    ("model.tar", tarred(), "unpack"),
    ("download", zipped("model.safetensors"), "unpack"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("model.safetensors", b"<!DOCTYPE html><html>", "download"),
    ("model.msgpack", pickle.dumps({"a": 1}), "pickle"),
    ("_METADATA", b"{}", "Orbax"),
]


@pytest.mark.parametrize(("name", "data", "word"), FOREIGN, ids=range(len(FOREIGN)))
def test_files_of_other_kinds_are_named(tmp_path, name, data, word):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(name)) as caught:
        open_source(tmp_path / name)
    assert word in str(caught.value)
    assert "Flax msgpack" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_does_not_hide_a_content_that_is_read(tmp_path, small):
    save_file(small, tmp_path / "model.bin")
    assert_holds(open_source(tmp_path / "model.bin"), small)
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    assert_holds(open_source((tmp_path / "x.npz").rename(tmp_path / "x.pkl")), {"a": np.ones(3)})


@pytest.mark.parametrize("magic", [b"\x80\x02", b"\x80\x05", b"\x1f\x8b", b"\x08\x03\x12"], ids=bytes.hex)
def test_a_length_does_not_hide_a_safetensors_file(tmp_path, magic):
    """The first bytes of such a file are the length of its header, here the magic of a pickle, gzip or ONNX."""
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    values = np.arange(2, dtype=np.float32)
    padded = header.ljust(int.from_bytes(magic, "little"))
    (tmp_path / "model.safetensors").write_bytes(raw(padded, values.tobytes()))
    assert_holds(open_source(tmp_path / "model.safetensors"), {"a": values})


def test_an_index_of_other_files(tmp_path):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "a.bin"}}')
    with pytest.raises(ValueError, match=r"a\.bin is a PyTorch file"):
        open_source(tmp_path / "pytorch_model.bin.index.json")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    refused(tmp_path / "config.json", "not a safetensors index", "open the file of the weights")


class TestFolders:
    def test_a_pipeline_lists_what_can_be_opened(self, tmp_path, small):
        for name in ("unet", "vae"):
            (tmp_path / name).mkdir()
            save_file(small, tmp_path / name / "diffusion_pytorch_model.safetensors")
        save_file(small, tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors")
        np.savez(tmp_path / "extra.npz", a=np.ones(2))
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
        listed = ["extra.npz", "unet", *(f"vae/diffusion_pytorch_model{x}.safetensors" for x in ("", ".fp16"))]
        refused(tmp_path, *listed)
        for name in listed:
            with open_source(tmp_path / name) as source:
                assert source.leaves

    def test_several_files_without_an_index_are_listed(self, tmp_path, small):
        for name in ("a.safetensors", "b.safetensors"):
            save_file(small, tmp_path / name)
        refused(tmp_path, "a.safetensors, b.safetensors")

    @pytest.mark.parametrize(
        ("name", "word"),
        [
            ("pytorch_model.bin", "PyTorch"),
            ("saved_model.pb", "TensorFlow"),
            ("model.ckpt.data-00000-of-00001", "TensorFlow"),
            ("model.weights.h5", "HDF5"),
            ("layer.kernel/.zarray", "zarr"),
        ],
    )
    def test_what_cannot_be_opened_is_named(self, tmp_path, name, word):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        refused(tmp_path, word)


class TestCompressed:
    """Checkpoints of btc_jax are recognised by their metadata, not by the names of their tensors."""

    @pytest.mark.parametrize("shard", [None, 100])
    def test_files(self, tmp_path, shard):
        file = tmp_path / "x.safetensors"
        btc_jax.save(file, {"kernel": np.ones((64, 64)), "bias": np.ones(64)}, max_shard_bytes=shard)
        for path in [tmp_path, *tmp_path.iterdir()]:
            with open_source(path) as source:
                assert source.compressed

    def test_an_item_of_orbax(self, tmp_path):
        ocp = pytest.importorskip("orbax.checkpoint")
        from btc_jax.orbax import BTCCheckpointHandler, BTCSave

        with ocp.Checkpointer(BTCCheckpointHandler()) as writer:
            writer.save(tmp_path / "x", args=BTCSave(btc_jax.btc_quantize({"kernel": jnp.ones((64, 64))})))
        with open_source(tmp_path / "x") as source:
            assert source.compressed

    def test_names_say_nothing(self, tmp_path):
        save_file({"kernel#plane0": np.ones(3), "kernel#header": np.ones(3)}, tmp_path / "x.safetensors")
        with open_source(tmp_path / "x.safetensors") as source:
            assert not source.compressed


def test_unknown(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing of the kind")
    (tmp_path / "like_msgpack").write_bytes(b"\x82\xa3abc")
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("notes.txt", "like_msgpack", "empty", "folder", "pipe.npz"):
        refused(tmp_path / name, "unknown kind", ".safetensors", ".npz", ".msgpack", "Orbax")
    refused(tmp_path / "absent.npz", "does not exist", kind=FileNotFoundError)


def test_torch_layout(tmp_path, small):
    for names, answer in [
        (small, True),
        ({"weight": np.ones(2)}, True),
        ({"kernel": np.ones(2), "xweight": np.ones(2)}, False),
    ]:
        save_file(names, tmp_path / "x.safetensors")
        assert open_source(tmp_path / "x.safetensors").torch_layout is answer


def test_fingerprint(shards):
    source, before = open_source(shards.parent), open_source(shards).fingerprint()
    assert source.fingerprint() == before
    assert int(before, 16)
    os.utime(shards.parent / "model-2.safetensors", ns=(1, 1))
    assert source.fingerprint() != before
    (shards.parent / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2\.safetensors"):
        source.fingerprint()


def test_unknown_leaf(tmp_path, small):
    save_file(small, tmp_path / "x.safetensors")
    with (
        open_source(tmp_path / "x.safetensors") as source,
        pytest.raises(ValueError, match=r"no leaf 'conv\.wight'; conv\.weight"),
    ):
        source.read("conv.wight")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "msgpack"])
def test_closed(tmp_path, kind):
    file, tree = tmp_path / f"x.{kind}", {"a": np.ones(2)}
    if kind == "msgpack":
        file.write_bytes(serialization.to_bytes(tree))
    else:
        save_file(tree, file) if kind == "safetensors" else np.savez(file, a=tree["a"])
    with open_source(file) as source:
        source.read("a")
    with pytest.raises(ValueError, match="closed"):
        source.read("a")
