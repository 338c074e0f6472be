"""Builds the library of kernels with a C compiler, against the headers of XLA that are installed with jaxlib.

A wheel may contain the library (see `hatch_build.py`). Otherwise it is built when first needed, which takes a few
seconds, and kept in the user's cache folder. Building it at every installation would mean downloading jaxlib, 100 MB,
only for its headers.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "btc_native.so"
_FLAGS = ("-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-Wno-psabi")
_KERNELS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
}
"""Instruction sets that the kernels are compiled for on x86-64; elsewhere, only the first."""


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why."""


def compiler() -> list[str]:
    """The command of a C compiler: `$CC`, the system's, or that of the package `ziglang`.

    Raises:
        BuildError: if there is none.
    """
    if command := os.environ.get("CC"):
        return command.split()
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise BuildError("no C compiler: install gcc or clang, or `pip install ziglang`")


def build(folder: Path, extra: Sequence[str] = ()) -> Path:
    """The library in a folder, built if it is not there.

    Args:
        folder: where it is kept, under a name derived from the sources, jaxlib and the processor.
        extra: more flags for the compiler, such as those of a sanitizer.

    Raises:
        BuildError: if there is no compiler, or it failed.
        OSError: if the folder cannot be written.
    """
    import jax.ffi  # only the headers are needed here

    include = jax.ffi.include_dir()
    sources = b"".join(path.read_bytes() for path in sorted(HERE.glob("*.[ch]")))
    api = (Path(include) / "xla" / "ffi" / "api" / "c_api.h").read_bytes()
    what = repr((_FLAGS, _KERNELS, tuple(extra), platform.machine(), sys.platform)).encode()
    target = folder / f"{hashlib.sha256(sources + api + what).hexdigest()[:16]}-{NAME}"
    if not target.exists():
        command = compiler()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _link(command, include, Path(scratch), extra)
            os.replace(Path(scratch) / NAME, target)
    return target


def _link(command: Sequence[str], include: str, scratch: Path, extra: Sequence[str]) -> None:
    kernels = _KERNELS if platform.machine() in ("x86_64", "AMD64") else {"portable": ()}
    compile_one = [*command, *_FLAGS, *extra, f"-I{include}", "-c"]
    jobs = [
        [*compile_one, *flags, f"-DISA={name}", str(HERE / "kernels.c"), "-o", str(scratch / f"{name}.o")]
        for name, flags in kernels.items()
    ]
    jobs += [[*compile_one, str(HERE / f"{name}.c"), "-o", str(scratch / f"{name}.o")] for name in ("library", "ffi")]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(_run, jobs))
    _run([*command, *extra, "-shared", *map(str, sorted(scratch.glob("*.o"))), "-o", str(scratch / NAME)])


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise BuildError(f"{command[0]} failed: {first}")
