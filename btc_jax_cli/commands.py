"""All commands, in the order of their help."""

import btc_jax_cli.writing  # noqa: F401  # registers its commands
from btc_jax_cli import reading as reading
from btc_jax_cli.app import app as app
