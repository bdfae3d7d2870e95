"""What the Triton scan takes, and what of it its kernels read where it lies."""

from typing import NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """Tensors of the scan, shaped as in `scan.mamba3_scan`; the kernels want what `readable` gives.

    initial: (batch, H, P, N) float32, the state before the first token, its look-ahead already in it.
    """

    x: Tensor
    B: Tensor
    C: Tensor
    dt: Tensor
    A: Tensor
    trap: Tensor | None
    angles: Tensor | None
    B_bias: Tensor | None
    C_bias: Tensor | None
    D: Tensor | None
    z: Tensor | None
    mimo_x: Tensor | None
    mimo_z: Tensor | None
    mimo_o: Tensor | None
    norm_weight: Tensor | None
    document_ids: Tensor | None
    initial: Tensor | None

    def readable(self) -> "Inputs":
        """The same, contiguous and at 16 bytes; but x and z stay where they are when both have the same `token_stride`.

        So an input projection's columns are read in place: x and z are most of the scan's bytes.
        """
        strides = {_token_stride(tensor) for tensor in (self.x, self.z) if tensor is not None}
        in_place = {"x", "z"} if len(strides) == 1 and None not in strides else set()
        return Inputs(
            *(
                None if tensor is None else aligned(tensor if name in in_place else tensor.contiguous())
                for name, tensor in zip(self._fields, self, strict=True)
            )
        )

    @property
    def token_stride(self) -> int:
        """Elements from a token of x or z to the next token, for inputs that are `readable`."""
        return _token_stride(self.x)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address divisible by 16, which copies to shared memory ask for: a copy where it is not."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _token_stride(x: Tensor) -> int | None:
    """That of one tensor (batch, seqlen, H, P); None where its tokens are not evenly spaced and aligned to 16 bytes."""
    seqlen, heads, head_dim = x.shape[1:]
    if x.is_contiguous():
        return heads * head_dim
    by_batch, by_token, *within = x.stride()
    if seqlen == 1:  # torch gives a dimension of one any stride
        by_token = by_batch
    evenly = by_batch == seqlen * by_token and within == [head_dim, 1]
    return by_token if evenly and by_token * x.element_size() % 16 == 0 else None
