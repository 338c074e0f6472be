import os
from pathlib import Path

# The tests spend most of their time compiling. Programs are cached for other workers, for processes that tests start
# (hence in the environment, before jax is imported), and for the next run.
CACHE = Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# jaxtyping's pytest option splits off only one package from a checker with arguments.
install_import_hook("btc_jax_cli", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# 8 CPU devices, and no implicit promotion of dtypes or ranks: code that passes here is explicit everywhere.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
