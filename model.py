"""The network (paper, Sec. 3.2): a backbone, a text branch, one small generated head per class.

A class is a row of w, the CLIP embedding of its prompt. Together with the scan's global feature f
it generates the 153 numbers theta_k of a three-layer head, which turns the decoder feature into the
logits of P_k. The file is plain PyTorch and needs nothing else of this project; fast.py computes
the same in less time and memory. Every piece equals the released weights (see `load_released`).

B batch   K classes   C channels   D, H, W voxels or tokens   E text width (512)
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IMAGE_DIM = 256         # width of the global image feature f
HEAD = (8, 8, 8, 1)     # channels of a generated head: its input, two hidden layers, its output
HEAD_LAYERS = [(c_out, c_in) for c_in, c_out in zip(HEAD, HEAD[1:], strict=False)]
HEAD_SIZES = [c_out * c_in for c_out, c_in in HEAD_LAYERS] + [c_out for c_out, _ in HEAD_LAYERS]
THETA_DIM = sum(HEAD_SIZES)                          # 64 + 64 + 8 weights, 8 + 8 + 1 biases: 153


# ---- pieces of both backbones ------------------------------------------------------------------
class Conv(nn.Conv3d):
    """A 3x3x3 (or 1x1x1) convolution that keeps the size of its input."""

    def __init__(self, c_in: int, c_out: int, side: int = 3, bias: bool = True):
        super().__init__(c_in, c_out, side, padding=side // 2, bias=bias)
        nn.init.kaiming_normal_(self.weight)       # larger than PyTorch's: calmer first steps


class UpConv(nn.ConvTranspose3d):
    """A 2x2x2 transposed convolution of stride 2, which doubles every side."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__(c_in, c_out, kernel_size=2, stride=2, bias=bias)


class GroupNormReLU(nn.GroupNorm):
    """Group norm with gcd(16, C) groups, then ReLU: what precedes the pooling and the heads."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(16, channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def run_stage(stage, *inputs, recompute: bool) -> Tensor:
    """stage(*inputs). With `recompute` its activations are not stored but computed again in the
    backward pass (activation checkpointing): less memory, about a third slower."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(stage, *inputs, use_reentrant=False)
    return stage(*inputs)


# ---- U-Net -------------------------------------------------------------------------------------
class ConvNormReLU(nn.Module):
    """3x3x3 convolution, instance norm, ReLU.

    The release has batch norm that uses the batch's own statistics, also in evaluation. With one
    window at a time that is instance norm. Here a window never depends on the windows beside it.
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

    width      channels of the decoder feature
    recompute  activation checkpointing of every level
    """
    side_multiple, side_minimum = 16, 32      # the sides of a window that this backbone takes

    def __init__(self, *, width: int = 64):
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        c0, c1, c2, c3, c4 = width // 2, width, 2 * width, 4 * width, 8 * width
        self.deep_channels, self.fine_channels = c4, c1
        self.recompute = False
        self.down = nn.ModuleList([DoubleConv(1, c0, c1), DoubleConv(c1, c1, c2),
                                   DoubleConv(c2, c2, c3), DoubleConv(c3, c3, c4)])
        self.up = nn.ModuleList([UpConv(c4, c4), UpConv(c3, c3), UpConv(c2, c2)])
        self.merge = nn.ModuleList([DoubleConv(c4 + c3, c3, c3), DoubleConv(c3 + c2, c2, c2),
                                    DoubleConv(c2 + c1, c1, c1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for level, down in enumerate(self.down):
            if level > 0:
                x = F.max_pool3d(x, 2)
            x = run_stage(down, x, recompute=self.recompute)           # (B, 2^level width, ...)
            skips.append(x)
        deep = skips.pop()                                # (B, 8 width, D/8, H/8, W/8)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = torch.cat([up(x), skips.pop()], 1)        # upsampled first, then the skip
            x = run_stage(merge, x, recompute=self.recompute)
        return deep, x                                    # x (B, width, D, H, W)


# ---- Swin UNETR: attention in windows ------------------------------------------------------------
WINDOW = 7                         # side of an attention window, in tokens


def window_and_shift(size, shifted: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window sides and shifts of a token grid. An axis no longer than a window is one window,
    which is never shifted."""
    window = tuple(min(WINDOW, n) for n in size)
    shift = tuple(WINDOW // 2 if shifted and n > WINDOW else 0 for n in size)
    return window, shift


def pad_to_windows(x: Tensor, window) -> Tensor:
    """Zeros behind the last token of every axis (B, D, H, W, C), up to whole windows."""
    D, H, W = x.shape[1:4]
    d, h, w = window
    return F.pad(x, (0, 0, 0, -W % w, 0, -H % h, 0, -D % d))


def window_partition(x: Tensor, window) -> Tensor:
    """(B, D, H, W, C) -> (B * windows, N, C): the N = d h w tokens of every window."""
    _, D, H, W, C = x.shape
    d, h, w = window
    x = x.reshape(-1, D // d, d, H // h, h, W // w, w, C)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, 7)                     # (B, D/d, H/h, W/w, d, h, w, C)
    return x.reshape(-1, d * h * w, C)


def window_reverse(windows: Tensor, window, size) -> Tensor:
    """(B * windows, N, C) -> (B, D, H, W, C): undoes `window_partition`."""
    D, H, W = size
    d, h, w = window
    C = windows.shape[-1]
    x = windows.reshape(-1, D // d, H // h, W // w, d, h, w, C)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)                     # (B, D/d, d, H/h, h, W/w, w, C)
    return x.reshape(-1, D, H, W, C)


def shifted_window_mask(size, window, shift, device) -> Tensor:
    """(windows, N, N) bool: True where two tokens of a window must not see each other.

    Rolling a grid by `shift` brings its first tokens behind its last ones. Two tokens of a window
    are neighbours in the volume only if, on every axis, both were wrapped round or neither was.
    """
    wrapped = [torch.arange(n, device=device) >= n - s for n, s in zip(size, shift, strict=True)]
    wrapped = torch.stack(torch.meshgrid(*wrapped, indexing="ij"), -1)         # (D, H, W, 3)
    wrapped = window_partition(wrapped[None], window)                          # (windows, N, 3)
    return (wrapped[:, :, None] != wrapped[:, None]).any(-1)


def relative_position_index(device=None) -> Tensor:
    """(343, 343): which row of the bias table belongs to two places of a 7^3 window."""
    places = torch.cartesian_prod(*[torch.arange(WINDOW, device=device)] * 3)  # (343, 3)
    offset = places[:, None] - places[None] + WINDOW - 1                       # each 0 ... 12
    span = 2 * WINDOW - 1
    return (offset[..., 0] * span + offset[..., 1]) * span + offset[..., 2]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias per relative position.

    windows (n, N, C), mask (windows of a scan, N, N) bool or None  ->  (n, N, C)

    As in the release, the bias of a window smaller than 7^3 comes from the first N rows and columns
    of the full index.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads).normal_(0, 0.02))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def position_bias(self, N: int) -> Tensor:
        """(heads, N, N): what is added to the scores of two places of a window of N tokens."""
        index = relative_position_index(self.bias_table.device)[:N, :N]
        return self.bias_table[index].permute(2, 0, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k' / sqrt(c) + bias) v; q, k, v and the result are (n, heads, N, c)."""
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)         # (n, heads, N, N)
        scores = scores + self.position_bias(q.shape[2])
        if mask is not None:
            per_scan = scores.unflatten(0, (-1, len(mask)))            # (B, windows, heads, N, N)
            scores = per_scan.masked_fill(mask[:, None], -math.inf).flatten(0, 1)
        return scores.softmax(-1) @ v

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(windows).unflatten(-1, (3, self.heads, -1))     # (n, N, 3, heads, c)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                           # (n, heads, N, c) each
        out = self.attend(q, k, v, mask)                               # (n, heads, N, c)
        return self.proj(out.transpose(1, 2).flatten(2))               # (n, N, C)


class SwinBlock(nn.Module):
    """Window attention and an MLP, each behind a layer norm and beside a shortcut.

    x (B, D, H, W, C) tokens; every second block shifts its windows by half a side.
    """

    def __init__(self, dim: int, heads: int, shifted: bool):
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def windowed_attention(self, x: Tensor) -> Tensor:
        """Shift, partition, attend, reverse and shift back: (B, D, H, W, C), same shape."""
        D, H, W = x.shape[1:4]
        window, shift = window_and_shift((D, H, W), self.shifted)
        x = pad_to_windows(x, window)
        size, mask = x.shape[1:4], None
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))
            mask = shifted_window_mask(size, window, shift, x.device)
        windows = window_partition(x, window)                          # (n, N, C)
        windows = self.attn(windows, mask)
        x = window_reverse(windows, window, size)
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        return x[:, :D, :H, :W]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.windowed_attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


# Which token of every 2x2x2 block (offset along D, H, W) goes where among the eight
OCTANTS = {"merging": "000 100 010 001 101 010 001 111",      # as released: two twice, two never
           "mergingv2": "000 001 010 011 100 101 110 111"}    # every one once


class PatchMerging(nn.Module):
    """Eight neighbouring tokens become one: (B, D, H, W, C) -> (B, D/2, H/2, W/2, 2C)."""

    def __init__(self, dim: int, merging: str):
        super().__init__()
        self.octants = [tuple(map(int, octant)) for octant in OCTANTS[merging].split()]
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, d::2, h::2, w::2] for d, h, w in self.octants]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class SwinStage(nn.Module):
    """Blocks with plain and shifted windows in turn, then patch merging."""

    def __init__(self, dim: int, depth: int, heads: int, merging: str):
        super().__init__()
        blocks = [SwinBlock(dim, heads, shifted=i % 2 == 1) for i in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.merge = PatchMerging(dim, merging)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.blocks(x))


# ---- Swin UNETR: the network ---------------------------------------------------------------------
class ResBlock(nn.Module):
    """Two 3x3x3 convolutions and a shortcut, with instance norms that have no parameters."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = Conv(c_in, c_out, bias=False)
        self.conv2 = Conv(c_out, c_out, bias=False)
        self.conv3 = Conv(c_in, c_out, side=1, bias=False) if c_in != c_out else None

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
    recompute     activation checkpointing of every stage and block
    """
    side_multiple, side_minimum = 32, 64      # the sides of a window that this backbone takes

    def __init__(self, *, feature_size: int = 48, depths=(2, 2, 2, 2), heads=(3, 6, 12, 24),
                 merging: str = "merging"):
        super().__init__()
        if feature_size % heads[0] or merging not in OCTANTS:
            raise ValueError(f"feature_size must be a multiple of {heads[0]} and merging one of "
                             f"{list(OCTANTS)}, got {feature_size} and {merging!r}")
        C = feature_size
        self.deep_channels, self.fine_channels = 16 * C, C
        self.recompute = False
        self.patch = nn.Conv3d(1, C, kernel_size=2, stride=2)
        self.stages = nn.ModuleList(
            SwinStage(C * 2 ** i, depth, n, merging)
            for i, (depth, n) in enumerate(zip(depths, heads, strict=True)))
        self.enc = nn.ModuleList([ResBlock(1, C), ResBlock(C, C), ResBlock(2 * C, 2 * C),
                                  ResBlock(4 * C, 4 * C)])
        self.bottom = ResBlock(16 * C, 16 * C)
        steps = [(16 * C, 8 * C), (8 * C, 4 * C), (4 * C, 2 * C), (2 * C, C), (C, C)]
        self.up = nn.ModuleList(UpConv(c_in, c_out, bias=False) for c_in, c_out in steps)
        self.dec = nn.ModuleList(ResBlock(2 * c_out, c_out) for _, c_out in steps)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Hidden states 0 ... 4, (B, 2^i C, D/2^(i+1), ...), layer-normalised (no parameters)."""
        tokens = self.patch(x).permute(0, 2, 3, 4, 1)          # (B, D/2, H/2, W/2, C)
        hidden = [tokens]
        for stage in self.stages:
            tokens = run_stage(stage, tokens, recompute=self.recompute)
            hidden.append(tokens)
        return [F.layer_norm(h, h.shape[-1:]).permute(0, 4, 1, 2, 3) for h in hidden]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encode(x)
        skips = [run_stage(enc, h, recompute=self.recompute)             # D, D/2, D/4, D/8
                 for enc, h in zip(self.enc, [x, *hidden[:3]], strict=True)]
        skips.append(hidden[3])                                # D/16
        deep = y = self.bottom(hidden[4])                      # (B, 16 C, D/32, H/32, W/32)
        for up, dec in zip(self.up, self.dec, strict=True):
            y = torch.cat([up(y), skips.pop()], 1)             # upsampled first, then the skip
            y = run_stage(dec, y, recompute=self.recompute)
        return deep, y                                         # y (B, C, D, H, W)


# ---- text branch and heads ---------------------------------------------------------------------
def split_theta(theta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """theta (..., 153) -> the weights and the biases of three layers.

    weights  (..., 8, 8), (..., 8, 8), (..., 1, 8): each is (out, in)
    biases   (..., 8), (..., 8), (..., 1)

    As released: all weights come first, then all biases.
    """
    parts = theta.split(HEAD_SIZES, -1)
    layers = len(HEAD_LAYERS)
    weights = [part.unflatten(-1, shape)
               for part, shape in zip(parts[:layers], HEAD_LAYERS, strict=True)]
    return weights, list(parts[layers:])


def apply_heads(feat: Tensor, theta: Tensor) -> Tensor:
    """P_k before the sigmoid: three 1x1x1 convolutions with the weights theta_k, ReLU in between.

    feat     (B, 8, D, H, W)   theta (B, K, 153)
    returns  (B, K, D, H, W)   logits
    """
    (w1, w2, w3), (b1, b2, b3) = split_theta(theta)
    x = feat.flatten(2)                                                        # (B, 8, N)
    h = F.relu(torch.einsum("bkoi,bin->bkon", w1, x) + b1[..., None])          # (B, K, 8, N)
    h = F.relu(torch.einsum("bkoi,bkin->bkon", w2, h) + b2[..., None])         # (B, K, 8, N)
    y = torch.einsum("bkoi,bkin->bkon", w3, h) + b3[..., None]                 # (B, K, 1, N)
    return y.squeeze(2).unflatten(2, feat.shape[2:])


class Controller(nn.Module):
    """theta_k = one linear layer of concat(f, text_k), text_k a projection of w_k."""

    def __init__(self, *, text_dim: int = 512, image_dim: int = IMAGE_DIM, hidden: int = 256):
        super().__init__()
        self.text = nn.Linear(text_dim, hidden)
        self.out = nn.Linear(image_dim + hidden, THETA_DIM)
        self.start_as_small_networks()

    @torch.no_grad()
    def start_as_small_networks(self) -> None:
        """Every head starts as an ordinary small network (He) whose answer is "no" mostly."""
        weights, biases = split_theta(self.out.bias)
        self.out.bias.zero_()
        for weight in weights[:-1]:
            weight.normal_(0, math.sqrt(2 / weight.shape[-1]))
        weights[-1].normal_(0, math.sqrt(1 / weights[-1].shape[-1]))
        biases[-1].fill_(-2.0)                             # a probability of 0.12

    def forward(self, w: Tensor, f: Tensor) -> Tensor:
        """w (K, E), f (B, 256) -> theta (B, K, 153)."""
        text = F.relu(self.text(w))                                    # (K, 256)
        B, K = f.shape[0], text.shape[0]
        image = f[:, None].expand(-1, K, -1)                           # (B, K, 256)
        text = text.expand(B, -1, -1)                                  # (B, K, 256)
        return self.out(torch.cat([image, text], 2))                   # the image feature first


class Extension(nn.Module):
    """New classes beside a frozen model (the 2024 extension): one two-layer MLP for each.

    w_new  (n, E)  their text embeddings, by which they are recognised among those of a call
    """

    def __init__(self, w_new: Tensor, image_dim: int = IMAGE_DIM, hidden: int = 512):
        super().__init__()
        n, width = len(w_new), image_dim + w_new.shape[1]
        self.register_buffer("w_new", w_new.clone())
        self.w1 = nn.Parameter(torch.randn(n, width, hidden) * math.sqrt(2 / width))
        self.b1 = nn.Parameter(torch.zeros(n, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(n, hidden, THETA_DIM) / math.sqrt(hidden))
        self.b2 = nn.Parameter(torch.zeros(n, 1, THETA_DIM))

    def find(self, w: Tensor) -> Tensor:
        """w (K, E) -> (K,) int: which new class an embedding belongs to, -1 for an old class."""
        same = (w[:, None] == self.w_new).all(2)                       # (K, n)
        return torch.where(same.any(1), same.int().argmax(1), -1)

    def forward(self, which: Tensor, f: Tensor) -> Tensor:
        """which (k,) of the new classes, f (B, 256) -> theta (B, k, 153)."""
        k, B = len(which), len(f)
        image = f[None].expand(k, -1, -1)                              # (k, B, 256)
        text = self.w_new[which, None].expand(-1, B, -1)               # (k, B, E)
        h = torch.cat([image, text], 2)
        h = F.relu(torch.baddbmm(self.b1[which], h, self.w1[which]))   # (k, B, 512)
        return torch.baddbmm(self.b2[which], h, self.w2[which]).transpose(0, 1)


class UniversalModel(nn.Module):
    """Backbone, pooling branch, text-driven controller, dynamic heads (paper, Fig. 2).

    backbone  a module with deep_channels, fine_channels, side_multiple and side_minimum that
              returns (deep, fine)
    text_dim  E, the width of a text embedding
    """

    def __init__(self, backbone: nn.Module, text_dim: int = 512):
        super().__init__()
        self.backbone = backbone
        self.pool_norm = GroupNormReLU(backbone.deep_channels)
        self.pool = nn.Linear(backbone.deep_channels, IMAGE_DIM)
        self.controller = Controller(text_dim=text_dim)
        self.reduce_norm = GroupNormReLU(backbone.fine_channels)
        self.reduce = nn.Conv3d(backbone.fine_channels, HEAD[0], 1)
        self.extension: Extension | None = None

    def extend(self, w_new: Tensor) -> None:
        """Freeze everything there is and add classes with these text embeddings (n, E)."""
        self.requires_grad_(False)
        self.extension = Extension(w_new).to(w_new.device)

    def theta(self, deep: Tensor, w: Tensor) -> Tensor:
        """deep (B, C, D/s, H/s, W/s), w (K, E) -> theta (B, K, 153)."""
        f = self.pool(self.pool_norm(deep).mean((2, 3, 4)))            # (B, 256)
        if self.extension is None:
            return self.controller(w, f)
        which = self.extension.find(w)                                 # (K,)
        old, new = which < 0, which >= 0
        theta = f.new_empty(len(f), len(w), THETA_DIM)
        theta[:, old] = self.controller(w[old], f)
        theta[:, new] = self.extension(which[new], f)
        return theta

    def heads(self, feat: Tensor, theta: Tensor) -> Tensor:
        return apply_heads(feat, theta)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, 1, D, H, W), w (K, E) -> logits (B, K, D, H, W), not probabilities."""
        check_side(x.shape[2:], self.backbone)
        deep, fine = self.backbone(x)                  # (B, 8 C, D/8, ...), (B, C, D, H, W)
        theta = self.theta(deep, w)                    # (B, K, 153)
        feat = self.reduce(self.reduce_norm(fine))     # (B, 8, D, H, W)
        return self.heads(feat, theta)                 # (B, K, D, H, W)


def check_side(size, backbone) -> None:
    """raises ValueError  unless every side of a window is one that the backbone takes."""
    multiple, minimum = backbone.side_multiple, backbone.side_minimum
    if any(side % multiple or side < minimum for side in size):
        raise ValueError(f"window sides must be multiples of {multiple} and at least {minimum}, "
                         f"got {tuple(size)}")


# ---- checkpoints -------------------------------------------------------------------------------
FORMAT = "universal-model/2"
OLDER_FORMATS = ("universal-model/1",)       # read as well; they lack settings that are newer
BACKBONES = {"unet": UNet, "swin_unetr": SwinUNETR}


def build_model(spec: dict) -> UniversalModel:
    """{"backbone": "unet", "width": 64, "text_dim": 512} -> an untrained model.

    "extension": n adds n new classes, whose text embeddings are still zero
    """
    spec = dict(spec)
    backbone, text_dim = spec.pop("backbone"), spec.pop("text_dim")
    new_classes = spec.pop("extension", 0)
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {sorted(BACKBONES)}, got {backbone!r}")
    model = UniversalModel(BACKBONES[backbone](**spec), text_dim)
    if new_classes:
        model.extend(torch.zeros(new_classes, text_dim))
    return model


def read_checkpoint(path) -> dict:
    """The plain content of a checkpoint file; nothing in it is run.

    raises FileNotFoundError, ValueError  in one line with the path
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as e:
        reason = str(e).strip().split("\n")[0][:200]
        raise ValueError(f"{path}: not a readable checkpoint, or cut off ({reason})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a checkpoint is a dict, this is {type(content).__name__}")
    return content


def load_checkpoint(path) -> tuple[UniversalModel, Tensor, dict]:
    """A checkpoint of train.py, or a released one -> (model in eval mode, w (K, E), the rest).

    The rest holds classes, config and the names trained on; it is empty for a released file.
    """
    content = read_checkpoint(path)
    if "format" not in content:
        model, w = load_released(content, where=str(path))
        return model, w, {}
    if content["format"] not in (FORMAT, *OLDER_FORMATS):
        raise ValueError(f"{path}: a checkpoint of format {content['format']!r}, this reads "
                         f"{FORMAT!r}")
    model = build_model(content["spec"])
    try:
        model.load_state_dict(current_names(content.pop("model")))
    except RuntimeError as e:
        raise ValueError(f"{path}: weights do not fit the model it names: {e}") from None
    return model.eval(), content["w"], content


def current_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names of today."""
    renamed = {"extension.rows": "extension.w_new"}                    # universal-model/1
    return {renamed.get(name, name): value for name, value in state.items()}


# ---- public weights ----------------------------------------------------------------------------
_DOUBLE_CONV = {".conv1.": ".conv.", ".bn1.": ".norm."}
_SWIN_STAGE = {".mlp.linear1.": ".mlp.0.", ".mlp.linear2.": ".mlp.2.",
               ".mlp.fc1.": ".mlp.0.", ".mlp.fc2.": ".mlp.2.",         # self-supervised files
               ".relative_position_bias_table": ".bias_table", "downsample.": "merge."}
_RES_BLOCK = {"conv1.conv.": "conv1.", "conv2.conv.": "conv2.", "conv3.conv.": "conv3."}
_PUBLIC_NAMES = [
    # a public name starts with     here                        and inside of it
    ("down_tr64.ops.",              "backbone.down.0.",         _DOUBLE_CONV),
    ("down_tr128.ops.",             "backbone.down.1.",         _DOUBLE_CONV),
    ("down_tr256.ops.",             "backbone.down.2.",         _DOUBLE_CONV),
    ("down_tr512.ops.",             "backbone.down.3.",         _DOUBLE_CONV),
    ("up_tr256.up_conv.",           "backbone.up.0.",           {}),
    ("up_tr128.up_conv.",           "backbone.up.1.",           {}),
    ("up_tr64.up_conv.",            "backbone.up.2.",           {}),
    ("up_tr256.ops.",               "backbone.merge.0.",        _DOUBLE_CONV),
    ("up_tr128.ops.",               "backbone.merge.1.",        _DOUBLE_CONV),
    ("up_tr64.ops.",                "backbone.merge.2.",        _DOUBLE_CONV),
    ("swinViT.patch_embed.proj.",   "backbone.patch.",          {}),
    ("swinViT.layers1.0.",          "backbone.stages.0.",       _SWIN_STAGE),
    ("swinViT.layers2.0.",          "backbone.stages.1.",       _SWIN_STAGE),
    ("swinViT.layers3.0.",          "backbone.stages.2.",       _SWIN_STAGE),
    ("swinViT.layers4.0.",          "backbone.stages.3.",       _SWIN_STAGE),
    ("encoder1.layer.",             "backbone.enc.0.",          _RES_BLOCK),
    ("encoder2.layer.",             "backbone.enc.1.",          _RES_BLOCK),
    ("encoder3.layer.",             "backbone.enc.2.",          _RES_BLOCK),
    ("encoder4.layer.",             "backbone.enc.3.",          _RES_BLOCK),
    ("encoder10.layer.",            "backbone.bottom.",         _RES_BLOCK),
    ("decoder5.transp_conv.conv.",  "backbone.up.0.",           {}),
    ("decoder4.transp_conv.conv.",  "backbone.up.1.",           {}),
    ("decoder3.transp_conv.conv.",  "backbone.up.2.",           {}),
    ("decoder2.transp_conv.conv.",  "backbone.up.3.",           {}),
    ("decoder1.transp_conv.conv.",  "backbone.up.4.",           {}),
    ("decoder5.conv_block.",        "backbone.dec.0.",          _RES_BLOCK),
    ("decoder4.conv_block.",        "backbone.dec.1.",          _RES_BLOCK),
    ("decoder3.conv_block.",        "backbone.dec.2.",          _RES_BLOCK),
    ("decoder2.conv_block.",        "backbone.dec.3.",          _RES_BLOCK),
    ("decoder1.conv_block.",        "backbone.dec.4.",          _RES_BLOCK),
    ("GAP.0.",                      "pool_norm.",               {}),
    ("GAP.3.",                      "pool.",                    {}),
    ("precls_conv.0.",              "reduce_norm.",             {}),
    ("precls_conv.2.",              "reduce.",                  {}),
    ("text_to_vision.",             "controller.text.",         {}),
    ("controller.weight",           "controller.out.weight",    {}),
    ("controller.bias",             "controller.out.bias",      {}),
]
_UNUSED = (".running_mean", ".running_var", ".num_batches_tracked", ".relative_position_index")


def our_name(public: str) -> str:
    """A parameter's name in a public file -> its name here; an unknown name stays as it is.

    "module.backbone.down_tr64.ops.0.conv1.weight" -> "backbone.down.0.0.conv.weight"
    """
    public = public.removeprefix("module.")
    name = public.removeprefix("backbone.")
    if name.startswith(("layers", "patch_embed")):                     # self-supervised files
        name = "swinViT." + name
    for start, ours, inside in _PUBLIC_NAMES:
        if name.startswith(start):
            name = ours + name.removeprefix(start)
            for old, new in inside.items():
                name = name.replace(old, new)
            return name
    return public


def _check_unused(name: str, value: Tensor, where: str) -> None:
    """raises ValueError  if a buffer that is not used here has not the content it must have."""
    if name.endswith(".relative_position_index"):
        if not torch.equal(value, relative_position_index()):
            raise ValueError(f"{where}: {name} is not that of {WINDOW}^3 windows")
    elif name.endswith((".running_mean", ".running_var")) and value.ndim != 1:
        raise ValueError(f"{where}: {name} has shape {tuple(value.shape)}, expected a vector")


def public_weights(content: dict, where: str) -> dict[str, Tensor]:
    """A public payload -> {our name: tensor}, without the buffers that the release never uses."""
    state = content
    for key in ("net", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            state = content[key]
            break
    weights = {}
    for public, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: not a checkpoint of this model: {public!r} is "
                             f"{type(value).__name__}, not a tensor")
        name = our_name(public)
        if name.endswith(_UNUSED):
            _check_unused(name, value, where)
            continue
        if name in ("pool.weight", "controller.out.weight") and value.ndim == 5:
            value = value.flatten(1)                       # released as a 1x1x1 convolution
        weights[name] = value
    return weights


def load_released(source, *, where: str = "state dict") -> tuple[UniversalModel, Tensor]:
    """The authors' U-Net or Swin UNETR -> (model in eval mode, w (K, E)); nothing may be left over.

    source  a path or what is in the file; keys as `module.backbone.X` under `net`, as `module.X`
            (older Swin file), or bare
    raises  ValueError  listing every parameter that is missing, unknown or of another shape
    """
    if not isinstance(source, dict):
        where, source = str(source), read_checkpoint(source)
    state = public_weights(source, where)
    w = state.pop("organ_embedding", None)
    unet_first = state.get("backbone.down.0.0.conv.weight")            # (width / 2, 1, 3, 3, 3)
    swin_first = state.get("backbone.patch.weight")                    # (feature_size, 1, 2, 2, 2)
    text = state.get("controller.text.weight")                         # (256, E)
    first = swin_first if unet_first is None else unet_first
    if any(t is None or t.ndim < 2 for t in (first, text, w)):
        raise ValueError(f"{where}: not a released CLIP-driven model: no backbone, "
                         "text_to_vision or organ_embedding that this code knows")
    if unet_first is None:
        spec = {"backbone": "swin_unetr", "feature_size": len(first)}
    else:
        spec = {"backbone": "unet", "width": 2 * len(first)}
    with torch.device("meta"):
        model = build_model({**spec, "text_dim": text.shape[1]})
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unknown {name}" for name in state if name not in own]
    for name in own:
        if name in state and own[name].shape != state[name].shape:
            wrong.append(f"{name} has shape {tuple(state[name].shape)}, "
                         f"expected {tuple(own[name].shape)}")
    if wrong:
        raise ValueError(f"{where}: does not fit the released {spec['backbone']}: "
                         + "; ".join(wrong))
    model.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model.eval(), w.float()


def load_pretrained(model: UniversalModel, path) -> tuple[list[str], list[str]]:
    """Fill the backbone from MONAI's self-supervised Swin file, Models Genesis (U-Net), or a
    checkpoint of train.py (transfer to other classes).

    returns  (names filled, names in the file that are no part of this backbone)
    raises   ValueError  if a tensor has another shape, or nothing fits
    """
    state, own = public_weights(read_checkpoint(path), str(path)), model.state_dict()
    fits = [name for name in state if name.startswith("backbone.") and name in own]
    if not fits:
        raise ValueError(f"{path}: no weight in it fits this backbone; it starts with "
                         f"{next(iter(state), 'nothing')!r}")
    for name in fits:
        if own[name].shape != state[name].shape:
            raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, this model "
                             f"{tuple(own[name].shape)}")
    model.load_state_dict({name: state[name] for name in fits}, strict=False)
    return fits, [name for name in state if name not in fits]
