"""The commands that write checkpoints, and the one that says what they would write."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btc_jax_cli.app import DONE, EXIT, AsJson, File, Force, Source, Target, app, check_target
from btc_jax_cli.console import show
from btc_jax_cli.options import Choices, Targets, nbytes, option, sensitivities, takes_groups

if TYPE_CHECKING:
    import btc_jax


@app.command(epilog=DONE)
@takes_groups
def plan(
    source: Source,
    targets: Targets,
    choices: Choices,
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

    policy = choices.policy(targets.target, targets.sensitivity)
    with progress("measuring", None if measure else 0):
        found = plan_file(source, policy=policy, measure=measure, **targets.goal)
    vague = found.target is not None and found.bytes_min < found.bytes_max
    hint = ["--measure reads the values, and tells the size of each leaf exactly."] if vague else []
    _show_plan(as_json, found, source, *hint)


@app.command(epilog=DONE)
@takes_groups
def quantize(
    source: Source,
    target: Target,
    targets: Targets,
    choices: Choices,
    max_shard_bytes: Annotated[
        str | None, option("SIZE", "Split TARGET into files of at most 500MB, 2GiB, 1000000, ...")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, and write nothing.")] = False,
    force: Force = False,
    as_json: AsJson = False,
):
    """Quantizes a checkpoint leaf by leaf. If it is stopped, the same command resumes.

    \b
    btc quantize model.safetensors small.safetensors --bits 4.5
    btc quantize model.safetensors small.safetensors --size 25MB
    btc quantize hf_folder/ small.safetensors --max-shard-bytes 2GB
    btc quantize model.npz small.btc --rule '*/head/*=dense' --rule '*attn*=32'
    """
    from btc_jax import plan_file, quantize_file
    from btc_jax._progress import progress
    from btc_jax.checkpoint.write import SUFFIX

    shard = None if max_shard_bytes is None else nbytes(max_shard_bytes, "max_shard_bytes")
    check_target(source, target, force)
    if shard and target.suffix != SUFFIX:
        raise ValueError(f"{target} must end in {SUFFIX} to be split into several files; rename it")
    policy = choices.policy(targets.target, targets.sensitivity)
    if dry_run:
        found = plan_file(source, policy=policy, **targets.goal)
        return _show_plan(as_json, found, source, f"dry run: {target} was not written.")
    allocates = targets.target or (policy.codec and policy.codec.rate_controlled)
    with progress("quantizing", _dense_nbytes(source), "allocating bits" if allocates else "") as on_leaf:
        done = quantize_file(source, target, policy=policy, max_shard_bytes=shard, on_leaf=on_leaf, **targets.goal)
    ratio = done.bytes_before / max(done.bytes_after, 1)
    resumed = f" ({done.resumed} by an earlier run)" if done.resumed else ""
    show(
        as_json,
        {"target": str(target), **dataclasses.asdict(done)},
        f"{target}: {done.bytes_before:,} to {done.bytes_after:,} bytes, {ratio:.2f} times smaller; {done.packed} of "
        f"{done.leaves} leaves packed{resumed} at {done.effective_bits:.3f} bits, {done.sqnr_db:.2f} dB, "
        f"{done.seconds:.1f} s",
    )


@app.command(epilog=EXIT.format("0 found, 1 nothing keeps to the limits"))
@takes_groups
def search(
    source: Source,
    choices: Choices,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="The file to write what was found to.")
    ] = None,
    evaluate: Annotated[
        str | None,
        option(
            "FILE.py:FUNCTION|MODULE:FUNCTION",
            "A function of the weights, nested dicts by the names of the source, that returns an accuracy from 0 to 1, "
            "or what btc_evaluate returns. Without it only the error limits the search.",
        ),
    ] = None,
    bits: Annotated[
        tuple[float, float] | None, option("LOW HIGH", "Search budgets of effective bits, instead of block sizes.")
    ] = None,
    block_sizes: Annotated[str | None, option("N,N,...", "The block sizes to try [32,64,128,256].")] = None,
    tolerance: Annotated[float, option("X", "With --bits: how near to the best budget to come.")] = 0.05,
    max_rmse: Annotated[
        str, option("X|none", "Largest error of the packed weights [0.003; with --bits: none].", show_default=False)
    ] = "auto",
    max_drop: Annotated[float, option("POINTS", "Largest loss of accuracy, in points of 1 %.")] = 2.0,
    max_kl: Annotated[float | None, option("NATS", "Largest divergence of the answers from the float ones.")] = None,
    min_agreement: Annotated[float | None, option("X", "Least share of answers that stay the same, 0 to 1.")] = None,
    sensitivity: Annotated[str | None, option("FILE|shape|equal", "With --bits: as for `btc quantize`.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> int:
    """Finds the largest blocks, or the fewest bits, that keep to limits of error and accuracy.

    The whole checkpoint is in memory. The largest blocks are the paper's search.

    \b
    btc search model.safetensors
    btc search model.safetensors small.safetensors --bits 3 6 --max-rmse 0.002
    btc search model.safetensors --bits 3 6 --evaluate eval.py:accuracy
    """
    from btc_jax import btc_search, save
    from btc_jax.stream import read_tree
    from btc_jax_cli.functions import function_of

    if target:
        check_target(source, target, force)
    judge = function_of(evaluate) if evaluate else None
    sizes: dict[str, Any] = {} if block_sizes is None else {"block_sizes": _whole_numbers(block_sizes)}
    policy = choices.policy(_target_of(bits), sensitivity)
    if not bits and policy.codec and policy.codec.rate_controlled:
        raise ValueError(f"--codec {policy.codec.id} is rate-controlled; search --bits LOW HIGH, not block sizes")
    found = btc_search(
        read_tree(source),
        judge,
        policy=policy,
        bits=bits,
        tolerance=tolerance,
        max_rmse=_limit(max_rmse),
        max_drop=max_drop,
        max_kl=max_kl,
        min_agreement=min_agreement,
        sensitivity=sensitivities(sensitivity),
        **sizes,
    )
    written = []
    if target and found.tree is not None:
        save(target, found.tree)
        written = [f"{target}: {target.stat().st_size:,} bytes"]
    show(as_json, found.to_json(), found.table, *written)
    return 0 if found.best else 1


@app.command(epilog=DONE)
def dequantize(file: File, target: Target, force: Force = False, as_json: AsJson = False):
    """Decodes a compressed checkpoint into plain safetensors.

    The names and dtypes are the original ones. What safetensors cannot hold so is
    written in another way or left out, and listed.

    \b
    btc dequantize small.safetensors plain.safetensors
    """
    from btc_jax import dequantize_file, open_checkpoint
    from btc_jax._progress import progress
    from btc_jax.compare import dense_nbytes

    check_target(file, target, force)
    with open_checkpoint(file) as checkpoint:
        total = sum(dense_nbytes(record.shape, record.dtype) for record in checkpoint.records.values())
    with progress("dequantizing", total) as on_leaf:
        done = dequantize_file(file, target, on_leaf=on_leaf)
    odd = [f"{path}: {change}" for path, change in done.changed.items()]
    odd += [f"{path}: {what}, left out" for path, what in done.left_out.items()]
    document = {"target": str(target), "leaves": done.leaves, "bytes": done.nbytes}
    document |= {"changed": done.changed, "left_out": done.left_out}
    show(as_json, document, *odd, f"{target}: {done.leaves} leaves, {done.nbytes:,} bytes")


def _show_plan(as_json: bool, found: "btc_jax.plan.Plan", source: Path, *more: str) -> None:
    show(as_json, found.to_json(), lambda: found.table(source.name, full=True), *more)


def _dense_nbytes(source: Path) -> int:
    from btc_jax.compare import dense_nbytes
    from btc_jax.sources import open_source

    with open_source(source) as opened:
        return sum(dense_nbytes(leaf.shape, leaf.dtype.name) for leaf in opened.leaves)


def _target_of(bits: tuple[float, float] | None) -> Any:
    """The largest budget of a search as a target, or none."""
    return Targets(bits=bits[1]).target if bits else None


def _limit(text: str) -> Any:
    if text in ("auto", "none"):
        return None if text == "none" else "auto"
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--max-rmse {text!r} is neither a number nor 'none'") from None


def _whole_numbers(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdecimal() and len(number) < 10 for number in numbers):
        raise ValueError(f"--block-sizes {text!r} are not whole numbers with commas, such as 32,64,128")
    return tuple(map(int, numbers))
