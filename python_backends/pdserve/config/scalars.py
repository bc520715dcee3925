"""Plain scalars of YAML, converted by the type of their field.

YAML 1.1, which PyYAML reads, guesses a type by the look of a scalar: ``off`` is false, ``127.1`` a
number, ``2026-11-29`` a date, ``010`` eight, ``1:30`` ninety, and ``1e3`` is text. Here the field's
type decides, and a scalar that two readers would read differently is refused. Quoted text stays
text.
"""

from __future__ import annotations

import math
import re

import yaml
from msgspec import inspect

_TAG = "tag:yaml.org,2002:"
_TRUTH = {"yes": True, "on": True, "true": True, "y": True} | {
    "no": False,
    "off": False,
    "false": False,
    "n": False,
}
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


def fitted(node: yaml.ScalarNode, info: inspect.Type) -> yaml.ScalarNode:
    """Return the scalar, converted for a field of this type.

    Raises:
        ValueError: it is not allowed, has two meanings, or is not finite.
    """
    if isinstance(info, inspect.LiteralType):
        return _one_of(node, info)
    if node.style is not None or node.tag == f"{_TAG}null":
        return node
    if isinstance(info, inspect.StrType):
        return as_text(node)
    if isinstance(info, inspect.BoolType):
        truth = _TRUTH.get(node.value.lower())
        return node if truth is None else _made(node, "bool", "yes" if truth else "no")
    if isinstance(info, inspect.IntType | inspect.FloatType):
        return _number(node, whole=isinstance(info, inspect.IntType))
    return node


def as_text(node: yaml.ScalarNode) -> yaml.ScalarNode:
    """Return the scalar as text."""
    return _made(node, "str", node.value)


def _one_of(node: yaml.ScalarNode, info: inspect.LiteralType) -> yaml.ScalarNode:
    text = node.value
    if text not in info.values and node.tag == f"{_TAG}bool":
        text = "on" if _TRUTH[text.lower()] else "off"
    if text not in info.values:
        allowed = ", ".join(map(str, info.values))
        raise ValueError(f"{node.value!r} is not allowed; allowed: {allowed}")
    return _made(node, "str", text)


def _number(node: yaml.ScalarNode, *, whole: bool) -> yaml.ScalarNode:
    text = node.value
    if node.tag in (f"{_TAG}int", f"{_TAG}float") and ":" in text:
        raise ValueError(f"{text} counts by sixties in YAML 1.1; write one number")
    if _OCTAL.fullmatch(text) and text.strip("+-0_"):
        raise ValueError(f"{text} is octal in YAML 1.1 and decimal in YAML 1.2; leave out the 0")
    if node.tag == f"{_TAG}int":
        return node
    try:
        value = float(text.replace("_", "")) if node.tag == f"{_TAG}str" else _float(text)
    except ValueError:
        return as_text(node)  # a date, or no number at all
    if not math.isfinite(value):
        raise ValueError(f"{text} is not finite; a finite number is allowed")
    if whole and value == int(value):
        return _made(node, "int", str(int(value)))
    return _made(node, "float", repr(value)) if node.tag == f"{_TAG}str" and not whole else node


def _float(text: str) -> float:
    """Read a number in YAML's notation, with ``.inf`` and ``.nan``."""
    return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", text.lower()).replace("_", ""))


def _made(node: yaml.ScalarNode, tag: str, value: str) -> yaml.ScalarNode:
    return yaml.ScalarNode(f"{_TAG}{tag}", value, node.start_mark, node.end_mark, node.style)
