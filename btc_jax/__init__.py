"""Makes the weights of a trained JAX model 4 to 8 times smaller: no data, no training, one call.

The tour, in the order in which the data flows:

- `btc_quantize` packs the weights of any parameter tree, as a `Uniform` or `Multilevel` codec codes them and a `Policy`
  of `Rule`s selects them; models run on the result as it is. `btc_dequantize` decodes it, and `btc_reconstruct` does
  both inside `jax.jit`. A packed leaf is a `BTCTensor`; `quantize_leaf` makes one.
- `btc_plan` looks ahead, `btc_allocate` keeps how bits were allocated, `btc_sensitivity` measures which leaves matter.
- `fused` runs models from packed weights with one dense leaf at a time; `backend` tells what decodes them.
- `btc_metrics` measures bits and errors, `btc_evaluate` answers, and `btc_report` shows all of it on a page.
- `btc_search` finds the largest blocks, or the fewest bits, that keep to limits of error and accuracy.
- `save`, `load`, `open_checkpoint` and `verify` keep packed trees in files; `quantize_file`, `dequantize_file` and
  `plan_file` work from file to file, leaf by leaf. The command `btc` does the same in a shell.

What these functions return and raise, and what extends them, is in the modules: `baselines`, `checkpoint`, `codecs`,
`evaluate`, `formats`, `metrics`, `packing`, `partition`, `plan`, `policy`, `report`, `search` and `stream`.
"""

from importlib.metadata import version as _version

from btc_jax import baselines as baselines
from btc_jax import checkpoint as checkpoint
from btc_jax import codecs as codecs
from btc_jax import evaluate as evaluate
from btc_jax import formats as formats
from btc_jax import metrics as metrics
from btc_jax import packing as packing
from btc_jax import partition as partition
from btc_jax import plan as plan
from btc_jax import policy as policy
from btc_jax import report as report
from btc_jax import savers as _savers
from btc_jax import search as search
from btc_jax import stream as stream
from btc_jax.backends import backend as backend
from btc_jax.checkpoint import load as load
from btc_jax.checkpoint import open_checkpoint as open_checkpoint
from btc_jax.checkpoint import save as save
from btc_jax.checkpoint import verify as verify
from btc_jax.codecs import Multilevel as Multilevel
from btc_jax.codecs import Uniform as Uniform
from btc_jax.evaluate import btc_evaluate as btc_evaluate
from btc_jax.evaluate import btc_logits as btc_logits
from btc_jax.fusion import fused as fused
from btc_jax.metrics import btc_metrics as btc_metrics
from btc_jax.packing import quantize_leaf as quantize_leaf
from btc_jax.plan import btc_plan as btc_plan
from btc_jax.policy import Policy as Policy
from btc_jax.policy import Rule as Rule
from btc_jax.report import btc_report as btc_report
from btc_jax.search import btc_search as btc_search
from btc_jax.sensitivity import btc_sensitivity as btc_sensitivity
from btc_jax.stream import dequantize_file as dequantize_file
from btc_jax.stream import plan_file as plan_file
from btc_jax.stream import quantize_file as quantize_file
from btc_jax.tensor import BTCTensor as BTCTensor
from btc_jax.tensor import is_packed as is_packed
from btc_jax.tree import btc_allocate as btc_allocate
from btc_jax.tree import btc_dequantize as btc_dequantize
from btc_jax.tree import btc_quantize as btc_quantize
from btc_jax.tree import btc_reconstruct as btc_reconstruct

__version__ = _version("btc_jax")

_savers.register()
