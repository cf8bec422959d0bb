"""The networks whose blocks and training steps are timed, written out so that nothing else need be
installed.

A module with `compile_unit` is what torch.compile is given: a block that repeats is compiled once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- blocks --------------------------------------------------------------------------------------


class AttentionBlock(nn.Module):
    """x + out(attention(qkv(norm(x))))"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        )
        mixed = (
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        )
        return x + self.out(mixed)


class MLPBlock(nn.Module):
    """x + down(gelu(up(norm(x)))), its activation a module, as timm and transformers write it."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class TransformerBlock(nn.Module):
    compile_unit = True

    def __init__(self, width: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        self.attention, self.mlp = AttentionBlock(width, heads), MLPBlock(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x))


class BertBlock(nn.Module):
    """norm(x + out(attention(x))), then norm(h + down(gelu(up(h)))), as transformers' BertLayer: a
    linear layer each for query, key and value."""

    compile_unit = True

    def __init__(self, width: int, heads: int, ratio: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.norm1, self.norm2, self.act = nn.LayerNorm(width), nn.LayerNorm(width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.norm1(x + self.out(mixed))
        return self.norm2(h + self.down(self.act(self.up(h))))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as transformers' LlamaMLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down, self.act = nn.Linear(hidden, width, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """RMSNorm, causal attention with rotary positions and grouped keys, RMSNorm, SwiGLU; no
    biases."""

    compile_unit = True

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.mlp = GatedMLP(width, hidden)

    def _rotated(self, x: Tensor) -> Tensor:  # [B, heads, T, head_width]
        half = self.head_width // 2
        inverse = 10000.0 ** (-torch.arange(half, device=x.device) / half)
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * inverse  # [T, half]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        h = self.norm1(x)
        q = self._rotated(self.q(h).view(batch, tokens, self.heads, -1).transpose(1, 2))
        k = self._rotated(self.k(h).view(batch, tokens, self.kv_heads, -1).transpose(1, 2))
        v = self.v(h).view(batch, tokens, self.kv_heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


# ---- models --------------------------------------------------------------------------------------


class ViT(nn.Module):
    """Patches by one convolution, a class token, learned positions, `depth` blocks, a linear
    head."""

    def __init__(
        self,
        image: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        classes: int,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(len(x), -1, -1), patches), 1) + self.position
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.shortcut = None
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(h + (x if self.shortcut is None else self.shortcut(x)))


class ResNet18(nn.Module):
    """ResNet-18 in its form for 32 x 32 images: a 3 x 3 stem, two blocks each of 64, 128, 256 and
    512 channels."""

    def __init__(self, classes: int = 10, width: int = 64, stages: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU()
        blocks, channels_in = [], width
        for stage in range(stages):
            channels = width << stage
            blocks.append(ResidualBlock(channels_in, channels, 1 if stage == 0 else 2))
            blocks.append(ResidualBlock(channels, channels, 1))
            channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.act(self.norm(self.stem(x))))
        return self.head(h.mean((2, 3)))


class MLP(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:  # nn.Sequential's own is none that torch.compile takes
        return super().forward(x)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide_in, wide_out in itertools.pairwise(widths):
        layers += [nn.Linear(wide_in, wide_out), nn.ReLU()]
    return MLP(*layers[:-1])


# ---- what is timed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """make() -> the module; shape: of one batch of inputs; classes: of a classifier, None where it
    returns a tensor."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int | None = None

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.shape))}"


def _llama() -> nn.Module:
    return nn.Sequential(*(LlamaBlock(512, 8, 4, 1408) for _ in range(4)))


def _vit(width: int, heads: int) -> Callable[[], nn.Module]:
    return lambda: ViT(224, 16, width, 12, heads, 100)


MODELS = {
    "cpu": [
        Network("ViT-Ti/16", _vit(192, 3), (2, 3, 224, 224), 100),
        Network("ViT-S/16", _vit(384, 6), (2, 3, 224, 224), 100),
        Network("ViT-S/16", _vit(384, 6), (8, 3, 224, 224), 100),
        Network("ResNet-18", ResNet18, (16, 3, 32, 32), 10),
        Network("Llama, 4 blocks", _llama, (2, 256, 512)),
        Network("BERT-base layer", lambda: BertBlock(768, 12), (4, 128, 768)),
    ],
    "cuda": [
        Network("MLP", lambda: mlp(784, 1024, 1024, 10), (2048, 784), 10),
        Network("ViT-Ti/16", _vit(192, 3), (128, 3, 224, 224), 100),
        Network("ViT-S/16", _vit(384, 6), (128, 3, 224, 224), 100),
        Network("Llama-block", lambda: LlamaBlock(2048, 16, 8, 5632), (4, 2048, 2048)),
        Network("ResNet-18", ResNet18, (512, 3, 32, 32), 10),
    ],
    "quick": [
        Network("MLP", lambda: mlp(16, 24, 10), (8, 16), 10),
        Network("ViT", lambda: ViT(8, 4, 16, 1, 2, 10), (2, 3, 8, 8), 10),
        Network("Llama-block", lambda: LlamaBlock(16, 4, 2, 24), (1, 8, 16)),
        Network("ResNet-18", lambda: ResNet18(width=4, stages=1), (2, 3, 8, 8), 10),
    ],
}


def _blocks(batch: int, tokens: int, width: int, heads: int) -> list[Network]:
    shape = (batch, tokens, width)
    return [
        Network("attention", lambda: AttentionBlock(width, heads), shape),
        Network("MLP", lambda: MLPBlock(width), shape),
    ]


BLOCKS = {
    "cpu": _blocks(8, 197, 384, 6),
    "cuda": _blocks(16, 1024, 1024, 16),
    "quick": _blocks(2, 8, 16, 2),
}
