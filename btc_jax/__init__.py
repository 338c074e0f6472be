"""Makes the weights of a trained JAX model 4 to 8 times smaller: no data, no training, one call.

The tour, in the order in which the data flows:

- `btc_quantize` packs the weights of any parameter tree; models run on the result as it is. `btc_dequantize` decodes
  it, `btc_reconstruct` does both inside `jax.jit`.
- `Uniform` is the codec, `Policy` and `Rule` choose the leaves, `BTCTensor` is a packed leaf, `btc_plan` looks ahead.
- `fused` runs models from packed weights with one dense leaf at a time.
- `btc_metrics` measures bits and errors, `btc_evaluate` accuracy, `apply_baseline` other quantizers in the same units.
  Each record prints as a table.
- `btc_search` finds the largest blocks that keep to limits of error and accuracy.
- `save`, `load`, `open_checkpoint` and `verify` keep it in files; `compress_file` and `restore_file` work from file to
  file, leaf by leaf. The command `btc` does the same in a shell.
"""

from importlib.metadata import version as _version

from btc_jax import savers as _savers
from btc_jax.backends import backend as backend
from btc_jax.baselines import Baseline as Baseline
from btc_jax.baselines import absmax4 as absmax4
from btc_jax.baselines import apply_baseline as apply_baseline
from btc_jax.baselines import percentile8 as percentile8
from btc_jax.baselines import uniform8 as uniform8
from btc_jax.checkpoint import BTCFormatError as BTCFormatError
from btc_jax.checkpoint import BTCIntegrityError as BTCIntegrityError
from btc_jax.checkpoint import BTCNotCompressedError as BTCNotCompressedError
from btc_jax.checkpoint import BTCTreeWarning as BTCTreeWarning
from btc_jax.checkpoint import BTCUnknownFormatError as BTCUnknownFormatError
from btc_jax.checkpoint import Checkpoint as Checkpoint
from btc_jax.checkpoint import LeafRecord as LeafRecord
from btc_jax.checkpoint import Verification as Verification
from btc_jax.checkpoint import load as load
from btc_jax.checkpoint import open_checkpoint as open_checkpoint
from btc_jax.checkpoint import save as save
from btc_jax.checkpoint import verify as verify
from btc_jax.codecs import Codec as Codec
from btc_jax.codecs import Coded as Coded
from btc_jax.codecs import Multilevel as Multilevel
from btc_jax.codecs import Uniform as Uniform
from btc_jax.codecs import codec_from_json as codec_from_json
from btc_jax.evaluate import Evaluation as Evaluation
from btc_jax.evaluate import btc_evaluate as btc_evaluate
from btc_jax.evaluate import btc_logits as btc_logits
from btc_jax.formats import Format as Format
from btc_jax.formats import MultilevelFormat as MultilevelFormat
from btc_jax.formats import UniformFormat as UniformFormat
from btc_jax.formats import UnknownFormatError as UnknownFormatError
from btc_jax.formats import format_from_json as format_from_json
from btc_jax.formats import register_format as register_format
from btc_jax.fusion import fused as fused
from btc_jax.metrics import LeafMetrics as LeafMetrics
from btc_jax.metrics import Measures as Measures
from btc_jax.metrics import TreeMetrics as TreeMetrics
from btc_jax.metrics import btc_metrics as btc_metrics
from btc_jax.packing import quantize_leaf as quantize_leaf
from btc_jax.partition import btc_combine as btc_combine
from btc_jax.partition import btc_partition as btc_partition
from btc_jax.plan import Plan as Plan
from btc_jax.plan import PlanRow as PlanRow
from btc_jax.plan import btc_plan as btc_plan
from btc_jax.policy import BTCPolicyError as BTCPolicyError
from btc_jax.policy import Policy as Policy
from btc_jax.policy import Rule as Rule
from btc_jax.report import Report as Report
from btc_jax.report import btc_report as btc_report
from btc_jax.search import SearchResult as SearchResult
from btc_jax.search import SearchStatus as SearchStatus
from btc_jax.search import Trial as Trial
from btc_jax.search import btc_search as btc_search
from btc_jax.sensitivity import btc_sensitivity as btc_sensitivity
from btc_jax.stream import Compressed as Compressed
from btc_jax.stream import Restored as Restored
from btc_jax.stream import compress_file as compress_file
from btc_jax.stream import plan_file as plan_file
from btc_jax.stream import restore_file as restore_file
from btc_jax.tensor import BTCTensor as BTCTensor
from btc_jax.tensor import is_packed as is_packed
from btc_jax.tree import btc_allocate as btc_allocate
from btc_jax.tree import btc_dequantize as btc_dequantize
from btc_jax.tree import btc_quantize as btc_quantize
from btc_jax.tree import btc_reconstruct as btc_reconstruct

__version__ = _version("btc_jax")

_savers.register()
