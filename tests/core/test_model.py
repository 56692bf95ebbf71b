"""The network: arithmetic by hand, agreement with MONAI and with a U-Net written out from nn
modules, what has no influence on what, and public weights under their own names."""
import pickle

import numpy as np
import pytest
import release
import torch
import torch.nn.functional as F
from torch import nn

import losses
import model
from support import fast

SLOW = pytest.mark.slow
FORMS = {"plain": lambda network: network, "fast": fast.accelerate}
SIDES = {"unet": 32, "swin_unetr": 64}                  # of a small input
BACKBONES = ["unet", pytest.param("swin_unetr", marks=SLOW)]


# ---- by hand: windows, attention, patch merging --------------------------------------------------
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


def test_an_axis_no_longer_than_a_window_is_one_window_and_never_shifted():
    assert model.window_and_shift((48, 7, 4), True) == ((7, 7, 4), (3, 0, 0))
    assert model.window_and_shift((48, 7, 4), False) == ((7, 7, 4), (0, 0, 0))


def test_a_token_wrapped_round_does_not_see_those_that_were_not():
    """Six tokens in windows of three, shifted by one: the last window holds tokens 4, 5 and 0."""
    mask = model.shifted_window_mask((1, 1, 6), (1, 1, 3), (0, 0, 1), "cpu")
    assert not mask[0].any()
    assert mask[1].int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 1, 0]]


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


@pytest.mark.parametrize("merging, want", [("merging", [0, 4, 2, 1, 5, 2, 1, 7]),
                                           ("mergingv2", [0, 1, 2, 3, 4, 5, 6, 7])])
def test_patch_merging_takes_the_tokens_of_a_block_in_this_order(merging, want):
    """Tokens 0 ... 7 of a block of 2 x 2 x 2. The release takes two of them twice, two never."""
    merge = model.PatchMerging(1, merging)
    merge.norm = merge.reduction = nn.Identity()
    assert merge(torch.arange(8.0).view(1, 2, 2, 2, 1)).flatten().tolist() == want


# ---- by hand: heads ------------------------------------------------------------------------------
def test_theta_is_split_into_weights_and_then_biases():
    """0 ... 152: weights 64, 64, 8 in rows of 8, then biases 8, 8, 1."""
    (w1, w2, w3), (b1, b2, b3) = model.split_theta(torch.arange(153))
    assert w1[1, 2] == 10 and w2[1, 2] == 74 and w3.tolist() == [list(range(128, 136))]
    assert b1.tolist() == list(range(136, 144)) and b2[0] == 144 and b3.tolist() == [152]


def test_heads_equal_three_small_convolutions():
    """A weight is (out, in); ReLU between the layers, not after the last one."""
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
    A controller starts near such a head."""
    torch.manual_seed(0)
    theta = torch.empty(500, 153)
    for row in theta:
        model.initialise_theta(row)
    (w1, w2, w3), (b1, b2, b3) = model.split_theta(theta)
    for weight, variance in ((w1, 2 / 8), (w2, 2 / 8), (w3, 1 / 8)):
        assert weight.var().item() == pytest.approx(variance, rel=0.08)
        assert abs(weight.mean()) < 0.02
    assert (b1 == 0).all() and (b2 == 0).all() and (b3 == -2).all()
    (w1, _, _), (b1, _, b3) = model.split_theta(model.Controller(text_dim=5).out.bias)
    assert 0.3 < w1.std() < 0.7 and (b1 == 0).all() and b3.tolist() == [-2]


@pytest.mark.parametrize("backbone, parameters, all_parameters", [
    (model.UNet, 19_073_600, 19_416_417), (model.SwinUNETR, 62_186_610, 62_595_315)])
def test_parameter_counts_of_the_paper(backbone, parameters, all_parameters):
    """Text rows are not counted."""
    with torch.device("meta"):
        network = model.UniversalModel(backbone())
    assert sum(p.numel() for p in network.backbone.parameters()) == parameters
    assert sum(p.numel() for p in network.parameters()) == all_parameters


# ---- Swin UNETR against MONAI --------------------------------------------------------------------
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
    ours.load_state_dict(names_of_backbone(monai.state_dict()))
    kept = {}
    monai.encoder10.register_forward_hook(lambda m, i, o: kept.update(deep=o))
    monai.out.register_forward_pre_hook(lambda m, i: kept.update(fine=i[0]))
    return monai, ours, kept


def names_of_backbone(tensors):
    """Tensors under MONAI's names -> under those of model.SwinUNETR, which has no output layer."""
    tensors = {name: value for name, value in tensors.items() if not name.startswith("out.")}
    return {name.removeprefix("backbone."): value
            for name, value in model.public_weights(tensors, "").items()}


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


@SLOW
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
    gradients = names_of_backbone({name: p.grad for name, p in monai.named_parameters()})
    for name, p in ours.named_parameters():
        want = gradients[name]
        assert (p.grad - want).norm() < 1e-6 * want.norm() + 1e-9, name


# ---- the U-Net against one written out -----------------------------------------------------------
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


def name_in_unet(written_out):
    """A parameter's name in WrittenOutUNet -> its name in model.UNet."""
    layer, *rest = written_out.split(".")
    if layer.startswith("up"):
        return f"up.{layer[2]}.{rest[0]}"
    level, position = layer
    part, letters = ("down", "abcd") if level in "abcd" else ("merge", "efg")
    module = {"0": "conv", "1": "norm"}[rest[0]]
    return f"{part}.{letters.index(level)}.{position}.{module}.{rest[1]}"


def test_unet_equals_one_written_out_from_nn_modules():
    """Values in float32, gradients in float64, where no ReLU flips by rounding."""
    torch.manual_seed(1)
    ours, plain = model.UNet(width=8), WrittenOutUNet(8)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.3)
    state = ours.state_dict()
    plain.load_state_dict({name: state.pop(name_in_unet(name)) for name in plain.state_dict()})
    assert not state
    x = torch.randn(1, 1, 32, 32, 48)
    for a, b in zip(ours(x), plain(x), strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
    ours, plain, x = ours.double(), plain.double(), x.double()
    features, wanted = ours(x), plain(x)
    weights = [torch.randn_like(f) for f in wanted]
    got, = torch.autograd.grad(features, ours.down[0][0].conv.weight, weights)
    want, = torch.autograd.grad(wanted, plain.a0[0].weight, weights)
    assert (got - want).norm() < 1e-9 * want.norm()


# ---- what has no influence -----------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", BACKBONES)
def test_a_window_does_not_depend_on_its_neighbours(kind, form):
    """In float64; norms over both windows would differ by 0.6 of the largest logit."""
    network = FORMS[form](release.small_released(kind)[0].double())
    x, w = torch.rand(2, 1, *[SIDES[kind]] * 3).double(), torch.randn(2, 7).double()
    x[1] *= 3
    with torch.no_grad():
        together = network(x, w)
        alone = torch.cat([network(part, w) for part in x.split(1)])
    assert (together - alone).abs().max() < 1e-12 * alone.abs().max()


def tiny_model():
    torch.manual_seed(0)
    return model.UniversalModel(model.UNet(width=8), text_dim=5)


def test_any_subset_of_classes_in_any_order_is_the_same_as_a_slice():
    network, x, w = tiny_model(), torch.randn(1, 1, 32, 32, 32), torch.randn(6, 5)
    with torch.no_grad():
        assert torch.allclose(network(x, w)[:, [4, 1]], network(x, w[[4, 1]]), atol=1e-5)


def test_unannotated_class_gets_exactly_zero_gradient_through_its_text_row():
    network, w = tiny_model(), torch.randn(4, 5, requires_grad=True)
    logits = network(torch.randn(2, 1, 32, 32, 32), w)
    y = (torch.rand_like(logits) > 0.5).float()
    annotated = torch.tensor([[True, False, False, True], [False, False, True, True]])
    (losses.masked_bce(logits, y, annotated) + losses.masked_dice(logits, y, annotated)).backward()
    assert (w.grad[1] == 0).all()
    assert all((w.grad[k] != 0).any() for k in (0, 2, 3))


@pytest.mark.parametrize("kind", BACKBONES)
def test_recomputing_in_backward_changes_no_gradient(kind):
    """With it, the convolutions of the first level run a second time."""
    x, w = torch.rand(1, 1, *[SIDES[kind]] * 3), torch.randn(2, 7)
    gradients, calls = [], []
    for recompute in (False, True):
        network, _ = release.small_released(kind)
        network.backbone.recompute = recompute
        first = network.backbone.down[0] if kind == "unet" else network.backbone.enc[0]
        first.register_forward_pre_hook(lambda *_, how=recompute: calls.append(how))
        network.train()(x, w).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7 * a.abs().max().item())
    assert calls == [False, True, True]


@SLOW
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SIDES)
def test_the_plain_model_exports_and_compiles_between_other_uses_in_one_process(kind):
    """Inference, export with a dynamic batch, use of the program, compilation, inference, then
    training, also of the fast form."""
    network = release.small_released(kind)[0]
    x, w = torch.rand(2, 1, *[SIDES[kind]] * 3), torch.randn(3, 7)
    with torch.inference_mode():
        before = network(x, w)
        first = network(x[:1], w)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(network, (x, w), dynamic_shapes=({0: batch}, None))
    assert torch.allclose(program.module()(x, w), before, atol=1e-4)
    assert torch.allclose(program.module()(x[:1], w), first, atol=1e-4)
    with torch.no_grad():
        compiled = torch.compile(network, backend="aot_eager", dynamic=False)
        assert torch.allclose(compiled(x, w), before, atol=1e-4)
    with torch.inference_mode():
        assert torch.equal(network(x, w), before)
    network.train()(x[:1], w).mean().backward()
    assert all(p.grad is not None for p in network.parameters())
    fast.accelerate(network)(x[:1], w).mean().backward()


def test_wrong_sides_are_named():
    swin = model.UniversalModel(model.SwinUNETR(feature_size=12), text_dim=5)
    for network, sizes, wanted in (
            (tiny_model(), [(64, 64, 65), (16, 64, 64), (96, 72, 96)], "of 16 and at least 32"),
            (swin, [(64, 64, 80), (32, 64, 64)], "of 32 and at least 64")):
        for size in sizes:
            with pytest.raises(ValueError, match=f"multiples {wanted}, got"):
                network(torch.zeros(1, 1, *size), torch.zeros(1, 5))


# ---- public weights ------------------------------------------------------------------------------
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


LAYOUTS = [           # key of the weights, what precedes the backbone's names, and the others
    ("", "backbone.", ""), ("net", "module.backbone.", "module."), ("net", "module.", "module."),
    # of derivatives
    ("state_dict", "model.backbone.", "model."), ("model", "net.", "net."),
    ("network", "_orig_mod.module.backbone.", "_orig_mod.module."),
    ("state_dict", "model.module.backbone.", ""), ("", "module.network.backbone.", "module.")]


def in_layout(state, key, backbone, others):
    """A released state dict with other words before its names, and a key beside an optimiser."""
    renamed = {backbone + name.removeprefix("backbone.") if name.startswith("backbone.")
               else others + name: value for name, value in state.items()}
    return {key: renamed, "optimizer": {"state": {}}, "epoch": 3} if key else renamed


@pytest.mark.parametrize("kind", SIDES)
def test_every_layout_of_a_released_file_gives_the_same_network(kind, tmp_path):
    network, state = release.small_released(kind)
    for layout in LAYOUTS:
        torch.save(in_layout(state, *layout), tmp_path / "file.pth")
        got, w = model.load_released(tmp_path / "file.pth")
        assert torch.equal(w, state["organ_embedding"]) and not got.training
        assert got.state_dict().keys() == network.state_dict().keys()
        for name, value in network.state_dict().items():
            assert torch.equal(got.state_dict()[name], value), (layout, name)


@pytest.mark.parametrize("kind", SIDES)
def test_a_file_that_does_not_fit_is_refused_with_what_differs(kind):
    """One name missing, one too many, one of another shape; text rows of another width or none;
    hundreds of differences, in a short line."""
    _, state = release.small_released(kind)
    name, ours = {"unet": ("backbone.up_tr64.ops.1.conv1.bias", "backbone.merge.2.1.conv.bias"),
                  "swin_unetr": ("backbone.swinViT.layers1.0.blocks.0.norm1.bias",
                                 "backbone.stages.0.blocks.0.norm1.bias")}[kind]
    others = {k: v for k, v in state.items() if k != name}
    very_different = {k.replace("ops.1", "x").replace("mlp", "x"): v[:-1] if k.endswith(
        ("norm1.weight", "bn1.weight")) else v for k, v in state.items()}
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
             "Missing key.*controller.text.weight"),
            (very_different, "Missing key.*Unexpected key.*size mismatch")):
        with pytest.raises(ValueError, match=f"f.pth: not the released.*{what}.*--pretrained") as e:
            model.load_released(in_layout(content, *LAYOUTS[3]), where="f.pth")
        assert "\n" not in str(e.value) and len(str(e.value)) < 1000


def test_a_file_with_two_models_is_refused():
    _, state = release.small_released("unet")
    twice = {f"{word}.{k}": v for word in ("model", "module") for k, v in state.items()}
    with pytest.raises(ValueError, match="only parameter that is .* of this model"):
        model.load_released(twice)
    with pytest.raises(ValueError, match="weights under net and model"):
        model.load_released({"model": state, "net": state})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("what, wanted", [
    ("numpy scalar", r"it holds numpy\._?core\.multiarray\.scalar; only tensors"),
    ("cut", "not a readable checkpoint .*zip"), ("text", "not a readable checkpoint"),
    ("pickle", "Unsupported operand 149"), ("list", "a checkpoint is a dict")])
def test_a_refused_checkpoint_is_named_with_the_cause(tmp_path, what, wanted):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(300, 300)}, path)
    if what == "numpy scalar":
        torch.save({"best": np.float64(0.5)}, path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    if what == "text":
        path.write_bytes(b"hello world, this is text")
    if what == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    if what == "list":
        torch.save([1], path)
    with pytest.raises(ValueError, match=f"file.pt: .*{wanted}") as e:
        model.read_checkpoint(path)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)
    assert len(str(e.value)) < 700 and "Re-running" not in str(e.value)     # torch's bad advice
