"""A denoising transformer of joint blocks, as in Qwen-Image and other double-stream models: text
and image tokens have separate weights and meet in one attention over the sequence [text, image].
Weights are random; the attention is an argument.

    text  ─ norm, modulate ─ q k v ─┐                     ┌─ out, gate, add ─ norm, modulate, MLP, gate, add ─▶
                                    ├─ attend over both ──┤
    image ─ norm, modulate ─ q k v ─┘                     └─ out, gate, add ─ norm, modulate, MLP, gate, add ─▶
"""

import dataclasses

import torch
import torch.nn.functional as F

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """By default those of Qwen-Image."""

    heads: int = 24
    head_dim: int = 128
    mlp_ratio: int = 4
    # Channels of an image token, and of a text token that the language model gives.
    image_channels: int = 64
    text_channels: int = 3584
    timestep_channels: int = 256

    @property
    def hidden(self):
        return self.heads * self.head_dim


class Linear:
    """A projection with random weights that multiplies the variance by `gain` squared."""

    def __init__(self, into, out, like, gain=1.0):
        self.weight = torch.randn(out, into, **like).mul_(gain * into**-0.5)
        self.bias = torch.randn(out, **like).mul_(0.02)

    def __call__(self, x):
        return F.linear(x, self.weight, self.bias)


class Stream:
    """One layer's weights for the tokens of one kind."""

    def __init__(self, dims, like):
        hidden, inner = dims.hidden, dims.hidden * dims.mlp_ratio
        # Gates of about 0.2, so that the sum of sixty layers stays in range.
        self.modulation = Linear(hidden, 6 * hidden, like, gain=0.3)
        self.qkv = Linear(hidden, 3 * hidden, like)
        self.q_norm = torch.rand(dims.head_dim, **like).add_(0.5)
        self.k_norm = torch.rand(dims.head_dim, **like).add_(0.5)
        self.out = Linear(hidden, hidden, like)
        self.up = Linear(hidden, inner, like)
        self.down = Linear(inner, hidden, like)

    def project(self, x, modulation, rotary, dims):
        """q, k and v of tokens, [B, n, H, D] each."""
        shift, scale = modulation[:2]
        q, k, v = self.qkv(modulate(x, shift, scale)).unflatten(-1, (3, dims.heads, dims.head_dim)).unbind(2)
        q = F.rms_norm(q, (dims.head_dim,), self.q_norm, EPS)
        k = F.rms_norm(k, (dims.head_dim,), self.k_norm, EPS)
        return rotate(q, rotary), rotate(k, rotary), v

    def finish(self, x, attended, modulation):
        """The part of the block after the attention."""
        gate, shift, scale, mlp_gate = modulation[2:]
        x = x + gate * self.out(attended.flatten(2))
        mlp = self.down(F.gelu(self.up(modulate(x, shift, scale)), approximate="tanh"))
        return x + mlp_gate * mlp


def modulate(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


def rotate(x, rotary):
    """Rotary position embedding on the two halves of each head."""
    cos, sin = rotary
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def angles(positions, axes, like):
    """cos and sin, [n, 1, D / 2], of [n, len(axes)] positions; axis i rotates `axes[i]` pairs."""
    turned = []
    for at, pairs in enumerate(axes):
        frequencies = 10000.0 ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
        turned.append(positions[:, at, None].float() * frequencies)
    turned = torch.cat(turned, -1)[:, None]
    return turned.cos().to(**like), turned.sin().to(**like)


def rotary_tables(text, side, dims, like):
    """Tables of the text tokens and of a square image. Text positions continue the diagonal beyond
    the image's corner."""
    # Qwen-Image's division of the 64 pairs: 8 for the frame, 28 each for row and column.
    frame = dims.head_dim // 16
    row = (dims.head_dim // 2 - frame) // 2
    axes = (frame, row, dims.head_dim // 2 - frame - row)
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side)) - side // 2
    image = torch.cat((torch.zeros(len(grid), 1), grid), 1)
    words = (torch.arange(text) + side // 2)[:, None].expand(-1, 3)
    return angles(words, axes, like), angles(image, axes, like)


class JointTransformer:
    """`layers` blocks that use `distinct` sets of weights in turn."""

    def __init__(self, dims, layers, distinct, device, dtype, seed=0):
        torch.manual_seed(seed)
        self.dims, self.layers = dims, layers
        self.like = {"device": device, "dtype": dtype}
        hidden = dims.hidden
        self.text_in = Linear(dims.text_channels, hidden, self.like)
        self.image_in = Linear(dims.image_channels, hidden, self.like)
        self.timestep = Linear(dims.timestep_channels, hidden, self.like), Linear(hidden, hidden, self.like)
        self.blocks = [(Stream(dims, self.like), Stream(dims, self.like)) for _ in range(distinct)]
        self.last_modulation = Linear(hidden, 2 * hidden, self.like, gain=0.3)
        self.image_out = Linear(hidden, dims.image_channels, self.like)

    def step(self, text, image, timestep, rotary, attend, layers=None):
        """The prediction for the image, [B, image tokens, channels], and the last state of the
        text, [B, text tokens, hidden]. `text` and `image` are [B, tokens, channels]. `attend` takes
        q, k and v of both, [B, S, H, D], text first."""
        words = text.shape[1]
        half = self.dims.timestep_channels // 2
        frequencies = torch.exp(torch.arange(half, device=text.device) * (-9.21 / half))
        waves = timestep[:, None] * frequencies
        moment = F.silu(self.timestep[0](torch.cat((waves.cos(), waves.sin()), -1).to(text.dtype)))
        moment = F.silu(self.timestep[1](moment))[:, None]
        text, image = self.text_in(text), self.image_in(image)
        for layer in range(self.layers if layers is None else layers):
            for_text, for_image = self.blocks[layer % len(self.blocks)]
            text_modulation = for_text.modulation(moment).chunk(6, -1)
            image_modulation = for_image.modulation(moment).chunk(6, -1)
            of_text = for_text.project(text, text_modulation, rotary[0], self.dims)
            of_image = for_image.project(image, image_modulation, rotary[1], self.dims)
            attended = attend(*(torch.cat(both, 1) for both in zip(of_text, of_image)))
            text = for_text.finish(text, attended[:, :words], text_modulation)
            image = for_image.finish(image, attended[:, words:], image_modulation)
        shift, scale = self.last_modulation(moment).chunk(2, -1)
        return self.image_out(modulate(image, shift, scale)), text
