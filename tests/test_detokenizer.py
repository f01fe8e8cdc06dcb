"""Text while its tokens come, against the whole decoded at once."""

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream

from dispec.engine.text.detokenizer import make_detokenizer
from dispec.engine.text.tokenizer import Tokenizer
from tests.vocabularies import PUBLISHED, VOCABULARIES, published_tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    stream = make_detokenizer(tokenizer, skip_special_tokens)
    return [*(stream.add(token) for token in ids), stream.finish()]


@pytest.mark.smoke
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(data=st.data(), skip_special_tokens=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_of_random_tokens_join_to_the_decoded_text(vocabulary, data, skip_special_tokens):
    tokenizer = VOCABULARIES[vocabulary]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    pieces = pieces_of(tokenizer, ids, skip_special_tokens)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens)


@given(text=st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_of_text_are_the_text_and_come_at_once(text):
    tokenizer = VOCABULARIES["bytes"]
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids, skip_special_tokens=False)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert pieces[-1] == ""  # whole characters leave nothing for the end
    spelled = b""
    for count, token in enumerate(ids, 1):
        spelled += tokenizer.token_bytes(token)
        # As much as is a whole number of characters, and never less.
        assert "".join(pieces[:count]) == spelled.decode(errors="ignore")


@given(contents=st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_pieces_of_random_bytes_join_to_the_decoded_text(contents):
    for name in ("bytes", "wrapped", "fallback"):
        tokenizer = VOCABULARIES[name]
        if name == "fallback":
            ids = list(contents)
        else:
            alphabet = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
            ids = [alphabet[bytes([byte])] for byte in contents]
        assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.smoke
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(data=st.data(), skip_special_tokens=st.booleans())
@settings(max_examples=150, deadline=None)
def test_pieces_after_a_prompt_are_the_difference(vocabulary, data, skip_special_tokens):
    tokenizer = VOCABULARIES[vocabulary]
    tokens = st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=12)
    prompt, ids = data.draw(tokens), data.draw(tokens)
    before, whole = (tokenizer.decode(part, skip_special_tokens) for part in (prompt, prompt + ids))
    # Bytes that become invalid, or a character, only by what follows are no text of the prompt yet.
    assume(whole.startswith(before) and not before.endswith("\ufffd"))
    stream = make_detokenizer(tokenizer, skip_special_tokens, prompt)
    assert "".join([*map(stream.add, ids), stream.finish()]) == whole[len(before) :]


def test_the_first_word_after_a_prompt_keeps_its_space():
    for name in ("fallback", "metaspace"):
        tokenizer = VOCABULARIES[name]
        hello, bos = (tokenizer.backend.token_to_id(text) for text in ("▁Hello", "<s>"))

        def first(prompt: list[int], skips: bool = True, tokenizer=tokenizer, hello=hello) -> str:
            return make_detokenizer(tokenizer, skips, prompt).add(hello)

        assert (first([hello]), first([bos]), first([bos], False), first([])) == (" Hello", "Hello", " Hello", "Hello")
        assert first([hello, bos]) == first([hello, 100_000]) == first([-1, hello]) == " Hello"


@pytest.mark.smoke
def test_a_character_begun_in_the_prompt_comes_whole():
    for name in ("bytes", "wrapped", "fallback"):
        tokenizer = VOCABULARIES[name]
        spelled = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
        ids = [spelled[bytes([byte])] for byte in "aé😀b".encode()]
        for cut in range(1, 6):
            stream = make_detokenizer(tokenizer, True, ids[:cut])
            rest = "".join([*map(stream.add, ids[cut:]), stream.finish()])
            assert rest == "aé😀b"[len(bytes("aé😀b".encode()[:cut]).decode(errors="ignore")) :], (name, cut)


@pytest.mark.smoke
def test_a_character_begun_in_the_prompt_and_left_is_no_text_of_the_answer():
    for name in ("bytes", "wrapped", "fallback"):
        tokenizer = VOCABULARIES[name]
        spelled = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
        prompt = [spelled[b"a"], spelled[b"\xc3"]]
        stream = make_detokenizer(tokenizer, True, prompt)
        assert stream.finish() == ""
        stream = make_detokenizer(tokenizer, True, prompt)
        assert stream.add(spelled[b"!"]) + stream.finish() == "!"
        stream = make_detokenizer(tokenizer, True, prompt)
        assert stream.add(spelled[b"b"]) + stream.finish() == "b"


def test_a_character_split_over_tokens_comes_whole():
    tokenizer = VOCABULARIES["bytes"]
    alphabet = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    ids = [alphabet[bytes([byte])] for byte in "a😀b".encode()]
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]
    assert pieces_of(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]
    # An invalid byte is certain at once, and so is what follows it.
    assert pieces_of(tokenizer, [alphabet[b"\xff"], alphabet[b"a"]]) == ["\ufffd", "a", ""]


def test_special_tokens_inside_a_character():
    tokenizer = VOCABULARIES["bytes"]
    alphabet = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    first, second = (alphabet[bytes([byte])] for byte in "é".encode())
    assert pieces_of(tokenizer, [first, 2, second]) == ["", "", "é", ""]
    assert pieces_of(tokenizer, [first, 2, second], skip_special_tokens=False)[1] == "\ufffd<|im_end|>"


@pytest.mark.parametrize("vocabulary", ["fallback", "metaspace"])
def test_the_number_of_tokens_decoded_is_linear(vocabulary: str) -> None:
    class Counting:
        def __init__(self, backend: Any) -> None:
            self.backend, self.num_tokens = backend, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.backend, name)

        def decode(self, ids: list[int], **options: Any) -> str:
            self.num_tokens += len(ids)
            return self.backend.decode(ids, **options)

    tokenizer = copy.copy(VOCABULARIES[vocabulary])
    tokenizer.backend = counting = Counting(tokenizer.backend)  # type: ignore[assignment]
    byte = 0xF0 if vocabulary == "fallback" else tokenizer.backend.token_to_id("ld")
    for token in (byte, tokenizer.backend.token_to_id("!")):
        counting.num_tokens = 0
        stream = make_detokenizer(tokenizer)
        for _ in range(1000):
            stream.add(token)
        stream.finish()
        assert counting.num_tokens <= 4000


@pytest.mark.slow
@pytest.mark.parametrize("package", PUBLISHED)
def test_pieces_of_published_vocabularies(package: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(published_tokenizer(package, tmp_path))
    text = "Straße 👩‍👩‍👧 日本語\n\tdef f(x): # é\u0301 \U0001f1e9\U0001f1ea ᚠᛇᚻ"

    @given(data=st.data(), skips=st.booleans(), count=st.integers(0, 12))
    @settings(max_examples=300, deadline=None)
    def check(data: st.DataObject, skips: bool, count: int) -> None:
        written = data.draw(st.text(text, max_size=30))
        random = st.lists(st.integers(0, tokenizer.vocab_size), max_size=30)
        ids = tokenizer.encode(written, add_special_tokens=False) or data.draw(random)
        prompt, output = ids[:count], ids[count:]
        before, whole = (tokenizer.decode(part, skips) for part in (prompt, ids))
        assume(whole.startswith(before) and not before.endswith("\ufffd"))
        stream = make_detokenizer(tokenizer, skips, prompt)
        assert "".join([*map(stream.add, output), stream.finish()]) == whole[len(before) :]

    check()


# Where `tokenizers.DecodeStream` differs


def decode_stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str | None]:
    stream = DecodeStream(ids=prompt or [], skip_special_tokens=True)
    return [stream.step(tokenizer.backend, token) for token in ids]


def test_bytes_that_form_no_character_are_text_and_no_error() -> None:
    tokenizer = VOCABULARIES["fallback"]
    word = tokenizer.backend.token_to_id("ld")
    ids = [*b"A\xe2", word]
    with pytest.raises(Exception, match="Invalid prefix"):
        decode_stream(tokenizer, ids)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids) == "\ufffd\ufffdld"


def test_a_prompt_that_ends_within_a_character_is_not_repeated() -> None:
    tokenizer = VOCABULARIES["bytes"]
    prompt = [*tokenizer.encode("The lazy dog"), tokenizer.encode("é")[0]]
    (word,) = tokenizer.encode("!")
    assert decode_stream(tokenizer, [word], prompt) == ["The lazy dog\ufffd!"]
    stream = make_detokenizer(tokenizer, True, prompt)
    assert stream.add(word) + stream.finish() == "!"


def test_an_invalid_byte_is_not_held_back() -> None:
    tokenizer = VOCABULARIES["bytes"]
    (invalid,) = (token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xff")
    assert decode_stream(tokenizer, [invalid] * 3) == [None] * 3
    assert pieces_of(tokenizer, [invalid] * 3) == ["\ufffd"] * 3 + [""]


def test_a_token_that_is_not_in_the_vocabulary_has_no_text() -> None:
    for tokenizer in VOCABULARIES.values():
        assert pieces_of(tokenizer, [100_000]) == ["", ""]
