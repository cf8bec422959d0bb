"""nn.MultiheadAttention on noised inputs: of its in-projection and of its out-projection.
docs/models.md."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import worlds
from . import tracing
from .input import DIPInput
from .inputs import undense
from .layer import BesideWeights, DIPLayer, fresh
from .linear import DIPLinear
from .variance import device_of_variance


class DIPOutProjection(DIPLinear, NonDynamicallyQuantizableLinear):
    """The out-projection of DIPMultiheadAttention, which calls it; nn.MultiheadAttention takes its
    weight alone."""

    plain_type = NonDynamicallyQuantizableLinear


class DIPInProjection(DIPInput):
    """The noise before an in-projection, whose weights are the attention's own. sample: 0 query, 1
    key, 2 value."""

    shown_as = "in-projection of DIPMultiheadAttention"

    def forward(self, input: Tensor, sample: int = 0, seed: Tensor | None = None) -> Tensor:
        if not self.noisy():
            return self.without_noise(input)
        return fresh(self, input, worlds.autocast_dtype(input), sample, seed)


class DIPMultiheadAttention(BesideWeights, nn.MultiheadAttention):
    """nn.MultiheadAttention with noise in training: on query, key and value, and on the input of
    the out-projection.

    q = W_q (query + sigma * z), and the same for k and v; y = W_o (heads + sigma_o * z) + b_o. In
    eval mode it is nn.MultiheadAttention itself, its fast path included. Call it like
    nn.MultiheadAttention. All other arguments are those of nn.MultiheadAttention.

    If query, key and value have one width, the in-projection is one matrix with one variance for
    each feature, in the child `in_proj`. Arguments that are the same tensor, or the same memory,
    share their noise, so self-attention draws once. Others get independent noise of that variance.
    With kdim or vdim there are three variances, in `q_proj`, `k_proj` and `v_proj`. `out_proj` has
    a variance of its own. The plain parameters keep their names, and a plain state dict loads. Rows
    of noise are numbered in the order of the tensors passed. So with batch_first=True an example's
    noise does not depend on the rest of its batch.

    Args:
        init_variance: sigma^2 to start from, a number > 0.
        num_samples: S >= 1 draws averaged, as one with sigma / sqrt(S).

    Raises:
        ValueError, TypeError: A bad argument, which the message names; also what
            nn.MultiheadAttention raises.

    Examples:
        >>> attention, x = dip.DIPMultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
        >>> y, weights = attention(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]))

    Source: arXiv 2506.04690, for every linear layer; where noise sits in attention is not stated
    there.
    """

    plain_type = nn.MultiheadAttention
    in_proj: DIPInProjection  # where query, key and value have one width
    q_proj: DIPInProjection
    k_proj: DIPInProjection
    v_proj: DIPInProjection
    out_proj: DIPOutProjection

    def __init__(  # all by name: torch.nn.utils.skip_init looks for device
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        init_variance: float = 0.01,
        num_samples: int = 1,
    ) -> None:
        places = (dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        super().__init__(embed_dim, num_heads, *places)
        self._set_up(dict.fromkeys(in_projections(self), init_variance), num_samples, device)
        self.out_proj.__class__ = DIPOutProjection
        self.out_proj._set_up(self.embed_dim, init_variance, num_samples, device)

    def _set_up(
        self,
        init_variances: dict[str, Any],
        num_samples: int,
        device: torch.device | str | None = None,
    ) -> None:
        """init_variances: of the in-projections by their names; none where what makes their input
        is noised."""
        parts = in_projections(self)
        for name, init_variance in init_variances.items():
            width, weight = parts[name]
            own = device_of_variance(weight, device)
            part = DIPInProjection(
                width, init_variance=init_variance, num_samples=num_samples, device=own
            )
            setattr(self, name, part.train(self.training))

    def to_plain_in_place(self) -> None:
        """nn.MultiheadAttention again; `out_proj` is turned back apart, as every linear layer
        is."""
        for name in in_projections(self):
            self._modules.pop(name, None)
        self.__class__ = self.plain_type  # type: ignore[assignment]

    def _parts(self) -> list[DIPLayer]:
        return [m for m in self._modules.values() if isinstance(m, DIPLayer)]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if any(isinstance(t, tracing.Proxy) for t in (query, key, value)):
            return tracing.record(self, query, key, value, *rest)
        if not self._calls_parts():
            query, key, value = self._with_unused_variances(query, key, value)
            return super().forward(query, key, value, *rest)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "attn_mask: expected the causal mask that is_causal=True promises, got None"
            )
        batched = query.dim() == 3
        batch_dim = 0 if self.batch_first or not batched else 1
        self._check_shapes(query, key, value, key_padding_mask, attn_mask, batch_dim)
        query, key, value = self._noised_inputs(query, key, value)
        q, k, v = (
            self._heads(y if batched else y[None], batch_dim)
            for y in self._project(query, key, value)
        )
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None
        else:
            is_causal = False
            mask = self._mask(attn_mask, key_padding_mask, q)
        k, v, mask = self._extended(k, v, mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v  # [N, H, L, D]
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        joined = (heads.transpose(1, 2) if batch_dim == 0 else heads.permute(2, 0, 1, 3)).flatten(2)
        out = self.out_proj(joined if batched else joined[0])
        return out, (weights if batched or weights is None else weights[0])

    def _calls_parts(self) -> bool:
        """Whether the projections have to be called: for noise, or for what looks at their calls:
        hooks, and check and calibrate, which set methods of theirs."""
        return any(
            part.noisy()
            or part._forward_hooks
            or part._forward_pre_hooks
            or any([name in vars(part) for name in ("forward", "without_noise")])
            for part in self._parts()
        )

    def _with_unused_variances(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same tensors, one where they were one, through which every variance that DDP or
        noise_off may ask for gets a gradient of zeros."""
        same = query
        for part in self._parts():
            same = part.without_noise(same)
        return same, same if key is query else key, same if value is query else value

    def _check_shapes(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        batch_dim: int,
    ) -> None:
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != width:
                count = query.dim() if query.dim() in (2, 3) else "2 or 3"
                wanted = f"[..., {width}] of {count} dimensions"
                raise ValueError(f"{name}: expected a tensor {wanted}, got shape {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: expected key's shape {tuple(key.shape[:-1])}, got "
                f"{tuple(value.shape[:-1])}"
            )
        batch = query.shape[batch_dim] if query.dim() == 3 else 1
        length, source = (x.shape[-2 if batch_dim == 0 else 0] for x in (query, key))
        heads = (batch * self.num_heads, length, source)
        _check_mask("attn_mask", attn_mask, (length, source), heads)
        padding = (batch, source) if query.dim() == 3 else (source,)
        _check_mask("key_padding_mask", key_padding_mask, padding)

    def _noised_inputs(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self._qkv_same_embed_dim:
            return self.q_proj(query), self.k_proj(key, 1), self.v_proj(value, 2)
        if "in_proj" not in self._modules:  # noised where they were made
            return query, key, value
        layer = self.in_proj
        made: list[tuple[Tensor, Tensor, int, Tensor | None]] = []  # x, u, its sample, its seed
        for sample, x in enumerate((query, key, value)):
            same = next((each for each in made if each[0] is x), None)
            if same is None:
                seed = None
                if alike := next((each for each in made if _is_alias(x, each[0])), None):
                    *_, sample, seed = alike
                elif layer.noisy():
                    seed = layer._seed(x)
                same = x, layer(x, sample, seed), sample, seed
            made.append(same)
        query, key, value = (u for _, u, _, _ in made)
        return query, key, value

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """q, k, v of the noised inputs; one product for arguments that are one tensor."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        if not self._qkv_same_embed_dim:
            weights: tuple[Tensor, ...] = tuple(w for _, w in in_projections(self).values())
        elif query is key and key is value:
            return F.linear(query, weight, bias).chunk(3, -1)
        elif key is value:
            q = F.linear(query, weight[:width], biases[0])
            rest = None if bias is None else bias[width:]
            return q, *F.linear(key, weight[width:], rest).chunk(2, -1)
        else:
            weights = weight.chunk(3)
        return tuple(F.linear(u, w, b) for u, w, b in zip((query, key, value), weights, biases))

    def _heads(self, y: Tensor, batch_dim: int) -> Tensor:
        """[N, L, E], or [L, N, E] where batch_dim is 1, as [N, H, L, D]."""
        split: Tensor = y.unflatten(-1, (self.num_heads, self.head_dim))
        return split.permute(0, 2, 1, 3) if batch_dim == 0 else split.permute(1, 2, 0, 3)

    def _mask(self, attn: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores of q [N, H, L, D], or None."""
        if attn is not None:
            attn = _additive("attn_mask", attn, q.dtype)
            attn = attn if attn.dim() == 2 else attn.unflatten(0, q.shape[:2])
        if padding is None:
            return attn
        padding = _additive("key_padding_mask", padding, q.dtype)[:, None, None]
        return padding if attn is None else attn + padding

    def _extended(
        self, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With bias_k and bias_v, and a zero, behind the keys and values, where the attention was
        made so."""
        added = int(self.bias_k is not None) + int(self.add_zero_attn)

        def with_bias(t: Tensor, bias: Tensor) -> Tensor:
            row = bias.view(1, self.num_heads, 1, self.head_dim).expand(len(t), -1, -1, -1)
            return torch.cat([t, row.to(t.dtype)], 2)

        if self.bias_k is not None and self.bias_v is not None:
            k, v = with_bias(k, self.bias_k), with_bias(v, self.bias_v)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v, F.pad(mask, (0, added)) if mask is not None and added else mask


def _is_alias(x: Tensor, y: Tensor) -> bool:
    """Whether both are one tensor's values: FSDP around the attention, its full backward hooks and
    a reentrant checkpoint pass each argument on as a tensor of its own."""
    if not (worlds.has_values(x) and worlds.has_values(y)) or undense(x) or undense(y):
        return False
    same = x.data_ptr() == y.data_ptr() != 0  # 0: empty, or on the meta device
    return same and (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


def in_projections(attention: Any) -> dict[str, tuple[int, Tensor]]:
    """The noised inputs that the DIP twin of this attention has: the width of each by its name, and
    the weight that reads it."""
    if attention._qkv_same_embed_dim:
        return {"in_proj": (attention.embed_dim, attention.in_proj_weight)}
    return {
        "q_proj": (attention.embed_dim, attention.q_proj_weight),
        "k_proj": (attention.kdim, attention.k_proj_weight),
        "v_proj": (attention.vdim, attention.v_proj_weight),
    }


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is not None and mask.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(mask.shape)}")


def _additive(name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if mask.is_floating_point():
        return mask.to(dtype)
    raise TypeError(f"{name}: expected a boolean or floating mask, got {mask.dtype}")
