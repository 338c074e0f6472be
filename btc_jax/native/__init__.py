"""C kernels for CPUs, built once by the system's compiler, and left out if there is none."""

from btc_jax.native.loading import Library as Library
from btc_jax.native.loading import library as library
from btc_jax.native.loading import why_not as why_not
