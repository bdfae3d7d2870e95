"""Mamba-3 language models (arXiv 2603.15569) for transformers: pure, hybrid with attention, or attention alone.

Plain PyTorch on any device. This file and mamba3_scan.py beside it need torch and transformers, nothing else; load with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
"""

from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .mamba3_scan import scan_chunked, scan_recurrent


class Mamba3Config(PretrainedConfig):
    """The dimensions of a model stand in `mamba3`, as the trainer wrote them."""

    model_type = "mamba3_train"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers declares it so)

    def __init__(self, mamba3=None, use_cache=True, **kwargs):
        self.mamba3 = mamba3 or {}
        self.use_cache = use_cache
        self.vocab_size = self.mamba3.get("vocab_size", 0)
        self.hidden_size = self.mamba3.get("d_model", 0)
        self.num_hidden_layers = self.mamba3.get("n_layers", 0)
        kwargs["tie_word_embeddings"] = self.mamba3.get("tie_embeddings", True)
        super().__init__(**kwargs)


class AttentionState(NamedTuple):
    """Keys and values, (batch, kv_heads, tokens, head_dim); which of them the next token may see, (batch, tokens)."""

    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor


class Mamba3Cache:
    """What every layer carries from token to token: a state of fixed size, or keys and values in attention layers."""

    is_compileable = False

    def __init__(self, layers, seen):
        self.layers, self.seen = layers, seen

    def get_seq_length(self, layer_idx=0):
        """Tokens read so far, padding included."""
        return self.seen

    def reorder_cache(self, beam_idx):
        """Take the rows of these indices, for beam search."""
        self.layers = [
            type(layer)(*(tensor.index_select(0, beam_idx.to(tensor.device)) for tensor in layer))
            for layer in self.layers
        ]


class Mamba3Mixer(nn.Module):
    """Sequence mixing by a complex state with exponential-trapezoidal steps, SISO (rank 1) or MIMO."""

    def __init__(self, d_model, config, norm_eps):
        super().__init__()
        self.config, self.norm_eps = config, norm_eps
        self.heads = config.expand * d_model // config.head_dim
        heads, rank, d_state, head_dim = self.heads, config.rank, config.d_state, config.head_dim
        self.pairs = 0 if config.rotation == "none" else int(d_state * config.rope_fraction) // 2
        inner, shared = heads * head_dim, rank * config.groups * d_state
        angles = self.pairs if config.rotation == "data_dependent" else 0
        self.widths = [inner, inner, shared, shared, heads, heads, heads if config.trapezoid else 0, angles]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.B_norm = nn.RMSNorm(d_state, eps=norm_eps)
        self.C_norm = nn.RMSNorm(d_state, eps=norm_eps)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.B_bias = nn.Parameter(torch.ones(heads, rank, d_state)) if config.B_bias else None
        self.C_bias = nn.Parameter(torch.ones(heads, rank, d_state)) if config.C_bias else None
        for name in ("mimo_x", "mimo_z", "mimo_o"):
            self.register_parameter(name, nn.Parameter(torch.ones(heads, rank, head_dim)) if rank > 1 else None)
        self.norm_weight = nn.Parameter(torch.ones(heads, head_dim)) if config.output_norm else None
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, u, document_ids, state):
        """(batch, seqlen, d_model) → the same shape, and the state after the last token."""
        config = self.config
        z, x, B, C, dt, A, trap, angles = self.in_proj(u).split(self.widths, dim=-1)
        z, x = (v.unflatten(-1, (self.heads, config.head_dim)) for v in (z, x))
        B, C = (v.unflatten(-1, (config.rank, config.groups, config.d_state)) for v in (B, C))
        if config.rotation == "none":
            angles = None
        elif config.rotation == "data_independent":
            angles = 10_000.0 ** (-torch.arange(self.pairs, device=u.device, dtype=torch.float32) / self.pairs)
        # Step sizes, decays and the state are float32 or wider whatever the weights are.
        wide = torch.promote_types(x.dtype, torch.float32)
        inputs = (
            *(x, norm(B, self.B_norm).to(x.dtype), norm(C, self.C_norm).to(x.dtype)),
            *(F.softplus(dt.to(wide) + self.dt_bias), self.decay_rate(A.to(wide)), trap if config.trapezoid else None),
            *(angles, self.B_bias, self.C_bias, self.D, z, self.mimo_x, self.mimo_z, self.mimo_o),
        )
        options = {
            "norm_weight": None if self.norm_weight is None else self.norm_weight.to(wide),
            "norm_eps": self.norm_eps,
            "document_ids": document_ids,
            "initial_state": state,
        }
        if u.shape[1] == 1:
            scan = scan_recurrent
        else:
            scan, options["chunk_size"] = scan_chunked, max(64 // config.rank, 16)
        with torch.autocast(u.device.type, enabled=False):
            y, state = scan(*(None if tensor is None else tensor.to(wide) for tensor in inputs), **options)
        return self.out_proj(y.flatten(-2).to(x.dtype)), state

    def decay_rate(self, a):
        """A < 0."""
        if self.config.a_activation == "softplus":
            rate = F.softplus(a)
        else:
            rate = torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0)))
        return -rate.clamp(min=self.config.a_floor)


class Mamba3Attention(nn.Module):
    """Causal grouped-query attention within a document; its state is keys, values, and which of them count."""

    def __init__(self, d_model, config):
        super().__init__()
        self.config = config
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)
        self.qkv_proj = nn.Linear(d_model, sum(self.heads) * config.head_dim, bias=False)
        self.out_proj = nn.Linear(config.n_heads * config.head_dim, d_model, bias=False)

    def forward(self, u, document_ids, state):
        """(batch, seqlen, d_model) → the same shape, and the state after the last token."""
        q, k, v = self.qkv_proj(u).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2).split(self.heads, dim=1)
        batch, _, seqlen, _ = q.shape
        before = 0 if state is None else state.key.shape[2]
        if self.config.rotary:
            q, k = (self.rotate(vectors, before) for vectors in (q, k))
        ids = torch.ones(batch, seqlen, dtype=torch.int64, device=u.device) if document_ids is None else document_ids
        visible = torch.ones(seqlen, seqlen, dtype=torch.bool, device=u.device).tril()
        visible = visible & (ids.unsqueeze(2) == ids.unsqueeze(1))
        counts = ids == ids[:, -1:]
        if state is not None:
            # What came before belongs to each row's first document.
            k, v = torch.cat([state.key, k], dim=2), torch.cat([state.value, v], dim=2)
            goes_on = (ids == ids[:, :1]).unsqueeze(2)
            visible = torch.cat([goes_on & state.visible.unsqueeze(1), visible], dim=2)
            counts = torch.cat([state.visible & counts[:, :1], counts], dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(1), enable_gqa=True)
        return self.out_proj(y.transpose(1, 2).flatten(-2)), AttentionState(k, v, counts)

    def rotate(self, vectors, offset):
        """Rotary positions offset, offset + 1, …, halves paired."""
        half = vectors.shape[-1] // 2
        precise = torch.promote_types(vectors.dtype, torch.float32)
        frequency = self.config.rope_theta ** (-torch.arange(half, device=vectors.device, dtype=precise) / half)
        position = torch.arange(vectors.shape[2], device=vectors.device, dtype=precise) + offset
        angle = position.unsqueeze(-1) * frequency
        cos, sin = angle.cos(), angle.sin()
        first, second = vectors.to(precise).chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(vectors.dtype)


class Mamba3MLP(nn.Module):
    """fc2(u · SiLU(gate)) with [u | gate] = fc1(x)."""

    def __init__(self, d_model, d_mlp):
        super().__init__()
        self.fc1 = nn.Linear(d_model, 2 * d_mlp, bias=False)
        self.fc2 = nn.Linear(d_mlp, d_model, bias=False)

    def forward(self, x):
        u, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(u * F.silu(gate))


class Mamba3Block(nn.Module):
    """One layer, pre-norm; the residual stream is float32 or wider."""

    def __init__(self, config, kind):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if kind == "M":
            self.mixer = Mamba3Mixer(config.d_model, SimpleNamespace(**config.mixer), config.norm_eps)
        else:
            self.mixer = Mamba3Attention(config.d_model, SimpleNamespace(**config.attention))
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps) if config.d_mlp else None
        self.mlp = Mamba3MLP(config.d_model, config.d_mlp) if config.d_mlp else None

    def forward(self, residual, document_ids, state):
        dtype = self.mixer.out_proj.weight.dtype
        mixed, state = self.mixer(norm(residual, self.norm).to(dtype), document_ids, state)
        residual = residual + mixed
        if self.mlp is not None:
            residual = residual + self.mlp(norm(residual, self.mlp_norm).to(dtype))
        return residual, state


class Mamba3PreTrainedModel(PreTrainedModel):
    config_class = Mamba3Config
    base_model_prefix = "model"
    _no_split_modules = ["Mamba3Block"]  # noqa: RUF012
    _is_stateful = True
    # Dynamics and norms, by patterns of their names.
    _keep_in_fp32_modules_strict = ["norm", "dt_bias", "B_bias", "C_bias", "mimo_", r"\.D$"]  # noqa: RUF012

    def _init_weights(self, module):
        """What a folder lacks keeps the values of its constructor."""


class Mamba3Model(Mamba3PreTrainedModel):
    """Token ids to the vectors that the head reads."""

    def __init__(self, config):
        super().__init__(config)
        dimensions = SimpleNamespace(**config.mamba3)
        rows = -(-dimensions.vocab_size // dimensions.vocab_multiple) * dimensions.vocab_multiple
        self.embedding = nn.Embedding(rows, dimensions.d_model)
        pattern = (dimensions.layer_pattern * dimensions.n_layers)[: dimensions.n_layers]
        self.layers = nn.ModuleList(Mamba3Block(dimensions, kind) for kind in pattern)
        self.norm = nn.RMSNorm(dimensions.d_model, eps=dimensions.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def set_input_embeddings(self, value):
        self.embedding = value

    def forward(
        self, input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None, use_cache=None, **kwargs
    ):
        """As every causal model of transformers; tokens that attention_mask leaves out change nothing."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        residual = x.to(torch.promote_types(x.dtype, torch.float32))
        document_ids = documents(attention_mask, x.shape[1])
        before = [None] * len(self.layers) if past_key_values is None else past_key_values.layers
        after = []
        for layer, state in zip(self.layers, before, strict=True):
            residual, state = layer(residual, document_ids, state)
            after.append(state)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = None
        if use_cache:
            cache = Mamba3Cache([], 0) if past_key_values is None else past_key_values
            cache.layers, cache.seen = after, cache.seen + x.shape[1]
        return BaseModelOutputWithPast(last_hidden_state=norm(residual, self.norm), past_key_values=cache)


class Mamba3ForCausalLM(Mamba3PreTrainedModel, GenerationMixin):
    """The language model; its logits are those of the vocabulary without the rows that pad it."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = Mamba3Model(config)
        self.lm_head = nn.Linear(config.hidden_size, self.model.embedding.num_embeddings, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        """The model makes its own."""
        return False

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits (batch, seqlen, vocab_size), and with labels, which are shifted here, the mean loss."""
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept].to(self.lm_head.weight.dtype))[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            targets = labels[:, 1:].flatten().to(logits.device)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def norm(x, module):
    """An RMS norm in the precision of its weight or wider."""
    return module(x.to(torch.promote_types(x.dtype, module.weight.dtype)))


def documents(attention_mask, seqlen):
    """Where padding begins and ends as documents of their own, (batch, seqlen), or None where there is none."""
    if attention_mask is None or attention_mask.dim() != 2:
        return None
    mask = attention_mask[:, -seqlen:].bool()
    if mask.all():
        return None
    changes = F.pad(mask[:, 1:] != mask[:, :-1], (1, 0))
    return changes.cumsum(1)
