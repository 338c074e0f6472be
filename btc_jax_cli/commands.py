"""The command `btc`: it parses and calls. What it prints, and how it fails, is in `console`."""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btc_jax_cli.console import OneLineErrors, diff_row, inspect_row, show
from btc_jax_cli.options import How, shard_bytes, takes_how

if TYPE_CHECKING:
    import btc_jax

_EXIT = "Exit codes: {}, 2 wrong usage, file or pattern, 130 interrupted."
_DONE = _EXIT.format("0 done")
_FROM_A_COPY = "get it from a copy, or make it again"

app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EXIT.format("0 done, 1 `verify` found damage or `diff` a difference"),
)

Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE",
        help="A .safetensors file, a folder of them with its index, an .npz, a Flax .msgpack, or an Orbax folder.",
    ),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A compressed checkpoint.")]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="The file to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace TARGET if it exists.")]


def _version(asked: bool) -> bool:
    if asked:
        from importlib.metadata import version

        typer.echo(f"btc {version('btc_jax')}")
        raise typer.Exit
    return asked


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Show the version and exit.")] = False,
):
    """Makes the weights of a trained model 4 to 8 times smaller: no data, no training.

    \b
    btc plan model.safetensors                          what would be done
    btc quantize model.safetensors small.safetensors    do it, perhaps --bits 4.5
    btc inspect small.safetensors                       what is in it
    btc verify small.safetensors                        is it whole?
    btc diff model.safetensors small.safetensors        what it cost in accuracy
    btc restore small.safetensors plain.safetensors     back to plain safetensors
    """


@app.command(epilog=_DONE)
@takes_how
def plan(
    source: Source,
    how: How,
    measure: Annotated[bool, typer.Option("--measure", help="Read the values: exact sizes, not a range.")] = False,
    as_json: AsJson = False,
):
    """What would be done to each leaf, and how large the result is.

    Leaves that stay dense have a reason. No values are read, except to measure; what --bits or --size allows is known
    without.

    \b
    btc plan model.safetensors
    btc plan model.safetensors --bits 4.5 --measure
    btc plan model.safetensors --block-size 32 --rule '*embed*=dense'
    """
    from btc_jax import plan_file
    from btc_jax._progress import progress

    policy, _ = how.policy_and_bytes(source)
    with progress("measuring", None if measure else 0):
        found = plan_file(source, policy=policy, measure=measure, **how.goal)
    vague = found.target is not None and found.bytes_min < found.bytes_max
    hint = [] if not vague else ["--measure reads the values, and tells the size of each leaf exactly."]
    show(
        as_json,
        found.to_json(),
        lambda: found.table(source.name, full=True),
        *hint,
    )


@app.command(epilog=_DONE)
@takes_how
def quantize(
    source: Source,
    target: Target,
    how: How,
    max_shard_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Split TARGET into files of at most 500MB, 2GiB, 1000000, ...")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
):
    """Compresses a checkpoint leaf by leaf. If it is stopped, the same command goes on where it was.

    \b
    btc quantize model.safetensors small.safetensors --bits 4.5
    btc quantize model.safetensors small.safetensors --size 25MB
    btc quantize hf_folder/ small.safetensors --max-shard-bytes 2GB
    btc quantize model.npz small.btc --rule '*/head/*=dense' --rule '*attn*=32'
    """
    from btc_jax import compress_file
    from btc_jax._progress import progress
    from btc_jax.checkpoint.write import SUFFIX

    shard = None if max_shard_bytes is None else shard_bytes(max_shard_bytes)
    _check_target(source, target, force)
    if shard and target.suffix != SUFFIX:
        raise ValueError(f"{target} must end in {SUFFIX} to be split into several files; rename it")
    policy, total = how.policy_and_bytes(source)
    with progress(
        "quantizing", total, "sharing out bits" if how.target or (policy.codec and policy.codec.rate_controlled) else ""
    ) as on_leaf:
        done = compress_file(source, target, policy=policy, max_shard_bytes=shard, on_leaf=on_leaf, **how.goal)
    ratio = done.bytes_before / max(done.bytes_after, 1)
    resumed = f" ({done.resumed} by an earlier run)" if done.resumed else ""
    show(
        as_json,
        {"target": str(target), **dataclasses.asdict(done)},
        f"{target}: {done.bytes_before:,} to {done.bytes_after:,} bytes, {ratio:.2f} times smaller; {done.packed} of "
        f"{done.leaves} leaves packed{resumed} at {done.effective_bits:.3f} bits, {done.sqnr_db:.2f} dB, "
        f"{done.seconds:.1f} s",
    )


@app.command(epilog=_DONE)
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


@app.command(epilog=_EXIT.format("0 whole, 1 damaged or not a compressed checkpoint"))
def verify(file: File, as_json: AsJson = False) -> int:
    """Compares all of a compressed checkpoint with its checksums.

    If it is damaged, what is wrong is listed, a line for each leaf.

    \b
    btc verify small.safetensors && cp small.safetensors /backup
    """
    import btc_jax
    from btc_jax_cli.errors import at_a_prompt

    try:
        found = btc_jax.verify(file)
        state = f"{len(found.damaged)} damaged; {_FROM_A_COPY}" if found.damaged else "all whole"
    except btc_jax.BTCFormatError as error:
        if file.is_dir():
            raise
        found = btc_jax.Verification(0, 0, (at_a_prompt(error),))
        state = "nothing to verify" if isinstance(error, btc_jax.BTCNotCompressedError) else f"damaged; {_FROM_A_COPY}"
    text = f"{file}: {found.leaves} leaves, {found.nbytes:,} bytes, {state}"
    show(as_json, {"file": str(file), "ok": found.ok, **dataclasses.asdict(found)}, *found.damaged, text)
    return 0 if found.ok else 1


@app.command(epilog=_EXIT.format("0 the same, 1 different"))
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


@app.command(epilog=_DONE)
def restore(file: File, target: Target, force: Force = False, as_json: AsJson = False):
    """Decodes a compressed checkpoint into plain safetensors.

    The names and dtypes are the original ones. What safetensors cannot hold so is
    written in another way or left out, and listed.

    \b
    btc restore small.safetensors plain.safetensors
    """
    from btc_jax import open_checkpoint, restore_file
    from btc_jax._progress import progress
    from btc_jax.compare import dense_nbytes

    _check_target(file, target, force)
    with open_checkpoint(file) as checkpoint:
        total = sum(dense_nbytes(record.shape, record.dtype) for record in checkpoint.records.values())
    with progress("restoring", total) as on_leaf:
        done = restore_file(file, target, on_leaf=on_leaf)
    odd = [f"{path}: {change}" for path, change in done.changed.items()]
    odd += [f"{path}: {what}, left out" for path, what in done.left_out.items()]
    document = {"target": str(target), "leaves": done.leaves, "bytes": done.nbytes}
    document |= {"changed": done.changed, "left_out": done.left_out}
    show(as_json, document, *odd, f"{target}: {done.leaves} leaves, {done.nbytes:,} bytes")


def _check_target(source: Path, target: Path, force: bool) -> None:
    """Refuses a target that cannot be, or must not be, written, before any work is done."""
    from btc_jax.checkpoint.write import index_of

    real, origin = target.resolve(), source.resolve()
    if origin in (real, index_of(real), *real.parents):
        raise ValueError(f"{target} would be written over or into {source}; name another file")
    if real.exists() and not real.is_file():
        raise ValueError(f"{target} is not a regular file; name a file")
    if not real.parent.is_dir():
        raise ValueError(f"{target} cannot be written: there is no folder {target.parent}; make it first")
    if not force and (real.exists() or index_of(real).exists()):
        raise ValueError(f"{target} exists; add --force to replace it, or name another file")


def _described(record: "btc_jax.LeafRecord") -> dict[str, Any]:
    from btc_jax.compare import dense_nbytes

    packed, weights = record.kind == "packed", math.prod(record.shape)
    return {
        **{"path": record.path, "kind": record.kind, "shape": record.shape, "dtype": record.dtype, "weights": weights},
        **{name: record.details.get(name) for name in ("codec", "order", "error", "origin")},
        "effective_bits": 8 * record.nbytes / weights if weights else None,
        "bytes_before": dense_nbytes(record.shape, record.dtype) if packed else record.nbytes,
        "bytes": record.nbytes,
    }
