"""Errors in parts. Their messages are for programmers; the command line phrases the same parts in its own words."""

from typing import Any


class ArgumentError(ValueError):
    """An argument has an invalid value.

    Attributes:
        name: the argument, such as `bits`.
        problem: the rest of the sentence.

    Examples:
        >>> str(ArgumentError("bits", "is nan; it must be a positive number"))
        'bits is nan; it must be a positive number'
    """

    def __init__(self, name: str, problem: str):
        super().__init__(name, problem)
        self.name, self.problem = name, problem

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


class ConflictingArgumentsError(ValueError):
    """Mutually exclusive arguments are given.

    Attributes:
        given: their values by name.
        problem: the rest of the sentence.
    """

    def __init__(self, given: dict[str, Any], problem: str):
        super().__init__(given, problem)
        self.given, self.problem = given, problem

    def __str__(self) -> str:
        return f"{' and '.join(f'{name}={value!r}' for name, value in self.given.items())} {self.problem}"


class LeafError(ValueError):
    """A leaf has values that cannot be packed.

    Attributes:
        path: the leaf.
        problem: what is wrong with its values, and what can be done.
    """

    def __init__(self, path: str, problem: str):
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}"


class Remedied(ValueError):
    """An error with a known remedy.

    Attributes:
        problem: what is wrong.
        remedy: what to do, in Python.
    """

    problem: str
    remedy: str

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"
