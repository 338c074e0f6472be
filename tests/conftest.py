import jax

# 8 CPU devices, and no silent mixing of dtypes or ranks: what passes here is explicit everywhere.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
