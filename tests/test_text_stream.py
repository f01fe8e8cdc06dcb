"""Text up to a stop string, piece by piece, against a search through the whole of it."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.text.detokenizer import make_detokenizer
from dispec.engine.text.text_stream import StopStrings, TextStream
from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import tiny_tokenizer
from tests.vocabularies import with_byte_fallback

pytestmark = pytest.mark.smoke

TOKENIZER = Tokenizer(tiny_tokenizer())
FALLBACK = with_byte_fallback()
TOKEN_OF = {TOKENIZER.token_bytes(token): token for token in range(TOKENIZER.vocab_size)}


def first_match(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Where the first stop string ends and starts: the definition, in quadratic time."""
    return min(
        (
            (start + len(stop), start)
            for stop in stops
            for start in range(len(text))
            if text[start : start + len(stop)] == stop
        ),
        default=None,
    )


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text that remains, and the stop string."""
    match = first_match(text, stops)
    if match is None:
        return text, None
    end, start = match
    return text[: end if include else start], text[start:end]


def num_withheld(text: str, stops: list[str]) -> int:
    beginnings = {stop[:length] for stop in stops for length in range(1, len(stop))}
    return max((length for length in range(1, len(text) + 1) if text[-length:] in beginnings), default=0)


def split(text: str, sizes: list[int]) -> list[str]:
    chunks = []
    for size in sizes:
        chunks.append(text[:size])
        text = text[size:]
    return [*chunks, text]


def by_bytes(text: str) -> list[int]:
    """Tokens of one byte each, so that every character outside ASCII is split."""
    return [TOKEN_OF[bytes([byte])] for byte in text.encode()]


def stream_of(tokenizer: Tokenizer | None, ids: list[int], **params) -> tuple[list[str], TextStream]:
    stream = TextStream(tokenizer, SamplingParams(**params))
    return [*(stream.add(token, False) for token in ids), stream.finish()], stream


# Stop strings.

few_letters = st.text("ab", max_size=24) | st.text("aé😀", max_size=16)
some_stops = st.lists(st.text("ab", min_size=1, max_size=5) | st.text("aé😀", min_size=1, max_size=4), max_size=4)
sizes = st.lists(st.integers(0, 6), max_size=12)


@given(text=few_letters, stops=some_stops, sizes=sizes, include=st.booleans())
@example(text="aaab", stops=["aab"], sizes=[1, 1, 1], include=False)
@example(text="abcd", stops=["abcd", "bc"], sizes=[1, 1, 1], include=False)  # the inner one ends first
@example(text="xaab", stops=["b", "aab", "ab"], sizes=[2], include=False)  # all end at once: the longest
@example(text="aab", stops=["aab", "b"], sizes=[], include=True)
@example(text="abab", stops=["abac"], sizes=[3], include=False)
@settings(max_examples=600, deadline=None)
def test_text_ends_at_the_first_stop_and_only_its_beginnings_are_held_back(text, stops, sizes, include):
    search = StopStrings(stops, include)
    arrived, returned = "", ""
    for chunk in split(text, sizes):
        arrived += chunk
        returned += search.add(chunk)
        expected, stop = cut(arrived, stops, include)
        assert search.matched == stop  # as soon as it is there
        if stop is None:
            expected = arrived[: len(arrived) - num_withheld(arrived, stops)]
        assert returned == expected
    returned += search.flush()
    assert (returned, search.matched) == cut(text, stops, include)
    assert search.flush() == ""


@given(stop=st.text("ab", min_size=6, max_size=20), lengths=st.lists(st.integers(1, 20), max_size=6))
@example(stop="ababaaa", lengths=[5, 4])
@settings(max_examples=300, deadline=None)
def test_beginnings_inside_beginnings(stop, lengths):
    """Texts made of beginnings of the stop string, where a search falls back more than once."""
    search = StopStrings([stop], include=False)
    text, returned = "".join(stop[:length] for length in lengths), ""
    for count, character in enumerate(text, 1):
        returned += search.add(character)
        expected, matched = cut(text[:count], [stop], include=False)
        assert search.matched == matched
        if matched is not None:
            break
        assert returned == expected[: count - num_withheld(expected, [stop])]


@pytest.mark.parametrize(
    ("chunks", "stops", "pieces", "matched"),
    [
        (["a", "a", "a", "b", "c"], ["aab"], ["", "", "a", "", "", ""], "aab"),
        (["a", "b", "c"], ["abc", "ab"], ["", "", "", ""], "ab"),
        (["xabyab"], ["abc", "aby"], ["x", ""], "aby"),
        (["a", "b", "c", "x"], ["abcd", "bce"], ["", "", "", "abcx", ""], None),
        (["a", "b", "c", "e"], ["abcd", "bce"], ["", "", "", "a", ""], "bce"),
        (["end\n", "\n", "more"], ["\n\n"], ["end", "", "", ""], "\n\n"),
        (["end\n"], ["\n\n"], ["end", "\n"], None),
        (["anything", "", "else"], [], ["anything", "", "else", ""], None),
    ],
)
def test_pieces_of_chunks(chunks, stops, pieces, matched):
    search = StopStrings(stops, include=False)
    assert [*(search.add(chunk) for chunk in chunks), search.flush()] == pieces
    assert search.matched == matched


def test_included_stop_string_ends_the_text():
    search = StopStrings(["bc"], include=True)
    assert [search.add("ab"), search.add("cd"), search.add("e"), search.flush()] == ["a", "bc", "", ""]


# Tokens.

BYTES = [TOKEN_OF[bytes([byte])] for byte in "aé😀".encode()]


@given(data=st.data(), include=st.booleans(), skip_special_tokens=st.booleans(), min_tokens=st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_text_of_tokens_is_the_decoded_whole_cut_at_the_stop(data, include, skip_special_tokens, min_tokens):
    tokenizer = data.draw(st.sampled_from([TOKENIZER, FALLBACK]))
    common = BYTES if tokenizer is TOKENIZER else [*"aé😀".encode(), *range(256, FALLBACK.vocab_size)]
    ids = data.draw(st.lists(st.sampled_from(common) | st.integers(0, tokenizer.vocab_size), max_size=24))
    whole = tokenizer.decode(ids, skip_special_tokens)
    # Stop strings that occur, as well as some that need not.
    inside = st.tuples(st.integers(0, 20), st.integers(1, 4)).map(lambda place: whole[place[0] :][: place[1]])
    stops = data.draw(st.lists((inside | st.text("aé😀\ufffd ", max_size=3)).filter(bool), max_size=3))

    detokenizer = make_detokenizer(tokenizer, skip_special_tokens)
    at_once = "".join(detokenizer.add(token) for token in ids[:min_tokens])
    free = whole if len(ids) <= min_tokens else at_once
    expected, stop = cut(whole[len(free) :], stops, include)

    pieces, stream = stream_of(
        tokenizer,
        ids,
        stop=tuple(stops),
        include_stop_str_in_output=include,
        skip_special_tokens=skip_special_tokens,
        min_tokens=min_tokens,
    )
    assert "".join(pieces) == stream.text == free + expected
    assert stream.stop_reason == stop
    assert "".join(pieces[: min(min_tokens, len(ids))]) == at_once


def test_characters_and_stop_strings_split_over_tokens():
    pieces, stream = stream_of(TOKENIZER, by_bytes("aé😀b"), stop=("é😀",))
    assert ("".join(pieces), stream.stop_reason) == ("a", "é😀")
    # `a` is certain at once; the é may begin the stop string until another character follows.
    pieces, stream = stream_of(TOKENIZER, by_bytes("aéb"), stop=("é😀",))
    assert pieces == ["a", "", "", "éb", ""]
    assert stream.stop_reason is None


def test_a_stop_string_across_words():
    ids = TOKENIZER.encode("The lazy dog is in Paris")
    pieces, stream = stream_of(TOKENIZER, ids, stop=("g i", "Paris"))
    assert ("".join(pieces), stream.text, stream.stop_reason) == ("The lazy do", "The lazy do", "g i")
    pieces, _ = stream_of(TOKENIZER, ids, stop=("g i",), include_stop_str_in_output=True)
    assert "".join(pieces) == "The lazy dog i"


def test_text_held_back_until_the_end_is_searched():
    half = by_bytes("a😀")[:-1]
    pieces, stream = stream_of(TOKENIZER, half, stop=("\ufffd",))
    assert (pieces[-1], stream.text, stream.stop_reason) == ("", "a", "\ufffd")
    pieces, stream = stream_of(FALLBACK, list(b"ab stop"), stop=("sto",))
    assert (pieces[-1], stream.stop_reason) == ("ab ", "sto")


def test_held_back_text_comes_at_the_end():
    stream = TextStream(TOKENIZER, SamplingParams(stop=("abc",)))
    assert [stream.add(token, False) for token in by_bytes("xab")] == ["x", "", ""]
    assert stream.text == "x"
    assert stream.finish() == "ab"
    assert (stream.text, stream.stop_reason) == ("xab", None)


def test_the_token_that_ends_the_sequence_is_not_text():
    stream = TextStream(TOKENIZER, SamplingParams(stop=("ab",)))
    a, b = by_bytes("ab")
    assert [stream.add(a, False), stream.add(b, True), stream.finish()] == ["", "", "a"]
    assert (stream.text, stream.stop_reason) == ("a", None)


def test_nothing_follows_a_stop_string():
    stream = TextStream(TOKENIZER, SamplingParams(stop=("b",)))
    pieces = [stream.add(token, False) for token in by_bytes("abcab")]
    assert [*pieces, stream.finish()] == ["a", "", "", "", "", ""]
    assert stream.text == "a"


@pytest.mark.parametrize(
    ("min_tokens", "text", "expected", "stop"),
    [
        (0, "xab-ab-", "x", "ab"),
        (1, "xab-ab-", "x", "ab"),
        (2, "xab-", "xab-", None),  # begun by the second token
        (3, "xab-ab-", "xab-", "ab"),
        (4, "xab-ab-", "xab-", "ab"),
        (5, "xab-ab-", "xab-ab-", None),
        (9, "xab-ab-", "xab-ab-", None),
    ],
)
def test_stop_strings_among_the_first_tokens_do_not_count(min_tokens, text, expected, stop):
    pieces, stream = stream_of(TOKENIZER, by_bytes(text), stop=("ab",), min_tokens=min_tokens)
    assert ("".join(pieces), stream.stop_reason) == (expected, stop)
    assert "".join(pieces[:min_tokens]) == text[:min_tokens]  # nothing of them is held back


def test_special_tokens_show_if_asked():
    [token] = TOKENIZER.encode("<|im_end|>")
    assert stream_of(TOKENIZER, [token])[1].text == ""
    assert stream_of(TOKENIZER, [token], skip_special_tokens=False)[1].text == "<|im_end|>"
    assert stream_of(TOKENIZER, [token], skip_special_tokens=False, stop=("im_",))[1].text == "<|"


def test_without_a_tokenizer_there_is_no_text():
    pieces, stream = stream_of(None, [1, 2, 3], stop=("a",))
    assert (pieces, stream.text, stream.stop_reason) == ([""] * 4, "", None)
