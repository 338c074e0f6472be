"""What the tests of policies share."""

import contextlib

import jax
import jax.numpy as jnp
import jaxtyping

from btc_jax import (
    btc_plan,
)

BIG = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def rows(tree, policy=None):
    return {row.path: row for row in btc_plan(tree, policy=policy).rows}


def reasons(tree, policy=None):
    return {path: row.reason for path, row in rows(tree, policy).items()}


@contextlib.contextmanager
def as_users_run_it():
    """Without the test run's type checks, which would precede the package's own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def star_glob(pattern, path):
    """Whether a glob that knows only `*` matches."""
    if not pattern:
        return not path
    if pattern[0] == "*":
        return any(star_glob(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return path[:1] == pattern[0] and star_glob(pattern[1:], path[1:])
