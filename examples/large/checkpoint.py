"""A Llama checkpoint of Hugging Face, read leaf by leaf onto a mesh."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from btc_jax.sources import Source, open_source
from examples.large.model import Config, Transformer, shardings

SUPPORTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "tie_word_embeddings": (False, True, None),
}
"""Values of fields that change what the model computes. None stands for an absent field, which has its default."""

NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    **{f"layers/{name}": f"model.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkvo"},
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    **{f"layers/{name}": f"model.layers.{{}}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    "norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}
"""Leaves of the model, and the tensors that they are made of; {} is the number of a layer."""

DTYPES = ("float32", "bfloat16", "float16")
UNUSED = ("rotary_emb.inv_freq", "lm_head.weight")
"""Tensors that some files hold although they follow from others: from the config, or from a tied embedding."""


def read_config(folder: Path) -> Config:
    """The sizes of the model in a folder.

    Raises:
        FileNotFoundError: if there is no `config.json`.
        ValueError: if it describes a model that is not supported; the message names the field and its value.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a Llama checkpoint")
    fields = json.loads(file.read_text())
    for field, values in SUPPORTED.items():
        if fields.get(field) not in values:
            supported = " or ".join(map(repr, values))
            raise ValueError(f"{file}: {field} is {fields.get(field)!r}; this example supports {supported}")
    heads = _positive(file, fields, "num_attention_heads")
    width = _positive(file, fields, "hidden_size")
    shared = _positive(file, fields, "num_key_value_heads", heads)
    head = _positive(file, fields, "head_dim", width // heads)
    if heads % shared:
        raise ValueError(f"{file}: num_attention_heads is {heads}, not a multiple of num_key_value_heads, {shared}")
    if head % 2:
        raise ValueError(f"{file}: head_dim is {head}; rotary embedding needs an even one")
    return Config(
        hidden_size=width,
        intermediate_size=_positive(file, fields, "intermediate_size"),
        num_hidden_layers=_positive(file, fields, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=head,
        vocab_size=_positive(file, fields, "vocab_size"),
        rms_norm_eps=_positive(file, fields, "rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(file, fields),
        tie_word_embeddings=bool(fields.get("tie_word_embeddings")),
    )


def _positive(file: Path, fields: dict[str, Any], field: str, default: Any = None) -> Any:
    """A positive number: a whole one, unless the default is not."""
    value = default if fields.get(field) is None else fields[field]
    kinds = (int, float) if isinstance(default, float) else (int,)
    if type(value) not in kinds or value <= 0:
        raise ValueError(f"{file}: {field} is {value!r}; it must be a positive number")
    return value


def _rope_theta(file: Path, fields: dict[str, Any]) -> float:
    """The base of rotary embedding, if nothing scales it: newer files have it among `rope_parameters`."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = fields.get(field) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.keys() - {"rope_type", "type", "rope_theta"}:
            raise ValueError(f"{file}: {field} is {rope!r}; only the kind 'default' is supported, without factors")
        fields = fields | rope
    return float(_positive(file, fields, "rope_theta", 10000.0))


def read_model(folder: Path, config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """The definition of the model, and its state on a mesh. Only one leaf at a time is on the host.

    Raises:
        ValueError: if a tensor is missing or unknown, or its shape or dtype is another than the model's.
    """
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    with open_source(folder) as source:
        _check(source, shapes)

        def read(path: Any, leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.Array:
            return jax.block_until_ready(jax.device_put(_read(source, _name(path), leaf.shape), place))

        return graphdef, jax.tree_util.tree_map_with_path(read, shapes, shardings(shapes, mesh))


def _check(source: Source, shapes: Any) -> None:
    """Find what is wrong before anything large is read."""
    held, wanted = {tensor.path: tensor for tensor in source.leaves}, set[str]()
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        for name, shape in _tensors(_name(path), leaf.shape).items():
            if name not in held:
                raise ValueError(f"{source.file} has no tensor {name!r}, which config.json implies")
            if held[name].shape != shape:
                raise ValueError(f"{source.file}: {name!r} has shape {held[name].shape}; config.json implies {shape}")
            if held[name].dtype.name not in DTYPES:
                raise ValueError(f"{source.file}: {name!r} is {held[name].dtype}; supported are {', '.join(DTYPES)}")
            wanted.add(name)
    for name in sorted(held.keys() - wanted):
        if not name.endswith(UNUSED):
            raise ValueError(f"{source.file} holds {name!r}, which this model does not use")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path[:-1], simple=True, separator="/")  # the last key is that of an NNX variable


def _tensors(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of a leaf, one for each layer if it is stacked, and their shapes: kernels are (out, in) there."""
    if name.startswith("layers/"):
        return {NAMES[name].format(layer): shape[:0:-1] for layer in range(shape[0])}
    return {NAMES[name]: shape if name == "embedding" else shape[::-1]}


def _read(source: Source, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a leaf in the dtype of the checkpoint; float32 if its layers differ in that."""
    tensors = _tensors(name, shape)
    dtypes = {tensor.dtype for tensor in source.leaves if tensor.path in tensors}
    values = np.empty(shape, dtypes.pop() if len(dtypes) == 1 else np.float32)
    for part, tensor in zip(values if name.startswith("layers/") else [values], tensors, strict=True):
        part[...] = source.read(tensor) if name == "embedding" else source.read(tensor).T
    return values
