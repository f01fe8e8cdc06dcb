"""Follows JSON text that comes in pieces, up to the end of one value."""

import re

_NEXT_OUTSIDE = re.compile(r'["{}\[\]]')
_NEXT_INSIDE = re.compile(r'["\\]')
_CONTROL = re.compile(r"[\x00-\x1f]")


class JsonText:
    """Finds the end of one JSON object or array by its strings and brackets; it does not check the rest.

    depth: brackets that are open before the text begins.
    """

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_in_string = False
        self._is_escaped = False
        self.is_complete = False

    def add(self, text: str, start: int = 0) -> tuple[str, int]:
        """Return the part of the text that belongs to the value, and its end in the text.

        Control characters in strings, which models write and JSON forbids, become escapes.
        """
        written = []
        position = start
        while position < len(text) and not self.is_complete:
            is_in_string = self._is_in_string
            end = self._string_end(text, position) if is_in_string else self._structure_end(text, position)
            part = text[position:end]
            written.append(_CONTROL.sub(_escape, part) if is_in_string else part)
            position = end
        return "".join(written), position

    def _string_end(self, text: str, position: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return position + 1
        found = _NEXT_INSIDE.search(text, position)
        if found is None:
            return len(text)
        self._is_escaped = self._is_in_string = found[0] == "\\"
        return found.end()

    def _structure_end(self, text: str, position: int) -> int:
        found = _NEXT_OUTSIDE.search(text, position)
        if found is None:
            return len(text)
        if found[0] == '"':
            self._is_in_string = True
        else:
            self._depth += 1 if found[0] in "{[" else -1
            self.is_complete = self._depth <= 0
        return found.end()


def _escape(found: re.Match[str]) -> str:
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(found[0], f"\\u{ord(found[0]):04x}")
