"""Training and inference on a second device, which a machine without a GPU can have as well
(second_device.py): nothing mixes devices, results equal those of the CPU, and the device is seldom
waited for.

A network takes one of two forms:

plain  the code of model.py (--plain)
gpu    what serves GPUs in fast.py, as on CUDA
"""
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from runs import config, content_of_checkpoint, same, segment_with, untrained, weights
from second_device import second_device

import clip_text
import model
import train
from support import checkpoints, fast, streaming

slow = pytest.mark.slow

@pytest.fixture(autouse=True)
def what_serves_gpus(monkeypatch):
    """fast.py treats both devices as it does CUDA."""
    for cls in fast.FAST.values():
        devices = ("cpu", "meta") if "cuda" in cls.devices else ()
        monkeypatch.setattr(cls, "devices", devices)


# ---- the second device itself --------------------------------------------------------------------
@pytest.mark.parametrize("mixed", [
    lambda here, there: here + there,
    lambda here, there: there.index_select(0, torch.tensor([1])),
    lambda here, there: torch.where(here > 0, there, 0),
    lambda here, there: torch.stack([there[0], torch.tensor(1.0)]),    # not even without axes
    lambda here, there: torch.zeros(()).add_(there[0]),                # the result would lie there
    lambda here, there: here[there.long()],
    lambda here, there: there.masked_fill(here > 1, 0),
    lambda here, there: torch.nn.functional.linear(there, here[None]),
])
def test_mixing_devices_is_an_error(mixed):
    with second_device(), pytest.raises(RuntimeError, match="on the same device.*meta and cpu"):
        mixed(torch.arange(3.0), torch.arange(3.0).to("meta"))


def test_what_cuda_takes_from_the_cpu_is_allowed_and_fetches_nothing():
    """Tensors without axes, indices, masks and copies."""
    with second_device() as fetches:
        a = torch.arange(4.0).to("meta")
        assert a.device.type == "meta"
        a[torch.tensor([True, False, False, False])] = 5
        parts = [a * torch.tensor(2.0), a[torch.tensor([3, 0])], a[[1, 2]], a[np.array([1])],
                 a[torch.tensor([True, False, False, True])], torch.where(a > 1, a, 0.0)]
        a.copy_(torch.ones(4))
        assert fetches == []
        assert [part.tolist() for part in parts] == [
            [10, 2, 4, 6], [3, 5], [1, 2], [1], [5, 3], [5, 0, 2, 3]]
        assert a.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("fetch", [
    lambda a: a.sum().item(),
    lambda a: bool(a.any()),
    lambda a: a.tolist(),
    lambda a: a.cpu(),
    lambda a: a.to("cpu", torch.int32, non_blocking=True),
    lambda a: torch.zeros(3).copy_(a),
    lambda a: a.nonzero(),
    lambda a: a[a > 0],
    lambda a: a.__setitem__(a > 0, 7.0),
    lambda a: a.unique(),
    lambda a: a.repeat_interleave(a.long()),
    lambda a: torch.equal(a, a),
])
def test_a_fetch_is_recorded_once_with_its_line(fetch):
    with second_device() as fetches:
        a = torch.arange(3.0).to("meta")
        fetch(a)
    line = fetch.__code__.co_firstlineno
    assert fetches == [f"tests/support/test_second_device.py:{line}"]


@pytest.mark.parametrize("refused, words", [
    (lambda a: a.numpy(), "Use Tensor.cpu"),
    (lambda a: np.asarray(a), "Use Tensor.cpu"),
    (lambda a: np.add(a, 1), "Use Tensor.cpu"),
    (lambda a: torch.zeros(3, dtype=torch.float64, device="meta"), "no float64"),
    (lambda a: torch.tensor(np.ones(3), device="meta"), "no float64"),
    (lambda a: torch.zeros(3, dtype=torch.float64).to("meta"), "no float64"),
    (lambda a: a.double(), "no float64"),
    (lambda a: a.sum(dtype=torch.float64), "no float64"),
])
def test_numpy_and_float64_are_refused(refused, words):
    with second_device(), pytest.raises(TypeError, match=words):
        refused(torch.arange(3.0).to("meta"))


# ---- networks ------------------------------------------------------------------------------------
# Swin UNETR with every kind of block, but narrow: attention dominates at this size
NETWORKS = {
    "unet": ({"backbone": "unet", "width": 8, "text_dim": 5}, 32),
    "swin_unetr": ({"backbone": "swin_unetr", "feature_size": 4, "depths": (1, 2, 1, 1),
                    "heads": (1, 1, 1, 1), "text_dim": 5}, 64),
}


def forward_and_backward(backbone, form, device):
    """-> logits, and the gradients of all parameters, on the CPU."""
    spec, side = NETWORKS[backbone]
    torch.manual_seed(0)
    network = model.build_model(spec).to(device)
    network.backbone.recompute = device == "meta"
    if form == "gpu":
        fast.accelerate(network)
    x, w = torch.rand(1, 1, side, side, side).to(device), torch.randn(3, 5).to(device)
    logits = network(x, w)
    weight = torch.linspace(-1, 1, logits.numel()).view(logits.shape).to(device)
    (logits * weight).mean().backward()
    return logits.detach().cpu(), [p.grad.cpu() for p in network.parameters()]


def relative(got, want) -> float:
    """The norm of the difference of two lists of tensors by the norm of the second."""
    got, want = (torch.cat([t.flatten() for t in part]).double() for part in (got, want))
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backbone, form", [
    ("unet", "plain"), ("unet", "gpu"),
    pytest.param("swin_unetr", "plain", marks=slow), pytest.param("swin_unetr", "gpu", marks=slow)])
def test_logits_and_gradients_are_those_of_the_cpu(backbone, form):
    """Also where the device computes activations twice. Bit for bit in the plain U-Net. Elsewhere
    PyTorch picks other kernels for tensor subclasses, which differ by rounding."""
    logits, gradients = forward_and_backward(backbone, form, "cpu")
    with second_device():
        there, gradients_there = forward_and_backward(backbone, form, "meta")
    limit = 0 if (backbone, form) == ("unet", "plain") else 1e-5
    assert relative([there], [logits]) <= limit
    assert relative(gradients_there, gradients) <= limit


def test_text_features_are_those_of_the_cpu():
    torch.manual_seed(0)
    encoder = clip_text.TextEncoder(vocabulary=50, context_length=9, width=16, layers=2, heads=2,
                                    embed_dim=6).eval()
    tokens = torch.randint(0, 49, (3, 9))
    tokens[:, 6] = 49                                                  # the end of the text
    with torch.no_grad():
        want = encoder(tokens)
        with second_device() as fetches:
            features = encoder.to("meta")(tokens.to("meta"))
            assert fetches == []
            features = features.cpu()
    assert torch.allclose(features, want, rtol=1e-5, atol=1e-6)


# ---- training ------------------------------------------------------------------------------------
def train_on_device(cfg, monkeypatch) -> list[list[str]]:
    """Train on the second device, stop after the first step and resume -> the fetches of every
    step. Those of the whole loop are counted; only a checkpoint and a validation may fetch more."""
    steps = []
    with second_device() as fetches, monkeypatch.context() as patch:
        def uncounted(call):
            def wrapper(*args, **kwargs):
                before = len(fetches)
                result = call(*args, **kwargs)
                del fetches[before:]
                return result
            return wrapper

        def update(run, net, batch, cfg, amp, stop, call=train.update):
            fetches.clear()                        # those of the start of the run
            stop.requested = not steps
            result = call(run, net, batch, cfg, amp, stop)
            steps.append(list(fetches))
            return result
        patch.setattr(checkpoints, "save_checkpoint", uncounted(checkpoints.save_checkpoint))
        patch.setattr(train, "validate", uncounted(train.validate))
        patch.setattr(train, "update", update)
        with pytest.raises(KeyboardInterrupt):
            train.main(cfg)
        train.main(cfg)
        assert fetches == steps[-1]
    return steps


def losses(out) -> list[float]:
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def moments(out) -> list[torch.Tensor]:
    """Adam's running means of the gradients."""
    return [state["exp_avg"] for state in
            content_of_checkpoint(out)["optimizer"]["state"].values()]


SWIN = {"backbone": "swin_unetr", "width": 12, "patch": 64, "batch": 1, "val_fraction": 0.0}


@pytest.mark.parametrize("plain, how", [
    (True, {"init": "base/last.pt"}),
    pytest.param(False, {}, marks=slow),
    pytest.param(False, SWIN, marks=slow),
    pytest.param(False, {"extend": "base/last.pt"}, marks=slow),
])
def test_training_ends_as_on_the_cpu_and_a_step_fetches_once(tiny, tmp_path, monkeypatch, plain,
                                                             how):
    """Two steps, the second one after resuming. In the plain form losses and weights are equal; in
    the other form they differ by rounding, which Adam turns into steps of the size of the learning
    rate where a gradient is nearly zero. --init and --extend start from kidneys, learned on the
    CPU; the liver is then added."""
    how = {"spacing_mm": 8.0, "batch": 2, "steps": 2, "val_fraction": 0.25, "plain": plain, **how}
    if "init" in how or "extend" in how:
        (tmp_path / "kidneys.json").write_text('["Right Kidney", "Left Kidney"]')
        (tmp_path / "liver.json").write_text('["Liver"]')
        train.train(config(tiny, tmp_path / "base", data=(str(tiny / "raw/Dataset902_Kidney"),),
                           classes="kidneys.json", steps=1, spacing_mm=8.0))
        how |= {"data": (str(tiny / "raw/Dataset901_Liver"),), "classes": "liver.json",
                "val_fraction": 0.5}
    cpu, there = tmp_path / "cpu", tmp_path / "there"
    train.train(config(tiny, cpu, **how))
    steps = train_on_device(config(tiny, there, device="meta", resume=True, **how), monkeypatch)
    assert len(steps) == 2 and all(len(fetched) <= 1 for fetched in steps), steps
    assert content_of_checkpoint(there)["step"] == 2
    assert losses(there) == pytest.approx(losses(cpu), rel=0 if plain else 1e-4)
    assert relative(moments(there), moments(cpu)) <= (0 if plain else 1e-2)
    assert weights(there).keys() == weights(cpu).keys()
    assert same(weights(there), weights(cpu)) or not plain


# ---- inference -----------------------------------------------------------------------------------
@pytest.mark.parametrize("flag", [[], pytest.param(["--plain"], marks=slow)])
def test_results_are_those_of_the_cpu_and_slabs_are_fetched_together(tiny, tmp_path, monkeypatch,
                                                                     flag):
    """At most three fetches for every call of the model, which takes three windows, beside the
    probabilities, which are fetched class by class."""
    checkpoint, calls, fetched = untrained(tmp_path / "m.pt"), [], []
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["controller.out.bias"][-1] = 0         # an untrained head finds nothing
    torch.save(content, checkpoint)
    scan = tiny / "raw/Dataset901_Liver/imagesTr/c0_0000.nii.gz"
    how = ["--batch", "3", "--masks", "--preview", "--probabilities", "--no-amp", *flag]
    assert segment_with(checkpoint, scan, tmp_path / "cpu", *how) == 0
    with second_device() as fetches, monkeypatch.context() as patch:
        def counted(volume, network, w, call=streaming.segment, **how):
            fetches.clear()
            hook = network.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
            seg = call(volume, network, w, **how)
            hook.remove()
            fetched.extend(fetches)
            return seg
        patch.setattr(streaming, "segment", counted)
        assert segment_with(checkpoint, scan, tmp_path / "there", *how, "--device", "meta") == 0
    assert [len(windows) for windows in calls] == [3, 1] * 3
    assert 0 < len(fetched) <= 3 * len(calls) + 3 * 2, fetched
    files = [sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d).rglob("*") if p.is_file())
             for d in ("cpu", "there")]
    assert files[0] == files[1] and len(files[0]) == 8
    for file in files[0]:
        a, b = tmp_path / "cpu" / file, tmp_path / "there" / file
        if file.suffix == ".gz":
            assert np.array_equal(nib.load(a).affine, nib.load(b).affine)
            assert np.array_equal(nib.load(a).dataobj, nib.load(b).dataobj)
        elif file.suffix == ".json":
            assert json.loads(a.read_text()) == json.loads(b.read_text())
        else:
            assert a.read_bytes() == b.read_bytes()
    label = np.asarray(nib.load(tmp_path / "cpu/c0.nii.gz").dataobj)
    assert len(np.unique(label)) > 1                           # otherwise all of this says little
