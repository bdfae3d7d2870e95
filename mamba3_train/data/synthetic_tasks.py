"""Tasks with an answer that can be computed: what a model must keep track of, or find again.

A task makes documents: tokens, and at some of them the answer to give there (IGNORED_LABEL elsewhere), so that the
answer never stands in the input. Everything is drawn from the generator that a task is given.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from mamba3_train.data.packing import IGNORED_LABEL


class Task(Protocol):
    """What makes documents of a length.

    vocab_size: number of tokens. answers: how many of them, from 0 on, are answers. shortest: length of a document.
    """

    vocab_size: int
    answers: int
    shortest: int

    def document(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """Tokens and labels, as many of each; at most `length`, at least one shorter. The last one has a label."""


class Parity:
    """Bits; at each the parity of the ones so far."""

    vocab_size = answers = 2
    shortest = 1

    def document(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """See `Task`."""
        bits = rng.integers(2, size=length)
        return bits.tolist(), (bits.cumsum() % 2).tolist()


class ModularArithmetic:
    """Numbers joined by +, − and ×; at each number the value so far, × before + and −, modulo `modulus`."""

    shortest = 1

    def __init__(self, modulus: int = 5):
        self.answers = modulus
        self.plus, self.minus, self.times = range(modulus, modulus + 3)
        self.vocab_size = modulus + 3

    def document(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """See `Task`; an even length becomes one less."""
        numbers = rng.integers(self.answers, size=(length + 1) // 2).tolist()
        operators = rng.integers(self.plus, self.times + 1, size=len(numbers) - 1).tolist()
        tokens, labels = [numbers[0]], [numbers[0]]
        # The value so far is before + product; what comes next may still multiply the product.
        before, product = 0, numbers[0]
        for operator, number in zip(operators, numbers[1:], strict=True):
            if operator == self.times:
                product *= number
            else:
                before, product = before + product, number if operator == self.plus else -number
            tokens += [operator, number]
            labels += [IGNORED_LABEL, (before + product) % self.answers]
        return tokens, labels


class BracketedArithmetic:
    """Nested expressions (a + b), (a − b), (a × b), (a) and −a; at each closing bracket the value of what it closes.

    The last token closes the whole (shorter than three tokens there is nothing to close, and its value stands there).
    """

    shortest = 1

    def __init__(self, modulus: int = 5):
        self.answers = modulus
        self.plus, self.minus, self.times, self.opening, self.closing = range(modulus, modulus + 5)
        self.vocab_size = modulus + 5

    def document(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """See `Task`."""
        # Drawn at once: a call of the generator costs more than the rest of a node.
        draws = iter(rng.random(length).tolist())
        tokens, labels = [], []
        labels[-1] = self._write(length, draws, tokens, labels) % self.answers
        return tokens, labels

    def _write(self, length: int, draws: Iterator[float], tokens: list[int], labels: list[int]) -> int:
        """Write an expression of so many tokens; returns its value."""
        if length <= 2:
            number = int(next(draws) * self.answers)
            self._put(tokens, labels, *([self.minus] if length == 2 else []), number)
            return -number if length == 2 else number
        self._put(tokens, labels, self.opening)
        if length <= 4:
            value = self._write(length - 2, draws, tokens, labels)
        else:
            on_the_left = 1 + int(next(draws) * (length - 4))
            operator = self.plus + int(next(draws) * 3)
            left = self._write(on_the_left, draws, tokens, labels)
            self._put(tokens, labels, operator)
            right = self._write(length - 3 - on_the_left, draws, tokens, labels)
            value = {self.plus: left + right, self.minus: left - right, self.times: left * right}[operator]
        self._put(tokens, labels, self.closing)
        labels[-1] = value % self.answers
        return value

    def _put(self, tokens: list[int], labels: list[int], *new: int) -> None:
        tokens.extend(new)
        labels.extend([IGNORED_LABEL] * len(new))


class Needle:
    """Pairs of a key and its value hidden in noise; then every key is asked for, in another order.

    Args:
        values: how many values there are.
        keys: how many keys; a document uses `needles` of them.
        noise: how many noise tokens.
        needles: pairs in a document.
    """

    def __init__(self, values: int = 16, keys: int = 16, noise: int = 16, needles: int = 4):
        self.answers, self.keys, self.noise, self.needles = values, keys, noise, needles
        self.question = values + keys + noise
        self.vocab_size = self.question + 1
        self.shortest = 3 * needles + 1

    def document(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[int]]:
        """See `Task`."""
        haystack = length - self.needles - 1
        keys = self.answers + rng.permutation(self.keys)[: self.needles]
        values = rng.integers(self.answers, size=self.needles)
        tokens = self.answers + self.keys + rng.integers(self.noise, size=length)
        # Places among what is left when each pair is one token; a pair then moves the later ones by one.
        places = np.sort(rng.permutation(haystack - self.needles)[: self.needles]) + np.arange(self.needles)
        tokens[places], tokens[places + 1] = keys, values
        order = rng.permutation(self.needles)
        tokens[haystack] = self.question
        tokens[haystack + 1 :] = keys[order]
        labels = np.full(length, IGNORED_LABEL)
        labels[haystack + 1 :] = values[order]
        return tokens.tolist(), labels.tolist()
