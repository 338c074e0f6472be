"""Builds the native kernels into a wheel, if `BTC_JAX_BUILD_NATIVE=1`. Otherwise they are built at first use."""

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

WANTED = os.environ.get("BTC_JAX_BUILD_NATIVE") == "1"


class NativeBuildHook(BuildHookInterface):
    """Adds the library to the wheel, which then is for one platform."""

    def dependencies(self) -> list[str]:
        return ["jax>=0.10"] if WANTED and self.target_name == "wheel" else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not WANTED or self.target_name != "wheel" or version == "editable":
            return
        native = Path(self.root) / "btc_jax" / "native"
        spec = importlib.util.spec_from_file_location("btc_native_build", native / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        library = module.build(Path(tempfile.mkdtemp()))
        build_data["force_include"][str(library)] = f"btc_jax/native/{module.NAME}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
