"""How many bytes of text every token stands for."""

import numpy as np
from tokenizers import decoders

from mamba3_train.data.tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> np.ndarray | None:
    """Bytes of every token of a byte-level vocabulary, (vocab_size,) int64; special tokens have none.

    The bytes of a text are then exactly the sum over its tokens. Other vocabularies, whose tokens cannot be counted one
    by one (the first loses its space, …), give None.
    """
    backend = tokenizer.backend
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    added = backend.get_added_tokens_decoder()
    sizes = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for spelling, number in backend.get_vocab(with_added_tokens=True).items():
        # A byte-level vocabulary spells every byte as one character.
        sizes[number] = len(spelling)
    for number, token in added.items():
        sizes[number] = 0 if token.special else len(token.content.encode())
    return sizes
