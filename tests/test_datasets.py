"""Finding and preparing datasets as their users have them: folders, lists, per-structure files."""
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, write_nifti

import data
import labels

EYE = np.eye(4)
BOX = np.arange(64, dtype=np.int16).reshape(4, 4, 4)


def class_names(mask):
    return {c.name for c, a in zip(labels.CLASSES, mask, strict=True) if a}


def nnunet(folder, cases=("x",), ending=".nii.gz", **info):
    """An nnU-Net raw folder that labels the liver; every case has an image and a label."""
    for case in cases:
        write_nifti(folder / f"imagesTr/{case}_0000{ending}", BOX, EYE)
        write_nifti(folder / f"labelsTr/{case}{ending}", (BOX % 2).astype(np.uint8), EYE)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"liver": 1}, **info}))
    return folder


def listed(*names, image="imagesTr/{}.nii.gz", label="labelsTr/{}.nii.gz"):
    return [{"image": image.format(name), "label": label.format(name)} for name in names]


def case_names_of(*roots, **kwargs):
    return [case.name for case in data.read_datasets(roots, labels.CLASSES, **kwargs)]


# ---- finding -----------------------------------------------------------------------------------
def test_hidden_twins_are_no_cases_and_hidden_folders_no_datasets(tmp_path):
    folder = nnunet(tmp_path / "Dataset001_X")
    for path in [*folder.rglob("*.nii.gz")]:
        path.with_name(f"._{path.name}").write_bytes(b"Mac OS X")
    nnunet(tmp_path / ".trash")
    assert case_names_of(tmp_path) == ["Dataset001_X/x"]
    nnunet(folder, training=listed("._x", "x"))
    assert case_names_of(tmp_path) == ["Dataset001_X/x"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_a_list_of_nnunets_first_version_leaves_0000_out(tmp_path, ending):
    folder = nnunet(tmp_path / "Task501_X", ending=ending)
    nnunet(folder, (), training=listed("x", image=f"./imagesTr/{{}}{ending}",
                                       label=f"./labelsTr/{{}}{ending}"))
    case, = data.read_dataset(folder, labels.CLASSES)
    assert case.image == folder / f"imagesTr/x_0000{ending}" and case.name == "Task501_X/x"


def test_a_stray_file_is_passed_over_and_named(tmp_path, capsys):
    folder = nnunet(tmp_path / "Dataset001_X")
    write_nifti(folder / "imagesTr/amos_0001 (1).nii.gz", BOX, EYE)
    assert case_names_of(folder) == ["Dataset001_X/x"]
    out = capsys.readouterr().out
    assert "passed over 1 files" in out and "amos_0001 (1).nii.gz" in out


def test_an_image_without_label_stops_or_is_left_out_with_a_line(tmp_path, capsys):
    folder = nnunet(tmp_path / "Dataset001_X", ["x", "y"])
    (folder / "labelsTr/x.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="x.nii.gz: no label for x_0000.nii.gz"):
        case_names_of(folder)
    assert case_names_of(folder, skip_bad=True) == ["Dataset001_X/y"]
    assert "skipped:" in capsys.readouterr().out
    nnunet(folder, ["y"], training=listed("gone", "y"))
    assert case_names_of(folder, skip_bad=True) == ["Dataset001_X/y"]
    assert "gone.nii.gz: no such image" in capsys.readouterr().out
    (folder / "labelsTr/y.nii.gz").unlink()
    with pytest.raises(ValueError, match="no scan"):
        case_names_of(folder, skip_bad=True)


def test_the_median_spacing_passes_over_scans_that_cannot_be_read(tmp_path):
    folder = nnunet(tmp_path / "Dataset001_X", ["x", "y"])
    (folder / "imagesTr/x_0000.nii.gz").write_bytes(b"")
    cases = data.read_dataset(folder, labels.CLASSES)
    with pytest.raises(ValueError, match="x_0000"):
        data.median_spacing(cases)
    assert data.median_spacing(cases, skip_bad=True) == 1.0
    with pytest.raises(ValueError, match="none of the scans"):
        data.median_spacing(cases[:1], skip_bad=True)


def test_datasets_of_one_name_are_told_apart_by_the_folders_above(tmp_path):
    """a/X and b/X are two datasets; Y needs no folder to be told apart."""
    for path in ("a/X", "b/X", "b/Y"):
        nnunet(tmp_path / path)
    cases = data.read_datasets([tmp_path / "a", tmp_path / "b"], labels.CLASSES)
    assert [case.dataset for case in cases] == ["a/X", "b/X", "Y"]
    assert [case.name for case in cases] == ["a/X/x", "b/X/x", "Y/x"]
    deep = [tmp_path / "s1/raw/X", tmp_path / "s2/raw/X"]
    assert data.dataset_names(deep) == ["s1/raw/X", "s2/raw/X"]


def test_a_dataset_that_is_given_twice_is_used_once(tmp_path, monkeypatch):
    folder = nnunet(tmp_path / "raw/X")
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/alias").symlink_to(folder)
    assert len(data.find_datasets([tmp_path / "raw", folder, tmp_path / "link"])) == 1
    assert case_names_of(tmp_path / "link", folder) == ["X/x"]
    monkeypatch.chdir(folder)
    assert case_names_of(".") == ["X/x"] == case_names_of("../X")


def test_cases_of_one_name_are_told_apart_by_folder_or_refused(tmp_path):
    folder = nnunet(tmp_path / "X", ["x"], ".nii.gz")
    nnunet(folder, ["x"], ".nii")
    with pytest.raises(ValueError, match=r"called x: .*x_0000.nii.gz and .*x_0000.nii;"):
        case_names_of(folder)
    for site in ("a", "b"):
        for name in ("p/ct", "scan"):
            write_nifti(folder / f"{site}/{name}.nii.gz", BOX, EYE)
            write_nifti(folder / f"{site}/{name}_seg.nii.gz", BOX % 2, EYE)
    names = ("a/p/ct", "b/p/ct", "a/scan", "b/scan")
    nnunet(folder, (), training=listed(*names, image="{}.nii.gz", label="{}_seg.nii.gz"),
           annotated={"b/scan": []})
    cases = data.read_dataset(folder, labels.CLASSES)
    assert [case.name for case in cases] == ["X/a/p", "X/b/p", "X/a/scan", "X/b/scan"]
    assert [case.annotated.any() for case in cases] == [True, True, True, False]


def test_annotated_is_reported_where_it_names_no_case(tmp_path, capsys):
    folder = nnunet(tmp_path / "X", annotated={"x": ["liver"], "img0099": ["spleen"]})
    case, = data.read_dataset(folder, labels.CLASSES)
    assert class_names(case.annotated) == {"Liver"}
    line, = capsys.readouterr().out.splitlines()
    assert "X/dataset.json" in line and "img0099" in line


def test_annotated_may_name_built_in_classes_that_a_smaller_table_lacks(tmp_path):
    folder = nnunet(tmp_path / "X", annotated={"x": ["liver", "spleen"]})
    case, = data.read_dataset(folder, labels.make_classes(["Femur", "Liver"]))
    assert case.annotated.tolist() == [False, True]
    nnunet(folder, annotated={"x": ["liver", "splen"]})
    with pytest.raises(ValueError, match="splen"):
        data.read_dataset(folder, labels.make_classes(["Femur", "Liver"]))


# ---- one file per structure ----------------------------------------------------------------------
def structures(case, masks, shape=(6, 5, 4), affine=EYE, ct="ct.nii.gz"):
    """CASE/ct.nii.gz and CASE/segmentations/NAME.nii.gz; masks: {name: first-axis indices}."""
    write_nifti(case / ct, np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)
    for name, planes in masks.items():
        mask = np.zeros(shape, np.uint8)
        mask[planes] = 1
        write_nifti(case / f"segmentations/{name}.nii.gz", mask, affine)


def merged_names(folder, case=0, name="totalsegmentator"):
    """Prepare the folder -> the structure at each plane of the first axis of one of its cases."""
    assert labels.run(labels.main, [name, str(folder)]) == 0
    info = json.loads((folder / "dataset.json").read_text())
    names = {value: structure for structure, value in info["labels"].items()}
    label = data.load_volume(folder / info["training"][case]["label"]).array
    assert (label == label[:, :1, :1]).all()
    return [names[value] for value in label[:, 0, 0]]


def test_children_stay_inside_their_parents(tmp_path):
    """In the alphabet, hepatic_vessel comes before liver and kidney_cyst before kidney_right."""
    structures(tmp_path / "s1", {"hepatic_vessel": [1], "liver": [0, 1], "pancreas_tumor": [2],
                                 "pancreas": [2, 3], "kidney_right": [4, 5], "kidney_cyst": [5]})
    assert merged_names(tmp_path) == ["liver", "hepatic_vessel", "pancreas_tumor", "pancreas",
                                      "kidney_right", "kidney_cyst"]
    case, = data.read_dataset(tmp_path, labels.CLASSES)
    row = case.label_map.to_label_rows(data.load_volume(case.label).array, "x")[:, 0, 0]
    regions = case.label_map.regions[row]
    assert class_names(regions[1]) == {"Liver", "Hepatic Vessel"}
    assert class_names(regions[2]) == {"Pancreas", "Pancreas Tumor"}


def test_a_lesion_with_a_side_tells_its_host(tmp_path):
    """Without kidney files that touch it, only the name kidney_cyst_left tells the side."""
    structures(tmp_path / "s1", {"kidney_cyst_left": [5], "kidney_cyst_right": [4],
                                 "liver": [0, 1], "liver_lesion": [1], "pancreatic_lesion": [2]})
    merged_names(tmp_path)
    case, = data.read_dataset(tmp_path, labels.CLASSES)
    row = case.label_map.to_label_rows(data.load_volume(case.label).array, "x")[:, 0, 0]
    found = [class_names(case.label_map.regions[r]) for r in row]
    assert found == [{"Liver"}, {"Liver", "Liver Tumor"}, {"Pancreas", "Pancreas Tumor"}, set(),
                     {"Right Kidney", "Kidney Cyst"}, {"Left Kidney", "Kidney Cyst"}]


def test_a_cyst_of_one_side_is_only_a_part_of_the_class(tmp_path):
    everything = {"kidney_cyst_left": [5], "kidney_cyst_right": [4], "kidney_left": [5]}
    structures(tmp_path / "s1", everything)
    structures(tmp_path / "s2", {k: v for k, v in everything.items() if k != "kidney_cyst_right"})
    merged_names(tmp_path)
    found = [class_names(case.annotated) for case in data.read_dataset(tmp_path, labels.CLASSES)]
    assert found == [{"Kidney Cyst", "Left Kidney"}, {"Left Kidney"}]


def test_a_lesion_without_a_clear_host_is_merged_and_left_out_of_the_loss(tmp_path):
    structures(tmp_path / "s1", {"liver": [0, 1], "spleen": [2, 3], "lesion": [1, 2, 4]})
    assert merged_names(tmp_path) == ["liver", "lesion", "lesion", "spleen", "lesion", "background"]
    case, = data.read_dataset(tmp_path, labels.CLASSES)
    row = case.label_map.to_label_rows(data.load_volume(case.label).array, "x")[:, 0, 0]
    assert case.label_map.known[row].all(1).tolist() == [True, False, False, True, False, True]


def test_a_lesion_stays_upon_a_vessel(tmp_path):
    structures(tmp_path / "s1", {"liver_tumor": [1, 2], "liver_vessel": [0, 1], "liver": range(6)})
    assert merged_names(tmp_path)[:3] == ["liver_vessel", "liver_tumor", "liver_tumor"]


def test_where_two_organs_overlap_the_later_one_of_totalsegmentators_list_stays(tmp_path):
    """The list has spleen, liver, stomach, colon, aorta; rectum is not in it and comes first."""
    structures(tmp_path / "s1", {"aorta": [0], "colon": [0, 1], "liver": [2, 3], "rectum": [3, 4],
                                 "stomach": [1, 2], "spleen": [4]})
    assert merged_names(tmp_path) == ["aorta", "colon", "stomach", "liver", "spleen", "background"]


def test_other_spellings_have_the_same_place_in_the_order(tmp_path):
    """postcava is TotalSegmentator's inferior_vena_cava, the last but one of its list."""
    structures(tmp_path / "s1", {"postcava": [0], "stomach": [0, 1], "gall_bladder": [1]})
    assert merged_names(tmp_path, name="abdomenatlas")[:2] == ["postcava", "stomach"]


@pytest.mark.parametrize("seed", range(6))
def test_the_axes_of_a_mask_do_not_matter(seed, tmp_path):
    """A mask with any flipped and permuted axes is merged where it lies in the CT's own axes."""
    rng = np.random.default_rng(seed)
    shape, affine = (4, 5, 6), affine_of("LPS", (1.5, 2.0, 3.0))
    structures(tmp_path / "s1", {"liver": [0, 1]}, shape, affine)
    mask = rng.integers(0, 2, shape).astype(np.uint8)
    order, flips = rng.permutation(3), rng.integers(0, 2, 3)
    orientation = np.stack([np.argsort(order), 1 - 2 * flips], 1)
    turned = nib.apply_orientation(mask, orientation)
    write_nifti(tmp_path / "s1/segmentations/spleen.nii.gz", np.ascontiguousarray(turned),
                affine @ nib.orientations.inv_ornt_aff(orientation, shape))
    assert labels.run(labels.main, ["totalsegmentator", str(tmp_path)]) == 0
    merged = nib.load(tmp_path / "s1/labels.nii.gz")
    liver = np.zeros(shape, np.uint8)
    liver[:2] = 1
    assert np.array_equal(np.asarray(merged.dataobj), np.where(liver, 1, 2 * mask))
    assert np.array_equal(merged.affine, affine)


def test_a_missing_file_means_not_annotated_in_that_case(tmp_path):
    """A lung of two lobes needs both; a class that one file shows whole needs one of its files."""
    everything = {"liver": [0], "spleen": [1], "lung_upper_lobe_left": [2],
                  "lung_lower_lobe_left": [3]}
    structures(tmp_path / "s1", everything)
    structures(tmp_path / "s2", {k: v for k, v in everything.items() if k != "spleen"})
    structures(tmp_path / "s3", {k: v for k, v in everything.items() if "upper" not in k})
    merged_names(tmp_path)
    info = json.loads((tmp_path / "dataset.json").read_text())
    assert info["annotated"] == {"s2": ["Liver", "Left Lung"], "s3": ["Spleen", "Liver"]}
    found = [class_names(case.annotated) for case in data.read_dataset(tmp_path, labels.CLASSES)]
    assert found == [{"Liver", "Spleen", "Left Lung"}, {"Liver", "Left Lung"}, {"Liver", "Spleen"}]


def test_two_spellings_of_one_organ_are_one_class(tmp_path):
    structures(tmp_path / "s1", {"gallbladder": [0]})
    structures(tmp_path / "s2", {"gall_bladder": [0]})
    merged_names(tmp_path)
    assert [class_names(case.annotated) for case in data.read_dataset(tmp_path, labels.CLASSES)] \
        == [{"Gall Bladder"}] * 2


DAMAGES = {
    "empty ct": ("ct.nii.gz", lambda path: path.write_bytes(b"")),
    "empty mask": ("segmentations/liver.nii.gz", lambda path: path.write_bytes(b"")),
    "cut ct": ("ct.nii.gz", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    "cut mask": ("segmentations/liver.nii.gz", lambda path: path.write_bytes(
        path.read_bytes()[:-9])),
    "shape": ("segmentations/liver.nii.gz", lambda path: write_nifti(
        path, np.ones((5, 5, 4), np.uint8), EYE)),
    "place": ("segmentations/liver.nii.gz", lambda path: write_nifti(
        path, np.ones((6, 5, 4), np.uint8), affine_of("RAS", (1, 1, 1)))),
    "4D mask": ("segmentations/liver.nii.gz", lambda path: write_nifti(
        path, np.ones((6, 5, 4, 2), np.uint8), EYE)),
    "no mask": ("segmentations/liver.nii.gz", lambda path: path.unlink()),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_case_that_cannot_be_merged_is_left_out_with_one_line(what, tmp_path, capsys):
    for case in ("s1", "s2"):
        structures(tmp_path / case, {"liver": [0]})
    file, damage = DAMAGES[what]
    damage(tmp_path / "s1" / file)
    assert merged_names(tmp_path)[0] == "liver"
    captured = capsys.readouterr()
    line, = [line for line in captured.out.splitlines() if "left out" in line]
    assert str(tmp_path / "s1") in line and "Traceback" not in captured.out + captured.err
    assert [case.name[-2:] for case in data.read_dataset(tmp_path, labels.CLASSES)] == ["s2"]
    assert not (tmp_path / "s1/labels.nii.gz").exists() and not list(tmp_path.rglob("*.part*"))
    shutil.rmtree(tmp_path / "s2")
    assert labels.run(labels.main, ["totalsegmentator", str(tmp_path)]) == 2


def test_a_mask_within_a_millimetre_is_merged_with_a_note(tmp_path, capsys):
    structures(tmp_path / "s1", {"stomach": [1]})
    near = EYE.copy()
    near[0, 3] = 0.5
    write_nifti(tmp_path / "s1/segmentations/liver.nii.gz", np.ones((6, 5, 4), np.uint8), near)
    assert merged_names(tmp_path) == ["stomach" if x == 1 else "liver" for x in range(6)]
    assert "liver.nii.gz: label and image lie 0.5 mm apart" in capsys.readouterr().out


def test_a_label_map_of_somebody_else_is_never_overwritten(tmp_path, capsys):
    for case in ("s1", "s2"):
        structures(tmp_path / case, {"liver": [0]})
    write_nifti(tmp_path / "s2/labels.nii.gz", np.ones((6, 5, 4), np.uint8), EYE)
    before = tree(tmp_path)
    assert labels.run(labels.main, ["totalsegmentator", str(tmp_path)]) == 2
    error, = capsys.readouterr().err.splitlines()
    assert "s2/labels.nii.gz" in error and "not overwritten" in error and tree(tmp_path) == before
    (tmp_path / "s2/labels.nii.gz").write_bytes(b"?")
    assert labels.run(labels.main, ["totalsegmentator", str(tmp_path)]) == 2
    (tmp_path / "s2/labels.nii.gz").unlink()
    assert labels.run(labels.main, ["totalsegmentator", str(tmp_path)]) == 0
    after = tree(tmp_path)
    assert labels.run(labels.main, ["totalsegmentator", str(tmp_path)]) == 0
    assert tree(tmp_path) == after                           # and ours is, with the same content


def test_more_than_255_structures_fit(tmp_path):
    structures(tmp_path, {"liver": [0], "spleen": [1]})
    masks = [(tmp_path / f"segmentations/{name}.nii.gz", value)
             for name, value in (("liver", 255), ("spleen", 300))]
    merged = labels.merge_masks(tmp_path / "ct.nii.gz", masks)
    assert merged[:, 0, 0].tolist() == [255, 300, 0, 0, 0, 0] and merged.dtype == np.uint16
    assert labels.merge_masks(tmp_path / "ct.nii.gz", masks[:1]).dtype == np.uint8


def test_pants_keeps_images_and_labels_apart(tmp_path):
    structures(tmp_path / "LabelTr/P1", {"liver": [0], "pancreas": [1, 2]}, ct="unused.nii.gz")
    (tmp_path / "ImageTr/P1").mkdir(parents=True)
    (tmp_path / "LabelTr/P1/unused.nii.gz").rename(tmp_path / "ImageTr/P1/ct.nii.gz")
    assert merged_names(tmp_path, name="pants")[:3] == ["liver", "pancreas", "pancreas"]
    case, = data.read_dataset(tmp_path, labels.CLASSES)
    assert case.name.endswith("/P1") and (tmp_path / "LabelTr/P1/labels.nii.gz").is_file()


def test_hidden_masks_and_cases_are_passed_over(tmp_path):
    structures(tmp_path / "s1", {"liver": [0]})
    structures(tmp_path / ".s2", {"liver": [0], "spleen": [1]})
    (tmp_path / "s1/segmentations/._liver.nii.gz").write_bytes(b"Mac OS X")
    (tmp_path / "s1/._ct.nii.gz").write_bytes(b"Mac OS X")
    assert merged_names(tmp_path)[0] == "liver"
    info = json.loads((tmp_path / "dataset.json").read_text())
    assert info["labels"] == {"background": 0, "liver": 1} and len(info["training"]) == 1


# ---- preparing -----------------------------------------------------------------------------------
def tree(folder):
    """{path: content} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MSD = {   # folder: (name, its name in dataset.json, labels, {value: classes})
    "Task03_Liver": ("msd-liver", "Liver", {"1": "liver", "2": "cancer"},
                     {1: {"Liver"}, 2: {"Liver", "Liver Tumor"}}),
    "Task06_Lung": ("msd-lung", "Lung", {"1": "cancer"}, {1: {"Right Lung", "Lung Tumor"}}),
    "Task07_Pancreas": ("msd-pancreas", "Pancreas", {"1": "pancreas", "2": "cancer"},
                        {1: {"Pancreas"}, 2: {"Pancreas", "Pancreas Tumor"}}),
    "Task08_HepaticVessel": ("msd-hepaticvessel", "HepaticVessel", {"1": "Vessel", "2": "Tumour"},
                             {1: {"Liver", "Hepatic Vessel"},
                              2: {"Liver", "Hepatic Vessel Tumor"}}),
    "Task09_Spleen": ("msd-spleen", "Spleen", {"1": "spleen"}, {1: {"Spleen"}}),
    "Task10_Colon": ("msd-colon", "Colon", {"1": "colon cancer primaries"},
                     {1: {"Colon", "Colon Tumor"}}),
}


def msd_replica(root, task):
    """A task as distributed: its own dataset.json, one scan, and the archive's ._ twins."""
    folder, (_, name, names, meaning) = root / task, MSD[task]
    label = np.resize(np.array([0, *meaning], np.uint8), (4, 4, 4))
    write_nifti(folder / "imagesTr/case_001.nii.gz", BOX, EYE)
    write_nifti(folder / "labelsTr/case_001.nii.gz", label, EYE)
    for part in ("imagesTr", "labelsTr"):
        (folder / part / "._case_001.nii.gz").write_bytes(b"Mac OS X")
    (folder / "._dataset.json").write_bytes(b"Mac OS X")
    info = {"name": name, "description": "replica", "licence": "CC-BY-SA 4.0", "release": "1.0",
            "tensorImageSize": "3D", "modality": {"0": "CT"},
            "labels": {"0": "background", **names}, "numTraining": 1, "numTest": 1,
            "training": [{"image": "./imagesTr/case_001.nii.gz",
                          "label": "./labelsTr/case_001.nii.gz"}],
            "test": ["./imagesTs/case_002.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(info))
    return folder


def check_msd(root, task):
    """The one case of the replica means what it should, and gets the zoom and crops of MSD."""
    meaning = MSD[task][3]
    case, = data.read_datasets([root], labels.CLASSES)
    assert case.name == f"{task}/case_001" and case.msd and case.modality == "ct"
    for value, classes in meaning.items():
        row, = case.label_map.to_label_rows(np.array([value]), "x")
        assert class_names(case.label_map.regions[row]) == classes
    lesions = {c.name for c in labels.CLASSES if c.lesion}
    wanted = set().union(*meaning.values())
    assert class_names(case.annotated) & lesions == wanted & lesions
    scan, = data.build_all([case], root / "cache", 1.0, workers=0, quiet=True)
    assert [labels.CLASSES[k].name for k in scan.present_classes()] == \
        [c.name for c, a in zip(labels.CLASSES, case.annotated, strict=True) if a and
         c.name in wanted]


@pytest.mark.parametrize("task", MSD)
def test_an_msd_task_as_distributed(task, tmp_path):
    msd_replica(tmp_path, task)
    before = tree(tmp_path)
    check_msd(tmp_path, task)
    assert all(tree(tmp_path)[path] == content for path, content in before.items())


@pytest.mark.parametrize("task", MSD)
def test_the_labels_of_an_msd_task_mean_the_same_in_evaluation(task, tmp_path):
    import metrics
    path = msd_replica(tmp_path, task) / "labelsTr/case_001.nii.gz"
    raw = data.load_volume(path).array
    found = metrics._label_map_of(path, raw, "case_001", labels.CLASSES)
    for value, classes in MSD[task][3].items():
        row, = found.to_label_rows(np.array([value]), "x")
        assert class_names(found.regions[row]) == classes


@pytest.mark.parametrize("task", MSD)
def test_an_msd_task_that_is_prepared(task, tmp_path, capsys):
    folder, name = msd_replica(tmp_path, task), MSD[task][0]
    before = tree(folder)
    assert labels.run(labels.main, [name, str(folder)]) == 0
    out = capsys.readouterr().out
    assert "dataset.original.json; taken over from it: tensorImageSize, channel_names" in out
    after = tree(folder)
    original = folder / "dataset.original.json"
    assert after.keys() - before.keys() == {original}
    assert after[original] == before[folder / "dataset.json"]
    changed = {path for path in before if after[path] != before[path]}
    assert changed == {folder / "dataset.json"}
    check_msd(tmp_path, task)
    assert labels.run(labels.main, [name, str(folder)]) == 0
    assert tree(folder) == after                             # a second run changes nothing


def test_msd_keeps_its_crops_where_dataset_json_is_lost(tmp_path):
    folder = msd_replica(tmp_path, "Task03_Liver")
    (folder / "dataset.json").unlink()
    assert labels.run(labels.main, ["msd-liver", str(folder)]) == 0
    check_msd(tmp_path, "Task03_Liver")
    assert not (folder / "dataset.original.json").exists()


def test_the_name_of_another_msd_task_is_refused(tmp_path, capsys):
    """Liver and pancreas have the same values, so nothing else would show the mistake."""
    folder = msd_replica(tmp_path, "Task03_Liver")
    before = tree(folder)
    assert labels.run(labels.main, ["msd-pancreas", str(folder)]) == 2
    assert "'Liver', which is not msd-pancreas" in capsys.readouterr().err
    assert tree(folder) == before


def test_an_edited_dataset_json_is_not_overwritten(tmp_path, capsys):
    folder = msd_replica(tmp_path, "Task09_Spleen")
    labels.main(["msd-spleen", str(folder)])
    info = json.loads((folder / "dataset.json").read_text())
    info["labels"]["liver"] = 2
    (folder / "dataset.json").write_text(json.dumps(info))
    before = tree(folder)
    assert labels.run(labels.main, ["msd-spleen", str(folder)]) == 2
    assert "edited after" in capsys.readouterr().err and tree(folder) == before


def test_the_copy_of_the_distributors_dataset_json_is_never_overwritten(tmp_path, capsys):
    folder = msd_replica(tmp_path, "Task09_Spleen")
    distributed = (folder / "dataset.json").read_bytes()
    labels.main(["msd-spleen", str(folder)])
    after = tree(folder)
    (folder / "dataset.json").write_bytes(distributed)       # the archive is unpacked again
    assert labels.run(labels.main, ["msd-spleen", str(folder)]) == 0 and tree(folder) == after
    (folder / "dataset.json").write_text('{"labels": {"spleen": 1}}')
    before = tree(folder)
    assert labels.run(labels.main, ["msd-spleen", str(folder)]) == 2
    assert "neither written by labels.py" in capsys.readouterr().err and tree(folder) == before


def test_an_unreadable_dataset_json_is_one_line_and_stays(tmp_path, capsys):
    folder = msd_replica(tmp_path, "Task09_Spleen")
    (folder / "dataset.json").write_text("{")
    before = tree(folder)
    assert labels.run(labels.main, ["msd-spleen", str(folder)]) == 2
    assert "dataset.json" in capsys.readouterr().err and tree(folder) == before


def test_stray_files_and_images_without_label_are_named_when_preparing(tmp_path, capsys):
    for case in ("amos_0001", "amos_0001 (1)", "amos_0002", "amos_0507", "._amos_0001"):
        write_nifti(tmp_path / f"imagesTr/{case}.nii.gz", BOX, EYE)
        write_nifti(tmp_path / f"labelsTr/{case}.nii.gz", BOX % 2, EYE)
    (tmp_path / "labelsTr/amos_0002.nii.gz").unlink()
    assert labels.run(labels.main, ["amos", str(tmp_path)]) == 0
    info = json.loads((tmp_path / "dataset.json").read_text())
    assert info["training"] == listed("amos_0001")
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split(": ")[1] for line in lines] == [
        "imagesTr/amos_0001 (1).nii.gz", "imagesTr/amos_0507.nii.gz", "imagesTr/amos_0002.nii.gz"]
    for case in ("0007", "0007 (1)", "x"):
        write_nifti(tmp_path / f"b/img/img{case}.nii.gz", BOX, EYE)
        write_nifti(tmp_path / f"b/label/label{case}.nii.gz", BOX % 2, EYE)
    assert labels.run(labels.main, ["btcv", str(tmp_path / "b")]) == 0
    assert len(data.read_dataset(tmp_path / "b", labels.CLASSES)) == 1


def test_the_mr_scans_of_amos_as_distributed_are_treated_as_mri(tmp_path, capsys):
    nnunet(tmp_path / "a", ("amos_0001", "amos_0507"), channel_names={"0": "CT"})
    cases = data.read_dataset(tmp_path / "a", labels.CLASSES)
    assert {case.name: case.modality for case in cases} == {"a/amos_0001": "ct",
                                                             "a/amos_0507": "mri"}
    assert "1 cases are MR scans by their AMOS numbers" in capsys.readouterr().out
    cases = data.read_dataset(tmp_path / "a", labels.CLASSES, modality="ct")
    assert [case.modality for case in cases] == ["ct", "ct"]           # as the user says


def test_the_ct_scans_of_amos_stay_ct_beside_a_list_that_mixes_both(tmp_path):
    write_nifti(tmp_path / "a/imagesTr/amos_0001.nii.gz", BOX, EYE)
    nnunet(tmp_path / "a", (), modality={"0": "CT", "1": "MRI"})
    write_nifti(tmp_path / "a/labelsTr/amos_0001.nii.gz", BOX % 2, EYE)
    assert labels.run(labels.main, ["amos", str(tmp_path / "a")]) == 0
    info = json.loads((tmp_path / "a/dataset.json").read_text())
    assert info["channel_names"] == {"0": "CT"}
    case, = data.read_dataset(tmp_path / "a", labels.CLASSES)
    assert case.modality == "ct"
