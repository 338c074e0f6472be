"""Rules in a TOML file."""

import dataclasses
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from btc_jax.codecs import codec_from_json
from btc_jax.policy.rules import BTCPolicyError, Rule

_FIELDS = tuple(field.name for field in dataclasses.fields(Rule))


def load_rules(path: str | os.PathLike[str]) -> tuple[Rule, ...]:
    """The rules of a TOML file, in its order, for `Policy(rules=...)`.

    Each is a table `[[rule]]` with the fields of `Rule`. A codec is `"dense"`, `"default"`, or a table of its `id` and
    of the fields that differ from their defaults.

    Returns:
        The rules, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        BTCPolicyError: if it is not TOML, or a rule cannot be; the message names the file and the rule.

    Examples:
        >>> import tempfile, pathlib
        >>> text = '''
        ... [[rule]]
        ... pattern = "*/head/*"
        ... codec = "dense"
        ...
        ... [[rule]]
        ... pattern = "*attention*"
        ... codec = { id = "multilevel", block_size = 64 }
        ... weight = 4.0
        ... '''
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "rules.toml")
        ...     _ = file.write_text(text)
        ...     [(rule.pattern, rule.codec) for rule in load_rules(file)]
        [('*/head/*', None), ('*attention*', Multilevel(block_size=64, width=None, effort='fast', slope=None))]
    """
    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BTCPolicyError(f"{path} is not a TOML file: {error}") from error
    rules = document.pop("rule", None)
    if document or not isinstance(rules, list):
        strange = f"has {next(iter(document))!r}" if document else "has no rule"
        raise BTCPolicyError(f"{path} {strange}; it must be a list of tables [[rule]], each with a pattern")
    return tuple(_rule(f"{path}, rule {number}", fields) for number, fields in enumerate(rules, 1))


def _rule(where: str, fields: Mapping[str, Any]) -> Rule:
    if strange := [name for name in fields if name not in _FIELDS]:
        raise BTCPolicyError(f"{where} has {strange[0]!r}; a rule can have {', '.join(_FIELDS)}")
    if "pattern" not in fields:
        raise BTCPolicyError(f"{where} has no pattern, such as pattern = '*/head/*'")
    codec = fields.get("codec", "default")
    if not (codec in ("dense", "default") or isinstance(codec, Mapping)):
        raise BTCPolicyError(f"{where}: codec is {codec!r}; it can be 'dense', 'default', or a table with an id")
    try:
        codec = None if codec == "dense" else codec_from_json(codec) if isinstance(codec, Mapping) else codec
        return Rule(**{**fields, "codec": codec})
    except (TypeError, ValueError) as error:
        raise BTCPolicyError(f"{where}: {error}") from error
