"""The language model: embedding → layers of mixer and MLP → norm → logits."""

import torch
from torch import Tensor, nn

from mamba3_train.model.attention import Attention, AttentionContext, attention_context
from mamba3_train.model.config import Mamba3Config
from mamba3_train.model.layers import SwiGLU, TokenEmbedding, Unembedding
from mamba3_train.model.mixer import Mamba3Mixer
from mamba3_train.model.recurrent_state import LayerState, RecurrentState


class Block(nn.Module):
    """One layer, pre-norm: residual + mixer(norm(residual)), then the same with the MLP."""

    def __init__(self, config: Mamba3Config, kind: str, kernels: str, keep: str = "scales"):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if kind == "M":
            settings = {"norm_eps": config.norm_eps, "kernels": kernels, "keep": keep}
            self.mixer = Mamba3Mixer(config.d_model, config.mixer, **settings)
        else:
            self.mixer = Attention(config.d_model, config.attention)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps) if config.d_mlp else None
        self.mlp = SwiGLU(config.d_model, config.d_mlp) if config.d_mlp else None

    def forward(
        self,
        residual: Tensor,
        document_ids: Tensor | None = None,
        state: LayerState | None = None,
        return_state: bool = False,
        context: AttentionContext | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        """(batch, seqlen, d_model) residual stream → the same, and with return_state the state after the last token.

        context: what attention needs besides.
        """
        # Matrices in a narrower dtype than the residual stream take their input in their own.
        dtype = self.mixer.out_proj.weight.dtype
        options = {"context": context} if isinstance(self.mixer, Attention) else {}
        mixed = self.mixer(self.norm(residual).to(dtype), document_ids, state, return_state, **options)
        mixed, new_state = mixed if return_state else (mixed, None)
        residual = residual + mixed
        if self.mlp is not None:
            residual = residual + self.mlp(self.mlp_norm(residual).to(dtype))
        return residual, new_state


class Mamba3LM(nn.Module):
    """A Mamba-3 language model, pure, hybrid or (pattern `*`) a Transformer.

    The parameters are uninitialised: call `initialize` or load a checkpoint. The residual stream is float32 or wider.

    Args:
        config: all dimensions.
        kernels, keep: backend of the scan and what it keeps for its backward, see `mamba3_scan`.
    """

    def __init__(self, config: Mamba3Config, *, kernels: str = "reference", keep: str = "scales"):
        super().__init__()
        self.config, self.kernels = config, kernels
        self.embedding = TokenEmbedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kind, kernels, keep) for kind in config.layers)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = None
        if not config.tie_embeddings:
            self.lm_head = Unembedding(config.d_model, config.padded_vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        state: RecurrentState | None = None,
        return_state: bool = False,
        labels: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor | tuple[Tensor, RecurrentState]:
        """Logits of the next token, or with labels their summed loss.

        Args:
            input_ids: (batch, seqlen) int64.
            document_ids: (batch, seqlen) integers, non-decreasing along a row; every document starts afresh.
            state: continues each row's first document.
            return_state: also return the state after the last token.
            labels: (batch, seqlen) int64, −100 where there is no target: the loss takes less memory than the logits.
            last_only: logits of the last token of each row alone, which take less memory still.

        Returns:
            (batch, seqlen, padded vocabulary), seqlen 1 with last_only, or with labels a scalar; with return_state
            also the state.
        """
        residual = self.embedding(input_ids)
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        context = self._attention_context(residual, document_ids, state)
        states = []
        for i, layer in enumerate(self.layers):
            carried = None if state is None else state[i]
            residual, layer_state = layer(residual, document_ids, carried, return_state, context)
            states.append(layer_state)
        if last_only:
            residual = residual[:, -1:]
        hidden = self.norm(residual).to(self.embedding.weight.dtype)
        if self.lm_head is None:
            result = self.embedding(hidden, unembed=True, labels=labels, kernels=self.kernels)
        else:
            result = self.lm_head(hidden, labels=labels, kernels=self.kernels)
        return (result, tuple(states)) if return_state else result

    def _attention_context(self, residual, document_ids, state) -> AttentionContext | None:
        """What attention layers share; None without any."""
        layers = self.config.layers
        if "*" not in layers:
            return None
        before = None if state is None else state[layers.index("*")]
        seqlen, dtype, device = residual.shape[1], residual.dtype, residual.device
        return attention_context(self.config.attention, seqlen, document_ids, before, dtype, device)
