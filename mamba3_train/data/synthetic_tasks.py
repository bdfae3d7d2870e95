"""Tasks with an answer that can be computed: what a model must keep track of, or find again.

A task makes many documents at once: tokens, and at some of them the answer to give there (IGNORED_LABEL elsewhere), so
that the answer never stands in the input. Documents lie end to end in flat arrays, and each is a pure function of its
length and of its own draws, random numbers in [0, 1): those at a token decide what stands there.
"""

import numpy as np

from mamba3_train.data.packing import IGNORED_LABEL
from mamba3_train.errors import UserError

# One pair of arrays for each level of nesting, the outermost first.
Levels = list[tuple[np.ndarray, np.ndarray]]


class Task:
    """What makes documents; tasks inherit from it.

    vocab_size: number of tokens. answers: how many of them, from 0 on, are answers.
    shortest, step: lengths of documents, from the shortest on in steps of so many tokens.
    draws_per_token: random numbers that a document takes for each of its tokens.
    """

    vocab_size: int
    answers: int
    shortest: int = 1
    step: int = 1
    draws_per_token: int = 1

    def documents(self, draws: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Documents end to end; the last token of each has a label.

        Args:
            draws: (draws_per_token, tokens) float32.
            lengths: (documents,) int64, which sum to the tokens.

        Returns:
            tokens, labels: (tokens,) int64.
        """
        raise NotImplementedError


class Parity(Task):
    """Bits; at each the parity of the ones so far."""

    vocab_size = answers = 2

    def documents(self, draws: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Task`."""
        bits = below(2, draws[0])
        return bits, _sums_so_far(bits, lengths) % 2


class ModularArithmetic(Task):
    """Numbers joined by +, − and ×; at each number the value so far, × before + and −, modulo `modulus`."""

    step = 2

    def __init__(self, modulus: int = 5):
        self.answers = modulus
        self.plus, self.minus, self.times = range(modulus, modulus + 3)
        self.vocab_size = modulus + 3

    def documents(self, draws: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Task`."""
        places = np.arange(lengths.sum()) - np.repeat(_starts(lengths), lengths)
        tokens = np.where(places % 2 == 0, below(self.answers, draws[0]), self.plus + below(3, draws[0]))
        numbers = np.flatnonzero(places % 2 == 0)
        operators = tokens[numbers - 1]  # before a first number stands another document's last one, which is like a +
        products = self._products(tokens[numbers], operators)
        # A further factor replaces the product so far.
        changes = products - np.where(operators == self.times, np.roll(products, 1), 0)
        labels = np.full_like(tokens, IGNORED_LABEL)
        labels[numbers] = _sums_so_far(changes, (lengths + 1) // 2) % self.answers
        return tokens, labels

    def _products(self, numbers: np.ndarray, operators: np.ndarray) -> np.ndarray:
        """At each number the product that it belongs to, with its sign, up to there."""
        products = np.where(operators == self.minus, -numbers, numbers)
        index = np.arange(len(numbers))
        factor = index - np.maximum.accumulate(np.where(operators == self.times, 0, index))
        for nth in range(1, factor.max() + 1):  # of all products at once; they are short
            here = np.flatnonzero(factor == nth)
            products[here] = products[here - 1] * products[here] % self.answers
        return products


class BracketedArithmetic(Task):
    """Nested expressions (a + b), (a − b), (a × b), (a) and −a; at each closing bracket the value of what it closes.

    The last token closes the whole (shorter than three tokens there is nothing to close, and its value stands there).
    """

    def __init__(self, modulus: int = 5):
        self.answers = modulus
        self.plus, self.minus, self.times, self.opening, self.closing = range(modulus, modulus + 5)
        self.vocab_size = modulus + 5

    def documents(self, draws: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Task`."""
        expressions, joints = self._split(draws[0], _starts(lengths), lengths)
        starts, sizes = (np.concatenate(levels) for levels in zip(*expressions, strict=True))
        tokens = self._write(draws[0], starts, sizes, joints)
        values = self._evaluate(tokens, starts, sizes, joints)
        labels = np.full_like(tokens, IGNORED_LABEL)
        closed = sizes > 2
        labels[(starts + sizes - 1)[closed]] = values[starts[closed]]
        labels[lengths.cumsum() - 1] = values[_starts(lengths)]
        return tokens, labels

    def _split(self, draws: np.ndarray, start: np.ndarray, size: np.ndarray) -> tuple[Levels, Levels]:
        """Split expressions at their operators, level by level.

        Returns:
            expressions: where they start, and their sizes in tokens. Those of 1 to 4 are a, −a, (a) and (−a); larger
                ones are brackets around two others and an operator.
            joints: where the larger ones start, and where their operators stand.
        """
        expressions, joints = [(start, size)], []
        while (size > 4).any():
            start, size = start[size > 4], size[size > 4]
            left = 1 + below(size - 4, draws[start])
            operator = start + 1 + left
            joints.append((start, operator))
            start, size = np.concatenate([start + 1, operator + 1]), np.concatenate([left, size - 3 - left])
            expressions.append((start, size))
        return expressions, joints

    def _write(self, draws: np.ndarray, starts: np.ndarray, sizes: np.ndarray, joints: Levels) -> np.ndarray:
        """Tokens: numbers, but where expressions have something else."""
        tokens = below(self.answers, draws)
        for _, operators in joints:
            tokens[operators] = self.plus + below(3, draws[operators])
        closed, negated = sizes > 2, (sizes == 2) | (sizes == 4)
        tokens[starts[closed]] = self.opening
        tokens[(starts + sizes - 1)[closed]] = self.closing
        tokens[(starts + sizes // 2 - 1)[negated]] = self.minus
        return tokens

    def _evaluate(self, tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray, joints: Levels) -> np.ndarray:
        """Values of expressions at the places where they start."""
        single = sizes <= 4
        starts, sizes = starts[single], sizes[single]
        numbers = tokens[starts + sizes // 2]
        values = np.empty_like(tokens)
        values[starts] = np.where(sizes % 2 == 0, -numbers, numbers) % self.answers
        for start, operators in reversed(joints):  # the innermost first
            left, right, operator = values[start + 1], values[operators + 1], tokens[operators]
            sums = left + np.where(operator == self.minus, -right, right)
            values[start] = np.where(operator == self.times, left * right, sums) % self.answers
        return values


class Needle(Task):
    """Pairs of a key and its value hidden in noise; then every key is asked for, in another order.

    Args:
        values: how many values there are.
        keys: how many keys; a document uses `needles` of them.
        noise: how many noise tokens.
        needles: pairs in a document.

    Raises:
        UserError: fewer keys than needles.
    """

    draws_per_token = 2

    def __init__(self, values: int = 16, keys: int = 16, noise: int = 16, needles: int = 4):
        if keys < needles:
            raise UserError(f"data.task.keys={keys} must be at least data.task.needles={needles}: no key comes twice")
        self.answers, self.keys, self.noise, self.needles = values, keys, noise, needles
        self.question = values + keys + noise
        self.vocab_size = self.question + 1
        self.shortest = 3 * needles + 1

    def documents(self, draws: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Task`; the second draws, those at the first tokens of a document, decide where its pairs stand."""
        at_token, at_pair = draws
        starts, pairs = _starts(lengths)[:, None], np.arange(self.needles)
        haystacks = lengths - self.needles - 1
        tokens = self.answers + self.keys + below(self.noise, at_token)
        # Places among what is left when each pair is one token; a pair then moves the later ones by one.
        places = starts + np.sort(distinct(haystacks - self.needles, at_pair[starts + pairs])) + pairs
        keys = self.answers + distinct(self.keys, at_token[places])
        values = below(self.answers, at_token[places + 1])
        tokens[places], tokens[places + 1] = keys, values
        question = starts + haystacks[:, None]
        asked = question + 1 + pairs
        order = distinct(self.needles, at_token[asked])
        tokens[question] = self.question
        tokens[asked] = np.take_along_axis(keys, order, axis=1)
        labels = np.full_like(tokens, IGNORED_LABEL)
        labels[asked] = np.take_along_axis(values, order, axis=1)
        return tokens, labels


def below(end: int | np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Turn each draw into an integer in [0, end); also the largest below 1 that float32 has."""
    return (draws * end).astype(np.int64)


def distinct(end: int | np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Turn each row of draws into as many different integers in [0, end), in any order with the same chance.

    Args:
        end: at least the draws in a row; one for all rows, or (rows,).
        draws: (rows, n).
    """
    chosen = np.empty(draws.shape, dtype=np.int64)
    for nth in range(draws.shape[1]):
        new = below(end - nth, draws[:, nth])  # its place among those that are left
        for earlier in np.sort(chosen[:, :nth]).T:
            new += new >= earlier
        chosen[:, nth] = new
    return chosen


def _starts(lengths: np.ndarray) -> np.ndarray:
    return lengths.cumsum() - lengths


def _sums_so_far(terms: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """At each term the sum of those of its document up to it."""
    sums, starts = terms.cumsum(), _starts(lengths)
    return sums - np.repeat(sums[starts] - terms[starts], lengths)
