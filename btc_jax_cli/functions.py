"""A function that a user names at the prompt."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def function_of(name: str) -> Callable[..., Any]:
    """The function of a name such as `eval.py:accuracy` or `package.module:accuracy`.

    What the file or module raises when it is imported is raised here: it is the user's, and so is the traceback.

    Raises:
        ValueError: if there is no such file, module or function.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute.isidentifier():
        raise ValueError(f"--evaluate {name!r} is not FILE.py:FUNCTION, such as eval.py:accuracy")
    module = _of_file(Path(where)) if where.endswith(".py") else _of_module(where)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"--evaluate: {where} has no function {attribute!r}")
    return function


def _of_file(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"--evaluate: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)  # dataclasses and pickles look for it there
    sys.path.insert(0, str(file.parent.resolve()))  # as Python does for a script
    spec.loader.exec_module(module)
    return module


def _of_module(name: str) -> Any:
    sys.path.insert(0, str(Path.cwd()))
    if not all(part.isidentifier() for part in name.split(".")) or importlib.util.find_spec(name.split(".")[0]) is None:
        raise ValueError(f"--evaluate: there is no module {name!r}; name a FILE.py:FUNCTION, or a module on the path")
    return importlib.import_module(name)
