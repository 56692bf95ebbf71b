"""The network: by hand, stored outputs of the released model, MONAI, plain nn modules, masking."""
import copy
import functools
import pickle

import numpy as np
import pytest
import release
import torch
import torch.nn.functional as F
from torch import nn

import losses
import model
from support import checkpoints, extension, fast

FORMS = {"plain": lambda network: network, "fast": fast.accelerate}


def tiny_model(text_dim=5, width=8, seed=0):
    torch.manual_seed(seed)
    return model.UniversalModel(model.UNet(width=width), text_dim)


# ---- by hand -------------------------------------------------------------------------------------
def test_windows_hold_neighbouring_tokens_and_reverse_to_the_grid():
    """A grid of 2 x 2 x 4 tokens 0 ... 15 in windows of 2 x 2 x 2: tokens 0, 1, 4, 5 and those 8
    further, then tokens 2, 3, 6, 7 and those 8 further."""
    grid = torch.arange(16).view(1, 2, 2, 4, 1)
    windows = model.window_partition(grid, (2, 2, 2))
    assert windows[:, :, 0].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert torch.equal(model.window_reverse(windows, (2, 2, 2), (2, 2, 4)), grid)
    grid = torch.arange(2 * 4 * 6 * 9 * 5).view(2, 4, 6, 9, 5)
    windows = model.window_partition(grid, (2, 3, 3))
    assert windows.shape == (2 * 2 * 2 * 3, 18, 5)
    assert torch.equal(model.window_reverse(windows, (2, 3, 3), (4, 6, 9)), grid)


def test_a_token_wrapped_round_does_not_see_those_that_were_not():
    """Six tokens in windows of three, shifted by one: the last window holds tokens 4, 5 and 0."""
    mask = model.shifted_window_mask((1, 1, 6), (1, 1, 3), (0, 0, 1), "cpu")
    assert not mask[0].any()
    assert mask[1].int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


def test_an_axis_no_longer_than_a_window_is_one_window_and_never_shifted():
    assert model.window_and_shift((48, 7, 4), True) == ((7, 7, 4), (3, 0, 0))
    assert model.window_and_shift((48, 7, 4), False) == ((7, 7, 4), (0, 0, 0))


def test_relative_positions_by_hand():
    """Places 0 and 342 are the corners (0,0,0) and (6,6,6): offsets -6 and +6 on every axis."""
    index = model.relative_position_index()
    assert index[0, 342] == 0 and index[342, 0] == 13 ** 3 - 1
    assert (index.diagonal() == (6 * 13 + 6) * 13 + 6).all()
    assert index[1, 0] - index[0, 0] == 1 and index[7, 0] - index[0, 0] == 13


def test_attention_by_hand():
    """One head of one channel, two tokens: softmax((q k1, q k2) + bias) weighs v."""
    attention = model.WindowAttention(1, 1).double()
    nn.init.normal_(attention.bias_table)
    q, k, v = (torch.tensor(t, dtype=torch.double).view(1, 1, 2, 1)
               for t in ([0.5, -1.0], [2.0, 3.0], [10.0, 20.0]))
    bias = attention.position_bias(2)[0]
    weights = [torch.softmax(torch.stack([a * 2.0 + bias[i, 0], a * 3.0 + bias[i, 1]]), 0)
               for i, a in enumerate((0.5, -1.0))]
    want = torch.stack([10 * a + 20 * b for a, b in weights])
    assert torch.allclose(attention.attend(q, k, v, None).flatten(), want)
    hidden = torch.tensor([[[False, True], [False, False]]])
    assert attention.attend(q, k, v, hidden).flatten()[0] == 10.0          # sees only itself


def test_theta_is_split_into_weights_and_then_biases():
    """0 ... 152: weights 64, 64, 8 in rows of 8, then biases 8, 8, 1."""
    (w1, w2, w3), (b1, b2, b3) = model.split_theta(torch.arange(153))
    assert w1[1, 2] == 10 and w2[1, 2] == 74 and w3.tolist() == [list(range(128, 136))]
    assert b1.tolist() == list(range(136, 144)) and b2[0] == 144 and b3.tolist() == [152]


def layouts(state):
    """The three public spellings of one state dict."""
    return {"bare": state, "net": {"net": {f"module.{k}": v for k, v in state.items()}, "epoch": 9},
            "older": {"net": {"module." + k.removeprefix("backbone."): v
                              for k, v in state.items()}}}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "swinunetr"])
def test_every_layout_of_a_released_file_gives_the_same_tensors(name, tmp_path):
    state = release.released_state(name, model.relative_position_index())
    assert len(state) == {"unet": 117, "swinunetr": 170}[name]
    models = []
    for content in layouts(state).values():
        torch.save(content, tmp_path / "file.pth")
        network, w = model.load_released(tmp_path / "file.pth")
        assert torch.equal(w, state["organ_embedding"])
        models.append(network.state_dict().values())
    for tensors in zip(*models, strict=True):
        assert all(torch.equal(tensor, tensors[0]) for tensor in tensors)


def test_parameter_count_of_the_paper_unet():
    """19,073,600 in the backbone, 19,416,417 in all, text rows not counted."""
    network = model.UniversalModel(model.UNet())
    assert sum(p.numel() for p in network.backbone.parameters()) == 19_073_600
    assert sum(p.numel() for p in network.parameters()) == 19_416_417


def test_parameter_count_of_the_paper_swin_unetr():
    """62,186,610 in the backbone, 62,595,315 in all, text rows not counted."""
    with torch.device("meta"):
        network = model.UniversalModel(model.SwinUNETR())
    assert sum(p.numel() for p in network.backbone.parameters()) == 62_186_610
    assert sum(p.numel() for p in network.parameters()) == 62_595_315


@functools.cache
def small_released(kind):
    """A small model's weights under the release's names, made by undoing the renaming."""
    spec = {"unet": {"backbone": "unet", "width": 8},
            "swin_unetr": {"backbone": "swin_unetr", "feature_size": 12}}[kind]
    torch.manual_seed(3)
    network = model.build_model({**spec, "text_dim": 7})
    for p in network.parameters():
        p.data.normal_()
    up, down = {"0": "256", "1": "128", "2": "64"}, ("64", "128", "256", "512")
    swin = {"patch": "swinViT.patch_embed.proj", "bottom": "encoder10.layer"}
    out = {"organ_embedding": torch.randn(4, 7)}
    for key, value in network.state_dict().items():
        for a, b in (("reduce_norm", "precls_conv.0"), ("reduce", "precls_conv.2"),
                     ("pool_norm", "GAP.0"), ("pool", "GAP.3"), ("controller.out", "controller"),
                     ("controller.text", "text_to_vision")):
            if key.startswith(a + "."):
                key = b + key[len(a):]
                break
        if key in ("GAP.3.weight", "controller.weight"):
            value = value[..., None, None, None]
        if key.startswith("backbone.") and kind == "unet":
            part, i, *rest = key.removeprefix("backbone.").split(".")
            rest = ".".join(rest)
            if part == "up":
                key = f"backbone.up_tr{up[i]}.up_conv.{rest}"
            else:
                level = f"down_tr{down[int(i)]}" if part == "down" else f"up_tr{up[i]}"
                j, unit, end = rest.split(".")
                unit = {"conv": "conv1", "norm": "bn1"}[unit]
                key = f"backbone.{level}.ops.{j}.{unit}.{end}"
                if unit == "bn1" and end == "bias":
                    out[key.replace("bias", "running_mean")] = value + 1
                    out[key.replace("bias", "running_var")] = value.exp()
                    out[key.replace("bias", "num_batches_tracked")] = torch.tensor(3)
        elif key.startswith("backbone."):
            part, *rest = key.removeprefix("backbone.").split(".")
            rest = ".".join(rest)
            if part in swin:
                name = f"{swin[part]}.{rest}"
            elif part == "stages":
                i, rest = rest.split(".", 1)
                name = f"swinViT.layers{int(i) + 1}.0.{rest}"
                for a, b in ((".merge.", ".downsample."), (".mlp.0.", ".mlp.linear1."),
                             (".mlp.2.", ".mlp.linear2."),
                             (".bias_table", ".relative_position_bias_table")):
                    name = name.replace(a, b)
            else:
                i, rest = rest.split(".", 1)
                name = {"enc": f"encoder{int(i) + 1}.layer.", "dec": f"decoder{5 - int(i)}."
                        "conv_block.", "up": f"decoder{5 - int(i)}.transp_conv.conv."}[part] + rest
            for n in "123":
                name = name.replace(f".conv{n}.", f".conv{n}.conv.")
            key = "backbone." + name
            if key.endswith("_bias_table"):
                out[key.replace("bias_table", "index")] = model.relative_position_index()
        out[key] = value
    return network, out


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_released_weights_load_strictly_in_every_layout(kind, tmp_path):
    network, state = small_released(kind)
    for layout, content in layouts(state).items():
        torch.save(content, tmp_path / f"{layout}.pth")
        got, w, rest = checkpoints.load_checkpoint(tmp_path / f"{layout}.pth")
        assert rest == {} and torch.equal(w, state["organ_embedding"]) and not got.training
        for k, v in network.state_dict().items():
            assert torch.equal(got.state_dict()[k], v), k


DERIVATIVES = [       # key of the weights, what precedes the backbone's names, and the others
    ("net", "module.backbone.", "module."), ("state_dict", "model.backbone.", "model."),
    ("network", "_orig_mod.module.backbone.", "_orig_mod.module."), ("model", "net.", "net."),
    ("state_dict", "model.module.backbone.", ""), ("", "module.network.backbone.", "module.")]


def derivative(state, key, backbone, others):
    """A released state dict in a derivative's layout: other words, and a key with an optimiser."""
    renamed = {backbone + name.removeprefix("backbone.") if name.startswith("backbone.")
               else others + name: value for name, value in state.items()}
    return {key: renamed, "optimizer": {"state": {}}, "epoch": 3} if key else renamed


@pytest.mark.parametrize("layout", DERIVATIVES, ids=lambda layout: " ".join(layout))
@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_derivatives_are_recognised_whatever_words_precede_their_names(kind, layout):
    network, state = small_released(kind)
    got, w = model.load_released(derivative(state, *layout))
    assert torch.equal(w, state["organ_embedding"])
    assert network.state_dict().keys() == got.state_dict().keys()
    for name, value in network.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_a_derivative_that_does_not_fit_is_refused_with_what_differs(kind):
    """One name missing, one too many, one of another shape; text rows of another width or none."""
    _, state = small_released(kind)
    name, ours = {"unet": ("backbone.up_tr64.ops.1.conv1.bias", "backbone.merge.2.1.conv.bias"),
                  "swin_unetr": ("backbone.swinViT.layers1.0.blocks.0.norm1.bias",
                                 "backbone.stages.0.blocks.0.norm1.bias")}[kind]
    others = {k: v for k, v in state.items() if k != name}
    missing, unknown = f'Missing key.*"{ours}"', 'Unexpected key.*"surprise"'
    for content, what in (
            (others, missing), ({**state, name: "text"}, missing),
            ({**state, "surprise": torch.ones(3)}, unknown),
            ({**others, "surprise": torch.ones(3)}, f"{missing}.*{unknown}"),
            ({**state, name: torch.ones(99)}, rf"size mismatch for {ours}: .*\[99\]"),
            ({**state, "organ_embedding": torch.ones(4, 8)},
             "size mismatch for controller.text.weight"),
            ({**state, "organ_embedding": torch.ones(8)}, "IndexError"),
            ({k: v for k, v in state.items() if k != "organ_embedding"}, "organ_embedding"),
            ({k: v for k, v in state.items() if "text_to_vision" not in k},
             "Missing key.*controller.text.weight")):
        with pytest.raises(ValueError, match=f"file.pth: not the released.*{what}.*--pretrained"):
            model.load_released(derivative(content, *DERIVATIVES[1]), where="file.pth")
    with pytest.raises(ValueError, match='state dict: .*Unexpected key.*"0"'):
        model.load_released({**state, 0: torch.ones(3)})


def test_hundreds_of_differences_are_a_short_line():
    _, state = small_released("swin_unetr")
    state = {k.replace("conv_block", "block").replace(".downsample.", ".x."): v[:-1] if k.endswith(
        "norm1.weight") else v for k, v in state.items()}
    with pytest.raises(ValueError, match="Missing.*Unexpected.*size mismatch") as e:
        model.load_released(state)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize("head", ["out_tr.final_conv", "out.conv.conv"])
@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_a_model_without_text_is_refused_and_its_backbone_can_be_taken(kind, head, tmp_path):
    """25 classes from one convolution, as other networks of the same backbones have them."""
    network, state = small_released(kind)
    state = {"module." + k: v for k, v in state.items() if k.startswith("backbone.")}
    state |= {f"module.{head}.weight": torch.ones(25, 8, 1, 1, 1),
              f"module.{head}.bias": torch.ones(25)}
    torch.save({"net": state}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="file.pth: .*organ_embedding.*--pretrained"):
        checkpoints.load_checkpoint(tmp_path / "file.pth")
    fresh = model.build_model({"backbone": kind, "text_dim": 7, **(
        {"width": 8} if kind == "unet" else {"feature_size": 12})})
    filled, left = checkpoints.load_pretrained(fresh, tmp_path / "file.pth")
    assert len(filled) == len(network.backbone.state_dict()) and len(left) == 2
    for name, value in network.backbone.state_dict().items():
        assert torch.equal(fresh.backbone.state_dict()[name], value)


def test_a_file_with_two_models_is_refused():
    _, state = small_released("unet")
    twice = {f"{word}.{k}": v for word in ("model", "module") for k, v in state.items()}
    with pytest.raises(ValueError, match="that is organ_embedding of this model"):
        model.load_released(twice)
    with pytest.raises(ValueError, match="weights under net and model"):
        model.load_released({"model": state, "net": state})


@pytest.mark.parametrize("kind", ["unet", "swin_unetr"])
def test_pretrained_encoders_fill_the_backbone_and_say_what_was_left(kind, tmp_path):
    """MONAI's file has `out` beside the backbone, older ones `module.layers1`; Genesis `out_tr`."""
    network, state = small_released(kind)
    public = {k.removeprefix("backbone."): v for k, v in state.items() if "backbone." in k}
    public = {(f"module.{k}" if kind == "unet" else k): v for k, v in public.items()}
    extra = {"unet": "module.out_tr.final_conv.weight", "swin_unetr": "out.conv.conv.weight"}[kind]
    torch.save({"state_dict": {**public, extra: torch.ones(3)}}, tmp_path / "a.pt")
    fresh = model.build_model({"backbone": kind, "text_dim": 7, **(
        {"width": 8} if kind == "unet" else {"feature_size": 12})})
    filled, left = checkpoints.load_pretrained(fresh, tmp_path / "a.pt")
    assert len(filled) == len(network.backbone.state_dict())
    assert left == [extra.removeprefix("module.")]
    for k, v in network.backbone.state_dict().items():
        assert torch.equal(fresh.backbone.state_dict()[k], v)
    if kind == "swin_unetr":
        old = {"module." + k.removeprefix("swinViT.").replace("linear", "fc"): v
               for k, v in public.items() if k.startswith("swinViT")}
        torch.save({"state_dict": old}, tmp_path / "b.pt")
        filled, left = checkpoints.load_pretrained(fresh, tmp_path / "b.pt")
        assert not left and len(filled) == sum("patch" in k or "stages" in k
                                               for k in network.backbone.state_dict())
    torch.save({"state_dict": {"fc.weight": torch.ones(2)}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="no weight in it fits"):
        checkpoints.load_pretrained(fresh, tmp_path / "c.pt")
    name = next(iter(public))
    torch.save({"state_dict": {**public, name: torch.ones(3)}}, tmp_path / "d.pt")
    with pytest.raises(ValueError, match="d.pt: does not fit this backbone .*size mismatch for"):
        checkpoints.load_pretrained(fresh, tmp_path / "d.pt")


def monai_pair(merging, size, seed):
    """MONAI's SwinUNETR, ours with the same random weights, and a dict that MONAI's features
    `deep` and `fine` are put into."""
    nets = pytest.importorskip("monai.networks.nets.swin_unetr")
    torch.manual_seed(seed)
    monai = nets.SwinUNETR(img_size=size, in_channels=1, out_channels=2, feature_size=12,
                           downsample=merging, use_v2=False)
    with torch.no_grad():
        for name, p in monai.named_parameters():
            p.add_(torch.randn_like(p) * (0.5 if "bias_table" in name else 0.05))
    ours = model.SwinUNETR(feature_size=12, merging=merging)
    state = {k: v for k, v in monai.state_dict().items() if not k.startswith("out.")}
    state = model.public_weights(state, "")
    ours.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items()})
    kept = {}
    monai.encoder10.register_forward_hook(lambda m, i, o: kept.update(deep=o))
    monai.out.register_forward_pre_hook(lambda m, i: kept.update(fine=i[0]))
    return monai, ours, kept


SLOW = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form, merging, size, seed", [
    ("plain", "merging", (64, 64, 64), 5),
    ("fast", "merging", (64, 64, 64), 5),
    pytest.param("plain", "mergingv2", (64, 64, 64), 6, marks=SLOW),
    pytest.param("fast", "merging", (64, 96, 128), 8, marks=SLOW)])
def test_swin_unetr_equals_monai(form, merging, size, seed):
    monai, ours, kept = monai_pair(merging, size, seed)
    x = torch.rand(1, 1, *size)
    with torch.no_grad():
        monai(x)
        deep, fine = FORMS[form](ours)(x)
    assert (deep - kept["deep"]).abs().max() < 1e-4 and (fine - kept["fine"]).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form, merging", [("plain", "merging"), ("fast", "mergingv2")])
def test_gradients_of_swin_unetr_equal_monais(form, merging):
    """In float64, where no ReLU flips by rounding."""
    monai, ours, kept = monai_pair(merging, (64, 64, 64), 5)
    monai, ours = monai.double(), FORMS[form](ours).double()
    x = torch.rand(1, 1, 64, 64, 64, dtype=torch.double)
    monai(x)
    deep, fine = ours(x)
    weights = torch.randn_like(fine), torch.randn_like(deep)
    for f, d in ((kept["fine"], kept["deep"]), (fine, deep)):
        ((f * weights[0]).mean() + (d * weights[1]).mean()).backward()
    grads = {k: p.grad for k, p in monai.named_parameters() if not k.startswith("out.")}
    grads = model.public_weights(grads, "")
    for name, p in ours.named_parameters():
        want = grads[f"backbone.{name}"]
        assert (p.grad - want).norm() < 1e-6 * want.norm() + 1e-9, name


class WrittenOutUNet(nn.Module):
    """The U-Net of the paper from nn modules alone, layer by layer, with batch norm as released."""

    def __init__(self, width):
        super().__init__()
        w = width
        self.a0, self.a1 = self.unit(1, w // 2), self.unit(w // 2, w)
        self.b0, self.b1 = self.unit(w, w), self.unit(w, 2 * w)
        self.c0, self.c1 = self.unit(2 * w, 2 * w), self.unit(2 * w, 4 * w)
        self.d0, self.d1 = self.unit(4 * w, 4 * w), self.unit(4 * w, 8 * w)
        self.up0 = nn.ConvTranspose3d(8 * w, 8 * w, 2, 2)
        self.up1 = nn.ConvTranspose3d(4 * w, 4 * w, 2, 2)
        self.up2 = nn.ConvTranspose3d(2 * w, 2 * w, 2, 2)
        self.e0, self.e1 = self.unit(12 * w, 4 * w), self.unit(4 * w, 4 * w)
        self.f0, self.f1 = self.unit(6 * w, 2 * w), self.unit(2 * w, 2 * w)
        self.g0, self.g1 = self.unit(3 * w, w), self.unit(w, w)
        self.pool = nn.MaxPool3d(2)

    @staticmethod
    def unit(c_in, c_out):
        return nn.Sequential(nn.Conv3d(c_in, c_out, 3, padding=1),
                             nn.BatchNorm3d(c_out, track_running_stats=False), nn.ReLU())

    def forward(self, x):
        a = self.a1(self.a0(x))
        b = self.b1(self.b0(self.pool(a)))
        c = self.c1(self.c0(self.pool(b)))
        deep = self.d1(self.d0(self.pool(c)))
        x = self.e1(self.e0(torch.cat([self.up0(deep), c], 1)))
        x = self.f1(self.f0(torch.cat([self.up1(x), b], 1)))
        return deep, self.g1(self.g0(torch.cat([self.up2(x), a], 1)))


UNET_LAYERS = {"down": "abcd", "merge": "efg"}          # ours -> the letters above


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size, seed", [
    ((32, 32, 48), 1), pytest.param((48, 32, 32), 2, marks=SLOW)])
def test_unet_equals_one_written_out_from_nn_modules(form, size, seed):
    """Values in float32, gradients in float64, where no ReLU flips by rounding."""
    torch.manual_seed(seed)
    ours, plain = model.UNet(width=8), WrittenOutUNet(8)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    own = ours.state_dict()
    for name in plain.state_dict():
        layer, *rest = name.split(".")
        if layer.startswith("up"):
            source = f"up.{layer[2]}.{rest[0]}"
        else:
            part = "down" if layer[0] in UNET_LAYERS["down"] else "merge"
            unit = {"0": "conv", "1": "norm"}[rest[0]]
            level = UNET_LAYERS[part].index(layer[0])
            source = f"{part}.{level}.{layer[1]}.{unit}.{rest[1]}"
        plain.state_dict()[name].copy_(own.pop(source))
    assert not own
    ours, x = FORMS[form](ours), torch.randn(1, 1, *size)
    for a, b in zip(ours(x), plain(x), strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
    ours, plain, x = ours.double(), plain.double(), x.double()
    features, wanted = ours(x), plain(x)
    weights = [torch.randn_like(f) for f in wanted]
    got, want = (torch.autograd.grad(out, first, weights) for out, first in
                 ((features, ours.down[0][0].conv.weight), (wanted, plain.a0[0].weight)))
    assert (got[0] - want[0]).norm() < 1e-9 * want[0].norm()


def test_heads_equal_three_small_convolutions():
    """Weights 64, 64, 8, then biases 8, 8, 1; a weight is (out, in); ReLU between, not after."""
    torch.manual_seed(0)
    feat, theta = torch.randn(2, 8, 3, 4, 5), torch.randn(2, 4, 153)
    logits = model.apply_heads(feat, theta)
    for b in range(2):
        for k in range(4):
            t = theta[b, k]
            h = F.relu(F.conv3d(feat[b], t[:64].view(8, 8, 1, 1, 1), t[136:144]))
            h = F.relu(F.conv3d(h, t[64:128].view(8, 8, 1, 1, 1), t[144:152]))
            want = F.conv3d(h, t[128:136].view(1, 8, 1, 1, 1), t[152:])[0]
            assert torch.allclose(logits[b, k], want, atol=1e-4)


def test_heads_start_as_small_networks_that_say_no():
    """Weights of variance 2/8, 2/8 and 1/8, no bias but the last, which is -2: sigmoid(-2) = 0.12.
    A controller and the MLPs of an extension start near such a head."""
    torch.manual_seed(0)
    theta = torch.empty(500, 153)
    for row in theta:
        model.initialise_theta(row)
    (w1, w2, w3), (b1, b2, b3) = model.split_theta(theta)
    for weight, variance in ((w1, 2 / 8), (w2, 2 / 8), (w3, 1 / 8)):
        assert weight.var().item() == pytest.approx(variance, rel=0.08)
        assert abs(weight.mean()) < 0.02
    assert (b1 == 0).all() and (b2 == 0).all() and (b3 == -2).all()
    controllers = model.Controller(text_dim=5), extension.ClassControllers(torch.randn(4, 5))
    for theta in (controllers[0].out.bias, *controllers[1].b2[:, 0]):
        (w1, _, _), (b1, _, b3) = model.split_theta(theta)
        assert 0.3 < w1.std() < 0.7 and (b1 == 0).all() and b3.tolist() == [-2]


# ---- torch.export, torch.compile -----------------------------------------------------------------
SMALL = {"unet": ({"backbone": "unet", "width": 8}, 32),
         "swin_unetr": ({"backbone": "swin_unetr", "feature_size": 12}, 64)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("kind", SMALL)
def test_the_plain_model_exports_between_other_uses_in_one_process(kind):
    """Inference, export with a dynamic batch, use of the program, inference, then training."""
    spec, side = SMALL[kind]
    torch.manual_seed(0)
    network = model.build_model({**spec, "text_dim": 5}).eval()
    x, w = torch.rand(2, 1, side, side, side), torch.randn(3, 5)
    with torch.inference_mode():
        before = network(x, w)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(network, (x, w), dynamic_shapes=({0: batch}, None))
    for part in (x, x[:1]):
        with torch.inference_mode():
            want = network(part, w)
        assert torch.allclose(program.module()(part, w), want, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(network(x, w), before)
    network.train()(x[:1], w).mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    fast.accelerate(network)(x[:1], w).mean().backward()      # also the fast form


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SMALL)
def test_the_plain_model_compiles(kind):
    spec, side = SMALL[kind]
    network = model.build_model({**spec, "text_dim": 5}).eval()
    x, w = torch.rand(1, 1, side, side, side), torch.randn(3, 5)
    with torch.no_grad():
        want = network(x, w)
        got = torch.compile(network, backend="aot_eager", dynamic=False)(x, w)
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("kind", ["unet", pytest.param("swin_unetr", marks=pytest.mark.slow)])
def test_recomputing_in_backward_changes_no_gradient(kind):
    _, side = SMALL[kind]
    x, w = torch.rand(1, 1, side, side, side), torch.randn(2, 7)
    grads = []
    for recompute in (False, True):
        network, _ = small_released(kind)
        network.backbone.recompute = recompute
        network.train()(x, w).square().mean().backward()
        grads.append([p.grad for p in network.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7 * a.abs().max().item())


@pytest.mark.parametrize("kind", ["unet", pytest.param("swin_unetr", marks=SLOW)])
def test_a_window_alone_equals_the_window_in_a_batch(kind):
    """Both forms in float64, the fast form in float32 as well, where matrix products of one and of
    two windows are rounded otherwise (1.2e-5 with AVX-512); norms over both windows differ by 0.6.
    """
    network = small_released(kind)[0].eval()
    torch.manual_seed(1)
    _, side = SMALL[kind]
    x, w = torch.rand(2, 1, side, side, side), torch.randn(2, 7)
    x[1] *= 3

    def compare(network, x, w, tolerance):
        with torch.no_grad():
            alone = torch.cat([network(part, w) for part in x.split(1)])
            assert (network(x, w) - alone).abs().max() < tolerance * alone.abs().max()
    compare(network.double(), x.double(), w.double(), 1e-12)
    fast.accelerate(network)
    compare(network, x.double(), w.double(), 1e-12)
    compare(network.float(), x, w, 1e-4)


def test_any_subset_of_classes_in_any_order_is_the_same_as_a_slice():
    network, x = tiny_model(), torch.randn(1, 1, 64, 64, 64)
    w = torch.randn(6, 5)
    with torch.no_grad():
        everything = network(x, w)
        some = network(x, w[[4, 1]])
    assert torch.allclose(everything[:, [4, 1]], some, atol=1e-5)


def test_a_window_does_not_depend_on_its_neighbours():
    network = tiny_model()
    x, w = torch.randn(3, 1, 32, 32, 32), torch.randn(2, 5)
    with torch.no_grad():
        assert torch.allclose(network(x, w)[1:2], network(x[1:2], w), atol=1e-5)


def test_unannotated_class_gets_exactly_zero_gradient_through_its_text_row():
    network, w = tiny_model(), torch.randn(4, 5, requires_grad=True)
    logits = network(torch.randn(2, 1, 32, 32, 32), w)
    y = (torch.rand_like(logits) > 0.5).float()
    annotated = torch.tensor([[True, False, False, True], [False, False, True, True]])
    (losses.masked_bce(logits, y, annotated) + losses.masked_dice(logits, y, annotated)).backward()
    assert (w.grad[1] == 0).all()
    assert all((w.grad[k] != 0).any() for k in (0, 2, 3))


def test_wrong_sides_are_named():
    for size in [(64, 64, 65), (16, 64, 64), (96, 72, 96)]:
        with pytest.raises(ValueError, match="multiples of 16 and at least 32, got"):
            tiny_model()(torch.zeros(1, 1, *size), torch.zeros(1, 5))
    swin = model.UniversalModel(model.SwinUNETR(feature_size=12), text_dim=5)
    for size in [(64, 64, 80), (32, 64, 64)]:
        with pytest.raises(ValueError, match="multiples of 32 and at least 64, got"):
            swin(torch.zeros(1, 1, *size), torch.zeros(1, 5))


# ---- extension -----------------------------------------------------------------------------------
def extended(backbone, form):
    """A model, its extension by two classes, an input, embeddings of old and of new classes."""
    torch.manual_seed(0)
    spec, side = SMALL[backbone]
    old = model.build_model({**spec, "text_dim": 5}).eval()
    w, w_new = torch.randn(3, 5), torch.randn(2, 5)
    new = extension.extend(copy.deepcopy(old), w_new)
    if form == "fast":
        fast.accelerate(old), fast.accelerate(new)
    return old, new, torch.rand(2, 1, side, side, side), w, w_new


@pytest.mark.parametrize("backbone, form", [
    ("unet", "plain"), ("unet", "fast"), pytest.param("swin_unetr", "plain", marks=SLOW),
    pytest.param("swin_unetr", "fast", marks=SLOW)])
def test_the_two_steps_of_an_extended_model_are_the_backbone(backbone, form):
    """All levels but the decoder's last, then the last: bit for bit the backbone's own features."""
    _, network, x, _, _ = extended(backbone, form)
    x = x[:1]
    with torch.no_grad():
        want = network.backbone(x)
        deep, coarse, skip = network.trunk(x)
        fine = network.decode(network.last_level(), coarse, skip)
    assert torch.equal(deep, want[0]) and torch.equal(fine, want[1])


@pytest.mark.parametrize("backbone, form", [
    ("unet", "plain"), ("unet", "fast"), pytest.param("swin_unetr", "fast", marks=SLOW)])
def test_an_extension_leaves_old_logits_bit_identical(backbone, form):
    """In any order of the classes, before and after the new weights have changed."""
    old, new, x, w, w_new = extended(backbone, form)
    with torch.no_grad():
        before = old(x, w)
        for p in new.extensions[0].parameters():
            p += 0.1 * torch.randn_like(p)
        assert torch.equal(new(x, w), before)
        both = new(x, torch.cat([w_new[1:], w, w_new[:1]]))
        assert torch.equal(both[:, 1:4], before)
        assert torch.allclose(both[:, [4, 0]], new(x, w_new), atol=1e-5)
        assert not torch.allclose(both[:, 4], both[:, 0])
    part = extension.owner_of(new, torch.cat([w_new[1:], w, w_new[:1]]))
    assert part.tolist() == [1, 0, 0, 0, 1]
    assert extension.owner_of(old, w).tolist() == [0, 0, 0]


def test_in_training_mode_all_classes_are_of_the_newest_extension():
    """The new ones are computed as in evaluation mode; another class is NaN, never a wrong map."""
    _, network, x, w, w_new = extended("unet", "plain")
    with torch.no_grad():
        want = network(x, w_new)
        got = network.train()(x, torch.cat([w_new, w[:1]]))
    assert torch.allclose(got[:, :2], want, atol=1e-5) and got[:, 2].isnan().all()


@pytest.mark.parametrize("backbone", ["unet", pytest.param("swin_unetr", marks=SLOW)])
def test_only_an_extension_is_trained_and_an_extended_model_can_be_extended_again(backbone):
    _, network, x, w, first = extended(backbone, "fast")
    x = x[:1]
    second = torch.randn(1, 5)
    with torch.no_grad():
        before = network(x, torch.cat([first, w]))
    assert extension.extend(network, second) is network
    part = extension.owner_of(network, torch.cat([second, w, first]))
    assert part.tolist() == [2, 0, 0, 0, 1, 1]
    network(x, torch.cat([w, second, first])).square().mean().backward()
    for name, p in network.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == ("extensions.1." in name), name
    with torch.no_grad():
        assert torch.equal(network(x, torch.cat([first, w])), before)
        spec = {"backbone": backbone, "text_dim": 5, "extensions": [2, 1],
                **({"width": 8} if backbone == "unet" else {"feature_size": 12})}
        again = fast.accelerate(extension.build_model(spec).eval())
        again.load_state_dict(network.state_dict())
        every = torch.cat([first, w, second])
        assert torch.allclose(again(x, every), network(x, every), atol=1e-5)


def test_a_backbone_of_ones_own_cannot_be_extended():
    network = tiny_model()
    network.backbone = nn.Identity()
    with pytest.raises(ValueError, match="only a UNet or a SwinUNETR can be extended.* Identity"):
        extension.extend(network, torch.randn(1, 5))


def test_the_heads_of_an_extension_by_hand():
    """One MLP a class on the image feature and the class's embedding: 472,217 parameters at the
    paper's size (768 -> 512 -> 153), and a decoder level of 9,112 at width 8."""
    network = extension.extend(tiny_model(text_dim=512).eval(), torch.randn(2, 512))
    new, c = network.extensions[0], network.extensions[0].controller
    mlps = sum(p.numel() for p in c.parameters())
    assert mlps == 2 * 472_217 and sum(p.numel() for p in new.parameters()) - mlps == 9_112
    f = torch.randn(2, 256)
    with torch.no_grad():
        got = c(c.w_new[[1, 0]], f)
        for k in range(2):
            h = torch.relu(torch.cat([f, c.w_new[k].expand(2, -1)], 1) @ c.w1[k] + c.b1[k])
            assert torch.allclose(got[:, 1 - k], h @ c.w2[k] + c.b2[k], atol=1e-5)


def test_a_checkpoint_of_train_py_loads_and_a_part_of_one_is_refused(tmp_path):
    spec = {"backbone": "unet", "width": 8, "text_dim": 5}
    state = {k: torch.randn_like(v) for k, v in model.build_model(spec).state_dict().items()}
    content = {"format": "universal-model/2", "spec": spec, "model": state, "w": torch.eye(5),
               "classes": []}
    torch.save(content, tmp_path / "a.pt")
    loaded, w, rest = checkpoints.load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(loaded.pool.weight, state["pool.weight"]) and len(w) == 5
    assert not loaded.training and rest["classes"] == []
    for change, what in (({"format": "universal-model/9"}, "of format 'universal-model/9'"),
                         ({"spec": {"backbone": "unet"}}, "not a whole checkpoint.*text_dim"),
                         ({"spec": {**spec, "width": 16}}, "size mismatch for"),
                         ({"model": {}}, "Missing key")):
        torch.save({**content, **change}, tmp_path / "b.pt")
        with pytest.raises(ValueError, match=f"b.pt: .*{what}"):
            checkpoints.load_checkpoint(tmp_path / "b.pt")


def test_public_names_by_hand():
    for public, ours in (
            ("module.backbone.down_tr64.ops.0.conv1.weight", "backbone.down.0.0.conv.weight"),
            ("backbone.up_tr128.ops.1.bn1.bias", "backbone.merge.1.1.norm.bias"),
            ("up_tr64.up_conv.bias", "backbone.up.2.bias"),
            ("_orig_mod.model.backbone.up_tr64.up_conv.bias", "backbone.up.2.bias"),
            ("net.precls_conv.2.bias", "reduce.bias"), ("network.module.x.y", "x.y"),
            ("model.backbone.x.y", "backbone.x.y"), ("teacher.GAP.3.bias", "teacher.GAP.3.bias"),
            ("module.layers2.0.blocks.1.mlp.fc2.bias", "backbone.stages.1.blocks.1.mlp.2.bias"),
            ("swinViT.layers4.0.downsample.norm.weight", "backbone.stages.3.merge.norm.weight"),
            ("backbone.encoder10.layer.conv2.conv.weight", "backbone.bottom.conv2.weight"),
            ("backbone.decoder1.conv_block.conv3.conv.weight", "backbone.dec.4.conv3.weight"),
            ("controller.bias", "controller.out.bias"), ("GAP.3.weight", "pool.weight"),
            ("backbone.enc.0.conv1.weight", "backbone.enc.0.conv1.weight"),
            ("module.out.conv.conv.bias", "out.conv.conv.bias")):
        assert model.our_name(public) == ours


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what, wanted", [
    ("numpy scalar", r"it holds numpy\._?core\.multiarray\.scalar; only tensors"),
    ("module", "it holds torch.nn.modules.linear.Linear; only tensors"),
    ("cut", "not a readable checkpoint .*zip"), ("old cut", "not a readable checkpoint .*EOF"),
    ("empty", "not a readable checkpoint"), ("text", "not a readable checkpoint"),
    ("pickle", "Unsupported operand 149"), ("list", "a checkpoint is a dict")])
def test_a_refused_checkpoint_is_named_with_the_cause(tmp_path, what, wanted):
    path = tmp_path / "file.pt"
    content = {"a": torch.ones(300, 300)}
    if what == "numpy scalar":
        content["best"] = np.float64(0.5)
    if what == "module":
        content["net"] = torch.nn.Linear(2, 2)
    torch.save([1] if what == "list" else content, path,
               _use_new_zipfile_serialization=what != "old cut")
    if "cut" in what:
        path.write_bytes(path.read_bytes()[:100_000])
    if what in ("empty", "text"):
        path.write_bytes(b"" if what == "empty" else b"hello world, this is text")
    if what == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(ValueError, match=f"file.pt: .*{wanted}") as e:
        checkpoints.read_checkpoint(path)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)
    assert len(str(e.value)) < 700 and "Re-running" not in str(e.value)     # torch's bad advice
