"""The command `btc`, in a package of its own: importing anything of `btc_jax` imports JAX, which takes a second.

Nothing here imports `btc_jax` before a command has work to do, so that help and wrong usage are there at once.
"""
