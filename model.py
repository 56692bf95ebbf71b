"""The network (paper, Sec. 3.2): a backbone, a text branch, one small generated head per class.

A class is a row of w, the CLIP embedding of its prompt. Together with the scan's global feature f
it generates the 153 numbers theta_k of a three-layer head that turns the decoder feature into P_k.
Needs torch only. Every piece is exact with respect to the released weights (see `load_released`).

B batch   K classes   C channels   G groups   D, H, W voxels   E text width (512)
"""
from __future__ import annotations

import itertools
import math
import re
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD = (8, 8, 8, 1)                # channels of the generated head, input first
_CL = torch.channels_last_3d


# ---- normalisation -----------------------------------------------------------------------------
def _slabs(*tensors: Tensor):
    """Views (B, n, C) of channels-last tensors (B, C, D, H, W), slab by slab, fit for the cache of
    a processor; a GPU gets one slab."""
    B, C = tensors[0].shape[:2]
    rows = [t.permute(0, 2, 3, 4, 1).reshape(B, -1, C) for t in tensors]
    step = max(1, (1 << 18) // (B * C)) if rows[0].device.type == "cpu" else rows[0].shape[1]
    return zip(*(r.split(step, 1) for r in rows), strict=True)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _sum(slab: Tensor) -> Tensor:
    """(B, n, C) -> (B, C) float64: one long float32 sum is wrong in the fourth digit at 96^3."""
    parts = slab.unflatten(1, (math.gcd(slab.shape[1], 16), -1))               # (B, 16, n / 16, C)
    return parts.sum(2, dtype=_wide(slab)).double().sum(1)


def _per_group(s: Tensor, groups: int) -> Tensor:
    """Mean over every group of channels, repeated per channel: (B, C) -> (B, C)."""
    C = s.shape[1]
    return s if groups == C else s.unflatten(1, (groups, -1)).mean(2).repeat_interleave(
        C // groups, 1)


class _NormAct(torch.autograd.Function):
    """Instance or group norm, affine, then (leaky) ReLU, channels-last, exact sums.

    F.batch_norm and F.group_norm sum naively, F.instance_norm copies channels-last input.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, slope, eps, inplace):
        x = x.contiguous(memory_format=_CL)
        N, wide = x[0, 0].numel(), _wide(x)
        sums = [(_sum(s), _sum(s.to(wide).square())) for s, in _slabs(x)]
        mean, power = (_per_group(sum(t) / N, groups) for t in zip(*sums, strict=True))
        rstd = ((power - mean.square()).clamp_min(0) + eps).rsqrt()            # (B, C) float64
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        scale, shift = scale[:, None].to(wide), shift[:, None].to(wide)
        y = x.detach() if inplace else torch.empty_like(x)     # x itself would lose its strides
        for s, out in _slabs(x, y):
            part = torch.addcmul(shift, s.to(wide), scale)
            if slope is not None:
                part = F.relu_(part) if slope == 0 else F.leaky_relu_(part, slope)
            out.copy_(part)
        if not inplace:
            ctx.save_for_backward(x, y if slope is not None else None, weight, mean, rstd)
            ctx.groups, ctx.slope = groups, slope
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y, weight, mean, rstd = ctx.saved_tensors
        grad, N, wide = grad.contiguous(memory_format=_CL), x[0, 0].numel(), _wide(x)
        gx, centre, sums = torch.empty_like(grad), mean[:, None].to(wide), []
        for s, g, out, *act in _slabs(x, grad, gx, *([] if y is None else [y])):
            if act:
                g = torch.ops.aten.threshold_backward(g, *act, 0) if ctx.slope == 0 else \
                    torch.ops.aten.leaky_relu_backward(g, *act, ctx.slope, True)
            out.copy_(g)
            sums.append((_sum(g), _sum((s.to(wide) - centre).mul_(g))))
        gb, gw = (sum(t) for t in zip(*sums, strict=True))
        gw = gw * rstd                                                         # (B, C) float64
        scale = rstd if weight is None else rstd * weight
        m1, m2 = (_per_group(t / N if weight is None else t * weight / N, ctx.groups)
                  for t in (gb, gw))
        by_x = -rstd.square() * m2
        rest = -rstd * m1 - by_x * mean
        scale, by_x, rest = (t[:, None].to(wide) for t in (scale, by_x, rest))
        for s, out in _slabs(x, gx):
            out.copy_(torch.addcmul(rest, out.to(wide), scale).addcmul_(s.to(wide), by_x))
        gw, gb = (None, None) if weight is None else (t.sum(0).to(weight.dtype) for t in (gw, gb))
        return gx, gw, gb, None, None, None, None


def norm_act(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
             groups: int | None = None, slope: float | None = 0.0, eps: float = 1e-5) -> Tensor:
    """Normalise x (B, C, D, H, W) over space and channel group, then leaky ReLU.

    groups None is instance norm; slope 0 is ReLU, None is no activation. Without gradients x is
    overwritten (a fresh 200 MB tensor costs more than the arithmetic): pass what you own.
    """
    inplace = not (torch.is_grad_enabled() and
                   any(t is not None and t.requires_grad for t in (x, weight, bias)))
    return _NormAct.apply(x, weight, bias, groups or x.shape[1], slope, eps, inplace)


class GroupNormReLU(nn.GroupNorm):
    """GroupNorm with gcd(16, C) groups and ReLU, before the pooling and the heads."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(16, channels), channels)

    def forward(self, x: Tensor) -> Tensor:
        return norm_act(x, self.weight, self.bias, groups=self.num_groups, eps=self.eps)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3x3 or 1x1x1 convolution that keeps its side.

    PyTorch sends a small single input on a processor to a path up to 15 times slower (C * D * H of
    at most 20,480). Such an input goes as a batch of two overlapping halves: the same numbers.
    """
    (B, C, D, H, _), p = x.shape, weight.shape[2] // 2
    weight = weight.contiguous(memory_format=_CL)
    if B > 1 or D % 2 or C * D * H > 20480 or x.device.type != "cpu":
        return F.conv3d(x, weight, bias, padding=p)
    x = F.pad(x, (0, 0, 0, 0, p, p))
    halves = torch.cat([x[:, :, :D // 2 + 2 * p], x[:, :, D // 2:]])       # (2, C, D/2+2p, H, W)
    y = F.conv3d(halves.contiguous(memory_format=_CL), weight, bias, padding=(0, p, p))
    return torch.cat(y.split(1), 2)


class Conv(nn.Conv3d):
    """A convolution of x, or of x and a skip beside it, which are then never concatenated, or of
    up(x) and a skip; without gradients a large up(x) is made one half at a time."""

    def __init__(self, c_in: int, c_out: int, side: int = 3, bias: bool = True):
        super().__init__(c_in, c_out, side, padding=side // 2, bias=bias)
        nn.init.kaiming_normal_(self.weight)       # larger than PyTorch's: calmer first steps

    def forward(self, x: Tensor, skip: Tensor | None = None, up: nn.Module | None = None) -> Tensor:
        if skip is None:
            return _conv(x, self.weight, self.bias)
        a, b = self.weight.split((self.in_channels - skip.shape[1], skip.shape[1]), 1)
        half = x.shape[2] // 2
        if up is None or torch.is_grad_enabled() or half < 24:         # 24: a window of 96 planes
            return _conv(x if up is None else up(x), a, self.bias).add_(_conv(skip, b, None))
        y = _conv(skip, b, self.bias)
        y[:, :, :2 * half] += _conv(up(x[:, :, :half + 1]), a, None)[:, :, :-2]
        y[:, :, 2 * half:] += _conv(up(x[:, :, half - 1:]), a, None)[:, :, 2:]
        return y


class Up2(nn.ConvTranspose3d):
    """A 2x2x2 transposed convolution of stride 2, as one matrix product and a reordering."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True):
        super().__init__(c_in, c_out, 2, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, C, D, H, W = x.shape
        weight = self.weight.permute(0, 2, 3, 4, 1)                            # (C, 2, 2, 2, c_out)
        bias = None if self.bias is None else self.bias.repeat(8)
        y = F.linear(x.permute(0, 2, 3, 4, 1).reshape(-1, C), weight.reshape(C, -1).t(), bias)
        y = y.view(B, D, H, W, 2, 2, 2, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return y.reshape(B, 2 * D, 2 * H, 2 * W, -1).permute(0, 4, 1, 2, 3)


def _run(recompute: bool, module: nn.Module, *x: Tensor) -> Tensor:
    """module(*x); if asked for, its inner values are computed again in backward, not kept."""
    again = recompute and torch.is_grad_enabled()
    return checkpoint(module, *x, use_reentrant=False) if again else module(*x)


# ---- U-Net -------------------------------------------------------------------------------------
class ConvNormReLU(nn.Module):
    """3x3x3 convolution, instance norm, ReLU.

    The release has batch norm that uses the batch's own statistics also in evaluation; with one
    window at a time that is instance norm, and here a window never depends on its neighbours.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = Conv(c_in, c_out)
        self.norm = nn.InstanceNorm3d(c_out, affine=True)

    def forward(self, *x: Tensor) -> Tensor:
        return norm_act(self.conv(*x), self.norm.weight, self.norm.bias)


class Pair(nn.Sequential):
    """Two convolutions; the first may take a skip, as Conv does."""

    def __init__(self, c_in: int, c_middle: int, c_out: int):
        super().__init__(ConvNormReLU(c_in, c_middle), ConvNormReLU(c_middle, c_out))

    def forward(self, *x: Tensor) -> Tensor:
        return self[1](self[0](*x))


class UNet(nn.Module):
    """3D U-Net with three poolings; `width` is the channel count of the decoder feature.

    x (B, 1, D, H, W)  ->  deep (B, 8 * width, D/8, H/8, W/8),  fine (B, width, D, H, W)
    """
    recompute, sides = False, (16, 32)    # a window's: multiples of the first, at least the second

    def __init__(self, *, width: int = 64):
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        c = [width // 2, width, 2 * width, 4 * width, 8 * width]
        self.deep_channels, self.fine_channels = c[4], c[1]
        self.down = nn.ModuleList(Pair(c_in, c[i], c[i + 1])
                                  for i, c_in in enumerate([1, c[1], c[2], c[3]]))
        self.up = nn.ModuleList(Up2(c[i], c[i]) for i in (4, 3, 2))
        self.merge = nn.ModuleList(Pair(c[i] + c[i - 1], c[i - 1], c[i - 1]) for i in (4, 3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for i, down in enumerate(self.down):
            with torch.autocast(x.device.type, enabled=False):     # it would pool in float32
                x = F.max_pool3d(x, 2) if i else x
            x = _run(self.recompute, down, x)             # (B, 2^i width, D/2^i, H/2^i, W/2^i)
            skips.append(x)
        deep = skips.pop()                                # (B, 8 width, D/8, H/8, W/8)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = _run(self.recompute, merge, x, skips.pop(), up)
        return deep, x                                    # x (B, width, D, H, W)


# ---- Swin UNETR --------------------------------------------------------------------------------
WINDOW = 7                         # side of an attention window, in tokens
_CHUNK, _CACHE = 1 << 24, 1 << 20  # attention weights at once in backward: on a GPU, a processor


@lru_cache(1)
def _relative_index() -> Tensor:
    """(343, 343): which row of the bias table belongs to a pair of places in a 7^3 window."""
    at = torch.cartesian_prod(*[torch.arange(WINDOW)] * 3)                     # (343, 3)
    step = (at[:, None] - at[None] + WINDOW - 1)                               # 0 ... 12
    return (step * torch.tensor([(2 * WINDOW - 1) ** 2, 2 * WINDOW - 1, 1])).sum(2)


@lru_cache(64)
def _runs(size: int, shifted: bool) -> list[tuple]:
    """Windows along an axis of tokens that look alike, in order, the axis shifted.

    (slice of their tokens, how many windows, which places of one hold a token, does it wrap round)
    The other places are padding; as all of it is one and the same token, it is never made.
    """
    side, shift = min(WINDOW, size), WINDOW // 2 if shifted and size > WINDOW else 0
    n, runs, at = -(-size // side), [], 0
    looks = [(tuple(p for p in range(side) if (i * side + p + shift) % (n * side) < size),
              shift > 0 and i == n - 1) for i in range(n)]
    for (places, wraps), same in itertools.groupby(looks):
        m = len(list(same))
        runs.append((slice(at, at := at + m * len(places)), m, places, wraps))
    return runs


@lru_cache(256)
def _layout(window: tuple, places: tuple, wraps: tuple, device) -> tuple:
    """Flat places of a window with a token, those without, and a mask (N, N) or None: -80 between
    places that are no neighbours in the volume, as a shifted axis wraps round. (-100 as released
    adds the same nothing, but its exponential is a denormal number, which costs six times more.)"""
    grid = list(itertools.product(*map(range, window)))                        # N places
    full = torch.tensor([all(map(tuple.__contains__, places, at)) for at in grid], device=device)
    late = torch.tensor([[r and i >= n - WINDOW // 2 for i, n, r in zip(
        at, window, wraps, strict=True)] for at in grid], device=device)       # (N, 3)
    mask = -80.0 * (late[:, None] != late).any(2) if any(wraps) else None
    return full.nonzero()[:, 0], (~full).nonzero()[:, 0], mask


class _Attention(torch.autograd.Function):
    """softmax(q k' / sqrt(c) + bias) v; q, k, v (n, heads, N, c), one bias (heads, N, N) for all.

    Fused kernels refuse a bias with a gradient. Nothing of size N x N is kept: backward computes
    the weights again, a few windows at a time, so that they stay in the cache.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias):
        free = bias.detach()[None].expand(len(q), -1, -1, -1)
        out = F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), free)
        ctx.save_for_backward(q, k, v, out, bias)
        return out

    @staticmethod
    def backward(ctx, grad):
        *each, bias = ctx.saved_tensors
        each.append(grad)
        step = max(1, (_CHUNK if grad.is_cuda else _CACHE) // bias.numel())
        scale, g_bias, parts = grad.shape[-1] ** -0.5, 0, []
        total = torch.promote_types(grad.dtype, torch.float32)     # a long sum in bf16 is wrong
        for q, k, v, out, g in zip(*(t.split(step) for t in each), strict=True):
            q = q * scale
            p = (q @ k.transpose(-2, -1)).add_(bias).softmax(-1)
            s = (g @ v.transpose(-2, -1)).sub_((g * out).sum(-1, keepdim=True)).mul_(p)
            g_bias = g_bias + s.sum(0, dtype=total)
            parts.append((s @ k * scale, s.transpose(-2, -1) @ q, p.transpose(-2, -1) @ g))
        return *(torch.cat(part) for part in zip(*parts, strict=True)), g_bias.to(bias.dtype)


class WindowAttention(nn.Module):
    """Self-attention inside windows of 7^3 tokens, with a learned bias per relative position.

    x (B, D, H, W, C); every second block shifts the windows by half a side. Sides count as filled
    up with zeros to whole windows; an axis shorter than a window is one window, unshifted. As in
    the release the bias of such a smaller window is read from the first rows of the full index.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.bias_table = nn.Parameter(torch.empty((2 * WINDOW - 1) ** 3, heads).normal_(0, 0.02))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, shifted: bool) -> Tensor:
        B, *size, C = x.shape
        window = tuple(min(WINDOW, n) for n in size)
        shift = [WINDOW // 2 if shifted and n > WINDOW else 0 for n in size]
        x = x.roll([-s for s in shift], (1, 2, 3)) if any(shift) else x
        N, qkv = math.prod(window), self.qkv(x)                                # (B, D, H, W, 3C)
        bias = self.bias_table[_relative_index()[:N, :N].to(x.device)].permute(2, 0, 1).contiguous()
        out, c = torch.empty_like(qkv[..., :C]), C // self.heads
        for group in itertools.product(*(_runs(n, shifted) for n in size)):    # windows alike
            at, n, places, wraps = zip(*group, strict=True)
            at = (slice(None), *at)
            real, void, mask = _layout(window, places, wraps, x.device)
            r = [len(p) for p in places]
            part = qkv[at].reshape(B, n[0], r[0], n[1], r[1], n[2], r[2], 3, self.heads, c)
            q, k, v = part.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9).flatten(1, 4).flatten(3, 5)
            both = bias if mask is None else bias + mask                       # (heads, N, N)
            if len(void):      # all padding has one k and one v: a single key, its weights summed
                both = both.index_select(1, real)
                fill = both.index_select(2, void).logsumexp(2, keepdim=True)
                both = torch.cat([both.index_select(2, real), fill], 2)
                none = self.qkv.bias[C:].to(k.dtype).view(2, 1, self.heads, 1, c).expand(
                    -1, len(k), -1, -1, -1)
                k, v = torch.cat([k, none[0]], 2), torch.cat([v, none[1]], 2)
            y = _Attention.apply(q, k, v, both.to(q.dtype))                    # (., heads, real, c)
            y = y.view(B, *n, self.heads, *r, c).permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
            out[at] = y.reshape(*out[at].shape)
        x = self.proj(out)
        return x.roll(shift, (1, 2, 3)) if any(shift) else x


class SwinBlock(nn.Module):
    """Pre-norm attention and MLP, each with a shortcut."""

    def __init__(self, dim: int, heads: int, shifted: bool):
        super().__init__()
        self.shifted, self.norm1 = shifted, nn.LayerNorm(dim)
        self.attn, self.norm2 = WindowAttention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), self.shifted)
        return x + self.mlp(self.norm2(x))


OCTANTS = {"merging": "000 100 010 001 101 010 001 111",      # as released: two twice, two never
           "mergingv2": "000 001 010 011 100 101 110 111"}


class PatchMerging(nn.Module):
    """Eight neighbouring tokens become one: (B, D, H, W, C) -> (B, D/2, H/2, W/2, 2C)."""

    def __init__(self, dim: int, form: str):
        super().__init__()
        self.octants = [tuple(slice(int(b), None, 2) for b in o) for o in OCTANTS[form].split()]
        self.norm, self.reduction = nn.LayerNorm(8 * dim), nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(self.norm(torch.cat([x[:, a, b, c] for a, b, c in self.octants], -1)))


class SwinStage(nn.Module):
    """Blocks with plain and shifted windows in turn, then patch merging."""

    def __init__(self, dim: int, depth: int, heads: int, merging: str):
        super().__init__()
        self.blocks = nn.Sequential(*(SwinBlock(dim, heads, bool(i % 2)) for i in range(depth)))
        self.merge = PatchMerging(dim, merging)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(self.blocks(x))


class ResBlock(nn.Module):
    """Two 3x3x3 convolutions with a shortcut; instance norm without affine, leaky ReLU of 0.01."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv1 = Conv(c_in, c_out, bias=False)
        self.conv2 = Conv(c_out, c_out, bias=False)
        self.conv3 = Conv(c_in, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, *x: Tensor) -> Tensor:
        y = norm_act(self.conv1(*x), slope=0.01)
        y = norm_act(self.conv2(y), slope=None)
        short = x[0] if self.conv3 is None else norm_act(self.conv3(*x), slope=None)
        return F.leaky_relu(y + short, 0.01)


class SwinUNETR(nn.Module):
    """Swin transformer encoder, convolutional decoder (Hatamizadeh et al., 2022).

    x (B, 1, D, H, W)  ->  deep (B, 16 C, D/32, H/32, W/32),  fine (B, C, D, H, W)

    C        feature_size
    merging  "merging" as released (the public weights need it), or "mergingv2", corrected
    """
    recompute, sides = False, (32, 64)

    def __init__(self, *, feature_size: int = 48, depths=(2, 2, 2, 2), heads=(3, 6, 12, 24),
                 merging: str = "merging"):
        super().__init__()
        if feature_size % heads[0] or merging not in OCTANTS:
            raise ValueError(f"feature_size must be a multiple of {heads[0]} and merging one of "
                             f"{list(OCTANTS)}, got {feature_size} and {merging!r}")
        C = feature_size
        self.deep_channels, self.fine_channels = 16 * C, C
        self.patch = nn.Conv3d(1, C, 2, 2)
        self.stages = nn.ModuleList(SwinStage(C << i, n, h, merging)
                                    for i, (n, h) in enumerate(zip(depths, heads, strict=True)))
        self.enc = nn.ModuleList(ResBlock(a, b) for a, b in
                                 ((1, C), (C, C), (2 * C, 2 * C), (4 * C, 4 * C)))
        self.bottom = ResBlock(16 * C, 16 * C)
        steps = ((16 * C, 8 * C), (8 * C, 4 * C), (4 * C, 2 * C), (2 * C, C), (C, C))
        self.up = nn.ModuleList(Up2(a, b, bias=False) for a, b in steps)
        self.dec = nn.ModuleList(ResBlock(2 * b, b) for _, b in steps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.patch(x).permute(0, 2, 3, 4, 1)          # (B, D/2, H/2, W/2, C)
        hidden = [tokens]
        for stage in self.stages:                              # (B, D/2^i+2, ..., 2^(i+1) C)
            tokens = _run(self.recompute, stage, tokens)
            hidden.append(tokens)
        hidden = [F.layer_norm(h, h.shape[-1:]).permute(0, 4, 1, 2, 3) for h in hidden]
        skips = [_run(self.recompute, enc, h)
                 for enc, h in zip(self.enc, [x, *hidden], strict=False)] + [hidden[3]]
        deep = y = self.bottom(hidden[4])                      # (B, 16 C, D/32, H/32, W/32)
        for up, dec in zip(self.up, self.dec, strict=True):
            y = _run(self.recompute, dec, up(y), skips.pop())
        return deep, y                                         # y (B, C, D, H, W)


# ---- text branch and heads ---------------------------------------------------------------------
class Controller(nn.Module):
    """theta_k from concat(f, text): one linear layer; the image feature comes first."""

    def __init__(self, *, text_dim: int = 512, image_dim: int = 256, hidden: int = 256):
        super().__init__()
        n = sum(a * b + b for a, b in zip(HEAD, HEAD[1:], strict=False))       # 153
        self.text = nn.Linear(text_dim, hidden)
        self.out = nn.Linear(image_dim + hidden, n)
        with torch.no_grad():      # a head starts as an ordinary small network (He), mostly "no"
            self.out.bias.zero_()
            self.out.bias[:128].normal_(0, math.sqrt(2 / 8))
            self.out.bias[128:136].normal_(0, math.sqrt(1 / 8))
            self.out.bias[-1] = -2.0

    def forward(self, w: Tensor, f: Tensor) -> Tensor:
        t = F.relu(self.text(w))                                       # (K, 256)
        B, K = len(f), len(t)
        both = torch.cat([f[:, None].expand(-1, K, -1), t.expand(B, -1, -1)], 2)
        return self.out(both)                                          # (B, K, 153)


class Extension(nn.Module):
    """New classes beside a frozen model (the 2024 extension): one MLP each, stacked in (n, ...).

    rows  (n, E)  their text rows, by which they are recognised among the rows of a call
    """

    def __init__(self, rows: Tensor, image_dim: int = 256, hidden: int = 512, out_dim: int = 153):
        super().__init__()
        n, width = len(rows), image_dim + rows.shape[1]
        self.register_buffer("rows", rows.clone())
        self.w1 = nn.Parameter(torch.randn(n, width, hidden) * math.sqrt(2 / width))
        self.b1 = nn.Parameter(torch.zeros(n, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(n, hidden, out_dim) / math.sqrt(hidden))
        self.b2 = nn.Parameter(torch.zeros(n, 1, out_dim))

    def place(self, w: Tensor) -> Tensor:
        """w (K, E) -> which new class a row is, -1 for an old one."""
        same = (w[:, None] == self.rows).all(2)                        # (K, n)
        return torch.where(same.any(1), same.int().argmax(1), -1)

    def forward(self, which: Tensor, f: Tensor) -> Tensor:
        both = torch.cat([f[None].expand(len(which), -1, -1),
                          self.rows[which, None].expand(-1, len(f), -1)], 2)   # (K, B, 768)
        h = torch.baddbmm(self.b1[which], both, self.w1[which]).relu()
        return torch.baddbmm(self.b2[which], h, self.w2[which]).transpose(0, 1)    # (B, K, 153)


def split_theta(theta: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """theta (K, 153) -> weights (K, 8, 8), (K, 8, 8), (K, 1, 8) and biases (K, 8), (K, 8), (K, 1).

    As released: all weights first, then all biases; a weight is (out, in).
    """
    shapes = list(zip(HEAD[1:], HEAD, strict=False))
    parts = theta.split([o * i for o, i in shapes] + [o for o, _ in shapes], dim=1)
    return [p.unflatten(1, s).contiguous() for p, s in zip(parts, shapes, strict=False)], parts[3:]


_BLOCK = 1 << 17, 1 << 23          # voxels x classes at once: the cache of a processor, a GPU


def _inner(feat: Tensor, layers, more: int = 0):
    """feat (8, N), split theta -> block by block: a slice of voxels, the inner values h1, h2
    (K, 8, n) and `more` such tensors, all in the same memory: fresh costs more than the sums."""
    ((w1, w2, _), (b1, b2, _)), N = layers, feat.shape[1]
    K, size = len(w1), max(1, _BLOCK[feat.is_cuda] // len(w1))
    rooms = feat.new_empty(2 + more, K * 8 * min(size, N))
    for i in range(0, N, size):
        x = feat[:, i:i + size]
        h1, h2, *rest = rooms[:, :K * 8 * x.shape[1]].view(2 + more, K, 8, -1)
        if x.dtype == torch.float32:                       # the faster form of each dtype
            torch.baddbmm(b1[..., None], w1, x.expand(K, -1, -1), out=h1).relu_()
        else:
            torch.addmm(b1.reshape(-1, 1), w1.flatten(0, 1), x, out=h1.flatten(0, 1)).relu_()
        torch.baddbmm(b2[..., None], w2, h1, out=h2).relu_()
        yield slice(i, i + size), h1, h2, *rest


class _Heads(torch.autograd.Function):
    """One scan's heads: feat (N, 8), theta (K, 153) -> logits (K, N), block by block.

    Nothing but input and output is kept; backward computes a block's inner values again while its
    gradient is made.
    """

    @staticmethod
    def forward(ctx, feat, theta):
        feat = feat.t()                                                        # (8, N)
        out, layers = feat.new_empty(len(theta), feat.shape[1]), split_theta(theta)
        for at, _, h2 in _inner(feat, layers):
            out[:, at] = torch.baddbmm(layers[1][2][..., None], layers[0][2], h2)[:, 0]
        ctx.save_for_backward(feat, theta)
        return out

    @staticmethod
    def backward(ctx, grad):
        feat, theta = ctx.saved_tensors
        (w1, w2, w3), K = (layers := split_theta(theta))[0], len(theta)
        g_feat, total = torch.empty_like(feat, memory_format=torch.contiguous_format), 0
        for at, h1, h2, g1, g2 in _inner(feat, layers, 2):
            x, g = feat[:, at], grad[:, at]
            back = torch.ops.aten.threshold_backward.grad_input
            back(torch.mul(w3.transpose(1, 2), g[:, None], out=g2), h2, 0, grad_input=g2)
            back(torch.bmm(w2.transpose(1, 2), g2, out=g1), h1, 0, grad_input=g1)
            parts = [(g1.flatten(0, 1) @ x.t()).view(K, -1), (g2 @ h1.transpose(1, 2)).flatten(1),
                     (h2 @ g[..., None]).flatten(1), g1.sum(2), g2.sum(2), g.sum(1, keepdim=True)]
            total = total + torch.cat(parts, 1).float()                        # (K, 153)
            g_feat[:, at] = w1.flatten(0, 1).t() @ g1.flatten(0, 1)
        return g_feat.t(), total.to(theta.dtype)


def apply_heads(feat: Tensor, theta: Tensor) -> Tensor:
    """Three 1x1x1 convolutions per class, ReLU between them.

    feat     (B, 8, D, H, W)   theta (B, K, 153)
    returns  (B, K, D, H, W)   logits

    Works on blocks of voxels that fit the cache and never repeats the feature map K times.
    """
    (B, _, *size), K = feat.shape, theta.shape[1]
    rows = feat.permute(0, 2, 3, 4, 1).reshape(B, -1, HEAD[0])                 # (B, N, 8)
    out = [_Heads.apply(r, t) for r, t in zip(rows, theta.to(rows.dtype), strict=True)]
    return (out[0][None] if B == 1 else torch.stack(out)).view(B, K, *size)


class UniversalModel(nn.Module):
    """Backbone, pooling branch, text-driven controller, dynamic heads (paper, Fig. 2).

    backbone  a module with deep_channels, fine_channels and sides that returns (deep, fine)
    text_dim  E, the width of a text row
    """

    def __init__(self, backbone: nn.Module, text_dim: int = 512):
        super().__init__()
        self.backbone = backbone
        deep, fine = backbone.deep_channels, backbone.fine_channels
        self.pool_norm, self.pool = GroupNormReLU(deep), nn.Linear(deep, 256)
        self.controller = Controller(text_dim=text_dim)
        self.reduce_norm, self.reduce = GroupNormReLU(fine), nn.Conv3d(fine, HEAD[0], 1)
        self.extension: Extension | None = None
        self.to(memory_format=_CL)

    def extend(self, rows: Tensor) -> None:
        """Freeze everything there is and add classes with these text rows (n, E)."""
        self.requires_grad_(False)
        self.extension = Extension(rows).to(rows.device)

    def theta(self, deep: Tensor, w: Tensor) -> Tensor:
        """deep (B, C, D/s, H/s, W/s), w (K, E) -> theta (B, K, 153)."""
        if not torch.is_grad_enabled():
            deep = deep.clone()                            # the norm overwrites; callers keep deep
        f = self.pool(self.pool_norm(deep).mean((2, 3, 4)))            # (B, 256)
        if self.extension is None:
            return self.controller(w, f)
        which = self.extension.place(w)                                # (K,)
        out = f.new_empty(len(f), len(w), 153)
        out[:, which < 0] = self.controller(w[which < 0], f)
        out[:, which >= 0] = self.extension(which[which >= 0], f)
        return out

    def forward(self, x: Tensor, w: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Logits (B, K, D, H, W), or only those of the wanted (B, K) pairs, (1, P, D, H, W)."""
        check_side(x.shape[2:], self.backbone)
        x = torch.empty_like(x, memory_format=_CL).copy_(x)    # strides that `contiguous` leaves
        deep, fine = self.backbone(x)                          # open where there is one channel
        theta = self.theta(deep, w)                        # (B, K, 153)
        feat = self.reduce(self.reduce_norm(fine))         # (B, 8, D, H, W)
        if wanted is None:
            return apply_heads(feat, theta)
        return torch.cat([apply_heads(f[None], t[None, own]) for f, t, own in
                          zip(feat, theta, wanted, strict=True) if own.any()], 1)


def check_side(size, backbone) -> None:
    """raises ValueError  unless every side is one that the backbone takes (its `sides`)."""
    step, least = backbone.sides
    if any(s % step or s < least for s in size):
        raise ValueError(f"window sides must be multiples of {step} and at least {least}, "
                         f"got {tuple(size)}")


# ---- checkpoints -------------------------------------------------------------------------------
FORMAT = "universal-model/1"


def build_model(spec: dict) -> UniversalModel:
    """{"backbone": "unet", "width": 64, "text_dim": 512} -> an untrained model."""
    spec = dict(spec)
    backbone, text_dim, new = spec.pop("backbone"), spec.pop("text_dim"), spec.pop("extension", 0)
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {sorted(BACKBONES)}, got {backbone!r}")
    model = UniversalModel(BACKBONES[backbone](**spec), text_dim)
    if new:
        model.extend(torch.zeros(new, text_dim))
    return model


BACKBONES = {"unet": UNet, "swin_unetr": SwinUNETR}


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
        return *load_released(content, where=str(path)), {}
    if content["format"] != FORMAT:
        raise ValueError(f"{path}: a checkpoint of format {content['format']!r}, this reads "
                         f"{FORMAT!r}")
    model = build_model(content["spec"])
    try:
        model.load_state_dict(content.pop("model"))
    except RuntimeError as e:
        raise ValueError(f"{path}: weights do not fit the model it names: {e}") from None
    return model.eval(), content["w"], content


# ---- public weights ----------------------------------------------------------------------------
_RENAME = [(re.compile(a), b) for a, b in (       # released name -> ours, one after the other
    (r"^module\.", ""), (r"^(layers\d|patch_embed)", r"swinViT.\1"),    # older Swin files, SSL
    (r"^(swinViT|encoder\d|decoder\d|down_tr|up_tr)", r"backbone.\1"),
    (r"swinViT\.patch_embed\.proj", "patch"), (r"\.mlp\.(?:linear|fc)1\.", ".mlp.0."),
    (r"\.mlp\.(?:linear|fc)2\.", ".mlp.2."), (r"\.relative_position_bias_table", ".bias_table"),
    (r"swinViT\.layers(\d)\.0\.", lambda m: f"stages.{int(m[1]) - 1}."),
    (r"\.downsample\.", ".merge."), (r"encoder10\.layer\.", "bottom."),
    (r"encoder(\d)\.layer\.", lambda m: f"enc.{int(m[1]) - 1}."),
    (r"decoder(\d)\.transp_conv\.conv", lambda m: f"up.{5 - int(m[1])}"),
    (r"decoder(\d)\.conv_block", lambda m: f"dec.{5 - int(m[1])}"),
    (r"\.conv(\d)\.conv\.", r".conv\1."),
    (r"down_tr(64|128|256|512)\.", lambda m: f"down.{(64, 128, 256, 512).index(int(m[1]))}."),
    (r"up_tr(256|128|64)\.up_conv", lambda m: f"up.{(256, 128, 64).index(int(m[1]))}"),
    (r"up_tr(256|128|64)\.", lambda m: f"merge.{(256, 128, 64).index(int(m[1]))}."),
    (r"\.ops\.(\d)\.conv1\.", r".\1.conv."), (r"\.ops\.(\d)\.bn1\.", r".\1.norm."),
    (r"^precls_conv\.0", "reduce_norm"), (r"^precls_conv\.2", "reduce"),
    (r"^GAP\.0", "pool_norm"), (r"^GAP\.3", "pool"), (r"^controller\.", "controller.out."),
    (r"^text_to_vision", "controller.text"))]
_UNUSED = (".running_mean", ".running_var", ".num_batches_tracked", ".relative_position_index")


def _public_names(content: dict, where: str) -> dict[str, Tensor]:
    """A public payload -> {our name: tensor}, without the buffers that the release never uses."""
    inner = [content.get(k) for k in ("net", "state_dict", "model")]
    state = next((c for c in inner if isinstance(c, dict)), content)
    out = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: not a checkpoint of this model: {key!r} is "
                             f"{type(value).__name__}, not a tensor")
        name = key
        for old, new in _RENAME:
            name = old.sub(new, name)
        if name.endswith(".relative_position_index") and not torch.equal(value, _relative_index()):
            raise ValueError(f"{where}: {key} is not that of {WINDOW}^3 windows")
        if name.endswith((".running_mean", ".running_var")) and value.ndim != 1:
            raise ValueError(f"{where}: {key} has shape {tuple(value.shape)}, expected a vector")
        if not name.endswith(_UNUSED):
            fc = name in ("pool.weight", "controller.out.weight") and value.ndim == 5
            out[name] = value.flatten(1) if fc else value
    return out


def load_released(source, *, where: str = "state dict") -> tuple[UniversalModel, Tensor]:
    """The authors' U-Net or Swin UNETR -> (model in eval mode, w (K, E)); nothing may be left over.

    source  a path or what is in the file; keys as `module.backbone.X` under `net`, as `module.X`
            (older Swin file), or bare
    raises  ValueError  listing every parameter that is missing, unknown or of another shape
    """
    if not isinstance(source, dict):
        where, source = str(source), read_checkpoint(source)
    state = _public_names(source, where)
    w = state.pop("organ_embedding", None)
    conv, patch = (state.get(f"backbone.{k}.weight") for k in ("down.0.0.conv", "patch"))
    first, text = patch if conv is None else conv, state.get("controller.text.weight")
    if any(t is None or t.ndim < 2 for t in (first, text, w)):
        raise ValueError(f"{where}: not a released CLIP-driven model: no backbone, "
                         "text_to_vision or organ_embedding that this code knows")
    size = {"backbone": "swin_unetr", "feature_size": len(first)} if conv is None else \
        {"backbone": "unet", "width": 2 * len(first)}
    with torch.device("meta"):
        model = build_model({**size, "text_dim": text.shape[1]})
    own = model.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state]
    wrong += [f"unknown {k}" for k in state if k not in own]
    wrong += [f"{k} has shape {tuple(state[k].shape)}, expected {tuple(own[k].shape)}"
              for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{where}: does not fit the released {size['backbone']}: "
                         + "; ".join(wrong))
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    return model.to(memory_format=_CL).eval(), w.float()


def load_pretrained(model: UniversalModel, path) -> tuple[list[str], list[str]]:
    """Fill the backbone from MONAI's self-supervised Swin file, Models Genesis (U-Net), or a
    checkpoint of train.py (transfer to other classes).

    returns  (names filled, names in the file that are no part of this backbone)
    raises   ValueError  if a tensor has another shape, or nothing fits
    """
    state, own = _public_names(read_checkpoint(path), str(path)), model.state_dict()
    fits = [k for k in state if k.startswith("backbone.") and k in own]
    if not fits:
        raise ValueError(f"{path}: no weight in it fits this backbone; it starts with "
                         f"{next(iter(state), 'nothing')!r}")
    for k in fits:
        if own[k].shape != state[k].shape:
            raise ValueError(f"{path}: {k} has shape {tuple(state[k].shape)}, this model "
                             f"{tuple(own[k].shape)}")
    model.load_state_dict({k: state[k] for k in fits}, strict=False)
    return fits, [k for k in state if k not in fits]
