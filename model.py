"""The network (paper, Sec. 3.2): a backbone, a text branch, one small generated head per class.

A class is a row of w, the CLIP embedding of its prompt. Together with the scan's global feature f
it generates the 153 numbers theta_k of a three-layer head that turns the decoder feature into P_k.
Needs torch only. Every piece is exact with respect to the released weights (see `load_released`).

B batch   K classes   C channels   G groups   D, H, W voxels   E text width (512)
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

HEAD = (8, 8, 8, 1)                # channels of the generated head, input first
SIDE_STEP, SIDE_MIN = 32, 64       # sides of a window: multiples of 32 and at least 64
_CL = torch.channels_last_3d


# ---- normalisation -----------------------------------------------------------------------------
def _statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (B, C) each, of every group of channels, repeated per channel.

    Sums are taken in slabs of the channels-last view and combined in float64: one long float32 sum
    (what F.batch_norm and F.group_norm do) is wrong in the fourth digit at 96^3.
    """
    B, C = x.shape[:2]
    rows = x.permute(0, 2, 3, 4, 1).reshape(B, -1, C)                  # (B, N, C), a view
    total, power = [], []
    for slab in rows.split(max(1, (1 << 18) // C), 1):                 # its square fits the cache
        parts = slab.unflatten(1, (math.gcd(slab.shape[1], 16), -1))   # (B, 16, n, C)
        total.append(parts.sum(2, dtype=torch.float32).double().sum(1))
        power.append(parts.float().square().sum(2).double().sum(1))
    mean, power = (torch.stack(t).sum(0) / rows.shape[1] for t in (total, power))      # (B, C)
    if groups != C:
        mean, power = (s.unflatten(1, (groups, -1)).mean(2).repeat_interleave(C // groups, 1)
                       for s in (mean, power))
    return mean, (power - mean.square()).clamp_min_(0)


class _NormAct(torch.autograd.Function):
    """Instance or group norm, affine, then (leaky) ReLU, in one pass and channels-last."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, slope, eps, inplace):
        x = x.contiguous(memory_format=_CL)
        mean, var = _statistics(x, groups)
        rstd = (var + eps).rsqrt()
        scale = rstd if weight is None else rstd * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        scale, shift = (s[..., None, None, None].float() for s in (scale, shift))
        if inplace:
            y = torch.addcmul(shift, x, scale, out=x) if x.dtype == scale.dtype else \
                x.mul_(scale).add_(shift)
        else:
            y = torch.addcmul(shift, x, scale).to(x.dtype)
        if slope is not None:
            y = F.relu_(y) if slope == 0 else F.leaky_relu_(y, slope)
        if not inplace:
            ctx.save_for_backward(x, y if slope is not None else None, weight,
                                  mean.float(), rstd.float())
            ctx.groups, ctx.slope, ctx.eps = groups, slope, eps
        return y

    @staticmethod
    def backward(ctx, grad):
        x, y, weight, mean, rstd = ctx.saved_tensors
        (B, C), G = x.shape[:2], ctx.groups
        grad = grad.contiguous(memory_format=_CL)
        if ctx.slope is not None:
            grad = torch.ops.aten.threshold_backward(grad, y, 0) if ctx.slope == 0 else \
                torch.ops.aten.leaky_relu_backward(grad, y, ctx.slope, True)
        want = [ctx.needs_input_grad[0], weight is not None, weight is not None]
        if G == C:
            parts = [torch.ops.aten.native_batch_norm_backward(
                grad[b:b + 1], x[b:b + 1], weight, None, None, mean[b], rstd[b], True, ctx.eps,
                want) for b in range(B)]
            gx, gw, gb = zip(*parts, strict=True)
            gx = None if gx[0] is None else gx[0] if B == 1 else torch.cat(gx)
            gw, gb = (None if g[0] is None else sum(g) for g in (gw, gb))
        else:
            gx, gw, gb = torch.ops.aten.native_group_norm_backward(
                grad, x, mean[:, ::C // G].contiguous(), rstd[:, ::C // G].contiguous(), weight,
                B, C, x[0, 0].numel(), G, want)
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


# ---- U-Net -------------------------------------------------------------------------------------
class ConvNormReLU(nn.Module):
    """3x3x3 convolution, instance norm, ReLU.

    The release has batch norm that uses the batch's own statistics also in evaluation; with one
    window at a time that is instance norm, and here a window never depends on its neighbours.
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, 3, padding=1)
        self.norm = nn.InstanceNorm3d(c_out, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return norm_act(self.conv(x), self.norm.weight, self.norm.bias)


class UNet(nn.Module):
    """3D U-Net with three poolings; `width` is the channel count of the decoder feature.

    x (B, 1, D, H, W)  ->  deep (B, 8 * width, D/8, H/8, W/8),  fine (B, width, D, H, W)
    """

    def __init__(self, *, width: int = 64):
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        c = [width // 2, width, 2 * width, 4 * width, 8 * width]
        self.deep_channels, self.fine_channels = c[4], c[1]
        self.down = nn.ModuleList(
            nn.Sequential(ConvNormReLU(c_in, c[i]), ConvNormReLU(c[i], c[i + 1]))
            for i, c_in in enumerate([1, c[1], c[2], c[3]]))
        self.up = nn.ModuleList(nn.ConvTranspose3d(c[i], c[i], 2, 2) for i in (4, 3, 2))
        self.merge = nn.ModuleList(
            nn.Sequential(ConvNormReLU(c[i] + c[i - 1], c[i - 1]), ConvNormReLU(c[i - 1], c[i - 1]))
            for i in (4, 3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skips = []
        for i, down in enumerate(self.down):
            x = down(F.max_pool3d(x, 2) if i else x)      # (B, 2^i width, D/2^i, H/2^i, W/2^i)
            skips.append(x)
        deep = skips.pop()                                # (B, 8 width, D/8, H/8, W/8)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return deep, x                                    # x (B, width, D, H, W)


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


def split_theta(theta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """theta (K, 153) -> weights (K, 8, 8), (K, 8, 8), (K, 1, 8) and biases (K, 8), (K, 8), (K, 1).

    As released: all weights first, then all biases; a weight is (out, in).
    """
    shapes = list(zip(HEAD[1:], HEAD, strict=False))
    parts = theta.split([o * i for o, i in shapes] + [o for o, _ in shapes], dim=1)
    return [p.unflatten(1, s) for p, s in zip(parts, shapes, strict=False)], list(parts[3:])


def _heads(feat: Tensor, theta: Tensor) -> Tensor:
    """feat (8, n), theta (K, 153) -> logits (K, n). Layer 1 is one product 8 -> 8K."""
    (w1, w2, w3), (b1, b2, b3) = split_theta(theta)
    K = len(theta)
    h = torch.addmm(b1.reshape(-1, 1), w1.flatten(0, 1), feat).relu_()         # (8K, n)
    h = torch.baddbmm(b2[..., None], w2, h.view(K, 8, -1)).relu_()             # (K, 8, n)
    return torch.baddbmm(b3[..., None], w3, h)[:, 0]                           # (K, n)


def apply_heads(feat: Tensor, theta: Tensor, *, block: int | None = None) -> Tensor:
    """Three 1x1x1 convolutions per class, ReLU between them.

    feat     (B, 8, D, H, W)   theta (B, K, 153)
    returns  (B, K, D, H, W)   logits

    Works on blocks of voxels that fit the cache and never repeats the feature map K times; with
    gradients a block's inner values are computed again in backward instead of being stored.
    """
    (B, _, *size), K = feat.shape, theta.shape[1]
    rows = feat.permute(0, 2, 3, 4, 1).reshape(B, -1, HEAD[0])                 # (B, N, 8)
    theta = theta.to(rows.dtype)
    N = rows.shape[1]
    if torch.is_grad_enabled() and (feat.requires_grad or theta.requires_grad):
        block = block or 1 << 16
        out = [torch.cat([checkpoint(_heads, part.t(), t, use_reentrant=False)
                          for part in r.split(block)], 1)
               for r, t in zip(rows, theta, strict=True)]
        return torch.stack(out).view(B, K, *size)
    block = block or max(1024, (1 << 16) // K)
    out = rows.new_empty(B, K, N)
    for b in range(B):
        for i in range(0, N, block):
            out[b, :, i:i + block] = _heads(rows[b, i:i + block].t(), theta[b])
    return out.view(B, K, *size)


class UniversalModel(nn.Module):
    """Backbone, pooling branch, text-driven controller, dynamic heads (paper, Fig. 2).

    backbone  a module with deep_channels and fine_channels that returns (deep, fine)
    text_dim  E, the width of a text row
    """

    def __init__(self, backbone: nn.Module, text_dim: int = 512):
        super().__init__()
        self.backbone = backbone
        deep, fine = backbone.deep_channels, backbone.fine_channels
        self.pool_norm, self.pool = GroupNormReLU(deep), nn.Linear(deep, 256)
        self.controller = Controller(text_dim=text_dim)
        self.reduce_norm, self.reduce = GroupNormReLU(fine), nn.Conv3d(fine, HEAD[0], 1)
        self.to(memory_format=_CL)

    def theta(self, deep: Tensor, w: Tensor) -> Tensor:
        """deep (B, C, D/s, H/s, W/s), w (K, E) -> theta (B, K, 153)."""
        if not torch.is_grad_enabled():
            deep = deep.clone()                            # the norm overwrites; callers keep deep
        f = self.pool(self.pool_norm(deep).mean((2, 3, 4)))            # (B, 256)
        return self.controller(w, f)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        check_side(x.shape[2:])
        deep, fine = self.backbone(x.contiguous(memory_format=_CL))
        theta = self.theta(deep, w)                        # (B, K, 153)
        feat = self.reduce(self.reduce_norm(fine))         # (B, 8, D, H, W)
        return apply_heads(feat, theta)                    # (B, K, D, H, W) logits


def check_side(size) -> None:
    """raises ValueError  unless every side is a multiple of 32 and at least 64."""
    if any(s % SIDE_STEP or s < SIDE_MIN for s in size):
        raise ValueError(f"window sides must be multiples of {SIDE_STEP} and at least {SIDE_MIN}, "
                         f"got {tuple(size)}")


# ---- checkpoints -------------------------------------------------------------------------------
FORMAT = "universal-model/1"


def build_model(spec: dict) -> UniversalModel:
    """{"backbone": "unet", "width": 64, "text_dim": 512} -> an untrained model."""
    spec = dict(spec)
    backbone, text_dim = spec.pop("backbone"), spec.pop("text_dim")
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {sorted(BACKBONES)}, got {backbone!r}")
    return UniversalModel(BACKBONES[backbone](**spec), text_dim)


BACKBONES = {"unet": UNet}


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
    """Our own checkpoint -> (model in eval mode, w (K, E), the rest of its content)."""
    content = read_checkpoint(path)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of train.py (format "
                         f"{content.get('format')!r}, expected {FORMAT!r})")
    model = build_model(content["spec"])
    try:
        model.load_state_dict(content.pop("model"))
    except RuntimeError as e:
        raise ValueError(f"{path}: weights do not fit the model it names: {e}") from None
    return model.eval(), content["w"], content
