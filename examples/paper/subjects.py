"""What can be evaluated with the files available: networks with weights, MLPs with rows; and what the rest needs."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.paper.data import Labelled, load_cifar, local_cifar10
from examples.paper.exams import Exam
from examples.paper.imagenet import load_imagenet
from examples.paper.mlp import mlp_exam
from examples.paper.networks import NETWORKS, Network
from examples.paper.store import Store, tree_digest
from examples.paper.tabular import BUNDLED, FILES, Table, bundled, load_csv, load_npz
from examples.paper.weights import WeightsMissing, default_folders, load_weights

PyTree = Any
Sets = tuple[Labelled, Labelled]
Missing = dict[str, str]

QUICK_IMAGES, QUICK_MULTIPLY_ADDS = 64, 20_000_000
CIFAR = "download it from https://www.cs.toronto.edu/~kriz/cifar.html, unpack it, and name its folder with"
HOW = {
    "cifar10": ("all CIFAR-10 test images", f"{CIFAR} --cifar10"),
    "cifar100": ("CIFAR-100 test images", f"{CIFAR} --cifar100"),
    "imagenet": ("ImageNet validation images", "get them from https://image-net.org; name the folder with --imagenet"),
}
UCI = {"Adult": "2/adult", "Letter": "59/letter+recognition", "Satimage": "146/statlog+landsat+satellite"}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the command; see its help."""

    output: Path
    weights: tuple[Path, ...] = ()
    cifar10: Path | None = None
    cifar100: Path | None = None
    imagenet: Path | None = None
    csv: Path | None = None
    target: str = ""
    images: int = 0
    seed: int = 0
    download: bool = False
    quick: bool = False

    @property
    def folders(self) -> list[Path]:
        return [*self.weights, *default_folders()]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One network or MLP: the fields that its rows begin with, and a function that creates its exam, which may be
    slow."""

    kind: str
    what: dict[str, Any]
    exam: Callable[[], Exam]


def subjects(options: Options, store: Store) -> tuple[list[Subject], list[Missing]]:
    """Everything that can be evaluated, and a line for each thing that cannot.

    Raises:
        FileNotFoundError, ValueError: if a named file or folder is missing, damaged, or of another kind.
    """
    sets, missing = _image_sets(options)
    found: list[Subject] = []
    for network in NETWORKS.values():
        try:
            variables = load_weights(network, options.folders, download=options.download)
        except WeightsMissing as error:
            missing.append(
                {"what": f"{network.title} ({network.dataset})", "how": str(error).removeprefix(f"{network.name}: ")}
            )
            continue
        if not options.quick or network.multiply_adds < QUICK_MULTIPLY_ADDS:
            found.append(_network(network, variables, sets.get(network.dataset), store))
    return [*found, *_mlps(options, store, missing)], missing


def _image_sets(options: Options) -> tuple[dict[str, Sets], list[Missing]]:
    sets: dict[str, Sets] = {}
    for name in ("cifar10", "cifar100"):
        if folder := getattr(options, name):
            whole = load_cifar(folder, name)
            sets[name] = (whole, whole)
    if options.imagenet:
        whole = load_imagenet(options.imagenet, options.images)
        sets["imagenet"] = (whole, whole)
    missing = [{"what": what, "how": how} for name, (what, how) in HOW.items() if name not in sets]
    if "cifar10" not in sets:
        local = filter(None, (local_cifar10(folder, options.images) for folder in options.folders))
        if pair := next(local, None):
            sets["cifar10"] = pair
    if options.quick:
        sets = {name: (a.first(QUICK_IMAGES), b.first(QUICK_IMAGES)) for name, (a, b) in sets.items()}
    return sets, missing


def _network(network: Network, variables: PyTree, sets: Sets | None, store: Store) -> Subject:
    statistics = variables.get("batch_stats", {})

    def apply(params: PyTree, images: Any) -> jax.Array:
        return network.apply({"params": params, "batch_stats": statistics}, jnp.asarray(images))

    own = not network.name.startswith("akamaster")
    what = {"name": network.name, "title": network.title, "dataset": network.dataset, "own_weights": own}
    example = np.zeros((1, network.size, network.size, 3), np.uint8)
    identity = f"{network.name} {tree_digest(statistics)}"
    exam = Exam(apply, variables["params"], example, *(sets or (None, None)), identity=identity, store=store)
    return Subject("network", what | {"multiply_adds": network.multiply_adds}, lambda: exam)


def _mlps(options: Options, store: Store, missing: list[Missing]) -> Iterator[Subject]:
    """An MLP for each data set; sweeps only for those from files, and all sweeps for the one with most classes."""
    tables = list(_tables(options, missing))
    studied = [table for table in tables if table.name not in BUNDLED] or tables
    shown = max(studied, key=lambda table: table.classes)
    for table in tables:
        kind = "shown mlp" if table is shown else "studied mlp" if table in studied else "mlp"
        what = {"name": f"mlp_{table.name}", "title": f"MLP, {table.name}", "dataset": "tabular", "own_weights": False}
        yield Subject(kind, what, lambda table=table: mlp_exam(table, store, options.seed))


def _tables(options: Options, missing: list[Missing]) -> Iterator[Table]:
    for name, file in FILES.items():
        paths = [folder / file for folder in options.folders if (folder / file).is_file()]
        if paths and not options.quick:
            yield load_npz(name, paths[0])
        elif not paths:
            address = f"https://archive.ics.uci.edu/dataset/{UCI[name]}"
            missing.append({"what": f"MLP, {name}", "how": f"{file}: or get {name} as CSV from {address}, with --csv"})
    for name in list(BUNDLED)[1:2] if options.quick else BUNDLED:
        yield bundled(name, options.seed)
    if options.csv:
        yield load_csv(options.csv, options.target, options.seed)
