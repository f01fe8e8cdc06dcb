"""Writes structural tags, vLLM's grammars of text with tags, in Lark.

Both forms of vLLM are read: the older one of `structures` and `triggers`, and the newer one of xgrammar, `{"type":
"structural_tag", "format": {...}}`. Formats that llguidance cannot express are refused by name.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from llguidance import regex_to_lark

from dispec.engine.structured_output.json_schema import SchemaError, enforceable_schema

_ANY_TEXT = r"/(.|\n)*/"
_MAX_DEPTH = 20  # of formats in formats
# Fields of formats that change what a format matches, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "excludes": ([], None), "max_tokens": (None,), "max_chars": (None,), "any_order": (False, None),
    "max_whitespace_cnt": (None,), "style": ("json", None),
}  # fmt: skip


class TagError(ValueError):
    """A structural tag cannot be enforced. place: JSON pointer of the wrong part."""

    def __init__(self, place: str, message: str) -> None:
        super().__init__(message)
        self.place = place


class TagWriter:
    """Writes one structural tag.

    write_schema: returns the JSON text of a checked schema with llguidance's options.
    """

    def __init__(self, write_schema: Callable[[Any], str]) -> None:
        self._write_schema = write_schema
        self._rules: list[str] = []
        self._formats: dict[str, Callable[[Mapping[str, Any], str, int], str]] = {
            "const_string": self._const_string,
            "json_schema": self._json_schema,
            "any_text": lambda *_: self._rule(_ANY_TEXT, is_terminal=True),
            "regex": self._regex,
            "sequence": lambda form, place, depth: self._group(" ".join(self._elements(form, place, depth))),
            "or": lambda form, place, depth: self._group(" | ".join(self._elements(form, place, depth))),
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
            "optional": lambda *given: self._group(self._content(*given)) + "?",
            "plus": lambda *given: self._group(self._content(*given)) + "+",
            "star": lambda *given: self._group(self._content(*given)) + "*",
            "repeat": self._repeat,
            "token": lambda form, place, _: _token(form, place),
        }

    def grammar(self, tag: Any) -> str:
        """Return the Lark grammar. Raises TagError or SchemaError."""
        if not isinstance(tag, Mapping):
            raise TagError("", f"is {type(tag).__name__}, must be an object")
        if "structures" in tag:
            tag = _newer_form(tag)
        elif tag.get("type") != "structural_tag" or "format" not in tag:
            raise TagError("", "must have structures and triggers, or type 'structural_tag' and format")
        start = self._format(tag["format"], "/format", 0)
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules])

    def _format(self, form: Any, place: str, depth: int) -> str:
        """Return the expression of a format."""
        if depth > _MAX_DEPTH:
            raise TagError(place, f"is nested more than {_MAX_DEPTH} formats deep")
        if not isinstance(form, Mapping):
            raise TagError(place, f"is {type(form).__name__}, must be an object")
        kind = form.get("type")
        if not isinstance(kind, str) or kind not in self._formats:
            raise TagError(f"{place}/type", f"is {kind!r:.50}, must be one of {', '.join(self._formats)}")
        for name, neutral in _NEUTRAL.items():
            if name in form and form[name] not in neutral:
                raise TagError(f"{place}/{name}", "cannot be enforced: leave it out")
        return self._formats[kind](form, place, depth)

    def _content(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        return self._format(form.get("content"), f"{place}/content", depth + 1)

    def _elements(self, form: Mapping[str, Any], place: str, depth: int) -> list[str]:
        elements = _list(form, "elements", place)
        return [self._format(item, f"{place}/elements/{index}", depth + 1) for index, item in enumerate(elements)]

    def _const_string(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        return _quote(_text(form, "value", place))

    def _json_schema(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        try:
            schema = enforceable_schema(form.get("json_schema"))
        except SchemaError as error:
            raise SchemaError(f"{place}/json_schema{error.pointer}", str(error)) from None
        if schema is False:
            raise SchemaError(f"{place}/json_schema", "is false, which allows no output")
        return self._rule(f"%json {self._write_schema(schema)}")

    def _regex(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        return self._rule(f"/{regex_to_lark(_text(form, 'pattern', place), '')}/", is_terminal=True)

    def _tag(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        begin = form.get("begin")
        first = _token(begin, f"{place}/begin") if isinstance(begin, Mapping) else _quote(_text(form, "begin", place))
        return f"{first} {self._rest_of_tag(form, place, depth)}"

    def _rest_of_tag(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        """Return what follows the beginning of a tag."""
        end, content = form.get("end"), form.get("content")
        if isinstance(end, Mapping):
            return f"{self._content(form, place, depth)} {_token(end, f'{place}/end')}"
        ends = end if isinstance(end, list) and end else [end]
        if not all(isinstance(text, str) for text in ends):
            raise TagError(f"{place}/end", "must be a text, a list of texts or a token")
        last = self._group(" | ".join(map(_quote, ends)))
        if isinstance(content, Mapping) and content.get("type") == "any_text" and all(ends):
            self._content(form, place, depth)  # checks its other fields
            return self._rule(f"{_ANY_TEXT} {last}", is_lazy=True)  # ends at the first of the ends
        return f"{self._content(form, place, depth)} {last}"

    def _triggered_tags(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        """Free text up to a trigger, then the rest of one of its tags, and so on."""
        by_trigger: dict[str, list[str]] = {}
        for trigger in _list(form, "triggers", place):
            if not isinstance(trigger, str) or not trigger:
                raise TagError(f"{place}/triggers", "must be texts of at least 1 character")
            by_trigger[trigger] = []
        for index, tag in enumerate(_list(form, "tags", place)):
            tag_place = f"{place}/tags/{index}"
            if not isinstance(tag, Mapping):
                raise TagError(tag_place, f"is {type(tag).__name__}, must be an object")
            begin = _text(tag, "begin", tag_place)
            matching = [trigger for trigger in by_trigger if begin.startswith(trigger)]
            if len(matching) != 1:
                raise TagError(f"{tag_place}/begin", f"begins with {len(matching)} of the triggers, must with one")
            rest = self._rest_of_tag(tag, tag_place, depth)
            by_trigger[matching[0]].append(f"{_quote(begin.removeprefix(matching[0]))} {rest}")
        calls = [
            f"{self._rule(f'{_ANY_TEXT} {_quote(trigger)}', is_lazy=True)} {self._group(' | '.join(tags))}"
            for trigger, tags in by_trigger.items()
            if tags
        ]
        call = self._group(" | ".join(calls))
        text = self._rule(_ANY_TEXT, is_terminal=True)
        if form.get("stop_after_first"):
            return call if form.get("at_least_one") else self._group(f"{call} | {text}")
        return f"{call}{'+' if form.get('at_least_one') else '*'} {text}"

    def _tags_with_separator(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        tags = [
            self._format({"type": "tag", **tag}, f"{place}/tags/{index}", depth + 1)
            for index, tag in enumerate(_list(form, "tags", place))
        ]
        one = self._group(" | ".join(tags))
        several = one
        if not form.get("stop_after_first"):
            several = self._group(f"{one} ({_quote(_text(form, 'separator', place))} {one})*")
        return several if form.get("at_least_one") else f"{several}?"

    def _repeat(self, form: Mapping[str, Any], place: str, depth: int) -> str:
        least, most = form.get("min"), form.get("max")
        if type(least) is not int or type(most) is not int or least < 0 or (most != -1 and most < max(least, 1)):
            raise TagError(place, f"has min {least!r:.20} and max {most!r:.20}, must be whole numbers with min <= max")
        return f"{self._group(self._content(form, place, depth))}{{{least},{'' if most == -1 else most}}}"

    def _group(self, expression: str) -> str:
        return f"({expression})"

    def _rule(self, expression: str, *, is_terminal: bool = False, is_lazy: bool = False) -> str:
        """Add a rule, and return its name."""
        name = f"{'T' if is_terminal else 'r'}{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if is_lazy else ''}: {expression}")
        return name


def _newer_form(tag: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tag of the older form in the newer one."""
    tags = []
    for index, item in enumerate(_list(tag, "structures", "")):
        place = f"/structures/{index}"
        if not isinstance(item, Mapping):
            raise TagError(place, f"is {type(item).__name__}, must be an object")
        schema = item.get("schema")
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise TagError(f"{place}/schema", f"is not JSON: {error}") from None
        content = {"type": "json_schema", "json_schema": schema}
        tags.append({"begin": item.get("begin"), "content": content, "end": item.get("end", "")})
    triggers = _list(tag, "triggers", "")
    return {"format": {"type": "triggered_tags", "triggers": triggers, "tags": tags}}


def _token(form: Mapping[str, Any], place: str) -> str:
    token = form.get("token")
    if form.get("type") != "token" or type(token) is not int or token < 0:
        raise TagError(f"{place}/token", f"is {token!r:.50}, must be a token id")
    return f"<[{token}]>"


def _text(form: Mapping[str, Any], name: str, place: str) -> str:
    value = form.get(name)
    if not isinstance(value, str):
        raise TagError(f"{place}/{name}", f"is {value!r:.50}, must be a text")
    return value


def _list(form: Mapping[str, Any], name: str, place: str) -> list[Any]:
    value = form.get(name)
    if not isinstance(value, list) or not value:
        raise TagError(f"{place}/{name}", f"is {value!r:.50}, must be a list of at least one entry")
    return value


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
