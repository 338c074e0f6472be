"""A generator for each lie that a checkpoint file can tell. Each takes an empty folder and returns what to load."""

from tests.hostile.headers import HEADERS
from tests.hostile.indexes import INDEXES
from tests.hostile.manifests import MANIFESTS
from tests.hostile.multilevel import MULTILEVEL

LIES = {lie.__name__: lie for lie in (*HEADERS, *MANIFESTS, *MULTILEVEL, *INDEXES)}
