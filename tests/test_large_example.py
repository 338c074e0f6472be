"""The example of a sharded model at small sizes, random and from checkpoints as Hugging Face lays them out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from flax import nnx
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from examples.large.__main__ import main, mesh_of
from examples.large.checkpoint import read_config, read_model

ROOT = Path(__file__).parents[1]
SIZES = {
    **{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
}
LAYER = "model.layers.{}."


def figures(output):
    """The numbers of each line, without that of the line."""
    found = (re.findall(r"\d[\d,]*\.?\d*", line)[1:] for line in output.splitlines())
    return [[float(number.replace(",", "")) for number in line] for line in found]


def test_it_packs_saves_and_restores_in_shards():
    """In a separate process because of its devices."""
    command = [sys.executable, "-m", "examples.large", "--width", "512", "--layers", "2"]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (_, devices, before), (bits, after), (places, same, kl), (size, fewer, restored), there = figures(output)
    assert (devices, places, fewer) == (8, 256, 4)
    assert bits <= 4.5
    assert after <= 0.16 * before
    assert restored < 2.1 * after
    assert size < 8.1 * after
    assert same > 50
    assert there[0] == same
    assert 0 < kl < 0.1
    assert abs(there[1] - kl) < 1e-3


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def random_tensors(config, dtype):
    rng = np.random.default_rng(0)
    width, inner, head = config["hidden_size"], config["intermediate_size"], head_of(config)
    wide, narrow = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    attention = {"q": (wide, width), "k": (narrow, width), "v": (narrow, width), "o": (width, wide)}
    mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    shapes = {"model.embed_tokens": (config["vocab_size"], width), "model.norm": (width,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head"] = (config["vocab_size"], width)
    for layer in map(LAYER.format, range(config["num_hidden_layers"])):
        shapes |= {f"{layer}self_attn.{name}_proj": shape for name, shape in attention.items()}
        shapes |= {f"{layer}mlp.{name}_proj": shape for name, shape in mlp.items()}
        shapes |= {f"{layer}{name}_layernorm": (width,) for name in ("input", "post_attention")}
    return {
        f"{name}.weight": (rng.standard_normal(shape) / np.sqrt(shape[-1]) + (len(shape) == 1)).astype(dtype)
        for name, shape in shapes.items()
    }


def write(folder, config, dtype=np.float32, files=1):
    """A checkpoint of random weights in one file, or in several with an index."""
    (folder / "config.json").write_text(json.dumps(config))
    tensors = random_tensors(config, dtype)
    if files == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    place = {name: f"model-{number % files}.safetensors" for number, name in enumerate(tensors)}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


def head_of(config):
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def theta_of(config):
    return config.get("rope_parameters", config).get("rope_theta", 10000)


def oracle(config, tensors, ids):
    """The logits of a Llama for one sequence, in float64, head by head."""
    weights = {name.removesuffix(".weight"): np.asarray(values, np.float64) for name, values in tensors.items()}
    x = weights["model.embed_tokens"][ids]
    for layer in map(LAYER.format, range(config["num_hidden_layers"])):
        y = rms_norm(x, weights[f"{layer}input_layernorm"], config)
        x = x + attention(y, {name: weights[f"{layer}self_attn.{name}_proj"] for name in "qkvo"}, config)
        y = rms_norm(x, weights[f"{layer}post_attention_layernorm"], config)
        gate, up = y @ weights[f"{layer}mlp.gate_proj"].T, y @ weights[f"{layer}mlp.up_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{layer}mlp.down_proj"].T
    head = weights["model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"]
    return rms_norm(x, weights["model.norm"], config) @ head.T


def rms_norm(x, scale, config):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])


def attention(x, weights, config):
    size, mixed = head_of(config), []
    sharing = config["num_attention_heads"] // config["num_key_value_heads"]
    for head in range(config["num_attention_heads"]):
        own, shared = (slice(size * i, size * (i + 1)) for i in (head, head // sharing))
        q, k = turned(x @ weights["q"][own].T, config), turned(x @ weights["k"][shared].T, config)
        scores = np.where(np.tri(len(x), dtype=bool), q @ k.T / np.sqrt(size), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(shares / shares.sum(-1, keepdims=True) @ (x @ weights["v"][shared].T))
    return np.concatenate(mixed, -1) @ weights["o"].T


def turned(x, config):
    """Elements i and i + size / 2 as a complex number, which position p turns by p * theta ** (-2 * i / size)."""
    half = x.shape[1] // 2
    angles = np.arange(len(x))[:, None] / theta_of(config) ** (np.arange(half) / half)
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], -1)


MODELS = {
    "wide heads, two files": (SIZES | {"head_dim": 32, "rope_theta": 500000.0}, np.float32, 2),
    "tied, bfloat16": (
        SIZES | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
        jnp.bfloat16,
        1,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_gives_the_logits_of_the_oracle(tmp_path, name):
    config, dtype, files = MODELS[name]
    write(tmp_path, config, dtype, files)
    mesh = mesh_of(8)
    graphdef, state = read_model(tmp_path, read_config(tmp_path), mesh)
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], (2, 24))
    found = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)
    right = np.stack([oracle(config, random_tensors(config, dtype), row) for row in ids])
    np.testing.assert_allclose(found, right, atol=1e-4, rtol=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype(dtype)}
    kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.nbytes > 2**12]
    assert len(kernels) == (8 if config.get("tie_word_embeddings") else 9)
    assert {leaf.size / leaf.addressable_shards[0].data.size for leaf in kernels} == {8}


def test_a_checkpoint_is_packed_saved_and_restored(tmp_path, capsys):
    config, dtype, files = MODELS["tied, bfloat16"]
    main(write(tmp_path, config, dtype, files))
    (weights, devices, before), (bits, after), (places, same, _), (_, fewer, restored), there = figures(
        capsys.readouterr().out
    )
    assert weights == sum(values.size for values in random_tensors(config, dtype).values())
    assert (devices, places, fewer) == (8, 256, 4)
    assert bits <= 4.5
    assert after < 0.35 * before
    assert restored < 2.1 * after
    assert there[0] == same > 10


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("model_type", None),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("quantization_config", {"bits": 4}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0}),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("hidden_size", "64"),
        ("vocab_size", None),
        ("rms_norm_eps", -1.0),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, field, value):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {field: value}))
    with pytest.raises(ValueError, match=rf"config\.json: .*{field}.*{re.escape(repr(value))}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 1, "head_dim": 12}, r"num_key_value_heads \* head_dim is 12"),
        ({"num_attention_heads": 6, "head_dim": 10}, r"num_attention_heads \* head_dim is 60"),
        ({"intermediate_size": 100}, "intermediate_size is 100"),
        ({"vocab_size": 97}, "vocab_size is 97"),
    ],
)
def test_sizes_that_the_devices_do_not_divide(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(SIZES | fields))
    config = read_config(tmp_path)
    config.check_shards(1)
    with pytest.raises(ValueError, match=f"{message}.* 8 devices"):
        config.check_shards(8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "no tensor 'model.norm.weight'"),
        ({"model.norm.weight": np.ones(63, np.float32)}, r"\(63,\); config.json implies \(64,\)"),
        ({"model.norm.weight": np.ones(64, np.int8)}, "'model.norm.weight' is int8"),
        ({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}, "q_proj.bias', which this model does not"),
        ({"model.layers.3.mlp.up_proj.weight": np.ones(64, np.float32)}, "layers.3.*, which this model does not"),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, change, message):
    file = write(tmp_path, SIZES) / "model.safetensors"
    tensors = load_file(file) | change
    save_file({name: values for name, values in tensors.items() if values is not None}, file)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path, read_config(tmp_path), mesh_of(8))


def test_tensors_that_follow_from_others_are_left_out(tmp_path):
    file = write(tmp_path, SIZES | {"tie_word_embeddings": True}) / "model.safetensors"
    tensors = load_file(file)
    more = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    more["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors | more, file)
    read_model(tmp_path, read_config(tmp_path), mesh_of(8))


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    app = typer.Typer()
    app.command()(main)
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"vocab_size": 97}))
    for arguments, words in [
        (["--checkpoint", str(tmp_path)], "--checkpoint: vocab_size is 97"),
        (["--checkpoint", str(tmp_path / "none")], "no config.json"),
        (["--width", "100"], "100 is not a multiple of 64"),
    ]:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert words in result.stderr
