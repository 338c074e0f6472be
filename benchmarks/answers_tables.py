"""Summaries of the rows of all networks: ratios of divergences, and the table of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.sides import OURS, Row

Results = Mapping[str, Sequence[Row]]
TRANSFORMERS = ("minilm", "babyllama")
K_QUANTS = {3.4375: "llama.cpp Q3_K", 4.5: "llama.cpp Q4_K", 5.5: "llama.cpp Q5_K"}
COLUMNS = {
    "resnet20-paper": "ResNet-20",
    "resnet56-paper": "ResNet-56",
    "shufflenetv2": "ShuffleNetV2",
    "minilm": "MiniLM",
    "babyllama": "language model",
}
LABELS = {
    "btc_jax, by shape": "btc_jax",
    "btc_jax, sensitivities, random inputs": "btc_jax, with `btc_sensitivity`",
}
"""Rows of btc_jax in docs/benchmarks.md."""
FIRST, *BETTER = (f"btc_jax, {name}" for name in OURS)


def summaries(results: Results) -> dict[str, list[Row]]:
    """Tables by title."""
    return {
        "KL relative to that with the least error of the weights, geometric means": list(_ratios(results)),
        "KL of btc_jax relative to llama.cpp at the same bits; above 1, llama.cpp is ahead": list(_against(results)),
    }


def _ratios(results: Results) -> list[Row]:
    found = []
    for bits in _budgets(results):
        for name in BETTER:
            ratios = {network: _ratio(rows, name, FIRST, bits) for network, rows in results.items()}
            row: Row = {"name": name, "bits": f"{bits:g}", "all": _mean(list(ratios.values()))}
            of_transformers = [ratios[network] for network in TRANSFORMERS if network in ratios]
            row |= {"transformers": _mean(of_transformers) if of_transformers else None}
            found.append(row | {"worst": max(ratios.values()), "worst of": max(ratios, key=lambda n: ratios[n])})
    return found


def _against(results: Results) -> list[Row]:
    found = []
    for bits, peer in K_QUANTS.items() if set(K_QUANTS) <= set(_budgets(results)) else ():
        for name in BETTER:
            ratios = {
                network: _ratio(rows, name, peer, bits)
                for network, rows in results.items()
                if any(row["name"] == peer for row in rows)
            }
            if ratios:
                found.append({"name": name, "bits": f"{bits:g}", "against": peer} | ratios)
    return found


def _ratio(rows: Sequence[Row], name: str, other: str, bits: float) -> float:
    ours, theirs = (
        next(row for row in rows if row["name"] == one and row.get("budget", bits) == bits) for one in (name, other)
    )
    return ours["KL"] / theirs["KL"]


def _budgets(results: Results) -> list[float]:
    return sorted({row["budget"] for rows in results.values() for row in rows if row["name"] == FIRST})


def _mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def markdown(results: Results) -> str:
    """The table of docs/benchmarks.md: answers first, then weights."""
    networks = [network for network in COLUMNS if network in results]
    head = ["bits", *(f"{COLUMNS[n]} KL" for n in networks), *(f"{COLUMNS[n]} dB" for n in networks[-2:])]
    lines = [f"| | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    by_network = [{(row["name"], row.get("budget")): row for row in results[network]} for network in networks]
    shared = [key for key in by_network[0] if all(key in rows for rows in by_network)] if networks else []
    shown = [key for key in shared if key[0] in LABELS or not key[0].startswith("btc_jax")]
    lines += [
        _line(key[0], [rows[key] for rows in by_network]) for key in sorted(shown, key=lambda k: _place(k, by_network))
    ]
    return "\n".join(lines)


def _place(key: tuple[str, float | None], by_network: Sequence[Mapping[Any, Row]]) -> tuple[float, bool, str]:
    """Sort key: by bits, with btc_jax first among equal bits."""
    bits = key[1] or round(by_network[0][key]["effective"], 1)
    return round(bits, 1), key[0] not in LABELS, key[0]


def _line(name: str, rows: Sequence[Row]) -> str:
    ours = name in LABELS
    figures = [f"{rows[0]['effective']:.2f}", *(f"{row['KL']:.4f}" for row in rows)]
    figures += [f"{row['SQNR dB']:.1f}" for row in rows[-2:]]
    return f"| {f'**{LABELS[name]}**' if ours else name} | {' | '.join(figures)} |"
