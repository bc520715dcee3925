"""Annotations as short text, written the same way whatever a version's style is."""

from __future__ import annotations

import ast
from collections.abc import Iterator

NUMBERS = {
    "PositiveInt": "int",
    "NonNegativeInt": "int",
    "PositiveFloat": "float",
    "NonNegativeFloat": "float",
    "List": "list",
    "Dict": "dict",
    "Tuple": "tuple",
    "Set": "set",
}


def shortened(node: ast.expr) -> str:
    """Return an annotation without modules and bounds, with ``|`` for unions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return shortened(ast.parse(node.value, mode="eval").body)
        except SyntaxError:
            return node.value
    if isinstance(node, ast.Attribute):
        return NUMBERS.get(node.attr, node.attr)
    if isinstance(node, ast.Name):
        return NUMBERS.get(node.id, node.id)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([node.left, node.right])
    if isinstance(node, ast.Subscript):
        return _generic(node)
    return ast.unparse(node)


def choices(node: ast.expr) -> Iterator[str]:
    """Yield the strings that an annotation allows by ``Literal``."""
    for part in ast.walk(node):
        if isinstance(part, ast.Subscript) and shortened(part.value) == "Literal":
            yield from (
                one.value
                for one in ast.walk(part.slice)
                if isinstance(one, ast.Constant) and isinstance(one.value, str)
            )


def _generic(node: ast.Subscript) -> str:
    name = shortened(node.value)
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Optional":
        return _union([*inner, ast.Constant(None)])
    if name == "Union":
        return _union(inner)
    if name == "Annotated":
        return shortened(inner[0])
    if name == "Literal":
        return f"Literal[{', '.join(map(ast.unparse, inner))}]"
    return f"{name}[{', '.join(map(shortened, inner))}]"


def _union(parts: list[ast.expr]) -> str:
    texts = [text for part in parts for text in shortened(part).split(" | ")]
    return " | ".join(dict.fromkeys([*(one for one in texts if one != "None"), *texts]))
