"""What a leaf is, by its path: possibly a weight matrix, or plainly not one."""

import functools
import re
from collections.abc import Sequence

from btc_jax._typing import Order

_COLLECTIONS = frozenset(("batch_stats", "cache", "kv_cache", "intermediates", "perturbations", "flax_mutables"))
"""Collections of variables that are state, not weights."""

_WRAPPERS = frozenset(("", "vars", "value", "raw_value", "data_array"))
"""Last keys that some libraries append to the name of a variable."""

_SCALES = frozenset(("scale", "gamma", "beta", "offset", "shift", "gain", "g"))
_OF_TABLE = frozenset(("embedding", "embeddings", "weight", "table", "rel_embedding", "w_pos"))
"""Names of a layer's only parameter, whose meaning follows from the name of the layer."""

_LAYER = re.compile(r"ada|conv|dense|fc|feed|ffn?|forward|head|lin(ear)?|mlp|modulation|net|proj(ection)?")
"""Words of layers with a weight matrix of their own, such as `linear_pos` or `adaLN_modulation`."""

_POSITION = re.compile(r"alibi|pos(emb(ed)?|ition(al|s)?)?|relpos|wpe")
_RELATIVE = re.compile(r"rel(ative)?_(attention_|attn_)?(bias(es)?|emb(ed(ding)?)?s?)")
_ROTARY = re.compile(r"rotary(_pos)?(_emb(ed(ding)?s?|s)?)?|rope(_(emb(ed(ding)?s?|s)?|freqs|cache|table))?")
_ROTARY_LEAF = re.compile(r"(original_)?inv_freqs?|freqs(_(cis|cos|sin))?|(sin|cos)(_cached?|_table)?|cos_sin_cache")
_STATISTIC = re.compile(
    r"((moving|running|pop|batch)_)?(mean|var(iance)?|std(dev)?)|cluster_size|embed_avg|amax_history"
)
_TOKEN = re.compile(r"(?!embed_)(.*_)?tokens?|cls|(cls|class|mask)_embed(ding)?|masked_spec_embed|latents|probe")
_SHORT_BIAS = re.compile(r"b(\d+|_[A-Za-z]{1,3}\d*)?")
_NORM = re.compile(r".*norm(s|ali[sz]ations?)?|ln|bn|gn")
_EMBEDDING = re.compile(r"(.*_)?(embeddings?|embeds?|embs?|embedder|wte)(_(table|matrix|tokens))?|w_e")


def collection_of(path: str) -> str:
    """The collection of state that a leaf is in, such as `batch_stats`, or an empty string."""
    return next((part for part in split_path(path)[:-1] if part in _COLLECTIONS), "")


@functools.lru_cache(2**16)
def kind_of(path: str) -> str:
    """What a leaf is, if it is plainly not a weight matrix; empty for one that can be.

    Both `/` and `.` separate the parts of a path, as trees and PyTorch have them.

    Examples:
        >>> [kind_of(path) for path in ("layers/query/kernel", "layers/query/bias", "model.norm.weight", "wpe.weight")]
        ['', 'bias', 'norm', 'position table']
    """
    parts = _named(path)
    if not parts:
        return ""
    last, parent = snake(parts[-1]), snake(parts[-2]) if len(parts) > 1 else ""
    words = _words(last)
    if within := next(filter(None, map(_kind_within, parts)), ""):
        return within
    if _ROTARY_LEAF.fullmatch(last):
        return "rotary table"
    if last == "pe" or _is_position(last) or (last in _OF_TABLE and _is_position(parent)):
        return "position table"
    if words & {"bias", "biases"} or last == "beta" or _SHORT_BIAS.fullmatch(parts[-1]):
        return "bias"
    if _is_norm(last) or (last in ("weight", "w") and _is_norm(parent)) or (last in _SCALES and _has(_NORM, parent)):
        return "norm"
    if _STATISTIC.fullmatch(last) or parent in ("mean_ema", "var_ema"):
        return "statistics"
    if _TOKEN.fullmatch(last):
        return "learned token"
    return _other_kind(last, words)


@functools.lru_cache(2**16)
def _kind_within(part: str) -> str:
    """What everything below a part of the path is."""
    if "lora" in _words(snake(part)):
        return "LoRA adapter"
    return "rotary table" if _ROTARY.fullmatch(snake(part)) else ""


def _other_kind(last: str, words: frozenset[str]) -> str:
    if words & {"scale", "scales", "gamma", "gain"} or last in ("weight_g", "magnitude"):
        return "scale"
    if last in ("cached_key", "cached_value"):
        return "cache"
    if last == "a_log":
        return "state-space decay"
    return "mask" if words & {"mask", "masks"} else ""


def order_of(path: str) -> Order:
    """The default layout of a leaf: as stored, if each row is the vector of a token (embeddings) or of an output
    (`weight` in PyTorch and Equinox); otherwise output by output.

    Examples:
        >>> [order_of(path) for path in ("embed/embedding", "fc.weight", "Dense_0/kernel")]
        ['stored', 'stored', 'output-major']
    """
    last = snake((_named(path) or [""])[-1])
    return "stored" if _EMBEDDING.fullmatch(last) or "weight" in _words(last) else "output-major"


def is_embedding(path: str) -> bool:
    """Whether each row of a leaf is the vector of a token.

    Examples:
        >>> [is_embedding(path) for path in ("embed/embedding", "wte.weight", "fc.weight")]
        [True, True, False]
    """
    parts = [snake(part) for part in _named(path)][-2:]
    return any(_EMBEDDING.fullmatch(part) for part in parts[-1:]) or (
        len(parts) > 1 and parts[1] in _OF_TABLE and bool(_EMBEDDING.fullmatch(parts[0]))
    )


def normalized_by_linen(paths: Sequence[str]) -> set[str]:
    """Leaves that `nn.WeightNorm` or `nn.SpectralNorm` normalizes when the model runs.

    Both map over the arrays of all variables of their layer, so they would mistake a packed leaf for several. They
    store what they add under the name of the leaf: `WeightNorm_0` has the key `Dense_0/kernel/scale`.

    Examples:
        >>> normalized_by_linen(["Dense_0/kernel", "Dense_1/kernel", "WeightNorm_0/Dense_0/kernel/scale"])
        {'Dense_0/kernel'}
    """
    known, found = set(paths), set()
    for path in paths:
        *parts, added = path.removeprefix("batch_stats/").split("/")
        if added in ("scale", "u", "sigma"):
            without_one = ["/".join(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
            found |= known.intersection(without_one + [f"params/{path}" for path in without_one])
    return found


def split_path(path: str) -> list[str]:
    """The parts of a path, separated by `/`, or by `.` as in PyTorch's names."""
    return re.split(r"[/.]", path)


@functools.lru_cache(2**16)
def snake(part: str) -> str:
    """A part of a path in lower case, with `_` between words: `LayerNorm_0` is `layer_norm_0`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", part).lower()


def _named(path: str) -> list[str]:
    """The parts of a path, without the number or wrapper at its end and without numbers in between."""
    parts = [part for part in split_path(path.removesuffix(":0")) if not part.isdigit()]
    while parts and parts[-1] in _WRAPPERS:
        parts.pop()
    return parts


@functools.lru_cache(2**12)
def _words(name: str) -> frozenset[str]:
    """The words of a name in snake case, without numbers: `norm1` is a `norm`."""
    return frozenset(word.rstrip("0123456789") for word in name.split("_")) - {""}


def _is_norm(name: str) -> bool:
    last = re.sub(r"[_\d]+$", "", name).rsplit("_", 1)[-1]
    return bool(_NORM.fullmatch(last)) or (_has(_NORM, name) and not _has(_LAYER, name))


def _is_position(name: str) -> bool:
    return bool(_RELATIVE.fullmatch(name)) or (_has(_POSITION, name) and not _has(_LAYER, name))


def _has(pattern: re.Pattern[str], name: str) -> bool:
    """Whether one of the words of a name matches."""
    return any(map(pattern.fullmatch, _words(name)))
