"""What a table was measured on, for the line below it."""

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax

from btc_jax import backend

_PACKAGES = ("jax", "flax", "numpy")


def measured_on(*packages: str) -> str:
    """The date, the machine, the versions and the commit, as one sentence.

    Args:
        packages: others that were measured; those that are not installed are left out.
    """
    kernels = backend().partition(",")[0]  # without the path of the library
    versions = [f"{name} {number}" for name in (*_PACKAGES, *packages) if (number := _version(name))]
    return (
        f"Measured on {datetime.date.today()}: {_processor()}, {os.cpu_count()} cores, {_device()}{kernels}; "
        f"Python {platform.python_version()}, {', '.join(versions)}; btc_jax {_commit()}."
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """The name of the processor, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _device() -> str:
    device = jax.devices()[0]
    return "" if device.platform == "cpu" else f"{device.device_kind}, "


def _commit() -> str:
    """The version and the commit of this checkout; a `+` where files were changed since."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return f"{version('btc_jax')} at {git('rev-parse', '--short', 'HEAD')}{'+' if git('status', '--short') else ''}"
    except (OSError, subprocess.CalledProcessError):
        return version("btc_jax")
