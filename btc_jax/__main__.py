"""The command `btc`, as `python -m btc_jax`."""

from btc_jax_cli.commands import app

app()
