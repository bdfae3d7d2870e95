"""Text comes out whole, in order, and never past a stop string."""

import pytest

from mamba3_train.evaluation.text_stream import TextStream
from tests.small_run import tokenizer


def stream(text, stop=()):
    """Pieces that were handed out token by token, and the stream."""
    coder = tokenizer()
    out, pieces = TextStream(coder, coder.encode("the "), stop), []
    for token in coder.encode(text):
        pieces.append(out.add(token))
        if out.stopped:
            return pieces, out
    return [*pieces, out.end()], out


def test_pieces_are_the_text_in_whole_characters():
    text = "state, käse, 🙂 and 日本 of a fixed <size>"
    pieces, out = stream(text)
    assert "".join(pieces) == out.text == text
    assert "�" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 10, "not all at once"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "o t"], "one tw"),
        ("one two three", ["four"], "one two three"),
        ("aaab", ["aab"], "a"),
        ("a b\n\nc", ["\n\n"], "a b"),
        ("xaby", ["ab", "xa"], ""),
        ("käse", ["ä"], "k"),
        ("one", [" one"], "one"),  # the prompt does not count
    ],
)
def test_a_stop_string_ends_the_text_where_it_first_begins(text, stop, expected):
    pieces, out = stream(text, stop)
    assert "".join(pieces) == out.text == expected
    assert out.stopped == (expected != text)


def test_what_may_become_a_stop_string_is_held_back():
    pieces, out = stream("ab abc", ["abcd"])
    assert not out.stopped
    for number in range(len(pieces)):
        shown = "".join(pieces[:number])
        assert not any(shown.endswith("abcd"[:length]) for length in (1, 2, 3))
    assert "".join(pieces) == "ab abc"


def test_a_character_cut_short_is_shown_at_the_end():
    coder = tokenizer()
    ids = coder.encode("a 🙂")
    out = TextStream(coder, ids[:1])
    shown = "".join(out.add(token) for token in ids[1:-1])
    assert "�" not in shown
    assert out.end().startswith("�")
