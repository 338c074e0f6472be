"""Pretrained weights of a network as Flax variables, from PyTorch's files."""

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from btc_jax.sources import open_source
from examples.paper import sources
from examples.paper.networks import Network
from examples.paper.sources import CACHE, SOURCES
from examples.paper.sources import WeightsMissing as WeightsMissing
from examples.paper.sources import default_folders as default_folders
from examples.paper.torch_names import torch_names

PyTree = Any
State = dict[str, np.ndarray]

# By the number of axes: Flax's (kh, kw, in, out) or (in, out), and PyTorch's (out, in, kh, kw) or (out, in).
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}


def load_weights(
    network: Network,
    folders: Sequence[Path],
    *,
    download: bool = False,
    cache: Path = CACHE,
    progress: bool = True,
) -> PyTree:
    """The variables `{"params": ..., "batch_stats": ...}` of `network.model`, from the first file found.

    `folders` and `cache` are searched for safetensors copies of the published file, and for the file itself; if there
    is none and `download` is true, it is downloaded into `cache`.

    Raises:
        WeightsMissing: if there is no such file, or only one that needs PyTorch, and PyTorch is not installed.
        ValueError: if the file is damaged, or holds another network.
    """
    path = _find(network, [*folders, cache], download) or sources.download(SOURCES[network.name], cache, progress)
    return convert(read_state(path), network, str(path))


def _find(network: Network, folders: Sequence[Path], download: bool) -> Path | None:
    """A readable file; `None` if it is to be downloaded."""
    source = SOURCES[network.name]
    found = sources.find(source, folders)
    torch = importlib.util.find_spec("torch") is not None
    readable = [path for path in found if torch or path.suffix == ".safetensors"]
    if readable:
        return readable[0]
    if not torch and (found or download):
        unread = f"{network.name}: {found[0] if found else source.address} needs PyTorch, which is not installed"
        raise WeightsMissing(f"{unread}: `pip install torch`, or give {source.names[0]}")
    if not download:
        wanted = f"{network.name}: no {' or '.join(source.names)} was found"
        raise WeightsMissing(f"{wanted}: download {source.address} and name its folder with --weights")
    return None


def read_state(path: Path) -> State:
    """The arrays of a `.pt`, `.pth`, `.th` or safetensors file, by PyTorch's names; no code in it is run.

    Raises:
        ValueError: if the file is damaged, or not a checkpoint.
        ImportError: if it needs PyTorch, which is not installed.
    """
    if path.suffix == ".safetensors":
        with open_source(path) as source:
            return {leaf.path: source.read(leaf.path) for leaf in source.leaves}
    with path.open("rb") as file:
        sources.check_sum(str(path), hashlib.file_digest(file, "sha256").hexdigest(), "delete it and download it again")
    return dict(_state(_unpickled(path), path))


def _unpickled(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, some with many lines
        reason = f"{type(error).__name__}: {str(error).strip() or 'no content'}".splitlines()[0]
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, or it is truncated ({reason}); delete it and download it again"
        ) from error


def _state(content: Any, path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a state dict, which may be inside a training checkpoint."""
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not all(hasattr(value, "numpy") for value in content.values()):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of a state dict; save `model.state_dict()`")
    for name, value in content.items():
        if str(value.dtype) == "torch.bfloat16":  # numpy has no such type
            raise ValueError(f"{path}: {name} is bfloat16; save `model.float().state_dict()`")
        yield name, value.detach().numpy()


def convert(state: State, network: Network, where: str) -> PyTree:
    """Convert PyTorch's arrays to variables of `network.model`; names must correspond one to one.

    Raises:
        ValueError: if a name is missing or left over, a shape differs, or an array is not float32.
    """
    state = _plain(state)
    leaves, structure = jax.tree.flatten(network.shapes())
    names = torch_names(network.model, network.shapes())
    shapes = {
        name: tuple(leaf.shape[axis] for axis in TO_TORCH[leaf.ndim]) for name, leaf in zip(names, leaves, strict=True)
    }
    if differences := list(_differences(state, shapes)):
        raise ValueError(f"{where} does not fit {network.name}: {'; '.join(differences)}. Give {_wanted(network)}")
    return structure.unflatten([jnp.asarray(state[name].transpose(FROM_TORCH[state[name].ndim])) for name in names])


def _plain(state: State) -> State:
    """The state without the prefix that `DataParallel` adds to all names, and without counters used only in
    training."""
    prefix = "module." if all(name.startswith("module.") for name in state) else ""
    kept = {name.removeprefix(prefix): array for name, array in state.items()}
    return {name: array for name, array in kept.items() if not name.endswith(".num_batches_tracked")}


def _differences(state: State, shapes: dict[str, tuple[int, ...]]) -> Iterator[str]:
    missing, over = ([*(a.keys() - b.keys())] for a, b in ((shapes, state), (state, shapes)))
    if missing:
        yield f"{len(missing)} of its {len(shapes)} arrays are missing, such as {min(missing)}"
    if over:
        yield f"{len(over)} arrays of the file have no place, such as {min(over)}"
    common = sorted(shapes.keys() & state.keys())
    wrong = [name for name in common if state[name].shape != shapes[name]]
    bias, weight = _last_layer(shapes)
    if wrong == [bias, weight] and state[weight].shape == (*state[bias].shape, shapes[weight][1]):
        yield f"it has {len(state[bias])} classes instead of {shapes[bias][0]}"
    elif wrong:
        yield f"{len(wrong)} shapes differ, such as {wrong[0]} {state[wrong[0]].shape} instead of {shapes[wrong[0]]}"
    if odd := [name for name in common if state[name].dtype != np.float32]:
        yield f"{len(odd)} arrays are not float32, such as {odd[0]} of {state[odd[0]].dtype}"


def _last_layer(shapes: dict[str, tuple[int, ...]]) -> tuple[str, str]:
    """Names of the bias and weight of the classifier, the only dense layer in each of these networks."""
    weight = next(name for name, shape in shapes.items() if len(shape) == 2)
    return weight.removesuffix("weight") + "bias", weight


def _wanted(network: Network) -> str:
    source = SOURCES.get(network.name)
    return source.file if source else f"the weights of {network.name}"
