"""Figures 2, 3, 6 and 8: configurations of an MLP, small blocks, and the threshold."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.paper import published
from examples.paper.show.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION, Draw, panels, style

Results = dict[str, Any]
Row = dict[str, Any]
LINES = ((BLUE, "s"), (GREEN, "v"), (PURPLE, "D"), (ORANGE, "P"), (VERMILLION, "^"), (SKY, "X"), (BLACK, "o"))


def noise(results: Results) -> Figure | None:
    """Figure 2."""
    if not (found := _configurations(results)):
        return None
    title, steps, fixed = found
    figure, (error, payload, stored) = panels(1, 3, (13, 5), f"Figure 2. Quantization noise and bits of the {title}")
    for panel, name in ((error, "rmse"), (payload, "payload"), (stored, "effective")):
        _by_threshold(panel, steps, name)
        _level(panel, fixed["uniform8"][name], "uniform8")
    error.set_ylim(bottom=0)
    payload.axhspan(4.5, 6.3, color=SKY, alpha=0.25, linewidth=0, label="paper: 4.5 to 6.3 bits")
    error.set_ylabel("rmse of the weights")
    payload.set_ylabel("bits per weight, payload only")
    stored.set_ylabel("bits per weight, everything stored")
    figure.legend(*payload.get_legend_handles_labels(), ncols=5, fontsize=9, loc="outside lower left")
    return figure


def loss(results: Results) -> Figure | None:
    """Figure 3."""
    if not (found := _configurations(results)):
        return None
    title, steps, fixed = found
    figure, (cross, accuracy) = panels(1, 2, (11, 5), f"Figure 3. Loss and accuracy of the {title}")
    for panel, name, scale in ((cross, "loss", 1), (accuracy, "accuracy", 100)):
        _by_threshold(panel, steps, name, scale)
        for method in ("float32", "uniform8"):
            _level(panel, scale * fixed[method][name], method)
    middle, error = (100 * fixed["float32"][name] for name in ("accuracy", "standard_error"))
    band = (middle - error, middle + error)
    accuracy.axhspan(*band, color=BLACK, alpha=0.1, linewidth=0, label="float32 ± standard error")
    cross.set_ylabel("cross-entropy on held-out rows, nats")
    accuracy.set_ylabel("accuracy on held-out rows, %")
    figure.legend(*accuracy.get_legend_handles_labels(), ncols=3, fontsize=9, loc="outside lower left")
    return figure


def _configurations(results: Results) -> tuple[str, list[Row], dict[str, Row]] | None:
    for name, found in results.get("configurations", {}).items():
        fixed = {row["method"]: row for row in found["fixed"]}
        return results["networks"][name]["title"].replace("MLP, ", "MLP on "), found["steps"], fixed
    return None


def _by_threshold(panel: Axes, steps: list[Row], name: str, scale: float = 1) -> None:
    """A line for each threshold, over the block sizes."""
    thresholds = sorted({row["threshold"] for row in steps})
    for size, threshold, (colour, marker) in zip((11, 8, 5), thresholds, LINES, strict=False):
        points = [(row["block_size"], scale * row[name]) for row in steps if row["threshold"] == threshold]
        label = f"BTC, threshold {threshold:g}"
        panel.plot(*zip(*points, strict=True), marker=marker, markersize=size, color=colour, label=label)
    _block_axis(panel, sorted({row["block_size"] for row in steps}))


def _level(panel: Axes, value: float, method: str) -> None:
    panel.axhline(value, color=style(method)[0], linestyle=":" if method == "float32" else "-.", label=method)


def _block_axis(panel: Axes, sizes: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, map(str, sizes))
    panel.set_xlabel("block size, weights")


def block_sizes(results: Results) -> Figure | None:
    """Figure 6."""
    found = results.get("block_sizes", {})
    if not found:
        return None
    title = "Figure 6. Block sizes on fully connected layers (threshold 0.05)"
    figure, (accuracy, bits) = panels(1, 2, (11, 5), title)
    plain = {row["name"]: row for row in results["rows"] if row["method"] == "float32"}
    for (name, rows), (colour, marker) in zip(found.items(), LINES, strict=False):
        right, error = (100 * plain[name][key] for key in ("accuracy", "standard_error"))
        label, sizes = (
            f"{results['networks'][name]['title']} ({right:.1f} ± {error:.1f} %)",
            [r["block_size"] for r in rows],
        )
        accuracy.plot(sizes, [100 * r["accuracy"] - right for r in rows], marker=marker, color=colour, label=label)
        bits.plot(sizes, [r["effective"] for r in rows], marker=marker, color=colour, label=label)
        for panel in (accuracy, bits):
            _block_axis(panel, sizes)
    for panel in (accuracy, bits):
        panel.axvspan(2, 64, color=SKY, alpha=0.15, linewidth=0, label="the paper's range")
    _level(accuracy, 0, "float32")
    _level(bits, 8, "uniform8")
    accuracy.set_ylabel("accuracy minus that of float32, points")
    bits.set_ylabel("bits per weight, everything stored")
    bits.set_yscale("log", base=2)
    ticks = [8, 10, 12, 16, 20, 24]
    bits.set_yticks(ticks, map(str, ticks))
    figure.legend(*bits.get_legend_handles_labels(), ncols=3, fontsize=9, loc="outside lower left")
    return figure


def thresholds(results: Results) -> Figure | None:
    """Figure 8, which is not in the paper: sensitivity to the threshold."""
    found = results.get("thresholds", {})
    if not found:
        return None
    figure, axes = panels(1, 3, (14, 5.4), "Figure 8. Sensitivity to the threshold (blocks of 64)")
    for (name, rows), (colour, marker) in zip(found.items(), LINES, strict=False):
        what = results["networks"][name]
        look = {"marker": marker, "color": colour, "label": what["title"]}
        for panel, column in zip(axes, ("payload", "rmse", "kl"), strict=True):
            points = [(row["threshold"], row[column]) for row in rows if row.get(column) is not None]
            if points:
                panel.plot(*zip(*points, strict=True), linestyle="-" if what["own_weights"] else "--", **look)
    _threshold_axes(axes, [row["threshold"] for row in next(iter(found.values()))])
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, fontsize=9, loc="outside lower left")
    return figure


def _threshold_axes(axes: list[Axes], ticks: list[float]) -> None:
    low, high = published.claims()["weakly_sensitive"]
    labels = ("payload, bits per weight", "rmse of the weights", "KL from the float answers, nats")
    for panel, label in zip(axes, labels, strict=True):
        panel.axvspan(low, high, color=SKY, alpha=0.2, linewidth=0, label="“weakly sensitive” (paper)")
        panel.set_xscale("log")
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
        panel.set(xlabel="threshold, units of the weights", ylabel=label)
    if axes[2].has_data():
        axes[2].set_yscale("log")


FIGURES: dict[str, Draw] = {
    "figure2_noise": noise,
    "figure3_loss": loss,
    "figure6_block_sizes": block_sizes,
    "figure8_threshold": thresholds,
}
