from btc_jax_cli.commands import app

app()
