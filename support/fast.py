"""The operations of model.py again, faster and in less memory: `accelerate(model)`.

Every class here is a subclass of one plain class of model.py, with the same parameters and the same
results to rounding; `accelerate` swaps the classes of a model's modules and, on the CPU, the memory
layout of its weights. State dicts, isinstance and checkpoints are the same either way. A forward
falls back to the plain one on a device that its class does not name in `devices`. Attention and
heads save memory and serve GPUs as well. The others serve the CPU only: on an H100, PyTorch's own
norms and convolutions on contiguous tensors were as fast or faster (experiments/RESULTS.md).

B batch   K classes   C channels   D, H, W voxels or tokens   N voxels, or tokens of a window
"""
from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import (
    HEAD,
    WINDOW,
    Conv,
    ConvNormReLU,
    DoubleConv,
    GroupNormReLU,
    ResBlock,
    SwinBlock,
    SwinUNETR,
    UNet,
    UniversalModel,
    UpConv,
    WindowAttention,
    run_stage,
    split_theta,
    window_and_shift,
)
from support.extension import ExtendedModel

CHANNELS_LAST = torch.channels_last_3d
# How many numbers a loop handles at once: what fits the cache of a CPU, and on a GPU enough to
# keep it busy without large temporaries
NORM_BLOCK = {"cpu": 1 << 18}                          # activations
HEAD_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 23}         # voxels times classes
ATTENTION_BLOCK = {"cpu": 1 << 20, "cuda": 1 << 26}    # attention weights
# A decoder level composes its upsampling and convolution if x has this many voxels per channel. The
# composed kernel costs 216 products per pair of channels and each voxel saves 8 x 19 of them, so
# that it takes 1.4 voxels per channel to save anything
LEAST_VOXELS_PER_CHANNEL = 8


def block_size(sizes: dict[str, int], device: torch.device) -> int:
    return sizes.get(device.type, sizes["cpu"])


def channels_last(x: Tensor) -> Tensor:
    """x in channels-last layout. `contiguous` does not set the strides of a single channel."""
    return torch.empty_like(x, memory_format=CHANNELS_LAST).copy_(x)


# ---- normalisation with exact statistics ---------------------------------------------------------
def _slabs(*tensors: Tensor):
    """Views (B, n, C) of channels-last tensors (B, C, D, H, W), slab by slab."""
    B, C = tensors[0].shape[:2]
    flat = [t.permute(0, 2, 3, 4, 1).reshape(B, -1, C) for t in tensors]
    step = max(1, block_size(NORM_BLOCK, tensors[0].device) // (B * C))
    return zip(*(t.split(step, 1) for t in flat), strict=True)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _exact_sum(slab: Tensor) -> Tensor:
    """(B, n, C) -> (B, C) float64: one long float32 sum is wrong in the fourth digit at 96^3."""
    parts = slab.unflatten(1, (math.gcd(slab.shape[1], 16), -1))               # (B, 16, n / 16, C)
    return parts.sum(2, dtype=_at_least_float32(slab.dtype)).double().sum(1)


def _mean_of_group(per_channel: Tensor, groups: int) -> Tensor:
    """(B, C) -> (B, C): every channel gets the mean of its group."""
    C = per_channel.shape[1]
    if groups == C:
        return per_channel
    return per_channel.unflatten(1, (groups, -1)).mean(2).repeat_interleave(C // groups, 1)


def _activation_backward(grad: Tensor, y: Tensor, slope: float) -> Tensor:
    """The gradient before a (leaky) ReLU whose output is y."""
    if slope == 0:
        return torch.ops.aten.threshold_backward(grad, y, 0)
    return torch.ops.aten.leaky_relu_backward(grad, y, slope, True)


class _NormAct(torch.autograd.Function):
    """Instance or group norm, affine, then (leaky) ReLU, on channels-last tensors.

    F.batch_norm and F.group_norm sum naively in float32; F.instance_norm copies channels-last
    input. Here the sums are exact and the tensor is read and written once each.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, groups, slope, eps, overwrite):
        x = x.contiguous(memory_format=CHANNELS_LAST)
        n, wide = x[0, 0].numel(), _at_least_float32(x.dtype)
        mean = power = 0
        for slab, in _slabs(x):
            mean = mean + _exact_sum(slab) / n
            power = power + _exact_sum(slab.to(wide).square()) / n
        mean, power = _mean_of_group(mean, groups), _mean_of_group(power, groups)
        rstd = ((power - mean.square()).clamp_min(0) + eps).rsqrt()            # (B, C) float64
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        scale, shift = scale[:, None].to(wide), shift[:, None].to(wide)        # (B, 1, C)
        y = x.detach() if overwrite else torch.empty_like(x)
        for slab, out in _slabs(x, y):
            part = torch.addcmul(shift, slab.to(wide), scale)
            if slope is not None:
                part = F.relu_(part) if slope == 0 else F.leaky_relu_(part, slope)
            out.copy_(part)
        if not overwrite:
            ctx.save_for_backward(x, y if slope is not None else None, weight, mean, rstd)
            ctx.groups, ctx.slope = groups, slope
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y, weight, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=CHANNELS_LAST)
        n, wide = x[0, 0].numel(), _at_least_float32(x.dtype)
        grad_x, centre = torch.empty_like(grad), mean[:, None].to(wide)
        grad_bias = grad_weight = 0                        # per scan and channel, (B, C) float64
        for slab, g, out, *act in _slabs(x, grad, grad_x, *([] if y is None else [y])):
            if act:
                g = _activation_backward(g, act[0], ctx.slope)
            out.copy_(g)
            grad_bias = grad_bias + _exact_sum(g)
            grad_weight = grad_weight + _exact_sum((slab.to(wide) - centre).mul_(g))
        grad_weight = grad_weight * rstd
        # dx = rstd (g w - mean(g w) - x_hat mean(g w x_hat)), written as grad scale + x by_x + rest
        gamma = 1 if weight is None else weight
        scale = rstd * gamma
        mean_g = _mean_of_group(grad_bias * gamma / n, ctx.groups)
        mean_gx = _mean_of_group(grad_weight * gamma / n, ctx.groups)
        by_x = -rstd.square() * mean_gx
        rest = -rstd * mean_g - by_x * mean
        scale, by_x, rest = (t[:, None].to(wide) for t in (scale, by_x, rest))
        for slab, out in _slabs(x, grad_x):
            out.copy_(torch.addcmul(rest, out.to(wide), scale).addcmul_(slab.to(wide), by_x))
        if weight is None:
            return grad_x, None, None, None, None, None, None
        grad_weight, grad_bias = (t.sum(0).to(weight.dtype) for t in (grad_weight, grad_bias))
        return grad_x, grad_weight, grad_bias, None, None, None, None


def norm_act(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *,
             groups: int | None = None, slope: float | None = 0.0, eps: float = 1e-5,
             overwrite: bool = False) -> Tensor:
    """Normalise x (B, C, D, H, W) over space and channel groups, then (leaky) ReLU.

    groups     None: instance norm
    slope      of the leaky ReLU; 0: ReLU; None: no activation
    overwrite  the caller does not need x any more. Without gradients the result then takes its
               memory, since a fresh tensor of 200 MB costs more than the arithmetic
    """
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias))
    return _NormAct.apply(x, weight, bias, groups or x.shape[1], slope, eps,
                          overwrite and not needs_gradient)


class FastGroupNormReLU(GroupNormReLU):
    """Exact statistics; norm and activation in one pass."""
    devices = ("cpu",)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in self.devices:
            return super().forward(x)
        return norm_act(x, self.weight, self.bias, groups=self.num_groups, eps=self.eps)


# ---- convolutions --------------------------------------------------------------------------------
SLOW_SINGLE_INPUT = 20_480     # C * D * H up to which PyTorch's CPU code picks its slow kernel


def padded_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution padded with half its kernel: 3x3x3 or 1x1x1, which keeps the size of its input,
    or 2x2x2, whose output has one more voxel along every axis.

    On the CPU, PyTorch falls back to a kernel up to 15 times slower for a single small input. Such
    an input goes as a batch of two overlapping halves: the same numbers.
    """
    (B, C, D, H, _), kernel = x.shape, weight.shape[2]
    p = kernel // 2
    weight = weight.contiguous(memory_format=CHANNELS_LAST)
    if x.device.type != "cpu" or B > 1 or C * D * H > SLOW_SINGLE_INPUT:
        return F.conv3d(x, weight, bias, padding=p)
    x = F.pad(x, (0, 0, 0, 0, p, p))
    planes = x.shape[2] - kernel + 1                           # of the output
    half = (planes + 1) // 2
    halves = torch.cat([x[:, :, :half + kernel - 1], x[:, :, planes - half:]])
    y = F.conv3d(halves.contiguous(memory_format=CHANNELS_LAST), weight, bias, padding=(0, p, p))
    first, second = y.split(1)
    return torch.cat([first, second[:, :, 2 * half - planes:]], 2)


def conv_beside(conv: Conv, x: Tensor, skip: Tensor) -> Tensor:
    """conv of x and a skip beside it, which are never concatenated."""
    of_x, of_skip = conv.weight.split((x.shape[1], skip.shape[1]), 1)
    return padded_conv(x, of_x, conv.bias).add_(padded_conv(skip, of_skip, None))


def upsampled_weight(up: UpConv, weight: Tensor) -> Tensor:
    """The 2x2x2 kernel that makes conv(up(x)) from x, (8 c_out, c_in, 2, 2, 2).

    weight  (c_out, c_up, 3, 3, 3), of the convolution

    Along one axis, input voxel i becomes voxels 2i and 2i + 1 (children 0 and 1) of up(x). Output
    voxel 2i is made from children 2i - 1, 2i, 2i + 1, so from input voxels i - 1 and i; output
    voxel 2i + 1 from i and i + 1. So either parity of the output is a convolution of x with a
    kernel of two taps, and both together are

        place 2 tap + parity of 4   0               1                2               3
        child 0 meets conv tap                      0                1               2
        child 1 meets conv tap      0               1                2

    A bias of `up` is the weight of one more input channel, which is 1 in all of x.
    """
    with torch.autocast(weight.device.type, enabled=False):
        of_up = up.weight.flatten(2).permute(1, 2, 0)                          # (c_up, 8, c_in)
        if up.bias is not None:
            of_up = torch.cat([of_up, up.bias[:, None, None].expand(-1, 8, 1)], 2)
        of_conv = weight.permute(2, 3, 4, 0, 1)                                # (3, 3, 3, o, c_up)
        products = of_conv.reshape(-1, len(of_up)) @ of_up.flatten(1)
    kernel = products.view(*of_conv.shape[:4], 2, 2, 2, -1)        # taps, c_out, children, c_in
    for axis in range(3):
        child_0, child_1 = kernel.unbind(4)
        before = (0, 0) * (child_0.dim() - 1 - axis)               # F.pad begins at the last axis
        kernel = F.pad(child_0, (*before, 1, 0)) + F.pad(child_1, (*before, 0, 1))
    c_out, c_in = kernel.shape[3:]
    kernel = kernel.view(2, 2, 2, 2, 2, 2, c_out, c_in)            # tap and parity of each axis
    kernel = kernel.permute(1, 3, 5, 6, 0, 2, 4, 7).reshape(8 * c_out, 2, 2, 2, c_in)
    return kernel.permute(0, 4, 1, 2, 3)


class _AddParities(torch.autograd.Function):
    """y (B, C, 2D, 2H, 2W) += the eight parities (B, 8 C, D + 1, H + 1, W + 1) of its voxels.

    Along an axis, an output voxel of parity 1 belongs to the place after that of parity 0.
    """

    @staticmethod
    def pairs(y: Tensor, parities: Tensor):
        """Of each parity, the view of y and the view of the parities that belong together."""
        B, C, D, H, W = y.shape
        fine = y.permute(0, 2, 3, 4, 1).view(B, D // 2, 2, H // 2, 2, W // 2, 2, C)
        coarse = parities.permute(0, 2, 3, 4, 1).unflatten(4, (2, 2, 2, C))
        for a, b, c in itertools.product((0, 1), repeat=3):
            at = coarse[:, a:a + D // 2, b:b + H // 2, c:c + W // 2, a, b, c]
            yield fine[:, :, a, :, b, :, c], at

    @staticmethod
    def forward(ctx, y, parities):
        for at, own in _AddParities.pairs(y, parities):
            at += own
        ctx.mark_dirty(y)
        ctx.size = parities.shape
        return y

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous(memory_format=CHANNELS_LAST)
        of_parities = channels_last(grad.new_zeros(1).expand(ctx.size))
        for at, own in _AddParities.pairs(grad, of_parities):
            own.copy_(at)
        return grad, of_parities


def conv_of_upsampled(conv: Conv, up: UpConv, x: Tensor, skip: Tensor) -> Tensor:
    """conv, 3x3x3, of up(x) and a skip beside it.

    On a large map up(x) is never made: upsampling and convolution are composed into one of eight
    2x2x2 kernels on x, which takes 8 products instead of 27 per output voxel and pair of channels.
    """
    if x[:, 0].numel() < LEAST_VOXELS_PER_CHANNEL * x.shape[1]:
        return conv_beside(conv, up(x), skip)
    of_x, of_skip = conv.weight.split((up.out_channels, skip.shape[1]), 1)
    y = padded_conv(skip, of_skip, conv.bias)
    if up.bias is not None:
        x = channels_last(torch.cat([x, x.new_ones(len(x), 1, *x.shape[2:])], 1))
    return _AddParities.apply(y, padded_conv(x, upsampled_weight(up, of_x), None))


class FastConv(Conv):
    """Avoids PyTorch's slow kernel for a single small input."""
    devices = ("cpu",)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in self.devices:
            return super().forward(x)
        return padded_conv(x, self.weight, self.bias)


def up_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 2x2x2 transposed convolution of stride 2, with weight (C, c_out, 2, 2, 2)."""
    B, C, D, H, W = x.shape
    weight = weight.permute(0, 2, 3, 4, 1).reshape(C, -1)                      # (C, 8 c_out)
    bias = None if bias is None else bias.repeat(8)
    tokens = x.permute(0, 2, 3, 4, 1).reshape(-1, C)                           # (B D H W, C)
    y = F.linear(tokens, weight.t(), bias).view(B, D, H, W, 2, 2, 2, -1)
    y = y.permute(0, 1, 4, 2, 5, 3, 6, 7)                                      # (B, D, 2, H, 2, ..)
    return y.reshape(B, 2 * D, 2 * H, 2 * W, -1).permute(0, 4, 1, 2, 3)


class FastUpConv(UpConv):
    """Every input voxel makes its own 2x2x2 block, so this is one matrix product and a reordering:
    faster than the general transposed convolution of a CPU."""
    devices = ("cpu",)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in self.devices:
            return super().forward(x)
        return up_conv(x, self.weight, self.bias)


# ---- U-Net ---------------------------------------------------------------------------------------
class FastConvNormReLU(ConvNormReLU):
    """Norm and activation in one pass; without gradients in the memory of the convolution."""
    devices = ("cpu",)

    def normalise(self, y: Tensor) -> Tensor:
        return norm_act(y, self.norm.weight, self.norm.bias, overwrite=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in self.devices:
            return super().forward(x)
        return self.normalise(self.conv(x))


class FastUNet(UNet):
    """Channels-last, without concatenations and large upsampled maps; pools in bf16 where autocast
    would go to float32."""
    devices = ("cpu",)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type not in self.devices:
            return super().forward(x)
        deep, x, skip = self.trunk(x)
        return deep, self.decode(self.up[-1], self.merge[-1], x, skip)

    # The two steps of forward on the CPU, which FastExtendedModel takes apart
    def decode(self, up: UpConv, merge: DoubleConv, x: Tensor, skip: Tensor) -> Tensor:
        """One level of the decoder."""
        def level(x, skip):
            y = conv_of_upsampled(merge[0].conv, up, x, skip)
            return merge[1](merge[0].normalise(y))
        return run_stage(level, x, skip, recompute=self.recompute)

    def trunk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All levels but the decoder's last: see ExtendedModel.trunk."""
        x, skips = channels_last(x), []
        for level, down in enumerate(self.down):
            if level > 0:
                with torch.autocast(x.device.type, enabled=False):
                    x = F.max_pool3d(x, 2)
            x = run_stage(down, x, recompute=self.recompute)
            skips.append(x)
        deep = x = skips.pop()
        for up, merge in zip(self.up[:-1], self.merge[:-1], strict=True):
            x = self.decode(up, merge, x, skips.pop())
        return deep, x, skips.pop()


# ---- Swin UNETR: attention -----------------------------------------------------------------------
class _Attention(torch.autograd.Function):
    """softmax(q k' / sqrt(c) + bias) v; q, k, v (n, heads, N, c), bias (heads, N, N),
    mask (windows, N, N) bool or None, True where nothing is to be seen.

    Fused kernels refuse a bias with a gradient. Nothing of size N x N is kept: the backward pass
    computes the weights again, a few windows at a time.
    """

    @staticmethod
    def blocks(q, bias, mask):
        """Which windows go together, and their bias: (m or 1, heads, N, N)."""
        step = max(1, block_size(ATTENTION_BLOCK, q.device) // bias.numel())
        for start in range(0, len(q), step):
            at = slice(start, min(start + step, len(q)))
            if mask is None:
                yield at, bias[None]
            else:
                window = torch.arange(at.start, at.stop, device=q.device) % len(mask)
                yield at, bias[None].masked_fill(mask[window][:, None], -math.inf)

    @staticmethod
    def forward(ctx, q, k, v, bias, mask):
        tensors = q, k, v, bias
        q, k, v, bias = (t.detach() for t in tensors)      # else PyTorch picks no fused kernel
        if mask is None:
            everywhere = bias[None].expand(len(q), -1, -1, -1)
            out = F.scaled_dot_product_attention(q, k, v, everywhere)
        else:
            parts = []
            for at, own in _Attention.blocks(q, bias, mask):
                own = own.expand(len(q[at]), -1, -1, -1)
                parts.append(F.scaled_dot_product_attention(q[at], k[at], v[at], own))
            out = torch.cat(parts)
        q, k, v, bias = tensors
        ctx.save_for_backward(q, k, v, out, bias, mask)
        return out

    @staticmethod
    def backward(ctx, grad):
        *each, bias, mask = ctx.saved_tensors
        each.append(grad)
        scale, grad_bias, parts = grad.shape[-1] ** -0.5, 0, []
        wide = _at_least_float32(grad.dtype)               # a long sum in bf16 is wrong
        for at, own in _Attention.blocks(each[0], bias, mask):
            q, k, v, out, g = (tensor[at] for tensor in each)
            q = q * scale
            p = (q @ k.transpose(-2, -1)).add_(own).softmax(-1)
            s = (g @ v.transpose(-2, -1)).sub_((g * out).sum(-1, keepdim=True)).mul_(p)
            grad_bias = grad_bias + s.sum(0, dtype=wide)
            parts.append((s @ k * scale, s.transpose(-2, -1) @ q, p.transpose(-2, -1) @ g))
        grad_q, grad_k, grad_v = (torch.cat(part) for part in zip(*parts, strict=True))
        return grad_q, grad_k, grad_v, grad_bias.to(bias.dtype), None


class FastWindowAttention(WindowAttention):
    """Keeps nothing of size N x N for the backward pass."""
    devices = ("cpu", "cuda")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.device.type not in self.devices:
            return super().attend(q, k, v, mask)
        bias = self.position_bias(q.shape[2]).to(q.dtype)
        return _Attention.apply(q, k, v, bias, mask)


@dataclass(frozen=True)
class WindowGroup:
    """Neighbouring windows along one axis that look alike: the same padding, the same wrapping."""
    tokens: slice                  # of the rolled axis, without padding
    windows: int                   # how many
    places: tuple[int, ...]        # of a window that hold a token; the others are padding
    wraps: bool                    # holds tokens from both ends of the axis


@lru_cache(64)
def window_groups(size: int, shifted: bool) -> list[WindowGroup]:
    """Group the windows along one axis by padding and shift, so that each group is one batch.

    48 tokens, shifted by 3, fill 7 windows of 7 with one place of padding: six whole windows, and
    one that holds tokens 45 ... 47, the padding, and tokens 0 ... 2, which were wrapped round.
    """
    (side,), (shift,) = window_and_shift((size,), shifted)
    count = -(-size // side)
    kinds = []
    for i in range(count):
        origins = [(i * side + place + shift) % (count * side) for place in range(side)]
        places = tuple(place for place, origin in enumerate(origins) if origin < size)
        kinds.append((places, shift > 0 and i == count - 1))
    groups, start = [], 0
    for (places, wraps), alike in itertools.groupby(kinds):
        windows = len(list(alike))
        stop = start + windows * len(places)
        groups.append(WindowGroup(slice(start, stop), windows, places, wraps))
        start = stop
    return groups


# In place of minus infinity between tokens that must not see each other: its exponential is as
# good as zero, but no denormal number as that of the released -100, which costs six times more
HIDDEN = -80.0


@lru_cache(256)
def window_layout(window: tuple, places: tuple, wraps: tuple):
    """Of a window of N places, as NumPy arrays (a cached tensor would outlive its mode or device):
    those that hold a token, those of padding, and what is added to the scores (N, N) or None."""
    grid = np.stack(np.meshgrid(*map(np.arange, window), indexing="ij"), -1).reshape(-1, 3)
    filled = np.all([np.isin(grid[:, axis], places[axis]) for axis in range(3)], 0)
    wrapped = np.zeros_like(grid, bool)
    for axis in range(3):
        if wraps[axis]:
            wrapped[:, axis] = grid[:, axis] >= window[axis] - WINDOW // 2
    hidden = (wrapped[:, None] != wrapped[None]).any(-1)
    added = np.where(hidden, np.float32(HIDDEN), np.float32(0)) if any(wraps) else None
    return np.flatnonzero(filled), np.flatnonzero(~filled), added


class FastSwinBlock(SwinBlock):
    """No padding and no mask per window: windows that look alike are one batch, and all padding,
    which is one and the same token, is a single key whose weights are summed."""
    devices = ("cpu",)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in self.devices:
            return super().forward(x)
        x = x + self.grouped_attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def grouped_attention(self, x: Tensor) -> Tensor:
        """Window attention of all tokens, group by group: (B, D, H, W, C) -> the same shape."""
        C, size = x.shape[-1], x.shape[1:4]
        window, shift = window_and_shift(size, self.shifted)
        if any(shift):
            x = x.roll([-s for s in shift], (1, 2, 3))
        qkv = self.attn.qkv(x)                                                 # (B, D, H, W, 3C)
        bias = self.attn.position_bias(math.prod(window)).contiguous()         # (heads, N, N)
        out = torch.empty_like(qkv[..., :C])
        for group in itertools.product(*(window_groups(n, self.shifted) for n in size)):
            at = (slice(None), *(g.tokens for g in group))
            out[at] = self.attend_group(qkv[at], bias, window, group)
        x = self.attn.proj(out)
        if any(shift):
            x = x.roll(shift, (1, 2, 3))
        return x

    def attend_group(self, qkv: Tensor, bias: Tensor, window, group) -> Tensor:
        """Attention of the windows of one group: qkv (B, d, h, w, 3C) -> (B, d, h, w, C)."""
        heads, B, size = self.attn.heads, len(qkv), qkv.shape[1:4]
        c = qkv.shape[-1] // (3 * heads)
        filled, padding, added = window_layout(window, tuple(g.places for g in group),
                                               tuple(g.wraps for g in group))
        split = [(g.windows, len(g.places)) for g in group]    # windows, then tokens of a window
        qkv = qkv.reshape(B, *split[0], *split[1], *split[2], 3, heads, c)
        qkv = qkv.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)
        q, k, v = qkv.flatten(1, 4).flatten(3, 5)                              # (n, heads, N', c)
        if added is not None:
            bias = bias + torch.from_numpy(added).to(bias)
        if len(padding):
            bias, k, v = self.with_padding_as_one_key(bias, k, v, filled, padding)
        y = _Attention.apply(q, k, v, bias.to(q.dtype), None)
        windows, tokens = zip(*split, strict=True)
        y = y.view(B, *windows, heads, *tokens, c)
        return y.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(B, *size, heads * c)

    def with_padding_as_one_key(self, bias, k, v, filled, padding):
        """bias (heads, N', N' + 1), k and v (n, heads, N' + 1, c): the last key is all padding.

        Tokens of padding are zero, so their key and value are the biases of `qkv`. A key that
        occurs m times with biases b_i weighs as much as once with logsumexp(b_i).
        """
        filled, padding = (torch.from_numpy(i).to(k.device) for i in (filled, padding))
        bias = bias.index_select(1, filled)
        of_padding = bias.index_select(2, padding).logsumexp(2, keepdim=True)
        bias = torch.cat([bias.index_select(2, filled), of_padding], 2)
        n, heads, _, c = k.shape
        _, key, value = self.attn.qkv.bias.to(k.dtype).view(3, 1, heads, 1, c)
        k = torch.cat([k, key.expand(n, -1, -1, -1)], 2)
        v = torch.cat([v, value.expand(n, -1, -1, -1)], 2)
        return bias, k, v


# ---- Swin UNETR: the network ---------------------------------------------------------------------
class FastResBlock(ResBlock):
    """Exact statistics, norm and activation in one pass."""
    devices = ("cpu",)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in self.devices:
            return super().forward(x)
        shortcut = None if self.conv3 is None else self.conv3(x)
        return self.finish(x, self.conv1(x), shortcut)

    def merge(self, up: UpConv, x: Tensor, skip: Tensor) -> Tensor:
        """The block for up(x), where `up` has no bias, and a skip beside it, on the CPU."""
        of_x, of_skip = self.conv3.weight.split((up.out_channels, skip.shape[1]), 1)
        of_x = torch.einsum("iudhw,ou->iodhw", up.weight, of_x.flatten(1))     # (c_in, c_out, 2...)
        shortcut = up_conv(x, of_x, None).add_(padded_conv(skip, of_skip, None))
        return self.finish(None, conv_of_upsampled(self.conv1, up, x, skip), shortcut)

    def finish(self, x: Tensor | None, y: Tensor, shortcut: Tensor | None) -> Tensor:
        """From conv1's output y and conv3's, or the input x where there is no conv3."""
        y = norm_act(y, slope=0.01, overwrite=True)
        y = norm_act(self.conv2(y), slope=None, overwrite=True)
        if shortcut is not None:
            x = norm_act(shortcut, slope=None, overwrite=True)
        return F.leaky_relu(y + x, 0.01)


class FastSwinUNETR(SwinUNETR):
    """Channels-last, without concatenations and large upsampled maps."""
    devices = ("cpu",)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.device.type not in self.devices:
            return super().forward(x)
        deep, x, skip = self.trunk(x)
        return deep, self.decode(self.up[-1], self.dec[-1], x, skip)

    # The two steps of forward on the CPU, which FastExtendedModel takes apart
    def decode(self, up: UpConv, dec: ResBlock, x: Tensor, skip: Tensor) -> Tensor:
        """One level of the decoder."""
        return run_stage(dec.merge, up, x, skip, recompute=self.recompute)

    def trunk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All levels but the decoder's last: see ExtendedModel.trunk."""
        x = channels_last(x)
        hidden = self.encode(x)
        skips = [run_stage(enc, h, recompute=self.recompute)
                 for enc, h in zip(self.enc, [x, *hidden[:3]], strict=True)]
        skips.append(hidden[3])
        deep = x = self.bottom(hidden[4])
        for up, dec in zip(self.up[:-1], self.dec[:-1], strict=True):
            x = self.decode(up, dec, x, skips.pop())
        return deep, x, skips.pop()


# ---- heads ---------------------------------------------------------------------------------------
class _Heads(torch.autograd.Function):
    """The heads of one scan: feat (8, N), theta (K, 153) -> logits (K, N).

    Blocks of voxels fit the cache, and the feature map is never repeated K times. Only input and
    output are kept; the backward pass computes the hidden layers of a block again.
    """

    @staticmethod
    def hidden(feat, theta, more: int = 0):
        """Block by block: the slice of its voxels, h1 and h2 (K, 8, n), and `more` tensors of that
        shape to work in. All blocks share one piece of memory: a fresh one costs more."""
        (w1, w2, _), (b1, b2, _) = split_theta(theta)
        w1, w2 = w1.contiguous(), w2.contiguous()
        K, N = len(theta), feat.shape[1]
        size = max(1, block_size(HEAD_BLOCK, feat.device) // K)
        memory = feat.new_empty(2 + more, K * 8 * min(size, N))
        for start in range(0, N, size):
            x = feat[:, start:start + size]
            h1, h2, *rest = memory[:, :K * 8 * x.shape[1]].view(2 + more, K, 8, -1)
            if x.dtype == torch.float32:                   # each dtype has its faster form
                torch.baddbmm(b1[..., None], w1, x.expand(K, -1, -1), out=h1).relu_()
            else:
                torch.addmm(b1.reshape(-1, 1), w1.flatten(0, 1), x, out=h1.flatten(0, 1)).relu_()
            torch.baddbmm(b2[..., None], w2, h1, out=h2).relu_()
            yield slice(start, start + size), h1, h2, *rest

    @staticmethod
    def forward(ctx, feat, theta):
        (_, _, w3), (_, _, b3) = split_theta(theta)
        out, w3 = feat.new_empty(len(theta), feat.shape[1]), w3.contiguous()
        for at, _, h2 in _Heads.hidden(feat, theta):
            out[:, at] = torch.baddbmm(b3[..., None], w3, h2)[:, 0]
        ctx.save_for_backward(feat, theta)
        return out

    @staticmethod
    def backward(ctx, grad):
        feat, theta = ctx.saved_tensors
        (w1, w2, w3), _ = split_theta(theta)
        back = torch.ops.aten.threshold_backward.grad_input                    # of ReLU
        grad_feat = torch.empty_like(feat, memory_format=torch.contiguous_format)
        grad_theta, wide = 0, _at_least_float32(grad.dtype)
        for at, h1, h2, g1, g2 in _Heads.hidden(feat, theta, more=2):
            x, g = feat[:, at], grad[:, at]
            back(torch.mul(w3.transpose(1, 2), g[:, None], out=g2), h2, 0, grad_input=g2)
            back(torch.bmm(w2.transpose(1, 2), g2, out=g1), h1, 0, grad_input=g1)
            parts = [(g1.flatten(0, 1) @ x.t()).view(len(theta), -1),          # weights: 64
                     (g2 @ h1.transpose(1, 2)).flatten(1),                     # 64
                     (h2 @ g[..., None]).flatten(1),                           # 8
                     g1.sum(2), g2.sum(2), g.sum(1, keepdim=True)]             # biases: 8, 8, 1
            grad_theta = grad_theta + torch.cat(parts, 1).to(wide)             # (K, 153)
            grad_feat[:, at] = w1.flatten(0, 1).t() @ g1.flatten(0, 1)
        return grad_feat, grad_theta.to(theta.dtype)


class FastUniversalModel(UniversalModel):
    """Heads in blocks of voxels."""
    devices = ("cpu", "cuda")

    def heads(self, feat: Tensor, theta: Tensor) -> Tensor:
        if feat.device.type not in self.devices:
            return super().heads(feat, theta)
        (B, _, *size), K = feat.shape, theta.shape[1]
        voxels = feat.permute(0, 2, 3, 4, 1).reshape(B, -1, HEAD[0])           # (B, N, 8)
        logits = [_Heads.apply(scan.t(), own)
                  for scan, own in zip(voxels, theta.to(feat.dtype), strict=True)]
        logits = logits[0][None] if B == 1 else torch.stack(logits)            # (B, K, N)
        return logits.view(B, K, *size)


class FastExtendedModel(FastUniversalModel, ExtendedModel):
    """The two steps of the fast backbones, heads in blocks."""

    def trunk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.device.type not in FastUNet.devices:
            return super().trunk(x)
        return self.backbone.trunk(x)

    def decode(self, level, x: Tensor, skip: Tensor) -> Tensor:
        if x.device.type not in FastUNet.devices:
            return super().decode(level, x, skip)
        return self.backbone.decode(*level, x, skip)


# ---- swapping ------------------------------------------------------------------------------------
FAST = {
    Conv: FastConv,
    UpConv: FastUpConv,
    GroupNormReLU: FastGroupNormReLU,
    ConvNormReLU: FastConvNormReLU,
    UNet: FastUNet,
    WindowAttention: FastWindowAttention,
    SwinBlock: FastSwinBlock,
    ResBlock: FastResBlock,
    SwinUNETR: FastSwinUNETR,
    UniversalModel: FastUniversalModel,
    ExtendedModel: FastExtendedModel,
}


def accelerate(model: nn.Module) -> nn.Module:
    """Swap the classes of a model's modules for their fast equivalents, in place.

    On the CPU the weights are laid out channels-last as well, so move the model to its device
    before, and make the optimiser and DistributedDataParallel afterwards.
    """
    for module in model.modules():
        module.__class__ = FAST.get(type(module), type(module))
    if all(p.device.type in FastUNet.devices for p in model.parameters()):
        model.to(memory_format=CHANNELS_LAST)
    return model
