"""The released networks and CLIP's text encoder as far as outputs are stored in release.json: the
names and shapes of their parameters, and the numbers that fill them.

The stored outputs are those of the authors' code and of OpenAI's, float32 on a CPU, for weights and
an input that are filled from a seed. Anyone can fill the same weights and compare.
"""
import json
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

import model

OUTPUTS = json.loads(Path(__file__).with_name("release.json").read_text(encoding="utf-8"))


# ---- the recipe ----------------------------------------------------------------------------------
def noise(name: str, count: int, seed: int) -> np.ndarray:
    """Normally distributed numbers that depend on a name and a seed only (NumPy's frozen
    RandomState)."""
    stream = np.random.RandomState((crc32(name.encode()) + 7919 * seed) % 2**32)
    return stream.standard_normal(count)


def fill(shapes: dict[str, tuple], seed: int) -> dict[str, torch.Tensor]:
    """{name: shape} -> {name: float32 tensor}, every number another one."""
    state = {}
    for name, shape in shapes.items():
        z = noise(name, int(np.prod(shape)), seed)
        if name.endswith("running_var"):
            value = np.exp(0.1 * z)
        elif name.endswith(("organ_embedding", "relative_position_bias_table")):
            value = 0.5 * z
        elif name.endswith(("token_embedding.weight", "positional_embedding")):
            value = 0.02 * z
        elif len(shape) <= 1:
            value = 1.0 + 0.1 * z if name.endswith("weight") else 0.1 * z
        else:
            value = z / np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(np.asarray(value, dtype=np.float32).reshape(shape))
    return state


def volume(shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    """(D, H, W) -> (1, 1, D, H, W) float32 in 0..1, different along every axis."""
    d, h, w = np.meshgrid(*[np.arange(side, dtype=np.float64) for side in shape], indexing="ij")
    v = np.sin(0.11 * d + 0.31 * seed) * np.cos(0.07 * h + 0.3) + 0.6 * np.sin(0.05 * w + 0.02 * d)
    v = v + 0.5 * noise("volume", int(np.prod(shape)), seed).reshape(shape)
    v = (v - v.min()) / (v.max() - v.min())
    return torch.from_numpy(v.astype(np.float32))[None, None]


# ---- names and shapes of the parameters ----------------------------------------------------------
def linear(name: str, out: int, into: int) -> dict[str, tuple]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, channels: int) -> dict[str, tuple]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def conv(name: str, out: int, into: int, side: int, bias: bool = True) -> dict[str, tuple]:
    shapes = {f"{name}.weight": (out, into, side, side, side)}
    if bias:
        shapes[f"{name}.bias"] = (out,)
    return shapes


def double_conv(name: str, into: int, middle: int, out: int) -> dict[str, tuple]:
    """The two convolutions with batch norm of one level of the released U-Net."""
    shapes = {}
    for i, (c_in, c_out) in enumerate(((into, middle), (middle, out))):
        shapes |= conv(f"{name}.ops.{i}.conv1", c_out, c_in, 3)
        shapes |= norm(f"{name}.ops.{i}.bn1", c_out)
        shapes |= {f"{name}.ops.{i}.bn1.running_mean": (c_out,),
                   f"{name}.ops.{i}.bn1.running_var": (c_out,),
                   f"{name}.ops.{i}.bn1.num_batches_tracked": ()}
    return shapes


def unet_shapes(width: int = 64, **heads) -> dict[str, tuple]:
    """A released U-Net. The names tell the channels of the paper's size, whatever the width is."""
    c1, c2, c3, c4 = width, 2 * width, 4 * width, 8 * width
    shapes = {}
    for name, into, middle, out in ((64, 1, c1 // 2, c1), (128, c1, c1, c2), (256, c2, c2, c3),
                                    (512, c3, c3, c4)):
        shapes |= double_conv(f"backbone.down_tr{name}", into, middle, out)
    for name, out, below in ((256, c3, c4), (128, c2, c3), (64, c1, c2)):
        name = f"backbone.up_tr{name}"
        shapes |= {f"{name}.up_conv.weight": (below, below, 2, 2, 2),
                   f"{name}.up_conv.bias": (below,)}
        shapes |= double_conv(name, below + out, out, out)
    return shapes | head_shapes(deep=c4, fine=c1, **heads)


def swin_stage(name: str, dim: int, heads: int) -> dict[str, tuple]:
    """Two transformer blocks and the patch merging behind them."""
    shapes = {}
    for block in (f"{name}.blocks.0", f"{name}.blocks.1"):
        shapes |= norm(f"{block}.norm1", dim)
        shapes |= {f"{block}.attn.relative_position_bias_table": (13 ** 3, heads),
                   f"{block}.attn.relative_position_index": (343, 343)}
        shapes |= linear(f"{block}.attn.qkv", 3 * dim, dim)
        shapes |= linear(f"{block}.attn.proj", dim, dim)
        shapes |= norm(f"{block}.norm2", dim)
        shapes |= linear(f"{block}.mlp.linear1", 4 * dim, dim)
        shapes |= linear(f"{block}.mlp.linear2", dim, 4 * dim)
    shapes[f"{name}.downsample.reduction.weight"] = (2 * dim, 8 * dim)
    return shapes | norm(f"{name}.downsample.norm", 8 * dim)


def res_block(name: str, into: int, out: int) -> dict[str, tuple]:
    shapes = conv(f"{name}.conv1.conv", out, into, 3, bias=False)
    shapes |= conv(f"{name}.conv2.conv", out, out, 3, bias=False)
    if into != out:
        shapes |= conv(f"{name}.conv3.conv", out, into, 1, bias=False)
    return shapes


def swin_unetr_shapes(feature_size: int = 48, **heads) -> dict[str, tuple]:
    C = feature_size
    shapes = conv("backbone.swinViT.patch_embed.proj", C, 1, 2)
    for i, count in enumerate((3, 6, 12, 24)):
        shapes |= swin_stage(f"backbone.swinViT.layers{i + 1}.0", 2 ** i * C, count)
    for name, into, out in (("encoder1", 1, C), ("encoder2", C, C), ("encoder3", 2 * C, 2 * C),
                            ("encoder4", 4 * C, 4 * C), ("encoder10", 16 * C, 16 * C)):
        shapes |= res_block(f"backbone.{name}.layer", into, out)
    for number, below, out in ((5, 16 * C, 8 * C), (4, 8 * C, 4 * C), (3, 4 * C, 2 * C),
                               (2, 2 * C, C), (1, C, C)):
        name = f"backbone.decoder{number}"
        shapes[f"{name}.transp_conv.conv.weight"] = (below, out, 2, 2, 2)
        shapes |= res_block(f"{name}.conv_block", 2 * out, out)
    return shapes | head_shapes(deep=16 * C, fine=C, **heads)


def head_shapes(deep: int, fine: int, text_dim: int = 512, classes: int = 32) -> dict[str, tuple]:
    """What follows the backbone: reduction, pooling branch, controller, text branch, text rows."""
    return {"organ_embedding": (classes, text_dim),
            **norm("precls_conv.0", fine), **conv("precls_conv.2", 8, fine, 1),
            **norm("GAP.0", deep), **conv("GAP.3", 256, deep, 1),
            **conv("controller", 153, 512, 1), **linear("text_to_vision", 256, text_dim)}


def clip_shapes(width: int = 512, layers: int = 12, embed_dim: int = 512,
                vocabulary: int = 49408, length: int = 77) -> dict[str, tuple]:
    """The text side of OpenAI's CLIP; the defaults are those of ViT-B/32."""
    shapes = {"positional_embedding": (length, width), "text_projection": (width, embed_dim),
              "logit_scale": ()}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width),
                   f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{block}.attn.out_proj", width, width)
        shapes |= norm(f"{block}.ln_1", width)
        shapes |= linear(f"{block}.mlp.c_fc", 4 * width, width)
        shapes |= linear(f"{block}.mlp.c_proj", width, 4 * width)
        shapes |= norm(f"{block}.ln_2", width)
    shapes["token_embedding.weight"] = (vocabulary, width)
    return shapes | norm("ln_final", width)


SHAPES = {"unet": unet_shapes(), "swinunetr": swin_unetr_shapes()}


def released_state(shapes: dict[str, tuple],
                   position_index: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state dict of a network in the release's layout, filled with seed 1, integer buffers
    included."""
    counters = {key for key in shapes if key.endswith("num_batches_tracked")}
    indices = {key for key in shapes if key.endswith("relative_position_index")}
    state = fill({key: shape for key, shape in shapes.items()
                  if key not in counters | indices}, seed=1)
    state |= {key: torch.tensor(7) for key in counters}
    state |= {key: position_index for key in indices}
    return state


def small_released(kind):
    """A small network of width 7 for text, and its weights in the layout of the """
    sizes = {"text_dim": 7, "classes": 4}
    shapes = {"unet": unet_shapes(width=8, **sizes),
              "swin_unetr": swin_unetr_shapes(feature_size=12, **sizes)}[kind]
    state = released_state(shapes, model.relative_position_index())
    return model.load_released(state)[0], state
