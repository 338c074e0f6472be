"""The commands that read checkpoints."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btc_jax_cli.app import DONE, EXIT, AsJson, File, app, check_target
from btc_jax_cli.console import diff_row, inspect_row, show

if TYPE_CHECKING:
    import btc_jax

_FROM_A_COPY = "get it from a copy, or make it again"


@app.command(epilog=DONE)
def inspect(file: File, as_json: AsJson = False):
    """How the leaves of a compressed checkpoint are stored.

    Bits are effective ones: all that is stored, over the number of weights. Errors are shown where the file has them.

    \b
    btc inspect small.safetensors
    btc inspect small.safetensors --json | jq '.leaves[].effective_bits'
    """
    from btc_jax import open_checkpoint
    from btc_jax.tables import comparison_table

    with open_checkpoint(file) as checkpoint:
        leaves = [_described(record) for record in checkpoint.records.values()]
    total = {name: sum(leaf[name] for leaf in leaves) for name in ("weights", "bytes_before", "bytes")}
    packed = sum(leaf["kind"] == "packed" for leaf in leaves)
    text = f"{len(leaves)} leaves, {packed} of them packed, {total['weights']:,} weights: "
    text += f"{total['bytes']:,} bytes, {total['bytes_before']:,} before"
    document = {"file": str(file), "packed": packed, **total, "leaves": leaves}
    show(as_json, document, lambda: comparison_table(map(inspect_row, leaves), file.name), text)


@app.command(epilog=EXIT.format("0 whole, 1 damaged or not a compressed checkpoint"))
def verify(file: File, as_json: AsJson = False) -> int:
    """Compares all of a compressed checkpoint with its checksums.

    If it is damaged, what is wrong is listed, a line for each leaf.

    \b
    btc verify small.safetensors && cp small.safetensors /backup
    """
    import btc_jax
    from btc_jax.checkpoint import BTCFormatError, BTCNotCompressedError, Verification
    from btc_jax_cli.errors import at_a_prompt

    try:
        found = btc_jax.verify(file)
        state = f"{len(found.damaged)} damaged; {_FROM_A_COPY}" if found.damaged else "undamaged"
    except BTCFormatError as error:
        if file.is_dir():
            raise
        found = Verification(0, 0, (at_a_prompt(error),))
        state = "nothing to verify" if isinstance(error, BTCNotCompressedError) else f"damaged; {_FROM_A_COPY}"
    text = f"{file}: {found.leaves} leaves, {found.nbytes:,} bytes, {state}"
    show(as_json, {"file": str(file), "ok": found.ok, **dataclasses.asdict(found)}, *found.damaged, text)
    return 0 if found.ok else 1


@app.command(epilog=EXIT.format("0 the same, 1 different"))
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="The original: a compressed checkpoint, or any SOURCE.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What is compared with it, of the same kinds.")],
    limit: Annotated[int | None, typer.Option(min=0, metavar="N", help="Only the N worst leaves.")] = None,
    as_json: AsJson = False,
) -> int:
    """The error of each leaf of B against A, worst first.

    Leaves of equal shape, dtype and values are only counted.

    \b
    btc diff model.safetensors small.safetensors --limit 10
    btc diff old.safetensors new.safetensors && echo the same
    """
    from btc_jax._progress import progress
    from btc_jax.compare import compare, open_any
    from btc_jax.tables import comparison_table

    with open_any(a) as one, open_any(b) as other, progress("comparing", one.nbytes) as on_leaf:
        found = compare(one, other, on_leaf)
    rows = [*map(diff_row, found.different[:limit]), diff_row(found.total)]
    text = f"{len(found.different)} of {len(found.leaves)} leaves differ"
    table = [lambda: comparison_table(rows, f"{b.name} against {a.name}")] if found.different else []
    show(as_json, {"a": str(a), "b": str(b), **found.to_json(limit)}, *table, text)
    return 1 if found.different else 0


@app.command(epilog=DONE)
def report(
    a: Annotated[Path, typer.Argument(metavar="A", help="The original: any SOURCE, or a compressed checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The compressed checkpoint that was made of it.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Measure other quantizers on the same leaves.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace FILE if it exists.")] = False,
    as_json: AsJson = False,
):
    """What quantization saved and cost, as a page that opens in any browser.

    Bits by leaf, the worst leaves, histograms of the weights, what stayed dense and why,
    and other quantizers in the same units. It needs nothing else and no network.

    \b
    btc report model.safetensors small.safetensors -o report.html
    """
    from btc_jax._progress import progress
    from btc_jax.compare import open_any
    from btc_jax.report import report_files

    check_target(a, output, force)
    check_target(b, output, force)
    with open_any(a) as original:
        total = original.nbytes
    with progress("measuring", total) as on_leaf:
        found = report_files(a, b, baselines=baselines, on_leaf=on_leaf)
    found.save(output)
    metrics, m = found.metrics, found.metrics.total
    ratio = metrics.bytes_before / max(metrics.bytes_after, 1)
    text = f"{output}: {ratio:.2f} times smaller, {len(found.packed)} of {len(metrics.leaves)} leaves packed at "
    show(as_json, found.to_json(), f"{text}{m.effective_bits:.3f} bits, {m.sqnr_db:.2f} dB")


def _described(record: "btc_jax.checkpoint.LeafRecord") -> dict[str, Any]:
    from btc_jax.compare import dense_nbytes

    packed, weights = record.kind == "packed", math.prod(record.shape)
    return {
        **{"path": record.path, "kind": record.kind, "shape": record.shape, "dtype": record.dtype, "weights": weights},
        **{name: record.details.get(name) for name in ("codec", "order", "error", "origin")},
        "effective_bits": 8 * record.nbytes / weights if weights else None,
        "bytes_before": dense_nbytes(record.shape, record.dtype) if packed else record.nbytes,
        "bytes": record.nbytes,
    }
