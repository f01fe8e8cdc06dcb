"""Reads calls in Python that come in pieces, without running them."""

import ast
import json
import re
from typing import Any

_NEXT_OUTSIDE = re.compile(r"[\"'(){}\[\]]")
_NEXT_INSIDE = {quote: re.compile(rf"\\.|{quote}", re.DOTALL) for quote in ("'", '"')}
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_PYTHON_ESCAPES = frozenset("\n\\'\"abfnrtvxNuU01234567")
# Also as JSON spells them, which grammars and some models write.
_CONSTANTS = {"true": True, "false": False, "null": None}


class ClosingParenthesis:
    """Finds the parenthesis that closes a call. position: behind the one that opens it."""

    def __init__(self, position: int) -> None:
        self._position = position
        self._depth = 1
        self._quote = ""

    def find(self, text: str) -> int | None:
        """Return the position behind the parenthesis, if the text has it. text: all of it, which grows."""
        while (end := self._next_end(text)) is not None:
            self._position = end
            if self._depth == 0:
                return end
        return None

    def _next_end(self, text: str) -> int | None:
        """Return the end of the next quote, bracket or escape; None if more text must come."""
        found = (_NEXT_INSIDE[self._quote] if self._quote else _NEXT_OUTSIDE).search(text, self._position)
        if found is None:  # a backslash at the end is the beginning of an escape
            self._position = len(text) - (bool(self._quote) and text.endswith("\\"))
            return None
        if found[0] in ("'", '"'):
            self._quote = "" if self._quote else found[0]
        elif not self._quote:
            self._depth += 1 if found[0] in "([{" else -1
        return found.end()


def keyword_arguments(text: str) -> str | None:
    """Return the arguments of a call as a JSON object. None if they are not keyword arguments with plain values."""
    # Python warns of escapes that it does not know, and takes their backslash as it is.
    escaped = _ESCAPED.sub(lambda found: found[0] if found[1] in _PYTHON_ESCAPES else f"\\{found[0]}", text)
    try:
        call = ast.parse(f"f({escaped})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            return None
        found = {_text(keyword.arg): _value(keyword.value) for keyword in call.keywords}
        written = json.dumps(found, ensure_ascii=False, allow_nan=False)
        written.encode()  # half a surrogate pair is an error
        return written
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last: nested more deeply than Python parses
        return None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str(text)):
            return text.encode("utf-16", "surrogatepass").decode("utf-16")  # JSON escapes a character as two halves
        case ast.Constant(value=bool() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            return {_text(key and _value(key)): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
    raise ValueError("not a plain value")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a name")
    return value
