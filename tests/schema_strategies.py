"""JSON Schemas by Hypothesis: draft 2020-12, over the keywords that `GrammarCompiler` supports."""

from typing import Any

from hypothesis import strategies as st

NAMES = st.text(st.characters(exclude_categories=("Cs",), max_codepoint=0x3FFFF), max_size=4)
PATTERNS = ("^[a-z]{1,3}$", "[0-9]", "^x", "y$", "^(?:a|bc)*$", "^\\w\\d?$", "^[^a]{2}$", "^.{1,2}$", "^é+$")
FORMATS = ("ipv4", "ipv6", "uuid", "duration")
NAME_PATTERNS = ("^a", "^b[0-9]$", "^_")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1000, 1000) | st.sampled_from([0.5, -2.25, 1e3]) | NAMES,
    lambda values: st.lists(values, max_size=2) | st.dictionaries(NAMES, values, max_size=2),
    max_leaves=4,
)


def _some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return mappings with any subset of the keywords."""
    return st.fixed_dictionaries({}, optional=keywords)


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["integer", "number"]))
    bound = st.integers(-300, 300) if kind == "integer" else st.integers(-1200, 1200).map(lambda n: n / 4)
    schema = {"type": kind} | draw(
        _some(
            minimum=bound,
            exclusiveMinimum=bound,
            multipleOf=st.sampled_from([1, 2, 5, 12] if kind == "integer" else [0.25, 5]),
        )
    )
    least = max(schema.get("minimum", -300), schema.get("exclusiveMinimum", -300))
    # Wide enough that a multiple of each step lies between the bounds.
    return schema | draw(_some(maximum=st.just(least + 13), exclusiveMaximum=st.just(least + 30)))


@st.composite
def texts(draw: st.DrawFn) -> dict[str, Any]:
    match draw(st.integers(0, 2)):
        case 0:
            shortest = draw(st.integers(0, 4))
            return {"type": "string", "minLength": shortest, "maxLength": shortest + draw(st.integers(0, 3))}
        case 1:
            return {"type": "string", "pattern": draw(st.sampled_from(PATTERNS))} | draw(
                _some(maxLength=st.integers(3, 9))
            )
        case _:
            return {"type": "string", "format": draw(st.sampled_from(FORMATS))}


@st.composite
def arrays(draw: st.DrawFn, items: st.SearchStrategy[Any]) -> dict[str, Any]:
    schema = {"type": "array"} | draw(
        _some(prefixItems=st.lists(items, min_size=1, max_size=2), items=items, minItems=st.integers(0, 2))
    )
    if schema.get("items") is False:
        schema.pop("minItems", None)
    return schema | {"maxItems": schema.get("minItems", 0) + draw(st.integers(0, 2))}


@st.composite
def objects(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, values, max_size=3))
    schema: dict[str, Any] = {"type": "object"}
    if properties:
        schema["properties"] = properties
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    return schema | draw(
        _some(
            additionalProperties=st.booleans() | values,
            patternProperties=st.dictionaries(st.sampled_from(NAME_PATTERNS), values, min_size=1, max_size=2),
        )
    )


@st.composite
def schemas(draw: st.DrawFn) -> dict[str, Any]:
    """Return schemas with definitions that refer to each other and to the root's parts."""
    leaves = (
        st.just({"type": "null"})
        | st.just({"type": "boolean"})
        | st.sampled_from([{"type": ["null", "boolean"]}, {"type": ["integer", "string"], "maxLength": 3}])
        | numbers()
        | texts()
        | st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values})
        | VALUES.map(lambda value: {"const": value})
        | st.sampled_from([{"$ref": "#/$defs/first"}, {"$ref": "#/$defs/second"}])
    )
    nested = st.recursive(
        leaves,
        lambda inner: (
            arrays(inner)
            | objects(inner)
            | st.lists(inner, min_size=1, max_size=3).map(lambda several: {"anyOf": several})
            | inner.map(lambda schema: {"allOf": [schema, {"description": "any"}]})
        ),
        max_leaves=6,
    )
    # A reference from a definition stands below an optional property: a finite document exists.
    first = draw(texts() | numbers())
    second = {
        "type": "object",
        "properties": {"again": {"$ref": "#/$defs/second"}, "other": {"$ref": "#/$defs/first"}},
        "additionalProperties": False,
    }
    return {"$defs": {"first": first, "second": second}} | draw(nested)
