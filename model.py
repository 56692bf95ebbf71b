"""The network: a backbone, a text-driven controller, one small generated head per class.

A class is given by its text embedding w_k, row k of w. From w_k and the global image feature f of
the input, the controller generates the 153 parameters theta_k of a small three-layer network, the
head of class k. It turns the decoder feature into the logits of class k, whose sigmoid is P_k.

The file is plain PyTorch and needs nothing else of this project; support/fast.py computes the same
in less time and memory. With the released weights (`load_released`) the outputs equal those of the
release for one window at a time.

B batch   K classes   C channels   D, H, W voxels or tokens   E text width (512)
N voxels of the input, or tokens of an attention window
"""
from __future__ import annotations

import math
import re
import textwrap
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IMAGE_DIM = 256         # width of the global image feature f
TEXT_HIDDEN = 256       # width of the text feature that the controller computes from w
HEAD = (8, 8, 8, 1)     # channels of a generated head: its input, two hidden layers, its output
HEAD_LAYERS = [(c_out, c_in) for c_in, c_out in pairwise(HEAD)]    # (8, 8), (8, 8), (1, 8)
WEIGHT_SIZES = [c_out * c_in for c_out, c_in in HEAD_LAYERS]       # 64, 64, 8
BIAS_SIZES = [c_out for c_out, _ in HEAD_LAYERS]                   # 8, 8, 1
THETA_DIM = sum(WEIGHT_SIZES) + sum(BIAS_SIZES)                    # 153


# ---- pieces of both backbones ------------------------------------------------------------------
class Conv(nn.Conv3d):
    """A 3x3x3 (or 1x1x1) convolution that keeps the size of its input."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 3, bias: bool = True):
        super().__init__(c_in, c_out, kernel, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(self.weight)       # short trainings start more steadily with it


class UpConv(nn.ConvTranspose3d):
    """A 2x2x2 transposed convolution of stride 2, which doubles every side."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__(c_in, c_out, kernel_size=2, stride=2, bias=bias)


class GroupNormReLU(nn.GroupNorm):
    """Group norm, then ReLU: the first step of the pooling branch and of the reduction to 8
    channels. There are 16 groups as released, or fewer where 16 does not divide C."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(16, channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def run_stage(stage, *inputs, recompute: bool) -> Tensor:
    """stage(*inputs), with activation checkpointing if `recompute`: its activations are not stored
    but computed again in the backward pass, which takes less memory and more time."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(stage, *inputs, use_reentrant=False)
    return stage(*inputs)


# ---- U-Net -------------------------------------------------------------------------------------
class ConvNormReLU(nn.Module):
    """3x3x3 convolution, instance norm, ReLU.

    The release has batch norm, which uses the statistics of the batch in evaluation as well. With
    one input at a time batch norm of this kind equals instance norm. With instance norm, a result
    never depends on the other inputs of the batch.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = Conv(c_in, c_out)
        self.norm = nn.InstanceNorm3d(c_out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class DoubleConv(nn.Sequential):
    """The two convolutions of one level of the U-Net."""

    def __init__(self, c_in: int, c_middle: int, c_out: int):
        super().__init__(ConvNormReLU(c_in, c_middle), ConvNormReLU(c_middle, c_out))


class UNet(nn.Module):
    """3D U-Net with three poolings (Ronneberger et al., 2015; Zhou et al., 2019).

    x (B, 1, D, H, W)  ->  deep (B, 8 * width, D/8, H/8, W/8),  fine (B, width, D, H, W)

    width  channels of the decoder feature
    """
    # Input sides are multiples of the first number and at least the second. Three poolings need
    # multiples of 8; with 16, the deepest level has even sides, too, and with at least 32 it has
    # 4^3 voxels for the instance norm
    side_multiple, side_minimum = 16, 32

    def __init__(self, *, width: int = 64):
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        c1, c2, c3, c4 = width, 2 * width, 4 * width, 8 * width        # channels of the levels
        self.deep_channels, self.fine_channels = c4, c1
        self.recompute = False                 # True: activation checkpointing of every level
        self.down = nn.ModuleList([
            DoubleConv(1, c1 // 2, c1),
            DoubleConv(c1, c1, c2),
            DoubleConv(c2, c2, c3),
            DoubleConv(c3, c3, c4),
        ])
        self.up = nn.ModuleList([UpConv(c4, c4), UpConv(c3, c3), UpConv(c2, c2)])
        self.merge = nn.ModuleList([           # upsampled channels + skip channels -> ...
            DoubleConv(c4 + c3, c3, c3),
            DoubleConv(c3 + c2, c2, c2),
            DoubleConv(c2 + c1, c1, c1),
        ])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for level, down in enumerate(self.down):
            if level > 0:
                x = F.max_pool3d(x, 2)
            x = run_stage(down, x, recompute=self.recompute)       # (B, 2^level width, ...)
            skips.append(x)
        deep = x = skips.pop()                                     # (B, 8 width, D/8, H/8, W/8)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = torch.cat([up(x), skips.pop()], 1)                 # upsampled first, then the skip
            x = run_stage(merge, x, recompute=self.recompute)
        return deep, x                                             # x (B, width, D, H, W)


# ---- Swin UNETR: attention in windows ------------------------------------------------------------
WINDOW = 7                         # side of an attention window, in tokens


def window_and_shift(size, shifted: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sides of the windows of a token grid, and by how much they are shifted along each axis.

    An axis of at most 7 tokens is a single window, and such an axis is never shifted.
    """
    window = tuple(min(WINDOW, tokens) for tokens in size)
    shift = tuple(WINDOW // 2 if shifted and tokens > WINDOW else 0 for tokens in size)
    return window, shift


def pad_to_windows(x: Tensor, window) -> Tensor:
    """Append zeros to every axis of x (B, D, H, W, C), so that whole windows cover it."""
    missing = [-tokens % side for tokens, side in zip(x.shape[1:4], window, strict=True)]
    # F.pad counts from the last axis, C, on
    return F.pad(x, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))


def window_partition(x: Tensor, window) -> Tensor:
    """(B, D, H, W, C) -> (B * windows, N, C): the N = d h w tokens of every window."""
    _, D, H, W, C = x.shape
    d, h, w = window
    x = x.reshape(-1, D // d, d, H // h, h, W // w, w, C)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)                     # (B, D/d, H/h, W/w, d, h, w, C)
    return x.reshape(-1, d * h * w, C)


def window_reverse(windows: Tensor, window, size) -> Tensor:
    """(B * windows, N, C) -> (B, D, H, W, C): the inverse of `window_partition`."""
    D, H, W = size
    d, h, w = window
    C = windows.shape[-1]
    x = windows.reshape(-1, D // d, H // h, W // w, d, h, w, C)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)                     # (B, D/d, d, H/h, h, W/w, w, C)
    return x.reshape(-1, D, H, W, C)


def shifted_window_mask(size, window, shift, device) -> Tensor:
    """(windows of a grid, N, N) bool: True for two tokens that share a window only because the roll
    put opposite ends of the volume side by side; they must not attend to each other.

    A grid that was rolled by -shift ends, on every axis, with the tokens that it began with before.
    Two tokens of a window are neighbours in the volume if, on every axis, both of them are such
    tokens or neither is: windows tile the grid, so no window reaches further.
    """
    wrapped = []
    for tokens, s in zip(size, shift, strict=True):
        wrapped.append(torch.arange(tokens, device=device) >= tokens - s)
    wrapped = torch.stack(torch.meshgrid(*wrapped, indexing="ij"), -1)         # (D, H, W, 3)
    wrapped = window_partition(wrapped[None], window)                          # (windows, N, 3)
    return (wrapped[:, :, None] != wrapped[:, None, :]).any(-1)                # (windows, N, N)


def relative_position_index(device=None) -> Tensor:
    """(343, 343): the row of the bias table for each pair of the 343 places of a 7^3 window."""
    side = torch.arange(WINDOW, device=device)
    places = torch.cartesian_prod(side, side, side)                            # (343, 3)
    offset = places[:, None] - places[None, :] + WINDOW - 1                    # each 0 ... 12
    span = 2 * WINDOW - 1                                                      # 13 offsets an axis
    return (offset[..., 0] * span + offset[..., 1]) * span + offset[..., 2]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position.

    windows  (n, N, C)         the tokens of n windows
    mask     (m, N, N) bool    True where nothing may be attended to, for the m windows of one grid
                               (n is a multiple of m), or None
    returns  (n, N, C)

    A window of fewer than 7^3 tokens takes the first N rows and columns of the index of a whole
    window. That gives its pairs the wrong offsets, but it is what the release does.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads).normal_(0, 0.02))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def position_bias(self, N: int) -> Tensor:
        """(heads, N, N): what is added to the score of each pair of places."""
        index = relative_position_index(self.bias_table.device)[:N, :N]
        return self.bias_table[index].permute(2, 0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T / sqrt(c) + bias) v, without the masked pairs; a method of its own, so that
        a subclass can replace it.

        q, k, v and the result are (n, heads, N, c).
        """
        c = q.shape[-1]
        scores = (q / math.sqrt(c)) @ k.transpose(-2, -1)              # (n, heads, N, N)
        scores = scores + self.position_bias(q.shape[2])
        if mask is not None:
            scores = scores.unflatten(0, (-1, len(mask)))              # (B, m, heads, N, N)
            scores = scores.masked_fill(mask[:, None], -math.inf)
            scores = scores.flatten(0, 1)                              # (n, heads, N, N)
        return scores.softmax(-1) @ v

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(windows).unflatten(-1, (3, self.heads, -1))     # (n, N, 3, heads, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # (n, heads, N, c) each
        out = self.attend(q, k, v, mask)                               # (n, heads, N, c)
        return self.proj(out.transpose(1, 2).flatten(2))               # (n, N, C)


class SwinBlock(nn.Module):
    """A transformer block with window attention: layer norm, attention, residual, layer norm, MLP,
    residual.

    x (B, D, H, W, C) tokens -> the same shape. With `shifted`, the windows are moved by 3 tokens
    along every axis, so that they overlap those of the block before. As in the release, the zeros
    that pad a grid to whole windows are tokens like the others, to which attention is paid.
    """

    def __init__(self, dim: int, heads: int, shifted: bool):
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        D, H, W = x.shape[1:4]
        window, shift = window_and_shift((D, H, W), self.shifted)
        shortcut = x
        x = self.norm1(x)
        x = pad_to_windows(x, window)
        size = x.shape[1:4]
        mask = None
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))
            mask = shifted_window_mask(size, window, shift, x.device)
        windows = window_partition(x, window)                          # (n, N, C)
        windows = self.attn(windows, mask)
        x = window_reverse(windows, window, size)
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        x = x[:, :D, :H, :W]                                           # without the padding
        x = shortcut + x
        return x + self.mlp(self.norm2(x))


# Offsets (along D, H, W) of the eight tokens of a 2x2x2 block, in the order of concatenation. The
# release takes two of them twice and two never: a mistake, but its weights were trained with it
OCTANTS = {"merging": "000 100 010 001 101 010 001 111",      # as released
           "mergingv2": "000 001 010 011 100 101 110 111"}    # every token once


class PatchMerging(nn.Module):
    """The eight tokens of every 2x2x2 block become one of twice the width.

    (B, D, H, W, C), with even sides -> (B, D/2, H/2, W/2, 2C)
    """

    def __init__(self, dim: int, merging: str):
        super().__init__()
        self.octants = [tuple(map(int, octant)) for octant in OCTANTS[merging].split()]
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, d::2, h::2, w::2] for d, h, w in self.octants]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class SwinStage(nn.Module):
    """Blocks whose windows are unshifted and shifted in turn, then patch merging."""

    def __init__(self, dim: int, depth: int, heads: int, merging: str):
        super().__init__()
        blocks = [SwinBlock(dim, heads, shifted=i % 2 == 1) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.merge = PatchMerging(dim, merging)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.blocks(x))


# ---- Swin UNETR: the network ---------------------------------------------------------------------
class ResBlock(nn.Module):
    """Two 3x3x3 convolutions and a shortcut. The instance norms have no parameters; where the
    number of channels changes, the shortcut has a 1x1x1 convolution (conv3)."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = Conv(c_in, c_out, bias=False)
        self.conv2 = Conv(c_out, c_out, bias=False)
        self.conv3 = Conv(c_in, c_out, kernel=1, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(F.instance_norm(self.conv1(x)), 0.01)
        y = F.instance_norm(self.conv2(y))
        if self.conv3 is not None:
            x = F.instance_norm(self.conv3(x))
        return F.leaky_relu(y + x, 0.01)


class SwinUNETR(nn.Module):
    """Swin transformer encoder, convolutional decoder (Hatamizadeh et al., 2022).

    x (B, 1, D, H, W)  ->  deep (B, 16 C, D/32, H/32, W/32),  fine (B, C, D, H, W)

    feature_size  C, channels of the decoder feature
    merging       "merging" as released (the public weights need it), or "mergingv2", corrected
    """
    # Input sides are multiples of the first number, as sides are halved five times, and at least
    # the second: a deepest feature of one voxel cannot be normalised
    side_multiple, side_minimum = 32, 64

    def __init__(self, *, feature_size: int = 48, depths=(2, 2, 2, 2), heads=(3, 6, 12, 24),
                 merging: str = "merging"):
        super().__init__()
        for stage, count in enumerate(heads):
            channels = feature_size * 2 ** stage
            if channels % count:
                raise ValueError(f"feature_size {feature_size}: stage {stage} has {channels} "
                                 f"channels, which {count} attention heads do not divide")
        if merging not in OCTANTS:
            raise ValueError(f"merging must be one of {list(OCTANTS)}, got {merging!r}")
        C = feature_size
        self.deep_channels, self.fine_channels = 16 * C, C
        self.recompute = False     # True: activation checkpointing of stages and residual blocks
        self.patch = nn.Conv3d(1, C, kernel_size=2, stride=2)
        self.stages = nn.ModuleList(
            SwinStage(C * 2 ** stage, depth, count, merging)
            for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)))
        self.enc = nn.ModuleList([
            ResBlock(1, C),
            ResBlock(C, C),
            ResBlock(2 * C, 2 * C),
            ResBlock(4 * C, 4 * C),
        ])
        self.bottom = ResBlock(16 * C, 16 * C)
        steps = [(16 * C, 8 * C), (8 * C, 4 * C), (4 * C, 2 * C), (2 * C, C), (C, C)]
        self.up = nn.ModuleList(UpConv(c_in, c_out, bias=False) for c_in, c_out in steps)
        self.dec = nn.ModuleList(ResBlock(2 * c_out, c_out) for _, c_out in steps)

    def encode(self, x: Tensor) -> list[Tensor]:
        """x -> five hidden states, the first (B, C, D/2, H/2, W/2); each later one has twice the
        channels and half the sides. They are layer-normalised without parameters."""
        tokens = self.patch(x).permute(0, 2, 3, 4, 1)          # (B, D/2, H/2, W/2, C)
        hidden = [tokens]
        for stage in self.stages:
            tokens = run_stage(stage, tokens, recompute=self.recompute)
            hidden.append(tokens)
        return [F.layer_norm(h, h.shape[-1:]).permute(0, 4, 1, 2, 3) for h in hidden]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encode(x)
        skips = []                                             # of sides D, D/2, D/4, D/8, D/16
        for enc, h in zip(self.enc, [x, *hidden[:3]], strict=True):
            skips.append(run_stage(enc, h, recompute=self.recompute))
        skips.append(hidden[3])
        deep = x = self.bottom(hidden[4])                      # (B, 16 C, D/32, H/32, W/32)
        for up, dec in zip(self.up, self.dec, strict=True):
            x = torch.cat([up(x), skips.pop()], 1)             # upsampled first, then the skip
            x = run_stage(dec, x, recompute=self.recompute)
        return deep, x                                         # x (B, C, D, H, W)


# ---- text-driven controller and heads ----------------------------------------------------------
def split_theta(theta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """theta (..., 153) -> the weights and the biases of three layers.

    weights  (..., 8, 8), (..., 8, 8), (..., 1, 8): each is (out, in)
    biases   (..., 8), (..., 8), (..., 1)

    As released: all weights come first, then all biases.
    """
    weights, biases = theta.split((sum(WEIGHT_SIZES), sum(BIAS_SIZES)), -1)
    weights = weights.split(WEIGHT_SIZES, -1)
    weights = [flat.unflatten(-1, shape) for flat, shape in zip(weights, HEAD_LAYERS, strict=True)]
    return weights, list(biases.split(BIAS_SIZES, -1))


def apply_heads(feat: Tensor, theta: Tensor) -> Tensor:
    """The heads: three 1x1x1 convolutions per class with the parameters theta_k, ReLU in between.

    feat     (B, 8, D, H, W)   theta (B, K, 153)
    returns  (B, K, D, H, W)   logits; P_k is their sigmoid
    """
    (w1, w2, w3), (b1, b2, b3) = split_theta(theta)
    x = feat.flatten(2)                                                        # (B, 8, N)
    h = F.relu(torch.einsum("bkoi,bin->bkon", w1, x) + b1[..., None])          # (B, K, 8, N)
    h = F.relu(torch.einsum("bkoi,bkin->bkon", w2, h) + b2[..., None])         # (B, K, 8, N)
    logits = torch.einsum("bkoi,bkin->bkon", w3, h) + b3[..., None]            # (B, K, 1, N)
    return logits.squeeze(2).unflatten(2, feat.shape[2:])


@torch.no_grad()
def initialise_theta(theta: Tensor) -> None:
    """Fill theta (153,) with the parameters of a He-initialised head (ours).

    The last bias is -2: at first a head gives every voxel a probability of about 0.12, because most
    voxels do not belong to a given class.
    """
    theta.zero_()
    weights, biases = split_theta(theta)               # views: writing to them writes to theta
    for weight in weights[:-1]:
        weight.normal_(0, math.sqrt(2 / weight.shape[-1]))             # a ReLU follows
    weights[-1].normal_(0, math.sqrt(1 / weights[-1].shape[-1]))       # no ReLU follows
    biases[-1].fill_(-2.0)


class Controller(nn.Module):
    """theta_k = Linear(concat(f, ReLU(Linear(w_k)))): the parameters of every head.

    w (K, E), f (B, 256)  ->  theta (B, K, 153)
    """

    def __init__(self, *, text_dim: int = 512):
        super().__init__()
        self.text = nn.Linear(text_dim, TEXT_HIDDEN)
        self.out = nn.Linear(IMAGE_DIM + TEXT_HIDDEN, THETA_DIM)
        # PyTorch makes the weights of `out` small, so at first every theta_k is close to its bias
        initialise_theta(self.out.bias)

    def forward(self, w: Tensor, f: Tensor) -> Tensor:
        text = F.relu(self.text(w))                                    # (K, 256)
        B, K = f.shape[0], text.shape[0]
        image = f[:, None].expand(B, K, -1)                            # (B, K, 256)
        text = text[None].expand(B, K, -1)                             # (B, K, 256)
        return self.out(torch.cat([image, text], 2))                   # the image feature first


def check_size(size, backbone) -> None:
    """Raise ValueError unless the backbone takes an input window of this size (D, H, W)."""
    multiple, minimum = backbone.side_multiple, backbone.side_minimum
    if any(side % multiple or side < minimum for side in size):
        raise ValueError(f"window sides must be multiples of {multiple} and at least {minimum}, "
                         f"got {tuple(size)}")


class UniversalModel(nn.Module):
    """Backbone, pooling branch, text-driven controller, dynamic heads.

    backbone  UNet, SwinUNETR, or a module of your own with their attributes deep_channels,
              fine_channels, side_multiple and side_minimum that returns (deep, fine)
    text_dim  E, the width of a text embedding
    """

    def __init__(self, backbone: nn.Module, text_dim: int = 512):
        super().__init__()
        self.backbone = backbone
        # The pooling branch: norm, ReLU, average over all voxels, linear layer
        self.pool_norm = GroupNormReLU(backbone.deep_channels)
        self.pool = nn.Linear(backbone.deep_channels, IMAGE_DIM)
        self.controller = Controller(text_dim=text_dim)
        # The reduction of the decoder feature to the 8 channels that the heads take
        self.reduce_norm = GroupNormReLU(backbone.fine_channels)
        self.reduce = nn.Conv3d(backbone.fine_channels, HEAD[0], 1)

    def heads(self, feat: Tensor, theta: Tensor) -> Tensor:
        """`apply_heads`, as a method that a subclass can replace."""
        return apply_heads(feat, theta)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, 1, D, H, W), w (K, E) -> logits (B, K, D, H, W), not probabilities."""
        check_size(x.shape[2:], self.backbone)
        deep, fine = self.backbone(x)                          # (B, C', d, h, w), (B, C, D, H, W)
        f = self.pool(self.pool_norm(deep).mean((2, 3, 4)))    # (B, 256): norm, ReLU, mean, linear
        theta = self.controller(w, f)                          # (B, K, 153)
        feat = self.reduce(self.reduce_norm(fine))             # (B, 8, D, H, W): norm, ReLU, linear
        return self.heads(feat, theta)                         # (B, K, D, H, W)


# ---- making and reading ------------------------------------------------------------------------
BACKBONES = {"unet": UNet, "swin_unetr": SwinUNETR}


def build_model(spec: dict) -> UniversalModel:
    """{"backbone": "unet", "width": 64, "text_dim": 512} -> an untrained model.

    The other keys are arguments of the backbone.
    """
    spec = dict(spec)
    backbone, text_dim = spec.pop("backbone"), spec.pop("text_dim")
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {sorted(BACKBONES)}, got {backbone!r}")
    return UniversalModel(BACKBONES[backbone](**spec), text_dim)


def one_line(error: Exception) -> str:
    """What torch.load or load_state_dict says about a file, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))                   # colours of a terminal
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it holds {refused[1]}; only tensors, numbers and strings are loaded"
    text = text.split("WeightsUnpickler error:")[-1].strip()           # what precedes it is advice
    lines = [textwrap.shorten(line, 200, placeholder=" ...") for line in text.splitlines()[:4]]
    return " ".join([f"{type(error).__name__}:", *lines])


def read_checkpoint(path) -> dict:
    """The content of a checkpoint file: tensors, numbers and strings. No code in it is run.

    raises OSError, ValueError  with a message of one line that names the file
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise OSError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:             # torch and pickle raise all kinds on a damaged file
        raise ValueError(f"{path}: not a readable checkpoint ({one_line(e)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a checkpoint is a dict, this is {type(content).__name__}")
    return content


# ---- public weights ----------------------------------------------------------------------------
_DOUBLE_CONV = {".conv1.": ".conv.", ".bn1.": ".norm."}
_SWIN_STAGE = {".mlp.linear1.": ".mlp.0.", ".mlp.linear2.": ".mlp.2.",
               ".mlp.fc1.": ".mlp.0.", ".mlp.fc2.": ".mlp.2.",         # self-supervised files
               ".relative_position_bias_table": ".bias_table", "downsample.": "merge."}
_RES_BLOCK = {"conv1.conv.": "conv1.", "conv2.conv.": "conv2.", "conv3.conv.": "conv3."}
# start of a public name -> start of the name here, and replacements in the remainder
_PUBLIC_NAMES = {
    "swinViT.patch_embed.proj.": ("backbone.patch.", {}),
    "encoder10.layer.":          ("backbone.bottom.", _RES_BLOCK),
    "GAP.0.":                    ("pool_norm.", {}),
    "GAP.3.":                    ("pool.", {}),
    "precls_conv.0.":            ("reduce_norm.", {}),
    "precls_conv.2.":            ("reduce.", {}),
    "text_to_vision.":           ("controller.text.", {}),
    "controller.weight":         ("controller.out.weight", {}),
    "controller.bias":           ("controller.out.bias", {}),
}
for _i, _channels in enumerate((64, 128, 256, 512)):                   # the levels of the U-Net
    _PUBLIC_NAMES[f"down_tr{_channels}.ops."] = (f"backbone.down.{_i}.", _DOUBLE_CONV)
for _i, _channels in enumerate((256, 128, 64)):
    _PUBLIC_NAMES[f"up_tr{_channels}.up_conv."] = (f"backbone.up.{_i}.", {})
    _PUBLIC_NAMES[f"up_tr{_channels}.ops."] = (f"backbone.merge.{_i}.", _DOUBLE_CONV)
for _i in range(4):                                                    # those of the Swin UNETR
    _PUBLIC_NAMES[f"swinViT.layers{_i + 1}.0."] = (f"backbone.stages.{_i}.", _SWIN_STAGE)
    _PUBLIC_NAMES[f"encoder{_i + 1}.layer."] = (f"backbone.enc.{_i}.", _RES_BLOCK)
for _i in range(5):
    _PUBLIC_NAMES[f"decoder{5 - _i}.transp_conv.conv."] = (f"backbone.up.{_i}.", {})
    _PUBLIC_NAMES[f"decoder{5 - _i}.conv_block."] = (f"backbone.dec.{_i}.", _RES_BLOCK)
# Buffers that this code does not need: the released batch norm never uses its running statistics,
# and the position index is computed
_UNUSED = (".running_mean", ".running_var", ".num_batches_tracked", ".relative_position_index")
# The key under which a public file keeps its weights; some hold nothing else, without a key
_KEYS_OF_WEIGHTS = ("net", "state_dict", "model", "network")
# Words that precede the names where a network was saved inside of another module
_WRAPPERS = r"^((module|model|net|network|_orig_mod)\.)+"


def our_name(public: str) -> str:
    """A parameter's name in a public file -> its name here, whatever words precede it there.

    A name that is not in _PUBLIC_NAMES loses these words, except "backbone".

    "module.backbone.down_tr64.ops.0.conv1.weight" -> "backbone.down.0.0.conv.weight"
    "model.down_tr64.ops.0.conv1.weight"           -> "backbone.down.0.0.conv.weight"
    """
    name = re.sub(_WRAPPERS, "", public)
    bare = name.removeprefix("backbone.")
    if bare.startswith(("layers", "patch_embed")):                     # self-supervised files
        bare = "swinViT." + bare
    for start, (our_start, replacements) in _PUBLIC_NAMES.items():
        if bare.startswith(start):
            remainder = bare.removeprefix(start)
            for old, new in replacements.items():
                remainder = remainder.replace(old, new)
            return our_start + remainder
    return name


def public_weights(content: dict, where: str) -> dict[str, Tensor]:
    """The content of a public file -> {our name: tensor}, without the unused buffers.

    where   the file, for error messages
    raises  ValueError  if it holds one parameter twice, or weights under two keys
    """
    keys = [key for key in _KEYS_OF_WEIGHTS if isinstance(content.get(key), dict)]
    if len(keys) > 1:
        raise ValueError(f"{where}: it holds weights under {' and '.join(keys)}; save a file with "
                         "one of them")
    state = content[keys[0]] if keys else content      # an optimiser and more may lie beside it
    weights: dict[str, Tensor] = {}
    for public, value in state.items():
        name = our_name(str(public))
        if not isinstance(value, Tensor) or name.endswith(_UNUSED):
            continue
        if name in weights:
            raise ValueError(f"{where}: {public} is not its only parameter that is {name} of this "
                             "model; keep only one of them in the file")
        if name in ("pool.weight", "controller.out.weight") and value.ndim == 5:
            value = value.flatten(1)                       # released as a 1x1x1 convolution
        weights[name] = value
    return weights


def load_released(source, *, where: str = "state dict") -> tuple[UniversalModel, Tensor]:
    """The authors' U-Net or Swin UNETR, or a derivative -> (model in eval mode, w (K, E)).

    Every parameter of the file must be used and none of the model's may be missing.

    source  a path, or the content of the file: a state dict, or a dict that holds one under "net",
            "state_dict", "model" or "network"; for the names in it, see our_name
    where   what error messages call the source if it is no path
    raises  ValueError  saying which parameters are missing, unknown or of another shape
    """
    if not isinstance(source, dict):
        where, source = str(source), read_checkpoint(source)
    state = public_weights(source, where)
    try:
        w = state.pop("organ_embedding").float()
        if "backbone.patch.weight" in state:                           # (feature_size, 1, 2, 2, 2)
            spec = {"backbone": "swin_unetr", "feature_size": len(state["backbone.patch.weight"])}
        else:                                                          # (width / 2, 1, 3, 3, 3)
            spec = {"backbone": "unet", "width": 2 * len(state["backbone.down.0.0.conv.weight"])}
        with torch.device("meta"):     # without memory: load_state_dict(assign=True) brings it
            model = build_model({**spec, "text_dim": w.shape[1]})
        model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{where}: not the released U-Net or Swin UNETR with its text embeddings "
                         f"({one_line(e)}); `train.py --pretrained FILE` takes only the backbone "
                         "of a file") from None
    return model.eval(), w


