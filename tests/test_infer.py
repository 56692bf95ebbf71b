"""Windows, blending, the way back to the scan's grid, and the command."""
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
                                   (63, 127, 33)])
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
        assert w.argmax() in (31, 32) or s in (0, 86)
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


def sphere_scan(tmp_path, codes="LPS", spacing=(2.0, 2.5, 3.0), shape=(70, 60, 52)):
    """A ball of 200 HU in air and water, written in the given axes; returns path and its mask."""
    A = affine_of(codes, spacing)
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    centre = np.array(shape) * [0.5, 0.4, 0.6]
    r = np.linalg.norm((ijk - centre) * spacing, axis=-1)
    hu = np.where(r < 25, 200, np.where(r < 55, 0, -1000)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", hu, A)
    return tmp_path / "scan.nii.gz", r < 25


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
def test_a_thresholding_network_segments_in_the_scans_own_grid(tmp_path, codes):
    """Logit > 0 where HU > 100; the ball comes back where it was, in the file's own axes."""
    path, want = sphere_scan(tmp_path, codes)

    def model(x, w):
        return torch.cat([(x - 0.647) * 50, (0.2 - x) * 0 - 9], 1)
    v = data.load_volume(path)
    seg = infer.segment(v, model, torch.zeros(2, 1), spacing_mm=2.5, patch=64)
    classes = labels.make_classes(["Ball", "Nothing"])
    rows = infer.write_results("scan", tmp_path / "out", path, seg, classes, [0, 1], masks=True,
                               preview=False, volume=v)
    got = nib.load(tmp_path / "out/scan.nii.gz")
    assert np.array_equal(got.affine, nib.load(path).affine) and got.shape == want.shape
    label = np.asarray(got.dataobj)
    assert 2 * (want & (label == 1)).sum() / (want.sum() + (label == 1).sum()) > 0.95
    assert rows[0]["volume_ml"] == pytest.approx((label == 1).sum() * 15 / 1000, abs=1e-3)
    assert rows[1]["volume_ml"] == 0
    mask = np.asarray(nib.load(tmp_path / "out/scan/ball.nii.gz").dataobj)
    assert np.array_equal(mask, label == 1)
    assert json.loads((tmp_path / "out/scan.json").read_text())["classes"][0]["value"] == 1


def test_slabs_and_whole_volume_give_the_same_segmentation(tmp_path):
    """Bits from streaming equal sigmoid, resample and threshold of the whole logits at once."""
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
        for a in range(3):         # one voxel at the box's rim is background when streaming
            at = data.positions(shape[a], v.array.shape[a])
            ok = (at >= box[a].start) & (at <= box[a].stop - 1)
            core &= ok.reshape([-1 if i == a else 1 for i in range(3)])
        near = np.abs(prob - 0.5) < 1e-4
        assert np.array_equal(seg.mask(k)[~near], ((prob > 0.5) & core)[~near])
        winner[core & (prob > best)] = k
        best = np.where(core, np.maximum(best, prob), best)
    any_ = seg.mask(0) | seg.mask(1) | seg.mask(2)
    assert (winner[any_] == seg.winner[any_]).mean() > 0.999


def test_merge_puts_children_over_parents_then_the_winner_then_table_order():
    classes = labels.make_classes(["Organ", {"name": "Tumor", "parents": ["Organ"]}, "Other"])
    seg = infer.Segmentation((6, 1, 1), 3)
    on = {0: [1, 1, 1, 0, 0, 1], 1: [0, 1, 0, 1, 0, 1], 2: [0, 0, 1, 0, 0, 1]}
    for k, m in on.items():
        seg.set_mask(k, np.array(m, bool).reshape(6, 1, 1))
    seg.winner[:, 0, 0] = [0, 0, 2, 0, 1, 2]
    # organ | tumour over organ | Other wins | tumour alone | nothing | Other wins over both
    assert seg.merge(classes)[:, 0, 0].tolist() == [1, 2, 3, 2, 0, 3]


def test_more_than_32_classes_need_another_word_and_keep_their_bits():
    seg = infer.Segmentation((2, 2, 2), 70)
    m = np.zeros((2, 2, 2), bool)
    m[1, 0, 1] = True
    for k in (0, 31, 32, 69):
        seg.set_mask(k, m)
    assert all(np.array_equal(seg.mask(k), m) for k in (0, 31, 32, 69)) and not seg.mask(33).any()


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
    return labels.run(infer.main, ["--checkpoint", str(checkpoint), "--input", str(scan), "--output",
                              str(output), *more])


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
    if how == "mask":                        # OUT/liver/liver.nii.gz is where the mask would go
        source = tmp_path / "liver" / "liver.nii.gz"
        source.parent.mkdir()
        scan.rename(source)
        scan, output, flags = source, tmp_path, ["--masks"]
    assert command(checkpoint, source, output, *flags) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert scan.read_bytes() == content and len(list(scan.parent.iterdir())) == 1


def test_a_result_is_there_already_only_for_the_same_scan(tmp_path, checkpoint, capsys):
    """Another patient's scan of the same name, and a scan replaced under its name."""
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
    status = labels.run(infer.main, ["--checkpoint", str(checkpoint), "--input", str(scan), "--output",
                                str(tmp_path / "out"), *extra])
    lines = [e for e in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error:" in e]
    assert status == 2 and len(lines) == 1 and len(lines[0]) < 400
    assert not (tmp_path / "out").exists()
