"""Search by limits of error and accuracy: the largest blocks, or the fewest bits, that keep to them."""

from btc_jax.search.record import SearchResult as SearchResult
from btc_jax.search.record import SearchStatus as SearchStatus
from btc_jax.search.run import btc_search as btc_search
from btc_jax.search.trial import Trial as Trial
