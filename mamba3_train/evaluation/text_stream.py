"""Tokens to text as they come, held back where more tokens could still change or forbid it."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one continuation, up to the first stop string.

    Args:
        tokenizer: `data.tokenizer.Tokenizer`.
        prompt: token ids that came before, which decide how the first ones decode.
        stop: texts that end it.
    """

    def __init__(self, tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._prompt, self._stop = tokenizer, list(prompt), tuple(stop)
        self._stream = DecodeStream(ids=self._prompt, skip_special_tokens=False)
        self._ids: list[int] = []
        self._decoded = ""
        self._given = 0
        self.stopped = False
        """Whether a stop string has come."""

    @property
    def text(self) -> str:
        """What has been handed out."""
        return self._decoded[: self._given]

    def add(self, token: int) -> str:
        """Take a token; returns the text that is certain now and was not before: whole characters, and nothing that
        may turn out to be the beginning of a stop string."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend, token) or ""
        # A stop string that ends in this piece began at most its own length before it.
        searched = max(len(self._decoded) - max(map(len, self._stop), default=0), self._given)
        self._decoded += piece
        found = [place for stop in self._stop if (place := self._decoded.find(stop, searched)) >= 0]
        if found:
            self.stopped = True
            return self._hand_out(min(found))
        return self._hand_out(len(self._decoded) - self._could_begin_a_stop())

    def end(self) -> str:
        """What was held back, when no token follows."""
        before = self._tokenizer.decode(self._prompt) + self._decoded
        whole = self._tokenizer.decode(self._prompt + self._ids)
        if whole.startswith(before):  # characters whose last bytes never came
            self._decoded += whole[len(before) :]
        return self._hand_out(len(self._decoded))

    def _could_begin_a_stop(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stop), default=1) - 1
        for length in range(min(longest, len(self._decoded) - self._given), 0, -1):
            if any(stop.startswith(self._decoded[-length:]) for stop in self._stop):
                return length
        return 0

    def _hand_out(self, end: int) -> str:
        piece = self._decoded[self._given : end]
        self._given = max(end, self._given)
        return piece
