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
from model import build_model
from support import checkpoints, class_tables, nifti, pictures, processes, results, streaming


def identity(x, w):
    """(B, 1, ...) -> (B, K, ...): the image itself, times k + 1."""
    return torch.cat([x * (k + 1) for k in range(len(w))], 1)


def test_windows_of_air_are_computed_once():
    calls = []

    def model(x, w):
        calls.append(len(x))
        return identity(x, w)
    x = torch.zeros(64, 64, 256)
    x[:, :, :30] = 0.5
    parts = [logits.clone() for _, logits in streaming.slabs(x, model, torch.zeros(1, 1), patch=64)]
    assert len(calls) == 2                       # one window with tissue, one of air
    assert torch.equal(torch.cat(parts, 3), x[None])


def test_bf16_is_the_default_only_on_cuda_from_ampere_on(monkeypatch):
    """Compute capability 8.0. On a CPU --amp is allowed where the processor has the instructions:
    oneDNN emulates bf16 without them, and then computes wrong gradients."""
    for capability, expected in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert processes.choose_amp("cuda", None) is expected
        assert processes.choose_amp("cuda", True) and not processes.choose_amp("cuda", False)
    processors = (({"avx512_f": True, "avx512_bf16": False}, False), ({"avx512_bf16": True}, True),
                  ({"amx_bf16": True}, True), ({"architecture": "aarch64", "bf16": True}, True))
    for processor, allowed in processors:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda p=processor: p)
        assert processes.choose_amp("cpu", None) is processes.choose_amp("cpu", False) is False
        if allowed:
            assert processes.choose_amp(torch.device("cpu"), True)
        else:
            with pytest.raises(ValueError, match="--amp: this processor has no instructions"):
                processes.choose_amp("cpu", True)
    assert processes.choose_amp("mps", None) is False


def sphere_scan(tmp_path, codes="LPS", spacing=(2.0, 2.5, 3.0), shape=(70, 60, 52)):
    """Write a scan of a 200 HU ball in water and air, in the given axes -> (path, ball's mask)."""
    A = affine_of(codes, spacing)
    ijk = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    centre = np.array(shape) * [0.5, 0.4, 0.6]
    r = np.linalg.norm((ijk - centre) * spacing, axis=-1)
    hu = np.where(r < 25, 200, np.where(r < 55, 0, -1000)).astype(np.int16)
    write_nifti(tmp_path / "scan.nii.gz", hu, A)
    return tmp_path / "scan.nii.gz", r < 25


def test_a_slab_has_at_most_half_a_window():
    """The last window's planes come in two slabs, so that no slab takes more memory than another.
    Each slab begins where the one before ended."""
    image = torch.rand(32, 32, 56)
    found = [(start, logits.shape[3]) for start, logits in
             streaming.slabs(image, lambda x, w: x, torch.ones(1, 1), patch=32, overlap=0.25)]
    assert found == [(0, 16), (16, 8), (24, 16), (40, 16)]


@pytest.mark.parametrize("codes, spacing, shape, K", [
    ("RAS", (2, 2, 2), (66, 70, 120), 3),         # three slabs, all classes
    ("LPS", (1, 2.5, 4), (50, 40, 20), 35),       # padded to a window; more than 32 classes
    ("RAS", (9, 2, 2), (12, 70, 80), 2),          # fewer native planes than the network sees
])
def test_slab_by_slab_gives_the_segmentation_of_the_whole_volume(tmp_path, codes, spacing, shape,
                                                                 K):
    """Bit for bit, where the network says the same whatever is beside a window; class 1 is found
    nowhere."""
    path, _ = sphere_scan(tmp_path, codes, spacing, shape)
    volume = data.load_volume(path)

    def model(x, w):
        smooth = torch.nn.functional.avg_pool3d(x, 5, 1, 2)
        logits = [(smooth - t) * 20 for t in np.linspace(0.3, 0.8, len(w))]
        logits[1] = smooth - 9
        return torch.cat(logits, 1)
    how = {"spacing_mm": 1.5, "patch": 64}
    whole = infer.segment(volume, model, torch.zeros(K, 1), **how)
    by_slab = streaming.segment(volume, model, torch.zeros(K, 1), **how)
    found = whole.masks.to_array()
    assert found.any((1, 2, 3)).sum() == K - 1 and not found[1].any()
    assert np.array_equal(by_slab.masks.to_array(), found)
    assert np.array_equal(by_slab.winner[found.any(0)], whole.winner[found.any(0)])
    assert by_slab.midline == whole.midline and by_slab.masks.boxes == whole.masks.boxes


def test_a_scan_is_segmented_as_its_resampled_probabilities_say(tmp_path):
    """Computed once more in NumPy: sigmoid, resampling and threshold of the whole logits."""
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
    classes = class_tables.make_classes(["Organ", {"name": "Tumor", "parents": ["Organ"]}, "Other"])
    seg = streaming.Segmentation((6, 1, 1), 3)
    on = {0: [1, 1, 1, 0, 0, 1], 1: [0, 1, 0, 1, 0, 1], 2: [0, 0, 1, 0, 0, 1]}
    for k, mask in on.items():
        seg.masks.set(k, np.array(mask, bool).reshape(6, 1, 1))
    seg.winner[:, 0, 0] = [0, 0, 2, 0, 1, 2]
    # organ | tumor over organ | Other wins | tumor alone | nothing | Other wins over both
    assert seg.merge(classes)[:, 0, 0].tolist() == [1, 2, 3, 2, 0, 3]


def test_class_70_is_merged_like_any_other():
    """70 classes need three words per voxel, and 300 a 16-bit label map."""
    for K in (70, 300):
        seg = streaming.Segmentation((2, 1, 1), K)
        seg.masks.set(K - 1, np.array([True, False]).reshape(2, 1, 1))
        seg.winner[0] = K - 1
        classes = class_tables.make_classes([f"part {k}" for k in range(K)])
        assert seg.merge(classes).ravel().tolist() == [K, 0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "m.pt"
    torch.manual_seed(0)
    spec = {"backbone": "unet", "width": 8, "text_dim": 3}
    torch.save({"format": checkpoints.FORMAT, "spec": spec,
                "model": build_model(spec).state_dict(), "w": torch.eye(3),
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


def test_a_picture_shows_the_reference_above_the_result_and_leaves_out_air(tmp_path):
    """A body that fills an eighth of the scan's width; red is class 1, blue is class 2."""
    plt = pytest.importorskip("matplotlib.pyplot")
    array = np.full((64, 64, 64), -1000, np.int16)
    array[28:36, 28:36] = 40
    label, reference = np.zeros((64, 64, 64), np.uint8), np.zeros((64, 64, 64), np.uint8)
    label[30:34, 30:34, 30:34] = 1
    reference[30:34, 30:34, 30:34] = 2
    classes = [labels.Class("Liver"), labels.Class("Spleen")]
    colours = np.array(pictures.COLOURS[:2])
    volume = data.Volume(array, np.diag([8., 8, 8, 1]))
    seen = {}
    for name, above in (("alone", None), ("beside", reference)):
        pictures.draw(tmp_path / f"{name}.png", volume, label, classes, "title", above)
        picture = 255 * plt.imread(tmp_path / f"{name}.png")[..., :3]
        grey = 255 * (40 - data.HU_WINDOW[0]) / (data.HU_WINDOW[1] - data.HU_WINDOW[0])
        middle = len(picture) // 2
        for part, rows in (("upper", picture[:middle]), ("lower", picture[middle:])):
            for k in range(2):
                near = abs(rows - (grey + colours[k]) / 2).max(-1) < 3
                seen[name, part, k] = int(near.sum())
    assert seen["alone", "upper", 0] == seen["alone", "upper", 1] == 0
    assert seen["beside", "upper", 0] == seen["beside", "lower", 1] == 0
    assert seen["beside", "upper", 1] > 0
    # half the width of the axial picture is coloured (a sixteenth if the air were shown)
    assert seen["alone", "lower", 0] == seen["beside", "lower", 0] > 0.2 * 200 ** 2


def test_a_picture_shows_the_patients_right_on_the_left_and_front_and_head_above(tmp_path):
    """A cube of 40 mm, which has 10 x 20 x 40 voxels, at the patient's right, front and head. It is
    a square in all three planes: left and above in the axial and the coronal one, right (front) and
    above in the sagittal one. Of the letters at the edges, R has more ink than L."""
    plt = pytest.importorskip("matplotlib.pyplot")
    label = np.zeros((40, 80, 160), np.uint8)
    label[26:36, 52:72, 104:144] = 1
    volume = data.Volume(np.full(label.shape, 40, np.int16), np.diag([4.0, 2, 1, 1]))
    pictures.draw(tmp_path / "a.png", volume, label, [labels.Class("Liver")])
    picture = 255 * plt.imread(tmp_path / "a.png")[..., :3]
    height, width = picture.shape[:2]
    grey = 255 * (40 - data.HU_WINDOW[0]) / (data.HU_WINDOW[1] - data.HU_WINDOW[0])
    lower = picture[round(0.48 * height):round(0.88 * height)]        # the row with the label
    for column, on_the_left in enumerate((True, True, False)):
        start = round(column * width / 3)
        panel = lower[:, start:start + round(0.325 * width)]
        red = abs(panel - (grey + np.array(pictures.COLOURS[0])) / 2).max(-1) < 3
        rows, columns = np.nonzero(red)
        assert 0.9 < np.ptp(columns) / np.ptp(rows) < 1.1
        assert rows.mean() < 0.45 * len(panel)
        assert bool(columns.mean() < 0.5 * panel.shape[1]) is on_the_left
        yellow = (panel[..., :2].min(-1) > 200) & (panel[..., 2] < 100)
        middle = slice(round(0.4 * len(panel)), round(0.6 * len(panel)))
        edge = round(0.15 * panel.shape[1])
        ink = yellow[middle, :edge].sum() - yellow[middle, -edge:].sum()
        assert ink > 0 or not on_the_left


def test_a_picture_of_more_classes_than_the_legend_holds(tmp_path):
    pytest.importorskip("matplotlib")
    n = 60
    label = np.arange(8 * 8 * 8).reshape(8, 8, 8) % (n + 1)
    volume = data.Volume(np.full((8, 8, 8), 40, np.int16), np.diag([30., 30, 30, 1]))
    pictures.draw(tmp_path / "a.png", volume, label, [labels.Class(f"c{k}") for k in range(n)])
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_derivative_with_other_classes_than_the_built_in_ones_is_refused(tmp_path, capsys,
                                                                           monkeypatch):
    network = build_model({"backbone": "unet", "width": 8, "text_dim": 3})
    monkeypatch.setattr(checkpoints, "load_checkpoint",
                        lambda path: (network, torch.eye(25, 3), {}))
    path, _ = sphere_scan(tmp_path)
    assert command(tmp_path / "x.pth", path, tmp_path / "out", "--classes", "liver") == 2
    error = capsys.readouterr().err
    assert "x.pth: 25 text embeddings and no class names" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def command(checkpoint, scan, output, *more):
    return processes.run(infer.main, ["--checkpoint", str(checkpoint), "--input", str(scan),
                                   "--output", str(output), *more])


def content_of(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def error_line(capsys) -> str:
    """The one line in which a command said what was wrong."""
    lines = [e for e in capsys.readouterr().err.replace("\r", "\n").split("\n") if "error:" in e]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def no_model(monkeypatch):
    """infer.main without a model: every scan gets an empty result."""
    def segment(volume, model, w, *, probabilities, **how):
        return streaming.Segmentation(volume.array.shape, len(w), probabilities)
    monkeypatch.setattr(streaming, "segment", segment)


def tiny_scan(path, value=0):
    hu = np.full((4, 5, 6), value, np.int16)
    hu[0] = -1000                                  # a scan of a single value is refused
    write_nifti(path, hu, np.eye(4))
    return path


@pytest.mark.parametrize("how", ["file", "folder", "link to the folder", "link to the scan",
                                 "hard link", "mask"])
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
    if how == "hard link":
        source = tmp_path / "other" / "scan.nii.gz"
        source.parent.mkdir()
        source.hardlink_to(scan)
    if how == "mask":                # the mask would be written to OUT/liver/liver.nii.gz
        source = tmp_path / "liver" / "liver.nii.gz"
        source.parent.mkdir()
        scan.rename(source)
        scan, output, flags = source, tmp_path, ["--masks"]
    assert command(checkpoint, source, output, *flags) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert scan.read_bytes() == content and len(list(scan.parent.iterdir())) == 1


def test_a_result_is_there_already_only_for_the_same_scan(tmp_path, checkpoint, capsys, no_model):
    """Another scan of the same name is refused; --overwrite replaces the result, with all of its
    files; a new scan under the old path is segmented again."""
    first, _ = sphere_scan(tmp_path / "a")
    second, _ = sphere_scan(tmp_path / "b", shape=(66, 60, 52))
    out = tmp_path / "out"
    assert command(checkpoint, first, out, "--masks") == 0
    assert command(checkpoint, first, out, "--masks") == 0
    assert "1 there already" in capsys.readouterr().out
    before = content_of(out)
    assert command(checkpoint, second, out) == 2
    error = error_line(capsys)
    assert f"is the result of another scan, {first}, not of {second}" in error
    assert content_of(out) == before
    assert command(checkpoint, second, out, "--overwrite") == 0
    assert nib.load(out / "scan.nii.gz").shape == (66, 60, 52)
    assert sorted(content_of(out)) == ["itksnap_labels.txt", "scan.json", "scan.nii.gz"]
    sphere_scan(tmp_path / "b", shape=(64, 60, 52))
    assert command(checkpoint, second, out) == 0
    assert nib.load(out / "scan.nii.gz").shape == (64, 60, 52)


@pytest.mark.parametrize("file", ["scan.nii.gz", "scan.json", "scan.png", "scan/liver.nii.gz",
                                  "scan/liver_probability.nii.gz", "itksnap_labels.txt"])
@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_a_file_that_infer_did_not_write_is_never_replaced(tmp_path, checkpoint, capsys, no_model,
                                                           file, flag):
    """A reference label map, the JSON that dcm2niix writes beside a scan, a mask drawn by hand."""
    scan, there = tiny_scan(tmp_path / "scan.nii"), tmp_path / file
    there.parent.mkdir(exist_ok=True)
    there.write_bytes(b'{"Modality": "CT"}')
    assert command(checkpoint, scan, tmp_path, "--masks", "--probabilities", "--preview",
                   *flag) == 2
    assert f"{there}: exists and was not written by infer.py" in error_line(capsys)
    assert sorted(content_of(tmp_path)) == sorted(["scan.nii", file])
    assert there.read_bytes() == b'{"Modality": "CT"}'


def test_results_beside_scans_are_not_scans(tmp_path, checkpoint, capsys, no_model):
    """x.nii and its results x.nii.gz and x/*.nii.gz in one folder, also with --overwrite."""
    scan = tiny_scan(tmp_path / "x.nii")
    flags = ["--masks", "--probabilities"]
    for more, said in (([], "1 scan(s)"), ([], "1 there already"), (["--overwrite"], "1 scan(s)")):
        assert command(checkpoint, tmp_path, tmp_path, *flags, *more) == 0
        assert said in capsys.readouterr().out
        assert results.find_scans(tmp_path) == [scan]
    for result in ("x.nii.gz", "x/liver.nii.gz", "x/liver_probability.nii.gz"):
        assert command(checkpoint, tmp_path / result, tmp_path / "other") == 2
        assert "is a result of infer.py, not a scan" in error_line(capsys)
    scan.unlink()
    assert command(checkpoint, tmp_path, tmp_path / "other") == 2
    assert "no scan" in error_line(capsys) and not (tmp_path / "other").exists()


def test_a_result_without_json_is_unfinished(tmp_path, checkpoint, capsys, no_model, monkeypatch):
    """The run is killed after the masks, before the label map: what it wrote is not a scan and is
    replaced, but masks that were not asked for again do not stay beside the new result."""
    scan, out = tiny_scan(tmp_path / "in/x.nii"), tmp_path / "out"
    save = nifti.save_nifti

    def killed(path, *args, **kwargs):
        if path.name == "x.nii.gz":
            raise KeyboardInterrupt
        save(path, *args, **kwargs)
    assert command(checkpoint, scan, out) == 0
    with monkeypatch.context() as patch:
        patch.setattr(nifti, "save_nifti", killed)
        assert command(checkpoint, scan, out, "--masks", "--overwrite") == 130
    assert sorted(content_of(out)) == ["itksnap_labels.txt", "x.nii.gz", "x/liver.nii.gz",
                                       "x/spleen.nii.gz"]
    assert results.is_result(out / "x.nii.gz") and results.is_result(out / "x/liver.nii.gz")
    capsys.readouterr()
    assert command(checkpoint, scan, out) == 2
    assert "x/liver.nii.gz: is not of the result that would be written" in error_line(capsys)
    assert command(checkpoint, scan, out, "--masks") == 0
    assert "1 scan(s)" in capsys.readouterr().out and len(content_of(out)) == 5
    (out / "x/liver.nii.gz").unlink()                  # a result is there only with all its files
    assert command(checkpoint, scan, out, "--masks") == 0
    assert "there already" not in capsys.readouterr().out and len(content_of(out)) == 5
    assert command(checkpoint, scan, out) == 0
    assert sorted(content_of(out)) == ["itksnap_labels.txt", "x.json", "x.nii.gz"]


def test_every_nifti_file_of_a_result_says_who_wrote_it(tmp_path, checkpoint, no_model):
    """Also where the scan's own header has another description. A copy is a result, too; what is
    drawn by hand under the name of a mask is neither replaced nor removed."""
    scan, out = tmp_path / "x.nii", tmp_path / "out"
    img = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), np.eye(4))
    img.header["descrip"] = b"my scanner"
    nib.save(img, scan)
    assert not results.is_result(scan)
    assert command(checkpoint, scan, out, "--masks", "--probabilities") == 0
    files = list(out.rglob("*.nii.gz"))
    assert len(files) == 5 and all(map(results.is_result, files))
    (tmp_path / "copy.nii.gz").write_bytes(files[0].read_bytes())
    assert results.is_result(tmp_path / "copy.nii.gz")
    drawn = tiny_scan(out / "x/liver.nii.gz").read_bytes()
    assert command(checkpoint, scan, out, "--masks", "--overwrite") == 2
    assert command(checkpoint, scan, out, "--classes", "spleen") == 0
    assert sorted(p.name for p in out.rglob("*.nii.gz")) == ["liver.nii.gz", "x.nii.gz"]
    assert (out / "x/liver.nii.gz").read_bytes() == drawn


def test_a_json_of_another_program_is_no_record(tmp_path):
    for text in ("", "{}", "[1]", '{"made_with": 3}', '{"made_with": {"scan": null}}',
                 '{"made_with": {"scan": {"path": "x"}}, "files": 4}'):
        (tmp_path / "x.json").write_text(text)
        assert results.read_record(tmp_path / "x.json") is None, text
    assert results.read_record(tmp_path / "y.json") is None


@pytest.mark.parametrize("first, second", [
    ("a.nii", "a.nii.gz"), ("imagesTr/x.nii.gz", "imagesTr/x_0000.nii.gz"),
    ("imagesTr/x_0000.nii.gz", "imagesTs/x_0000.nii.gz"), ("Case.nii.gz", "case.nii.gz"),
    ("p/q.nii", "P/q.nii")])
def test_two_scans_that_would_write_one_result_are_refused(tmp_path, checkpoint, capsys, first,
                                                           second):
    paths = [tiny_scan(tmp_path / "in" / first), tiny_scan(tmp_path / "in" / second)]
    if paths[0].samefile(paths[1]):
        pytest.skip("this file system does not tell the two names apart")
    assert command(checkpoint, tmp_path / "in", tmp_path / "out") == 2
    error = error_line(capsys)
    assert all(str(path) in error for path in paths) and "the same result" in error
    assert not (tmp_path / "out").exists()


def names_found(folder) -> list[str]:
    return list(results.name_scans(results.find_scans(folder), folder))


@pytest.mark.parametrize("files, names", [
    # numbers are channels in nnU-Net's folders only, and only beside the first channel
    (["vol_0000.nii", "vol_0001.nii"], ["vol_0000", "vol_0001"]),
    (["dataset.json", "p_0000.nii", "p_0001.nii", "q_0001.nii"], ["p", "q_0001"]),
    (["dataset.json", "imagesTr/p_0000.nii", "imagesTr/p_0001.nii", "imagesTs/q_0000.nii",
      "labelsTr/p.nii"], ["p", "q"]),
    # the folders in a folder, but not those further down, and only without scans above
    (["a/ct.nii", "b/ct.nii", "b/pet.nii", "c/d/ct.nii"], ["a", "b_ct", "b_pet"]),
    (["ct.nii", "a/ct.nii"], ["ct"]),
])
def test_results_are_named_after_folder_and_file(tmp_path, files, names):
    for file in files:
        path = tmp_path / "in" / file
        if path.suffix == ".json":
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")
        else:
            tiny_scan(path)
    assert names_found(tmp_path / "in") == names


def test_a_single_file_of_a_dataset_is_called_like_its_case(tmp_path):
    for file, name in (("imagesTs/p_0000.nii.gz", "p"), ("other/p_0000.nii.gz", "p_0000")):
        scan = tiny_scan(tmp_path / file)
        assert results.name_scans(results.find_scans(scan), scan) == {name: scan}


def test_a_study_with_one_folder_per_patient(tmp_path, checkpoint, capsys, no_model):
    """Results are called after the folders; what is hidden, a label or a result is passed over."""
    study = tmp_path / "study"
    for file in ("patient1/ct.nii.gz", "segmentations/liver.nii.gz", "patient2/ct.nii.gz",
                 "patient2/pet.nii", "patient2/ct_mask.nii.gz"):
        tiny_scan(study / file)
    for file in ("patient1/._ct.nii.gz", "._x.nii.gz", ".hidden/ct.nii.gz"):
        (study / file).parent.mkdir(exist_ok=True)
        (study / file).write_bytes(b"not a scan")
    (study / "loop").symlink_to(study)
    (study / "patient1/notes.txt").touch()
    names = ["patient1", "patient2_ct", "patient2_pet"]
    for out in (tmp_path / "out", study):
        assert command(checkpoint, study, out, "--masks") == 0
        said = capsys.readouterr().out
        assert "3 scan(s)" in said
        assert "note: 2 files passed over" in said
        assert sorted(p.name for p in out.glob("*.nii.gz") if p.name[0] != ".") == [
            f"{name}.nii.gz" for name in names]
        record = json.loads((out / "patient2_pet.json").read_text())
        assert record["scan"] == str(study / "patient2/pet.nii")
        assert command(checkpoint, study, out, "--masks") == 0     # also with results in the study
        assert "0 scan(s)" in (said := capsys.readouterr().out) and "3 there already" in said


@pytest.mark.parametrize("name", ["mask_1", "case_seg", "labels", "Segmentation-3", "labelsTr/x",
                                  "x/maskTs", "liver label"])
def test_label_maps_in_a_folder_are_not_segmented(tmp_path, name):
    """Only a file that is named with --input."""
    scan = tiny_scan(tmp_path / f"{name}.nii.gz")
    with pytest.raises(ValueError, match="no scan.*1 files passed over.*name it with --input"):
        results.find_scans(tmp_path)
    assert results.find_scans(scan) == [scan]


@pytest.mark.parametrize("name", ["ct", "segovia", "unlabelled", "damask"])
def test_words_that_only_contain_a_word_for_label_maps(tmp_path, name):
    scan = tiny_scan(tmp_path / f"{name}.nii.gz")
    assert results.find_scans(tmp_path) == [scan]


def test_probabilities_are_those_of_the_resampled_logits(tmp_path):
    """Stored in steps of 1/255, above 127 exactly where the mask is set; 0 outside of the body's
    box; the header scales them to 0..1."""
    path, _ = sphere_scan(tmp_path, "LPS", (2, 2, 2), (66, 70, 120))
    v = data.load_volume(path)

    def model(x, w):
        smooth = torch.nn.functional.avg_pool3d(x, 5, 1, 2)
        return torch.cat([(smooth - t) * 9 for t in (0.3, 0.5, 0.9)], 1)
    how = {"spacing_mm": 1.5, "patch": 64}
    seg = streaming.segment(v, model, torch.zeros(3, 1), probabilities=True, **how)
    plain = streaming.segment(v, model, torch.zeros(3, 1), **how)
    assert plain.levels is None and np.array_equal(seg.winner, plain.winner)
    assert np.array_equal(seg.masks.to_array(), plain.masks.to_array())
    assert np.array_equal(seg.levels > 127, seg.masks.to_array())
    image, shape, box = data.preprocess(v, 1.5)
    logits = infer.sliding_window(image, model, torch.zeros(3, 1), patch=64).numpy()
    inside = np.ones(v.array.shape, bool)
    for axis in range(3):
        at = data.positions(shape[axis], v.array.shape[axis])
        along = (at >= box[axis].start) & (at <= box[axis].stop - 1)
        inside &= along.reshape([-1 if a == axis else 1 for a in range(3)])
    for k in range(3):
        prob = np.zeros(shape, np.float32)
        prob[box] = 1 / (1 + np.exp(-logits[k]))
        prob = data.resample(prob, v.array.shape)
        assert np.abs(seg.levels[k] / 255 - prob)[inside].max() < 0.5 / 255 + 1e-4
        assert 0 < inside.mean() < 1 and not seg.levels[k][~inside].any()
    seg.levels[1, 0, 0, 0] = 255
    classes = class_tables.make_classes(["A", "B", "C d"])
    results.write_results("scan", tmp_path / "out", path, seg, classes,
                        [0, 1, 2], {}, masks=False, preview=False, volume=v)
    assert sorted(p.name for p in (tmp_path / "out/scan").iterdir()) == [
        "a_probability.nii.gz", "b_probability.nii.gz", "c_d_probability.nii.gz"]
    img = nib.load(tmp_path / "out/scan/b_probability.nii.gz")
    stored = data.load_volume(tmp_path / "out/scan/b_probability.nii.gz").array
    assert img.get_data_dtype() == np.uint8 and np.array_equal(img.affine, nib.load(path).affine)
    assert 0.999999 < np.asarray(img.dataobj).max() <= 1           # in float64
    assert np.abs(stored - seg.levels[1] / 255).max() < 1e-6


def test_probability_one_half_is_rounded_down_and_one_is_255():
    """Logits 0, 0.01, -100, 100 -> probabilities 0.5 (no mask), 0.5025 (mask), 0 and 1."""
    seg = streaming.Segmentation((4, 1, 1), 1, probabilities=True)
    at = [np.arange(4.0), np.zeros(1), np.zeros(1)]
    box = (slice(0, 4), slice(0, 1), slice(0, 1))
    seg.put(torch.tensor([0, 0.01, -100, 100]).view(1, 4, 1, 1), data.Placement(box, at))
    assert seg.levels.ravel().tolist() == [127, 128, 0, 255]
    assert seg.masks.get(0).ravel().tolist() == [False, True, False, True]


def test_two_classes_that_would_write_one_file_are_refused():
    names = ["Liver", "Liver Probability"]
    assert len(results.result_files("x", names, masks=True)) == 4
    with pytest.raises(ValueError, match="two classes.*x/liver_probability.nii.gz"):
        results.result_files("x", names, masks=True, probabilities=True)


def test_overlap_sets_the_number_of_windows_and_is_a_setting_of_a_result(tmp_path, checkpoint,
                                                                         monkeypatch, capsys):
    """At 4 mm a scan of 96 x 64 x 64 voxels stays as it is: two windows of 64 at any overlap up to
    a half, three at 0.75."""
    hu = np.full((96, 64, 64), 50, np.int16)
    hu[0, 0, 0] = -1000
    write_nifti(tmp_path / "scan.nii.gz", hu,
                np.diag([4.0, 4, 4, 1]))
    calls = []
    monkeypatch.setattr(infer.fast, "accelerate", lambda model: lambda x, w: (
        calls.append(len(x)), x.new_zeros(len(x), len(w), 64, 64, 64))[1])
    for overlap, windows in (("0.5", 2), ("0.5", 0), ("0.75", 3), ("0", 2)):
        calls.clear()
        assert command(checkpoint, tmp_path / "scan.nii.gz", tmp_path / "out", "--overlap",
                       overlap) == 0
        assert sum(calls) == windows
    made_with = json.loads((tmp_path / "out/scan.json").read_text())["made_with"]
    assert made_with["overlap"] == 0


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--batch", "-2"], ["--batch", str(10**30)],
                                   ["--overlap", "1"], ["--overlap", "-0.1"], ["--overlap", "nan"]])
def test_a_number_out_of_range_is_one_line(tmp_path, checkpoint, capsys, flags):
    scan = tiny_scan(tmp_path / "x.nii.gz")
    assert command(checkpoint, scan, tmp_path / "out", *flags) == 2
    error = error_line(capsys)
    assert " ".join(flags[:1]) in error and "must be" in error
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_one_line(tmp_path, checkpoint, capsys):
    scan = tiny_scan(tmp_path / "x.nii.gz")
    content = scan.read_bytes()
    assert command(checkpoint, scan, scan) == 2
    assert "is a file; name a folder" in error_line(capsys) and scan.read_bytes() == content


def test_plain_gives_the_same_result_files_and_is_a_setting_of_a_result(tmp_path, checkpoint,
                                                                        capsys):
    """The bias of the last layer of the heads is set so that about half of the body is labelled.
    fast.py and model.py differ by rounding, so a few voxels at the threshold may differ."""
    scan, _ = sphere_scan(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    model = build_model(content["spec"])
    model.load_state_dict(content["model"])
    image = torch.from_numpy(data.pad_to(data.preprocess(data.load_volume(scan), 4.0)[0], 64)[0])
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
    assert status == 2 and len(error_line(capsys)) < 400
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
