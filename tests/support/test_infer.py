"""The command infer.py: slab by slab, what its flags do, what results are called, and which files
are never replaced."""
import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import write_nifti
from runs import ball_scan, error_line, segment_with, smooth_levels, tiny_scan, untrained

import data
import infer
import labels
from support import class_tables, nifti, results, streaming


# ---- slab by slab --------------------------------------------------------------------------------
def test_windows_of_air_are_computed_once():
    calls = []

    def identity(x, w):
        calls.append(len(x))
        return x
    image = torch.zeros(64, 64, 256)
    image[:, :, :30] = 0.5
    parts = [logits.clone() for _, logits in streaming.slabs(image, identity, torch.zeros(1, 1),
                                                             patch=64)]
    assert len(calls) == 2                       # one window with tissue, one of air
    assert torch.equal(torch.cat(parts, 3), image[None])


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
    nowhere. Also where probabilities are kept, in steps of 1 / 255: above 127 exactly where the
    mask is set."""
    volume = data.load_volume(ball_scan(tmp_path, codes, spacing, shape)[0])
    network = smooth_levels(0.3, 9, *np.linspace(0.3, 0.8, K - 2))
    how = {"spacing_mm": 1.5, "patch": 64}
    prob = infer.segment(volume, network, torch.zeros(K, 1), **how).numpy()
    by_slab, with_levels = (
        streaming.segment(volume, network, torch.zeros(K, 1), probabilities=asked, **how)
        for asked in (False, True))
    found = prob > data.THRESHOLD
    assert found.any((1, 2, 3)).sum() == K - 1 and not found[1].any()
    for seg in (by_slab, with_levels):
        assert np.array_equal(seg.masks.to_array(), found)
        assert np.array_equal(seg.winner[found.any(0)], prob.argmax(0)[found.any(0)])
        assert seg.masks.boxes.keys() == {k for k in range(K) if k != 1}
    assert by_slab.levels is None and np.array_equal(with_levels.levels > 127, found)


def test_the_midline_is_a_position_in_the_scans_own_grid(tmp_path):
    """The body is centred on voxel 35 of 70. The network sees a cropped grid of 2.5 mm."""
    volume = data.load_volume(ball_scan(tmp_path, "RAS")[0])
    seg = streaming.segment(volume, lambda x, w: x, torch.zeros(1, 1), spacing_mm=2.5, patch=64)
    assert seg.midline == pytest.approx(35, abs=0.5)


def test_probabilities_are_rounded_so_that_one_half_is_no_mask():
    """Logits 0, 0.01, -100, 100, log 3 -> probabilities 0.5 (no mask), 0.5025 (mask), 0, 1, 0.75
    (191.25 steps of 1 / 255)."""
    seg = streaming.Segmentation((5, 1, 1), 1, probabilities=True)
    at = [np.arange(5.0), np.zeros(1), np.zeros(1)]
    box = (slice(0, 5), slice(0, 1), slice(0, 1))
    seg.put(torch.tensor([0, 0.01, -100, 100, np.log(3)]).view(1, 5, 1, 1),
            data.Placement(box, at))
    assert seg.levels.ravel().tolist() == [127, 128, 0, 255, 191]
    assert seg.masks.get(0).ravel().tolist() == [False, True, False, True, True]


def test_merge_puts_children_over_parents_then_the_winner_then_table_order():
    classes = class_tables.make_classes(["Organ", {"name": "Tumor", "parents": ["Organ"]}, "Other"])
    seg = streaming.Segmentation((6, 1, 1), 3)
    on = {0: [1, 1, 1, 0, 0, 1], 1: [0, 1, 0, 1, 0, 1], 2: [0, 0, 1, 0, 0, 1]}
    for k, mask in on.items():
        seg.masks.set(k, np.array(mask, bool).reshape(6, 1, 1))
    seg.winner[:, 0, 0] = [0, 0, 2, 0, 1, 2]
    # organ | tumor over organ | Other wins | tumor alone | nothing | Other wins over both
    assert seg.merge(classes)[:, 0, 0].tolist() == [1, 2, 3, 2, 0, 3]


def test_a_class_that_is_left_out_leaves_its_voxels_to_the_others():
    """A tumour in the organ is organ in a label map without tumours."""
    classes = class_tables.make_classes(["Organ", {"name": "Tumor", "parents": ["Organ"]}])
    seg = streaming.Segmentation((3, 1, 1), 2)
    seg.masks.set(0, np.array([True, True, False]).reshape(3, 1, 1))
    seg.masks.set(1, np.array([False, True, True]).reshape(3, 1, 1))
    seg.winner[:, 0, 0] = [0, 1, 1]
    assert seg.merge(classes)[:, 0, 0].tolist() == [1, 2, 2]
    assert seg.merge(classes, only=[0])[:, 0, 0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("table, want", [
    ({"liver": [1, 2], "liver tumor": 2}, {"Liver": 1, "Liver Tumor": 2}),                # LiTS
    ({"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3},                          # KiTS
     {"Right Kidney": 1, "Left Kidney": 1, "Kidney Tumor": 2, "Kidney Cyst": 3}),
    ({"0": "background", "1": "liver", "2": "cancer"}, {"Liver": 1, "Liver Tumor": 2}),   # MSD
])
def test_the_values_of_a_dataset_mean_their_class_and_the_fewest_others(tmp_path, table, want):
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": table}))
    values = results.values_of_dataset(tmp_path / "dataset.json", labels.CLASSES)
    assert {labels.CLASSES[k].name: value for k, value in values.items()} == want


@pytest.mark.parametrize("K", [70, 300])
def test_the_last_of_many_classes_is_merged_like_any_other(K):
    """70 classes need three words per voxel, and 300 a 16-bit label map."""
    seg = streaming.Segmentation((2, 1, 1), K)
    seg.masks.set(K - 1, np.array([True, False]).reshape(2, 1, 1))
    seg.winner[0] = K - 1
    classes = class_tables.make_classes([f"part {k}" for k in range(K)])
    assert seg.merge(classes).ravel().tolist() == [K, 0]


# ---- the flags -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Classes Liver, Spleen and Colon, of which the first two were trained. The last bias of the
    heads is 0 instead of -2, because an untrained network finds nothing otherwise."""
    path = untrained(tmp_path_factory.mktemp("checkpoint") / "m.pt")
    content = torch.load(path, weights_only=True)
    content["model"]["controller.out.bias"][-1] = 0
    torch.save(content, path)
    return path


@pytest.fixture
def no_model(monkeypatch):
    """Every scan gets an empty result -> what streaming.segment was called with."""
    calls = []

    def segment(volume, network, w, **how):
        calls.append({"volume": volume, "network": network, "w": w, **how})
        return streaming.Segmentation(volume.array.shape, len(w), how["probabilities"])
    monkeypatch.setattr(streaming, "segment", segment)
    return calls


def voxels(path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def content_of(folder) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_files_of_a_result(tmp_path, checkpoint):
    """The label map holds the numbers of the checkpoint's table; volumes are those of the masks;
    probabilities are stored as bytes, above 127 where the mask is set."""
    pytest.importorskip("matplotlib")
    scan, _ = ball_scan(tmp_path)
    out = tmp_path / "out"
    assert segment_with(checkpoint, scan, out, "--classes", "spleen", "--masks", "--preview",
                        "--probabilities", "--no-postprocess") == 0
    assert sorted(content_of(out)) == [
        "itksnap_labels.txt", "scan.json", "scan.nii.gz", "scan.png", "scan/spleen.nii.gz",
        "scan/spleen_probability.nii.gz"]
    mask = voxels(out / "scan/spleen.nii.gz")
    assert 0.01 < mask.mean() < 0.9
    assert np.array_equal(voxels(out / "scan.nii.gz"), 2 * mask)
    record = json.loads((out / "scan.json").read_text())
    found, = record["classes"]
    assert (found["value"], found["name"]) == (2, "Spleen") and record["scan"] == str(scan)
    assert found["volume_ml"] == pytest.approx(mask.sum() * 2 * 2.5 * 3 / 1000, abs=1e-3)
    probability = nib.load(out / "scan/spleen_probability.nii.gz")
    assert probability.get_data_dtype() == np.uint8
    assert np.array_equal(probability.affine, nib.load(scan).affine)
    prob = np.asarray(probability.dataobj)
    assert np.array_equal(prob > 127.5 / 255, mask == 1)
    assert 0 <= prob.min() and prob.max() <= 1                       # in float64


def test_flags_reach_the_segmentation(tmp_path, checkpoint, no_model, monkeypatch):
    """Also the checkpoint's spacing, windows and modality, and the rows of the classes asked for.
    What post-processing gets is in mm, and in the axes of the volume."""
    cleaned = []
    monkeypatch.setattr(infer.postprocess, "postprocess", lambda *args: cleaned.append(args))
    monkeypatch.setattr(infer.processes, "has_bf16_instructions", lambda: True)
    write_nifti(tmp_path / "s.nii.gz", np.arange(60, dtype=np.int16).reshape(3, 4, 5) - 1000,
                np.diag([2., 3, 4, 1]))
    assert segment_with(checkpoint, tmp_path / "s.nii.gz", tmp_path / "a", "--classes", "spleen",
                        "--batch", "3", "--overlap", "0.25", "--amp") == 0
    call, = no_model
    assert {key: call[key] for key in ("spacing_mm", "patch", "batch", "overlap", "amp")} == {
        "spacing_mm": 4.0, "patch": 32, "batch": 3, "overlap": 0.25, "amp": True}
    assert call["w"].tolist() == [[0, 1, 0]] and call["volume"].modality == "ct"
    assert type(call["network"]).__name__ == "FastUniversalModel"
    (_, classes, spacing_mm, midline), = cleaned
    assert [c.name for c in classes] == ["Spleen"] and midline is None
    assert np.allclose(spacing_mm, (2, 3, 4))
    mri = untrained(tmp_path / "mri.pt", modality="mri")
    for flags, modality in (((), "mri"), (("--modality", "ct"), "ct")):
        assert segment_with(mri, tmp_path / "s.nii.gz", tmp_path / modality, "--plain",
                            "--no-postprocess", *flags) == 0
        call = no_model[-1]
        assert call["volume"].modality == modality and call["w"].tolist() == [[1, 0, 0], [0, 1, 0]]
        assert call["amp"] is False and call["overlap"] == 0.5
        assert type(call["network"]).__name__ == "UniversalModel"
    assert len(cleaned) == 1


@pytest.mark.parametrize("flags", [
    ["--overlap", "0.25"], ["--plain"], ["--no-postprocess"], ["--classes", "liver"],
    ["--modality", "mri"], ["--masks"]])
def test_a_result_of_other_settings_is_made_again(tmp_path, checkpoint, capsys, no_model, flags):
    scan = tiny_scan(tmp_path / "x.nii")
    for more, said in (([], "1 scan(s)"), ([], "1 there already"), (flags, "1 scan(s)"),
                       (flags, "1 there already"), ([*flags, "--overwrite"], "1 scan(s)")):
        assert segment_with(checkpoint, scan, tmp_path / "out", *more) == 0
        assert said in capsys.readouterr().out


# ---- which files are never replaced --------------------------------------------------------------
@pytest.mark.parametrize("source, output, flags", [
    ("in/scan.nii.gz", "in", []),
    ("in", "in", []),
    ("in/scan.nii.gz", "link to the folder", []),
    ("link/scan.nii.gz", "in", []),
    ("hard link/scan.nii.gz", "in", []),
    ("liver/liver.nii.gz", ".", ["--masks"]),         # the mask's file is OUT/liver/liver.nii.gz
])
def test_a_scan_is_never_written_over(tmp_path, checkpoint, capsys, source, output, flags):
    scan = tiny_scan(tmp_path / "in/scan.nii.gz")
    tiny_scan(tmp_path / "liver/liver.nii.gz")
    (tmp_path / "link to the folder").symlink_to(scan.parent)
    for folder in ("link", "hard link"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link/scan.nii.gz").symlink_to(scan)
    (tmp_path / "hard link/scan.nii.gz").hardlink_to(scan)
    before = content_of(tmp_path)
    assert segment_with(checkpoint, tmp_path / source, tmp_path / output, *flags) == 2
    assert "would overwrite" in error_line(capsys)
    assert content_of(tmp_path) == before


def test_a_result_is_there_already_only_for_the_same_scan(tmp_path, checkpoint, capsys, no_model):
    """Another scan of the same name is refused; --overwrite replaces the result, with all of its
    files; a new scan under the old path is segmented again."""
    def scan_of(folder, depth):
        write_nifti(tmp_path / folder / "scan.nii.gz", np.arange(depth * 30, dtype=np.int16)
                    .reshape(depth, 5, 6), np.eye(4))
        return tmp_path / folder / "scan.nii.gz"
    first, second, out = scan_of("a", 4), scan_of("b", 5), tmp_path / "out"
    assert segment_with(checkpoint, first, out, "--masks") == 0
    before = content_of(out)
    assert segment_with(checkpoint, second, out) == 2
    error = error_line(capsys)
    assert f"is the result of another scan, {first}, not of {second}" in error
    assert content_of(out) == before
    assert segment_with(checkpoint, second, out, "--overwrite") == 0
    assert nib.load(out / "scan.nii.gz").shape == (5, 5, 6)
    assert sorted(content_of(out)) == ["itksnap_labels.txt", "scan.json", "scan.nii.gz"]
    scan_of("b", 6)
    assert segment_with(checkpoint, second, out) == 0
    assert nib.load(out / "scan.nii.gz").shape == (6, 5, 6)


@pytest.mark.parametrize("file", ["scan.nii.gz", "scan.json", "scan.png", "scan/liver.nii.gz",
                                  "scan/liver_probability.nii.gz", "itksnap_labels.txt"])
@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_a_file_that_infer_did_not_write_is_never_replaced(tmp_path, checkpoint, capsys, no_model,
                                                           file, flag):
    """A reference label map, the JSON that dcm2niix writes beside a scan, a mask drawn by hand."""
    scan, there = tiny_scan(tmp_path / "scan.nii"), tmp_path / file
    there.parent.mkdir(exist_ok=True)
    there.write_bytes(b'{"Modality": "CT"}')
    assert segment_with(checkpoint, scan, tmp_path, "--masks", "--probabilities", "--preview",
                        *flag) == 2
    assert f"{there}: exists and was not written by infer.py" in error_line(capsys)
    assert sorted(content_of(tmp_path)) == sorted(["scan.nii", file])
    assert there.read_bytes() == b'{"Modality": "CT"}'


def test_results_beside_scans_are_not_scans(tmp_path, checkpoint, capsys, no_model):
    """x.nii and its results x.nii.gz and x/*.nii.gz in one folder, also with --overwrite."""
    scan = tiny_scan(tmp_path / "x.nii")
    flags = ["--masks", "--probabilities"]
    for more, said in (([], "1 scan(s)"), ([], "1 there already"), (["--overwrite"], "1 scan(s)")):
        assert segment_with(checkpoint, tmp_path, tmp_path, *flags, *more) == 0
        assert said in capsys.readouterr().out
        assert results.find_scans(tmp_path) == [scan]
    for result in ("x.nii.gz", "x/liver.nii.gz", "x/liver_probability.nii.gz"):
        assert segment_with(checkpoint, tmp_path / result, tmp_path / "other") == 2
        assert "is a result of infer.py, not a scan" in error_line(capsys)
    scan.unlink()
    assert segment_with(checkpoint, tmp_path, tmp_path / "other") == 2
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
    assert segment_with(checkpoint, scan, out) == 0
    with monkeypatch.context() as patch:
        patch.setattr(nifti, "save_nifti", killed)
        assert segment_with(checkpoint, scan, out, "--masks", "--overwrite") == 130
    assert sorted(content_of(out)) == ["itksnap_labels.txt", "x.nii.gz", "x/liver.nii.gz",
                                       "x/spleen.nii.gz"]
    capsys.readouterr()
    assert segment_with(checkpoint, scan, out) == 2
    assert "x/liver.nii.gz: is not of the result that would be written" in error_line(capsys)
    assert segment_with(checkpoint, scan, out, "--masks") == 0
    assert "1 scan(s)" in capsys.readouterr().out and len(content_of(out)) == 5
    (out / "x/liver.nii.gz").unlink()                  # a result is there only with all its files
    assert segment_with(checkpoint, scan, out, "--masks") == 0
    assert "there already" not in capsys.readouterr().out and len(content_of(out)) == 5
    assert segment_with(checkpoint, scan, out) == 0
    assert sorted(content_of(out)) == ["itksnap_labels.txt", "x.json", "x.nii.gz"]


def test_every_nifti_file_of_a_result_says_who_wrote_it(tmp_path, checkpoint, no_model):
    """Also where the scan's own header has another description. A copy is a result, too; what is
    drawn by hand under the name of a mask is neither replaced nor removed."""
    scan, out = tmp_path / "x.nii", tmp_path / "out"
    img = nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(4, 5, 6), np.eye(4))
    img.header["descrip"] = b"my scanner"
    nib.save(img, scan)
    assert not results.is_result(scan)
    assert segment_with(checkpoint, scan, out, "--masks", "--probabilities") == 0
    files = list(out.rglob("*.nii.gz"))
    assert len(files) == 5 and all(map(results.is_result, files))
    (tmp_path / "copy.nii.gz").write_bytes(files[0].read_bytes())
    assert results.is_result(tmp_path / "copy.nii.gz")
    drawn = tiny_scan(out / "x/liver.nii.gz").read_bytes()
    assert segment_with(checkpoint, scan, out, "--masks", "--overwrite") == 2
    assert segment_with(checkpoint, scan, out, "--classes", "spleen") == 0
    assert sorted(p.name for p in out.rglob("*.nii.gz")) == ["liver.nii.gz", "x.nii.gz"]
    assert (out / "x/liver.nii.gz").read_bytes() == drawn


@pytest.mark.parametrize("text", [
    None, "", "{}", "[1]", '{"made_with": 3}', '{"made_with": {"scan": null}}',
    '{"made_with": {"scan": {"path": "x"}}, "files": 4}'])
def test_a_json_of_another_program_is_no_record(tmp_path, text):
    if text is not None:
        (tmp_path / "x.json").write_text(text)
    assert results.read_record(tmp_path / "x.json") is None


def test_two_classes_that_would_write_one_file_are_refused():
    names = ["Liver", "Liver Probability"]
    assert len(results.result_files("x", names, masks=True)) == 4
    with pytest.raises(ValueError, match="two classes.*x/liver_probability.nii.gz"):
        results.result_files("x", names, masks=True, probabilities=True)


@pytest.mark.parametrize("first, second", [
    ("a.nii", "a.nii.gz"), ("imagesTr/x.nii.gz", "imagesTr/x_0000.nii.gz"),
    ("imagesTr/x_0000.nii.gz", "imagesTs/x_0000.nii.gz"), ("Case.nii.gz", "case.nii.gz"),
    ("p/q.nii", "P/q.nii")])
def test_two_scans_that_would_write_one_result_are_refused(tmp_path, checkpoint, capsys, first,
                                                           second):
    paths = [tiny_scan(tmp_path / "in" / first), tiny_scan(tmp_path / "in" / second)]
    if paths[0].samefile(paths[1]):
        pytest.skip("this file system does not tell the two names apart")
    assert segment_with(checkpoint, tmp_path / "in", tmp_path / "out") == 2
    error = error_line(capsys)
    assert all(str(path) in error for path in paths) and "the same result" in error
    assert not (tmp_path / "out").exists()


# ---- which files are scans, and what their results are called ------------------------------------
@pytest.mark.parametrize("files, names", [
    # numbers are channels in nnU-Net's folders only, and only beside the first channel
    (["vol_0000.nii", "vol_0001.nii"], ["vol_0000", "vol_0001"]),
    (["dataset.json", "p_0000.nii", "p_0001.nii", "q_0001.nii"], ["p", "q_0001"]),
    (["dataset.json", "imagesTr/p_0000.nii", "imagesTr/p_0001.nii", "imagesTs/q_0000.nii",
      "labelsTr/p.nii"], ["p", "q"]),
    # the folders in a folder, but not those further down, and only without scans above
    (["a/ct.nii", "b/ct.nii", "b/pet.nii", "c/d/ct.nii"], ["a", "b_ct", "b_pet"]),
    (["ct.nii", "a/ct.nii"], ["ct"]),
    # a word for label maps, but not as a part of another word
    (["ct.nii", "mask_1.nii", "case_seg.nii", "Segmentation-3.nii", "liver label.nii"], ["ct"]),
    (["labelsTr/x.nii", "x/maskTs.nii", "y/segovia.nii"], ["y"]),
])
def test_results_are_named_after_folder_and_file(tmp_path, files, names):
    for file in files:
        path = tmp_path / "in" / file
        if path.suffix == ".json":
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")
        else:
            tiny_scan(path)
    scans = results.find_scans(tmp_path / "in")
    assert list(results.name_scans(scans, tmp_path / "in")) == names


def test_a_file_that_is_named_is_a_scan_called_like_its_case(tmp_path):
    for file, name in (("imagesTs/p_0000.nii.gz", "p"), ("other/p_0000.nii.gz", "p_0000"),
                       ("masks/liver_seg.nii.gz", "liver_seg")):
        scan = tiny_scan(tmp_path / file)
        assert results.name_scans(results.find_scans(scan), scan) == {name: scan}
    with pytest.raises(ValueError, match="no scan.*1 files passed over.*name it with --input"):
        results.find_scans(tmp_path / "masks")


def test_a_study_with_one_folder_per_patient(tmp_path, checkpoint, capsys, no_model):
    """Results are called after the folders, and may lie in them; what is hidden or called like a
    label map is passed over."""
    study = tmp_path / "study"
    for file in ("patient1/ct.nii.gz", "segmentations/liver.nii.gz", "patient2/ct.nii.gz",
                 "patient2/pet.nii", "patient2/ct_mask.nii.gz", "patient1/._ct.nii.gz",
                 "._x.nii.gz", ".hidden/ct.nii.gz"):
        tiny_scan(study / file)
    (study / "loop").symlink_to(study)
    for summary in ("3 scan(s)", "3 there already"):
        assert segment_with(checkpoint, study, study, "--masks") == 0
        said = capsys.readouterr().out
        assert summary in said and "note: 2 files passed over" in said
    assert [p.name for p in sorted(study.glob("p*.nii.gz"))] == [
        "patient1.nii.gz", "patient2_ct.nii.gz", "patient2_pet.nii.gz"]
    record = json.loads((study / "patient2_pet.json").read_text())
    assert record["scan"] == str(study / "patient2/pet.nii")


# ---- mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, wanted", [
    (["--batch", "0"], "--batch 0: must be"), (["--batch", str(10**30)], "--batch .* must be"),
    (["--overlap", "1"], "--overlap 1.0: must be"), (["--overlap", "-0.1"], "--overlap -0.1: must"),
    (["--overlap", "nan"], "--overlap nan: must be"),
    (["--input", "no.nii.gz"], "no.nii.gz: no such file"), (["--input", "empty"], "empty: no scan"),
    (["--output", "x.nii"], "x.nii: is a file; name a folder"),
    (["--checkpoint", "x.nii"], "x.nii: "), (["--checkpoint", "no.pt"], "no.pt: cannot be read"),
    (["--checkpoint", "other.pt"], "other.pt: "),
    (["--classes", "colon"], "m.pt was never trained on .'Colon'.; it was trained on"),
    (["--classes", "lever"], "lever"),
])
def test_a_users_mistake_is_one_line_and_leaves_nothing(tmp_path, checkpoint, capsys, flags,
                                                        wanted):
    """In a folder with the scan x.nii, the empty folder `empty` and other.pt, no checkpoint."""
    scan = tiny_scan(tmp_path / "x.nii")
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    before = content_of(tmp_path)
    assert segment_with(checkpoint, scan, tmp_path / "out", *flags) == 2
    assert re.search(wanted, error_line(capsys))
    assert content_of(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_constant_scan_is_refused_and_values_that_are_not_hounsfield_units_are_noted(
        tmp_path, checkpoint, capsys, no_model):
    """A single value would be "Liver 2720 ml"; 1024 was added to the other scan."""
    write_nifti(tmp_path / "constant.nii", np.full((4, 5, 6), 60, np.int16), np.eye(4))
    assert segment_with(checkpoint, tmp_path / "constant.nii", tmp_path / "out") == 2
    assert "constant.nii: all of its voxels have the value 60" in error_line(capsys)
    assert not (tmp_path / "out").exists()
    write_nifti(tmp_path / "shifted.nii", voxels(tiny_scan(tmp_path / "x.nii")) + 1024, np.eye(4))
    assert segment_with(checkpoint, tmp_path / "shifted.nii", tmp_path / "out") == 0
    assert "shifted.nii: its values lie in 24..1024" in capsys.readouterr().out
