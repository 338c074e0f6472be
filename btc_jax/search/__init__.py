"""Search for the largest blocks, or the fewest bits, that keep to limits of error and accuracy."""

from btc_jax.search.record import SearchResult as SearchResult
from btc_jax.search.record import SearchStatus as SearchStatus
from btc_jax.search.run import btc_search as btc_search
from btc_jax.search.trial import Trial as Trial
