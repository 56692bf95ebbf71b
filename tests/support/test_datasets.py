"""Finding datasets as their users have them: folders, lists, MSD tasks."""
import json

import numpy as np
import pytest
from conftest import write_nifti

import labels
from support import cache, class_tables, datasets, evaluate

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
    return [case.name for case in datasets.read_datasets(roots, labels.CLASSES, **kwargs)]


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
    case, = datasets.read_dataset(folder, labels.CLASSES)
    assert case.image == folder / f"imagesTr/x_0000{ending}" and case.name == "Task501_X/x"


def test_a_stray_file_is_passed_over_and_named(tmp_path, capsys):
    folder = nnunet(tmp_path / "Dataset001_X")
    write_nifti(folder / "imagesTr/amos_0001 (1).nii.gz", BOX, EYE)
    assert case_names_of(folder) == ["Dataset001_X/x"]
    out = capsys.readouterr().out
    assert "note: 1 files in" in out and "not used: amos_0001 (1).nii.gz" in out


def test_a_missing_image_or_label_is_one_line_that_names_it(tmp_path):
    folder = nnunet(tmp_path / "Dataset001_X", ["x", "y"])
    (folder / "labelsTr/x.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="x.nii.gz: no label for x_0000.nii.gz; remove"):
        case_names_of(folder)
    nnunet(folder, ["y"], training=listed("gone", "y"))
    with pytest.raises(FileNotFoundError, match="gone.nii.gz: no such image, but dataset.json"):
        case_names_of(folder)


def test_datasets_of_one_name_are_refused_in_one_line_that_names_both(tmp_path):
    for path in ("a/X", "b/X", "b/Y"):
        nnunet(tmp_path / path)
    with pytest.raises(ValueError, match="two datasets are called X: .*a/X and .*b/X; rename"):
        case_names_of(tmp_path / "a", tmp_path / "b")
    assert case_names_of(tmp_path / "b") == ["X/x", "Y/x"]


def test_a_dataset_two_folders_deep_is_named_as_not_used(tmp_path, capsys):
    """A dataset.json inside a dataset is none of them, nor is one in a hidden folder."""
    for path in ("X", "group/Y", "X/imagesTr", "group/.old", ".old/Z"):
        nnunet(tmp_path / path)
    assert case_names_of(tmp_path) == ["X/x"]
    line, = capsys.readouterr().out.splitlines()
    assert line == (f"note: 1 datasets lie too deep in {tmp_path} and are not used; pass the "
                    "folder that holds them: group/Y")
    assert case_names_of(tmp_path / "group") == ["Y/x"]


def test_a_dataset_that_is_given_twice_is_used_once(tmp_path, monkeypatch):
    folder = nnunet(tmp_path / "raw/X")
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/alias").symlink_to(folder)
    assert len(datasets.find_datasets([tmp_path / "raw", folder, tmp_path / "link"])) == 1
    assert case_names_of(tmp_path / "link", folder) == ["X/x"]
    monkeypatch.chdir(folder)
    assert case_names_of(".") == ["X/x"] == case_names_of("../X")


def test_cases_of_one_name_are_refused_in_one_line_that_names_both(tmp_path):
    folder = nnunet(tmp_path / "X", ["x"], ".nii.gz")
    nnunet(folder, ["x"], ".nii")
    with pytest.raises(ValueError, match=r"called x: .*x_0000.nii.gz and .*x_0000.nii;"):
        case_names_of(folder)
    for name in ("a/scan", "b/scan"):
        write_nifti(folder / f"{name}.nii.gz", BOX, EYE)
    nnunet(folder, (), training=listed("a/scan", "b/scan", image="{}.nii.gz", label="{}.nii.gz"))
    with pytest.raises(ValueError, match=r"called scan: .*a/scan.nii.gz and .*b/scan.nii.gz;"):
        case_names_of(folder)


def test_a_study_with_one_folder_per_patient_names_cases_after_folders(tmp_path):
    names = ("p1/ct", "p2/imaging", "p3/image_0000", "p4/img")
    for name in names:
        write_nifti(tmp_path / f"X/{name}.nii.gz", BOX, EYE)
        write_nifti(tmp_path / f"X/{name}_seg.nii.gz", BOX % 2, EYE)
    folder = nnunet(tmp_path / "X", (), annotated={"p2": []},
                    training=listed(*names, image="{}.nii.gz", label="{}_seg.nii.gz"))
    cases = datasets.read_dataset(folder, labels.CLASSES)
    assert [case.name for case in cases] == ["X/p1", "X/p2", "X/p3", "X/p4"]
    assert [bool(case.annotated.any()) for case in cases] == [True, False, True, True]


def test_annotated_is_reported_where_it_names_no_case(tmp_path, capsys):
    folder = nnunet(tmp_path / "X", annotated={"x": ["liver"], "img0099": ["spleen"]})
    case, = datasets.read_dataset(folder, labels.CLASSES)
    assert class_names(case.annotated) == {"Liver"}
    line, = capsys.readouterr().out.splitlines()
    assert "X/dataset.json" in line and "img0099" in line


def test_annotated_may_name_built_in_classes_that_a_smaller_table_lacks(tmp_path):
    folder = nnunet(tmp_path / "X", annotated={"x": ["liver", "spleen"]})
    case, = datasets.read_dataset(folder, class_tables.make_classes(["Femur", "Liver"]))
    assert case.annotated.tolist() == [False, True]
    nnunet(folder, annotated={"x": ["liver", "splen"]})
    with pytest.raises(ValueError, match="splen"):
        datasets.read_dataset(folder, class_tables.make_classes(["Femur", "Liver"]))


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
    """The one case of the replica means what it should, and gets the zoom and crops of the
    release."""
    meaning = MSD[task][2]
    case, = datasets.read_datasets([root], labels.CLASSES)
    assert case.name == f"{task}/case_001" and case.zoomed and case.modality == "ct"
    assert case.tumour_crops == (int(task[4:6]) in (3, 7, 8))
    for value, classes in meaning.items():
        row, = case.label_map.to_label_rows(np.array([value]), "x")
        assert class_names(case.label_map.regions[row]) == classes
    lesions = {c.name for c in labels.CLASSES if c.lesion}
    wanted = set().union(*meaning.values())
    assert class_names(case.annotated) & lesions == wanted & lesions
    scan, = cache.build_all([case], root / "cache", 1.0, workers=0, quiet=True)
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
    path = msd_replica(tmp_path, task) / "labelsTr/case_001.nii.gz"
    found = evaluate.read_label_map(path, labels.CLASSES)
    for value, classes in MSD[task][2].items():
        row, = found.to_label_rows(np.array([value]), "x")
        assert class_names(found.regions[row]) == classes


def test_the_mr_scans_of_amos_as_distributed_are_treated_as_mri(tmp_path, capsys):
    nnunet(tmp_path / "a", ("amos_0001", "amos_0507"), channel_names={"0": "CT"})
    cases = datasets.read_dataset(tmp_path / "a", labels.CLASSES)
    assert {case.name: case.modality for case in cases} == {"a/amos_0001": "ct",
                                                             "a/amos_0507": "mri"}
    assert "1 cases are MR scans by their AMOS numbers" in capsys.readouterr().out
    cases = datasets.read_dataset(tmp_path / "a", labels.CLASSES, modality="ct")
    assert [case.modality for case in cases] == ["ct", "ct"]           # as the user says
