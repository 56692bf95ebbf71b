"""Finding datasets as their users have them: folders, lists, MSD tasks."""
import json

import numpy as np
import pytest
from conftest import write_nifti

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


def test_training_with_skip_bad_leaves_out_what_cannot_be_used(tmp_path, capsys):
    import train
    folder = nnunet(tmp_path / "Dataset001_X", ["x", "y", "z"])
    (folder / "labelsTr/x.nii.gz").unlink()
    (folder / "imagesTr/y_0000.nii.gz").write_bytes(b"")
    argv = ["--data", str(folder), "--out", str(tmp_path / "run"), "--text", "onehot", "--dry-run",
            "--spacing-mm", "0", "--val-fraction", "0", "--workers", "0"]
    assert labels.run(train.main, argv) == 2
    assert "no label for x_0000.nii.gz" in capsys.readouterr().err
    assert labels.run(train.main, [*argv, "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "Dataset001_X: 1 scan," in captured.out and "y_0000" in captured.out + captured.err


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


# ---- MSD and AMOS as distributed -----------------------------------------------------------------
def tree(folder):
    """{path: content} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MSD = {   # folder: (its name in dataset.json, labels, {value: classes})
    "Task03_Liver": ("Liver", {"1": "liver", "2": "cancer"},
                     {1: {"Liver"}, 2: {"Liver", "Liver Tumor"}}),
    "Task06_Lung": ("Lung", {"1": "cancer"}, {1: {"Right Lung", "Lung Tumor"}}),
    "Task07_Pancreas": ("Pancreas", {"1": "pancreas", "2": "cancer"},
                        {1: {"Pancreas"}, 2: {"Pancreas", "Pancreas Tumor"}}),
    "Task08_HepaticVessel": ("HepaticVessel", {"1": "Vessel", "2": "Tumour"},
                             {1: {"Liver", "Hepatic Vessel"},
                              2: {"Liver", "Hepatic Vessel Tumor"}}),
    "Task09_Spleen": ("Spleen", {"1": "spleen"}, {1: {"Spleen"}}),
    "Task10_Colon": ("Colon", {"1": "colon cancer primaries"},
                     {1: {"Colon", "Colon Tumor"}}),
}


def msd_replica(root, task):
    """A task as distributed: its own dataset.json, one scan, and the archive's ._ twins."""
    folder, (name, names, meaning) = root / task, MSD[task]
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
    meaning = MSD[task][2]
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
    for value, classes in MSD[task][2].items():
        row, = found.to_label_rows(np.array([value]), "x")
        assert class_names(found.regions[row]) == classes


def test_the_mr_scans_of_amos_as_distributed_are_treated_as_mri(tmp_path, capsys):
    nnunet(tmp_path / "a", ("amos_0001", "amos_0507"), channel_names={"0": "CT"})
    cases = data.read_dataset(tmp_path / "a", labels.CLASSES)
    assert {case.name: case.modality for case in cases} == {"a/amos_0001": "ct",
                                                             "a/amos_0507": "mri"}
    assert "1 cases are MR scans by their AMOS numbers" in capsys.readouterr().out
    cases = data.read_dataset(tmp_path / "a", labels.CLASSES, modality="ct")
    assert [case.modality for case in cases] == ["ct", "ct"]           # as the user says
