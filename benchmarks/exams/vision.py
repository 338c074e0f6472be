"""CIFAR-10 networks of the paper's evaluation, on exact images of the test set."""

import functools
from pathlib import Path

import numpy as np

from benchmarks.exams import Exam, Missing, as_jax, file_of
from examples.paper.networks import NETWORKS
from examples.paper.weights import WeightsMissing, load_weights

NAMES = {
    "resnet20": "akamaster_resnet20",
    "resnet32": "akamaster_resnet32",
    "resnet56": "akamaster_resnet56",
    "resnet20-paper": "cifar10_resnet20",
    "resnet56-paper": "cifar10_resnet56",
    "shufflenetv2": "cifar10_shufflenetv2_x0_5",
}


def exam(name: str, data: Path) -> Exam:
    network = NETWORKS[NAMES[name]]
    try:
        variables = as_jax(load_weights(network, [data]))
    except WeightsMissing as error:
        raise Missing(f"{name}: {error}") from None
    with np.load(file_of(name, "cifar10_test_932.npz", data)) as stored:
        images, labels = np.asarray(network.normalized(stored["images"])), stored["labels"]
    draws = 2 if name in ("resnet32", "resnet56", "resnet56-paper") else 3  # seconds each
    return Exam(name, variables, network.model.apply, images, labels, draws=draws)


EXAMS = {name: functools.partial(exam, name) for name in NAMES}
