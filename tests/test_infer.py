"""Sliding window, blending, interpolation to the scan's own grid, and the command."""
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import affine_of, write_nifti

import data
import infer
import labels
from model import FORMAT, build_model


def identity(x, w):
    """(B, 1, ...) -> (B, K, ...): the image itself, times k + 1."""
    return torch.cat([x * (k + 1) for k in range(len(w))], 1)


@pytest.mark.parametrize("shape", [(64, 64, 64), (65, 64, 97), (150, 71, 64), (30, 1, 100),
                                   (63, 127, 33), (64, 64, 192)])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_identity_network_survives_the_sliding_window(shape, overlap):
    x = np.random.default_rng(0).random(shape, np.float32) - 0.3
    out = infer.sliding_window(x, identity, torch.zeros(2, 1), patch=64, overlap=overlap, batch=3)
    assert out.shape == (2, *shape)
    assert np.abs(out[1].numpy() - 2 * x).max() < 1e-5


def test_window_weights_add_up_to_one_everywhere():
    starts = infer.window_starts(150, 64)
    assert starts == [0, 29, 57, 86]
    total = np.zeros(150)
    for s, w in zip(starts, infer.window_weights(starts, 64), strict=True):
        total[s:s + 64] += w
        assert w.argmax() in (31, 32) or s in (0, 86)      # largest in the middle, but at the ends
    assert np.abs(total - 1).max() < 1e-6


def test_windows_of_air_are_computed_once():
    calls = []

    def model(x, w):
        calls.append(len(x))
        return identity(x, w)
    x = np.zeros((64, 64, 256), np.float32)
    x[:, :, :30] = 0.5
    infer.sliding_window(x, model, torch.zeros(1, 1), patch=64)
    assert len(calls) == 2                       # one window with tissue, one of air


def test_bf16_is_the_default_only_where_the_hardware_computes_in_it(monkeypatch):
    """CUDA: from compute capability 8.0 (Ampere). CPU: oneDNN is asked, in builds that have it."""
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert infer.use_amp("cuda") is expected
    assert infer.use_amp("mps") is False
    monkeypatch.setattr(torch.ops, "mkldnn", type("Ops", (), {}))
    assert infer.use_amp("cpu") is False
    monkeypatch.setattr(torch.ops, "mkldnn", type("Ops", (), {
        "_is_mkldnn_bf16_supported": staticmethod(lambda: True)}))
    assert infer.use_amp(torch.device("cpu")) is True


def sphere_scan(tmp_path, codes="LPS", spacing=(2.0, 2.5, 3.0), shape=(70, 60, 52)):
    """Write a scan of a 200 HU ball in water and air, in the given axes -> (path, ball's mask)."""
    A = affine_of(codes, spacing)
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    centre = np.array(shape) * [0.5, 0.4, 0.6]
    r = np.linalg.norm((ijk - centre) * spacing, axis=-1)
    hu = np.where(r < 25, 200, np.where(r < 55, 0, -1000)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", hu, A)
    return tmp_path / "scan.nii.gz", r < 25


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_thresholding_network_segments_in_the_scans_own_grid(tmp_path, codes):
    """Logit > 0 where HU > 100: the result is the ball, in the axes of the file."""
    path, expected = sphere_scan(tmp_path, codes)

    def model(x, w):
        return torch.cat([(x - 0.647) * 50, (0.2 - x) * 0 - 9], 1)
    v = data.load_volume(path)
    seg = infer.segment(v, model, torch.zeros(2, 1), spacing_mm=2.5, patch=64)
    classes = labels.make_classes(["Ball", "Nothing"])
    results = infer.write_results("scan", tmp_path / "out", path, seg, classes, [0, 1],
                                  masks=True, preview=False, volume=v)
    got = nib.load(tmp_path / "out/scan.nii.gz")
    assert np.array_equal(got.affine, nib.load(path).affine) and got.shape == expected.shape
    label = np.asarray(got.dataobj)
    assert 2 * (expected & (label == 1)).sum() / (expected.sum() + (label == 1).sum()) > 0.95
    assert results[0]["volume_ml"] == pytest.approx((label == 1).sum() * 15 / 1000, abs=1e-3)
    assert results[1]["volume_ml"] == 0
    mask = np.asarray(nib.load(tmp_path / "out/scan/ball.nii.gz").dataobj)
    assert np.array_equal(mask, label == 1)
    assert json.loads((tmp_path / "out/scan.json").read_text())["classes"][0]["value"] == 1


def test_slabs_and_whole_volume_give_the_same_segmentation(tmp_path):
    """Slab by slab gives what sigmoid, resampling and threshold of the whole logits give."""
    path, _ = sphere_scan(tmp_path, "RAS", (2, 2, 2), (66, 70, 120))
    v = data.load_volume(path)

    def model(x, w):
        smooth = torch.nn.functional.avg_pool3d(x, 5, 1, 2)
        return torch.cat([(smooth - t) * 20 for t in (0.3, 0.5, 0.9)], 1)
    seg = infer.segment(v, model, torch.zeros(3, 1), spacing_mm=1.5, patch=64)
    image, shape, box = data.preprocess(v, 1.5)
    logits = infer.sliding_window(image, model, torch.zeros(3, 1), patch=64).numpy()
    best = np.full(v.array.shape, 0.5)
    winner = np.zeros(v.array.shape, int)
    for k in range(3):
        prob = np.zeros(shape, np.float32)
        prob[box] = 1 / (1 + np.exp(-logits[k]))
        prob = data.resample(prob, v.array.shape)
        core = np.ones_like(prob, bool)
        for axis in range(3):      # outside the body's box everything is background
            at = data.positions(shape[axis], v.array.shape[axis])
            inside = (at >= box[axis].start) & (at <= box[axis].stop - 1)
            core &= inside.reshape([-1 if a == axis else 1 for a in range(3)])
        near = np.abs(prob - 0.5) < 1e-4
        assert np.array_equal(seg.masks.get(k)[~near], ((prob > 0.5) & core)[~near])
        winner[core & (prob > best)] = k
        best = np.where(core, np.maximum(best, prob), best)
    found = seg.masks.to_array().any(0)
    assert (winner[found] == seg.winner[found]).mean() > 0.999


def test_merge_puts_children_over_parents_then_the_winner_then_table_order():
    classes = labels.make_classes(["Organ", {"name": "Tumor", "parents": ["Organ"]}, "Other"])
    seg = infer.Segmentation((6, 1, 1), 3)
    on = {0: [1, 1, 1, 0, 0, 1], 1: [0, 1, 0, 1, 0, 1], 2: [0, 0, 1, 0, 0, 1]}
    for k, mask in on.items():
        seg.masks.set(k, np.array(mask, bool).reshape(6, 1, 1))
    seg.winner[:, 0, 0] = [0, 0, 2, 0, 1, 2]
    # organ | tumor over organ | Other wins | tumor alone | nothing | Other wins over both
    assert seg.merge(classes)[:, 0, 0].tolist() == [1, 2, 3, 2, 0, 3]


def test_class_70_is_merged_like_any_other():
    """70 classes need three words per voxel, and 300 a 16-bit label map."""
    for K in (70, 300):
        seg = infer.Segmentation((2, 1, 1), K)
        seg.masks.set(K - 1, np.array([True, False]).reshape(2, 1, 1))
        seg.winner[0] = K - 1
        classes = labels.make_classes([f"part {k}" for k in range(K)])
        assert seg.merge(classes).ravel().tolist() == [K, 0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "m.pt"
    torch.manual_seed(0)
    spec = {"backbone": "unet", "width": 8, "text_dim": 3}
    torch.save({"format": FORMAT, "spec": spec, "model": build_model(spec).state_dict(),
                "w": torch.eye(3),
                "classes": [{"name": "Liver"}, {"name": "Spleen"}, {"name": "Colon"}],
                "trained": ["Liver", "Spleen"],
                "config": {"spacing_mm": 4.0, "patch": 64}}, path)
    return path


def test_command_writes_label_names_volumes_and_a_preview(tmp_path, checkpoint, capsys):
    path, _ = sphere_scan(tmp_path)
    assert infer.main(["--checkpoint", str(checkpoint), "--input", str(path), "--output",
                       str(tmp_path / "out"), "--preview", "--classes", "spleen"]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "itksnap_labels.txt", "scan.json", "scan.nii.gz", "scan.png"]
    assert set(np.unique(np.asarray(nib.load(tmp_path / "out/scan.nii.gz").dataobj))) <= {0, 2}


def command(checkpoint, scan, output, *more):
    return labels.run(infer.main, ["--checkpoint", str(checkpoint), "--input", str(scan),
                                   "--output", str(output), *more])


@pytest.mark.parametrize("how", ["file", "folder", "link to the folder", "link to the scan",
                                 "mask"])
def test_a_scan_is_never_written_over(tmp_path, checkpoint, capsys, how):
    scan, _ = sphere_scan(tmp_path / "in")
    content, source, output, flags = scan.read_bytes(), scan, scan.parent, []
    if how == "folder":
        source = scan.parent
    if how == "link to the folder":
        output = tmp_path / "link"
        output.symlink_to(scan.parent)
    if how == "link to the scan":
        source = tmp_path / "other" / "scan.nii.gz"
        source.parent.mkdir()
        source.symlink_to(scan)
    if how == "mask":                # the mask would be written to OUT/liver/liver.nii.gz
        source = tmp_path / "liver" / "liver.nii.gz"
        source.parent.mkdir()
        scan.rename(source)
        scan, output, flags = source, tmp_path, ["--masks"]
    assert command(checkpoint, source, output, *flags) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert scan.read_bytes() == content and len(list(scan.parent.iterdir())) == 1


def test_a_result_is_there_already_only_for_the_same_scan(tmp_path, checkpoint, capsys):
    """Not for another scan of the same name, nor for a new scan under the old path."""
    first, _ = sphere_scan(tmp_path / "a")
    second, _ = sphere_scan(tmp_path / "b", shape=(66, 60, 52))
    out = tmp_path / "out"
    said = []
    for scan in (first, first, second, second):
        assert command(checkpoint, scan, out) == 0
        said.append("1 there already" in capsys.readouterr().out)
    assert said == [False, True, False, True]
    assert nib.load(out / "scan.nii.gz").shape == (66, 60, 52)
    sphere_scan(tmp_path / "b", shape=(64, 60, 52))
    assert command(checkpoint, second, out) == 0
    assert nib.load(out / "scan.nii.gz").shape == (64, 60, 52)


def test_plain_gives_the_same_result_files_and_is_a_setting_of_a_result(tmp_path, checkpoint,
                                                                        capsys):
    """The bias of the last layer of the heads is set so that about half of the body is labelled.
    fast.py and model.py differ by rounding, so a few voxels at the threshold may differ."""
    scan, _ = sphere_scan(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    model = build_model(content["spec"])
    model.load_state_dict(content["model"])
    image = torch.from_numpy(infer.pad_to(data.preprocess(data.load_volume(scan), 4.0)[0], 64)[0])
    bias, = (p for p in model.parameters() if p.shape == (153,))
    with torch.no_grad():
        bias[-1] -= model(image[None, None], content["w"])[:, :, image > 0].median()
    checkpoint = tmp_path / "shifted.pt"
    torch.save({**content, "model": model.state_dict()}, checkpoint)
    flags = ["--masks", "--no-amp", "--no-postprocess"]
    assert command(checkpoint, scan, tmp_path / "fast", *flags) == 0
    assert command(checkpoint, scan, tmp_path / "plain", *flags, "--plain") == 0
    files = [sorted(str(p.relative_to(tmp_path / d)) for p in (tmp_path / d).rglob("*"))
             for d in ("fast", "plain")]
    assert files[0] == files[1] and "scan/liver.nii.gz" in files[0]
    fast, plain = (np.asarray(nib.load(tmp_path / d / "scan.nii.gz").dataobj)
                   for d in ("fast", "plain"))
    assert 0.1 < (fast > 0).mean() < 0.9 and (fast == plain).mean() > 0.999
    capsys.readouterr()
    assert command(checkpoint, scan, tmp_path / "fast", *flags) == 0
    assert "1 there already" in capsys.readouterr().out
    assert command(checkpoint, scan, tmp_path / "fast", *flags, "--plain") == 0
    assert "there already" not in capsys.readouterr().out


def test_plain_leaves_the_model_as_it_is(tmp_path, checkpoint, monkeypatch):
    """fast.accelerate is called once, on the model that then computes; not with --plain."""
    scan, _ = sphere_scan(tmp_path)
    calls = []
    monkeypatch.setattr(infer.fast, "accelerate", lambda model: calls.append(model) or model)
    assert command(checkpoint, scan, tmp_path / "fast") == 0 and len(calls) == 1
    assert command(checkpoint, scan, tmp_path / "plain", "--plain") == 0 and len(calls) == 1


@pytest.mark.parametrize("what", ["missing scan", "truncated", "4D", "empty folder", "other kind",
                                  "not a checkpoint", "missing checkpoint", "unknown class",
                                  "untrained class"])
def test_a_users_mistake_is_one_line_and_leaves_nothing(tmp_path, checkpoint, capsys, what):
    scan, _ = sphere_scan(tmp_path)
    extra = []
    if what == "missing scan":
        scan = tmp_path / "no.nii.gz"
    if what == "truncated":
        scan.write_bytes(scan.read_bytes()[:3000])
    if what == "4D":
        write_nifti(scan, np.zeros((4, 5, 6, 2), np.int16), np.eye(4))
    if what == "empty folder":
        scan = tmp_path / "empty"
        scan.mkdir()
    if what == "other kind":
        checkpoint = tmp_path / "other.pt"
        torch.save({"state_dict": {"a": torch.zeros(1)}}, checkpoint)
    if what == "not a checkpoint":
        checkpoint = scan
    if what == "missing checkpoint":
        checkpoint = tmp_path / "no.pt"
    if what == "untrained class":
        extra = ["--classes", "colon"]
    if what == "unknown class":
        extra = ["--classes", "lever"]
    status = command(checkpoint, scan, tmp_path / "out", *extra)
    lines = [e for e in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error:" in e]
    assert status == 2 and len(lines) == 1 and len(lines[0]) < 400
    assert not (tmp_path / "out").exists()


def test_the_command_refuses_a_constant_scan_and_notes_values_that_are_not_hounsfield_units(
        tmp_path, checkpoint, capsys):
    """A single value would be "Liver 2720 ml"; 1024 was added to the other scan."""
    constant = tmp_path / "constant.nii.gz"
    write_nifti(constant, np.full((20, 20, 20), 60, np.int16), np.diag([4.0, 4, 4, 1]))
    assert command(checkpoint, constant, tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{constant}: all of its voxels have the value 60" in error
    assert not (tmp_path / "out" / "constant.nii.gz").exists()
    shifted, _ = sphere_scan(tmp_path / "shifted")
    image = nib.load(shifted)
    write_nifti(shifted, np.asarray(image.dataobj) + np.int16(1024), image.affine)
    assert command(checkpoint, shifted, tmp_path / "out") == 0
    assert f"note: {shifted}: its values lie in 24..1224" in capsys.readouterr().out
