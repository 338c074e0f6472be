"""Missing weights, downloads, and files of PyTorch."""

import contextlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from examples.paper import sources, weights
from examples.paper.networks import NETWORKS
from examples.paper.sources import SOURCES, Source, WeightsMissing, default_folders, download
from examples.paper.weights import convert, load_weights, read_state
from tests.paper_weights_support import NETWORK as NETWORK
from tests.paper_weights_support import source as source
from tests.paper_weights_support import state as state


def test_without_weights_one_line_says_how_to_get_them(tmp_path, source):
    with pytest.raises(WeightsMissing) as caught:
        load_weights(NETWORK, [tmp_path], cache=tmp_path / "cache")
    stem = source.file.removesuffix(".pt")
    assert str(caught.value) == (
        f"cifar10_resnet20: no copy.safetensors or {stem}.safetensors or {source.file} was found: "
        f"download {source.address} and name its folder with --weights"
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("fetch", [True, False])
def test_without_torch_one_line_says_what_to_do(tmp_path, source, monkeypatch, fetch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    folder = tmp_path if fetch else tmp_path / "published"
    with pytest.raises(
        WeightsMissing, match=r"needs PyTorch, which is not installed: `pip install torch`, or give copy"
    ):
        load_weights(NETWORK, [folder], download=fetch, cache=tmp_path / "cache")


def test_a_download_arrives_whole(tmp_path, source):
    path = download(source, tmp_path / "a" / "cache")
    assert path.read_bytes() == b"weights" * 1000
    assert [file.name for file in path.parent.iterdir()] == [source.file]


def test_a_damaged_download_leaves_what_is_there(tmp_path, source):
    cached = tmp_path / source.file
    cached.write_bytes(b"a good file")
    (tmp_path / "published" / source.file).write_bytes(b"weight5" * 1000)
    with pytest.raises(
        ValueError, match=rf"{source.file}: its SHA-256 begins with \w{{8}} and its name says \w{{8}}; it is"
    ):
        download(source, tmp_path, progress=False)
    assert cached.read_bytes() == b"a good file"
    assert not [file for file in tmp_path.iterdir() if "tmp" in file.name]


def test_offline_gives_one_line(tmp_path):
    away = Source((tmp_path / "nothing-12345678.pt").as_uri())
    with pytest.raises(
        WeightsMissing, match=r"^file.*nothing-12345678.pt could not be downloaded \(.*\): put the file into"
    ):
        download(away, tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


@contextlib.contextmanager
def serving(content: bytes, promised: int):
    """A server that promises more bytes than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(promised))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_a_download_that_is_cut_short_is_refused(tmp_path):
    with serving(b"half", 1000) as address:
        with pytest.raises((ValueError, WeightsMissing), match=r"net\.th.*(4 of 1,000 bytes arrived|IncompleteRead)"):
            download(Source(f"{address}net.th"), tmp_path, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_nobody_answers(tmp_path):
    with serving(b"", 0) as address:
        pass
    with pytest.raises(WeightsMissing, match="could not be downloaded"):
        download(Source(f"{address}net.th"), tmp_path, progress=False)


def test_default_folders_exist():
    assert all(folder.is_dir() for folder in default_folders())


def test_sources_are_complete():
    assert SOURCES.keys() == NETWORKS.keys()
    files = [source.file for source in SOURCES.values()]
    assert len(set(files)) == len(files)
    # Every file whose digits are a checksum is checked.
    for name, origin in SOURCES.items():
        if not name.startswith("akamaster"):
            with pytest.raises(ValueError, match="SHA-256"):
                sources.check_sum(origin.file, "no digest", "")


def test_files_of_torch_are_read(tmp_path, source, state):
    torch = pytest.importorskip("torch")
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in state.items()}
    for content in ({"state_dict": tensors, "best_prec1": 91.7, "epoch": 3}, tensors):
        torch.save(content, tmp_path / "net.th")
        read = read_state(tmp_path / "net.th")
        assert read.keys() == tensors.keys()
        np.testing.assert_array_equal(read["module.fc.weight"], state["fc.weight"])
    convert(read, NETWORK, "net.th")


def test_torch_files_that_are_no_checkpoints_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    torch.save({"weight": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"net\.pt is not a PyTorch checkpoint, or it is truncated \(\w+.*\); delete"):
        read_state(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"net\.pt holds a list instead of a state dict; save `model\.state_dict\(\)`"):
        read_state(path)
    torch.save({"weight": torch.zeros(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match=r"net\.pt: weight is bfloat16; save"):
        read_state(path)
    Path(path).write_bytes(b"")
    with pytest.raises(ValueError, match=r"net\.pt is not a PyTorch checkpoint"):
        read_state(path)


def test_a_truncated_local_file_is_known_by_its_name(tmp_path, source):
    pytest.importorskip("torch")
    (tmp_path / source.file).write_bytes(b"weights" * 999)
    with pytest.raises(ValueError, match=r"its SHA-256 begins with .*: delete it and download it again"):
        load_weights(NETWORK, [tmp_path], cache=tmp_path / "cache")


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    torch.save({"state_dict": Evil()}, tmp_path / "net.th")
    with pytest.raises(ValueError, match=r"net\.th is not a PyTorch checkpoint"):
        read_state(tmp_path / "net.th")
    assert not (tmp_path / "touched").exists()
