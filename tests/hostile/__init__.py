"""Generators of invalid checkpoint files. Each takes an empty folder and returns the path to load."""

import inspect

from tests.hostile import headers, indexes, leaves, manifests, multilevel, packed, trees

LIES = {
    name: lie
    for module in (headers, manifests, leaves, packed, multilevel, trees, indexes)
    for name, lie in inspect.getmembers(module, inspect.isfunction)
    if lie.__module__ == module.__name__ and not name.startswith("_") and len(inspect.signature(lie).parameters) == 1
}
"""Each public function that takes only a folder."""
