"""What quantization cost and saved."""

from btc_jax.metrics.measure import LeafRow as LeafRow
from btc_jax.metrics.measure import btc_metrics as btc_metrics
from btc_jax.metrics.measure import dict_of as dict_of
from btc_jax.metrics.measure import error_of as error_of
from btc_jax.metrics.measure import measure_leaf as measure_leaf
from btc_jax.metrics.measure import metrics_of as metrics_of
from btc_jax.metrics.measure import reason_of as reason_of
from btc_jax.metrics.measure import storage_of as storage_of
from btc_jax.metrics.measure import tied_row as tied_row
from btc_jax.metrics.measure import tree_metrics as tree_metrics
from btc_jax.metrics.records import LeafMetrics as LeafMetrics
from btc_jax.metrics.records import Measures as Measures
from btc_jax.metrics.records import Storage as Storage
from btc_jax.metrics.records import TreeMetrics as TreeMetrics
from btc_jax.metrics.records import jsonable as jsonable
