"""New classes beside a frozen model (the 2024 extension of the method): `train.py --extend`.

All weights of the model are frozen. The head of every new class comes from a two-layer MLP of its
own instead of the shared controller. The decoder feature of a model does not separate structures
that it was never trained on, so the new classes also get a copy of the decoder's last level and of
the reduction, which is trained for them (ours; the extension has the MLPs only).

B batch   K classes   C channels   D, H, W voxels   E text width (512)
"""
from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import model
from model import IMAGE_DIM, THETA_DIM, SwinUNETR, UNet, UniversalModel, run_stage


class ClassControllers(nn.Module):
    """theta_k = MLP_k(concat(f, w_k)): one MLP for each of n classes.

    w_new    (n, E)           text embeddings of the n classes
    w        (K, E)           some of these rows, in any order; f (B, 256)
    returns  theta (B, K, 153); NaN for an embedding that is none of the n rows
    """

    def __init__(self, w_new: Tensor, *, hidden: int = 512):
        super().__init__()
        n, width = len(w_new), IMAGE_DIM + w_new.shape[1]
        self.register_buffer("w_new", w_new.clone())
        # The layers of all n MLPs are stacked in one tensor each
        self.w1 = nn.Parameter(torch.randn(n, width, hidden) * math.sqrt(2 / width))
        self.b1 = nn.Parameter(torch.zeros(n, 1, hidden))
        self.w2 = nn.Parameter(torch.randn(n, hidden, THETA_DIM) / hidden)
        self.b2 = nn.Parameter(torch.zeros(n, 1, THETA_DIM))
        for k in range(n):
            model.initialise_theta(self.b2[k, 0])      # w2 is small: every head starts near b2

    def forward(self, w: Tensor, f: Tensor) -> Tensor:
        n, B = len(self.w_new), len(f)
        image = f[None].expand(n, B, -1)                               # (n, B, 256)
        text = self.w_new[:, None].expand(n, B, -1)                    # (n, B, E)
        x = torch.cat([image, text], 2)
        x = F.relu(torch.baddbmm(self.b1, x, self.w1))                 # (n, B, 512)
        theta = torch.baddbmm(self.b2, x, self.w2)                     # (n, B, 153)
        equal = (w[:, None] == self.w_new).all(2)                      # (K, n)
        theta = theta[equal.int().argmax(1)].transpose(0, 1)           # (B, K, 153)
        return theta.masked_fill(~equal.any(1)[:, None], math.nan)


class Extension(nn.Module):
    """What the classes of one extension have for themselves, under the names that the model itself
    has for it; last_level is a method of `ExtendedModel` that returns two modules."""

    def __init__(self, extended: ExtendedModel, w_new: Tensor):
        super().__init__()
        self.level = nn.ModuleList(copy.deepcopy(part) for part in extended.last_level())
        self.reduce_norm = copy.deepcopy(extended.reduce_norm)
        self.reduce = copy.deepcopy(extended.reduce)
        self.controller = ClassControllers(w_new)

    def last_level(self) -> tuple[nn.Module, nn.Module]:
        return tuple(self.level)


class ExtendedModel(UniversalModel):
    """A frozen model and its extensions, each with classes of its own: made by `extend`.

    A class is computed by the part of the model that knows its text embedding. Old and new classes
    share no operation behind the last but one level of the decoder, so the logits of the old ones
    are bit for bit those of the model before.

    In training mode, all classes must be of the newest extension, since no other part has weights
    to train; the logits of another class are NaN. In evaluation mode, the part of every class is
    looked up, for which the CPU waits for a GPU.
    """

    def __init__(self, first: UniversalModel):
        nn.Module.__init__(self)               # the parts are those of `first`, not new ones
        for name, part in first.named_children():
            setattr(self, name, part)
        self.extensions = nn.ModuleList()
        self.train(first.training)

    def last_level(self) -> tuple[nn.Module, nn.Module]:
        """The upsampling and the convolutions of the last level of the decoder."""
        net = self.backbone
        return net.up[-1], (net.merge if isinstance(net, UNet) else net.dec)[-1]

    # The backbone's forward in two steps, which fast.py replaces
    def trunk(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, 1, D, H, W) -> deep, and the input of the decoder's last level: a map of half the
        sides and a skip of the sides of x."""
        steps = unet_trunk if isinstance(self.backbone, UNet) else swin_unetr_trunk
        return steps(self.backbone, x)

    def decode(self, level, x: Tensor, skip: Tensor) -> Tensor:
        """The last level of the decoder -> fine (B, C, D, H, W)."""
        return decode(self.backbone, *level, x, skip)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, 1, D, H, W), w (K, E) -> logits (B, K, D, H, W)."""
        model.check_size(x.shape[2:], self.backbone)
        newest = torch.full((len(w),), len(self.extensions))
        owner = newest if self.training else owner_of(self, w)         # (K,)
        deep, coarse, skip = self.trunk(x)
        f = self.pool(self.pool_norm(deep).mean((2, 3, 4)))            # (B, 256)
        logits, classes = [], []
        for i in owner.unique().tolist():
            own = torch.nonzero(owner == i)[:, 0]                      # (k,) classes of part i
            source = (self, *self.extensions)[i]
            theta = source.controller(w[own], f)                       # (B, k, 153)
            fine = self.decode(source.last_level(), coarse, skip)      # (B, C, D, H, W)
            feat = source.reduce(source.reduce_norm(fine))             # (B, 8, D, H, W)
            logits.append(self.heads(feat, theta))                     # (B, k, D, H, W)
            classes.append(own)
        if len(logits) == 1:
            return logits[0]
        order = torch.cat(classes).argsort()
        return torch.cat(logits, 1)[:, order]                          # in the order of w


# ---- the backbones' forward, up to the last level of the decoder ---------------------------------
def decode(net, up: nn.Module, merge: nn.Module, x: Tensor, skip: Tensor) -> Tensor:
    """One level of the decoder: x, of half the skip's sides -> a map of the skip's sides."""
    x = torch.cat([up(x), skip], 1)                        # upsampled first, then the skip
    return run_stage(merge, x, recompute=net.recompute)


def unet_trunk(net: UNet, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> deep (B, 8 C, D/8, ...), x (B, 2 C, D/2, ...), skip (B, C, D, ...), with C = width."""
    skips = []
    for level, down in enumerate(net.down):
        if level > 0:
            x = F.max_pool3d(x, 2)
        x = run_stage(down, x, recompute=net.recompute)
        skips.append(x)
    deep = x = skips.pop()
    for up, merge in zip(net.up[:-1], net.merge[:-1], strict=True):
        x = decode(net, up, merge, x, skips.pop())
    return deep, x, skips.pop()


def swin_unetr_trunk(net: SwinUNETR, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> deep (B, 16 C, D/32, ...), x (B, C, D/2, ...), skip (B, C, D, ...)."""
    hidden = net.encode(x)
    skips = [run_stage(enc, h, recompute=net.recompute)
             for enc, h in zip(net.enc, [x, *hidden[:3]], strict=True)]
    skips.append(hidden[3])
    deep = x = net.bottom(hidden[4])
    for up, dec in zip(net.up[:-1], net.dec[:-1], strict=True):
        x = decode(net, up, dec, x, skips.pop())
    return deep, x, skips.pop()


# ---- making and loading --------------------------------------------------------------------------
def extend(network: UniversalModel, w_new: Tensor) -> ExtendedModel:
    """The network with new classes, given by their text embeddings (n, E): an extension for them is
    added and everything else is frozen. The network's own parts are used, not copied.

    raises ValueError  if the backbone is neither UNet nor SwinUNETR
    """
    if not isinstance(network.backbone, UNet | SwinUNETR):
        raise ValueError("only a UNet or a SwinUNETR can be extended, this backbone is "
                         f"{type(network.backbone).__name__}")
    if not isinstance(network, ExtendedModel):
        network = ExtendedModel(network)
    network.requires_grad_(False)
    network.extensions.append(Extension(network, w_new.cpu()).requires_grad_())
    return network.to(network.pool.weight.device)


def build_model(spec: dict) -> UniversalModel:
    """As model.build_model. With "extensions": [n, ...] in the spec, extensions of n classes each
    are added, whose text embeddings are zero until a state dict is loaded."""
    spec = dict(spec)
    extensions = spec.pop("extensions", [])
    network = model.build_model(spec)
    for n in extensions:
        network = extend(network, torch.zeros(n, spec["text_dim"]))
    return network


def owner_of(network: UniversalModel, w: Tensor) -> Tensor:
    """w (K, E) -> (K,) int, on the CPU: the part of the network that computes each class, 0 for the
    first model and i for extension i."""
    owner = torch.zeros(len(w), dtype=torch.long, device=w.device)
    for i, extension in enumerate(getattr(network, "extensions", ()), 1):
        known = (w[:, None] == extension.controller.w_new).all(2).any(1)       # (K,)
        owner = torch.where(known, i, owner)
    return owner.cpu()
