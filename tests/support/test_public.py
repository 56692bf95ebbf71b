"""The public datasets: their tables, their dataset.json, one file per structure -> a label map."""
import doctest
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from conftest import affine_of, write_nifti
from runs import error_line

import data
import labels
from support import datasets, processes, public

EYE = np.eye(4)
BOX = np.arange(64, dtype=np.int16).reshape(4, 4, 4)


def class_names(mask):
    return {c.name for c, a in zip(labels.CLASSES, mask, strict=True) if a}


def prepare(name, folder):
    """The status of the command; the folder's dataset.json"""
    status = processes.run(public.main, [name, str(folder)])
    path = folder / "dataset.json"
    return status, json.loads(path.read_text()) if path.is_file() and status == 0 else {}


def tree(folder):
    """{path: content} of all files."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_examples_in_the_docstrings_hold():
    result = doctest.testmod(public)
    assert result.failed == 0 and result.attempted > 0


# ---- tables and lists of scans -------------------------------------------------------------------
REPLICAS = {    # dataset: ((image, label), a value, its classes, one of the annotated classes)
    "btcv": (("img/img0007.nii.gz", "label/label0007.nii.gz"), 8, {"Aorta"}, "Duodenum"),
    "lits": (("volume-3.nii", "segmentation-3.nii"), 2, {"Liver", "Liver Tumor"}, "Liver"),
    "kits": (("case_00001/imaging.nii.gz", "case_00001/segmentation.nii.gz"), 3,
             {"Kidney Cyst", "Right Kidney"}, "Left Kidney"),
    "word": (("imagesTr/word_0002.nii.gz", "labelsTr/word_0002.nii.gz"), 16,
             {"Right Head of Femur"}, "Right Adrenal Gland"),
    "abdomenct-1k": (("Images/Case_00001_0000.nii.gz", "Masks/Case_00001.nii.gz"), 4,
                     {"Pancreas"}, "Left Kidney"),
    "amos": (("imagesTr/amos_0001.nii.gz", "labelsTr/amos_0001.nii.gz"), 14, {"Bladder"},
             "Prostate"),
    "ct-org": (("volume-0.nii.gz", "labels-0.nii.gz"), 3, {"Right Lung"}, "Bladder"),
    "abdomenct-12organ": (("imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"), 12, {"Celiac Trunk"},
                          "Stomach"),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_a_miniature_replica_gives_the_right_regions(name, tmp_path):
    (image, label), value, belongs, annotated = REPLICAS[name]
    for file in (image, label):
        write_nifti(tmp_path / name / file, np.full((4, 4, 4), value, np.int16), EYE)
    before = set(tree(tmp_path))
    assert prepare(name, tmp_path / name)[0] == 0
    assert set(tree(tmp_path)) - before == {tmp_path / name / "dataset.json"}
    case, = datasets.read_dataset(tmp_path / name, labels.CLASSES)
    row = case.label_map.to_label_rows(np.array([value]), "x")[0]
    assert class_names(case.label_map.regions[row]) == belongs
    assert annotated in class_names(case.annotated)
    assert case.image == tmp_path / name / image
    assert datasets.find_datasets([tmp_path]) == [tmp_path / name]


def test_the_table_of_btcv_has_the_numbers_of_its_release():
    """Its description: 1 spleen, 2 right kidney, 3 left kidney, 4 gallbladder, ... 13 left adrenal
    gland, and the duodenum, 14, of the extended labels."""
    assert public.PUBLIC["btcv"].labels == {
        "spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "esophagus": 5,
        "liver": 6, "stomach": 7, "aorta": 8, "postcava": 9, "portal vein and splenic vein": 10,
        "pancreas": 11, "right adrenal gland": 12, "left adrenal gland": 13, "duodenum": 14}
    assert public.PUBLIC["amos"].labels["right kidney"] == 2
    assert public.PUBLIC["word"].labels["left kidney"] == 3          # WORD has the left one first


def test_the_scans_of_btcv_from_60_on_annotate_eight_classes(tmp_path):
    for n in ("0040", "0060", "0061"):
        for file in (f"img/img{n}.nii.gz", f"label/label{n}.nii.gz"):
            write_nifti(tmp_path / "btcv" / file, np.ones((4, 4, 4), np.int16), EYE)
    prepare("btcv", tmp_path / "btcv")
    cases = datasets.read_dataset(tmp_path / "btcv", labels.CLASSES)
    assert [case.annotated.sum() for case in cases] == [14, 8, 8]
    assert class_names(cases[1].annotated) == {
        "Spleen", "Left Kidney", "Gall Bladder", "Esophagus", "Liver", "Stomach", "Pancreas",
        "Duodenum"}


def test_the_names_of_every_public_dataset_match_a_class(capsys):
    for name in public.PUBLIC.keys() - public.STRUCTURES.keys():
        assert public.main([name]) == 0
        table = json.loads(capsys.readouterr().out)["labels"]
        label_map = labels.label_map(table, labels.CLASSES)
        without = [label_map.names[value] for value in table.values()
                   if isinstance(value, int) and value not in label_map.values]
        assert without == ([["bone"], ["brain"]] if name == "ct-org" else []), name


@pytest.mark.parametrize("name", public.STRUCTURES)
def test_every_structure_means_its_class_and_is_painted_after_what_contains_it(name):
    names = [c.name for c in labels.CLASSES]
    painted = []
    for structure, class_name in public.STRUCTURES[name].items():
        k, = labels.match(structure)
        assert names[k] == class_name
        assert not any(k in labels.ancestors(earlier, labels.CLASSES) for earlier in painted)
        painted.append(k)


@pytest.mark.parametrize("args, what", [(["chaos"], "dcm2niix"), (["nonsense"], "unknown dataset"),
                                        (["kits", "{tmp}"], "no pair"),
                                        (["msd-liver"], "needs no preparation")])
def test_a_dataset_that_cannot_be_prepared_gives_one_line(tmp_path, capsys, args, what):
    assert processes.run(public.main, [a.format(tmp=tmp_path) for a in args]) == 2
    assert what in error_line(capsys) and not list(tmp_path.iterdir())


# ---- one file per structure ----------------------------------------------------------------------
def structures(case, masks, shape=(6, 5, 4), affine=EYE, ct="ct.nii.gz"):
    """CASE/ct.nii.gz and CASE/segmentations/NAME.nii.gz; masks: {name: first-axis indices}."""
    write_nifti(case / ct, np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)
    for name, planes in masks.items():
        mask = np.zeros(shape, np.uint8)
        mask[planes] = 1
        write_nifti(case / f"segmentations/{name}.nii.gz", mask, affine)


def merged_names(folder, name="totalsegmentator"):
    """Prepare the folder -> the structure at each plane of the first axis of its first case."""
    status, info = prepare(name, folder)
    assert status == 0
    names = {value: structure for structure, value in info["labels"].items()}
    label = data.load_volume(folder / info["training"][0]["label"]).array
    assert (label == label[:, :1, :1]).all()
    return [names[value] for value in label[:, 0, 0]]


@pytest.mark.parametrize("name, masks, merged", [
    # in the alphabet, kidney_cyst_right comes before kidney_right
    ("totalsegmentator", {"pancreas_tumor": [2], "pancreas": [2, 3], "kidney_right": [4, 5],
                          "kidney_cyst_right": [5], "liver": [0, 1]},
     "liver liver pancreas_tumor pancreas kidney_right kidney_cyst_right"),
    ("abdomenatlas", {"hepatic_vessel": [1], "liver": [0, 1, 3], "liver_lesion": [2, 3],
                      "spleen": [4, 5]},
     "liver hepatic_vessel liver_lesion liver_lesion spleen spleen"),
    # the list of TotalSegmentator has spleen, liver, stomach, colon, aorta; a rib is no class here
    ("totalsegmentator", {"aorta": [0], "colon": [0, 1], "liver": [2, 3], "stomach": [1, 2],
                          "spleen": [4, 3], "rib_left_1": [5]},
     "aorta colon stomach liver spleen background")])
def test_where_two_structures_overlap_a_child_stays_or_the_later_one_of_the_list(
        tmp_path, name, masks, merged):
    structures(tmp_path / "s1", masks)
    assert merged_names(tmp_path, name) == merged.split()


def test_a_lesion_gets_the_host_and_the_side_that_its_name_tells(tmp_path):
    """No kidney file touches the cysts, so only their names tell the side. A lesion without a
    clear host is left out of the loss."""
    structures(tmp_path / "s1", {"kidney_cyst_left": [5], "kidney_cyst_right": [4], "liver": [0, 1],
                                 "liver_lesion": [1], "pancreatic_lesion": [2], "lesion": [3]})
    merged_names(tmp_path)
    case, = datasets.read_dataset(tmp_path, labels.CLASSES)
    row = case.label_map.to_label_rows(data.load_volume(case.label).array, "x")[:, 0, 0]
    found = [class_names(case.label_map.regions[r]) for r in row]
    assert found == [{"Liver"}, {"Liver", "Liver Tumor"}, {"Pancreas", "Pancreas Tumor"}, set(),
                     {"Right Kidney", "Kidney Cyst"}, {"Left Kidney", "Kidney Cyst"}]
    assert case.label_map.known[row].all(1).tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize("codes", ["SAR", "IPR", "RSA"])
def test_the_axes_of_a_mask_do_not_matter(codes, tmp_path):
    """A mask in other axes is merged where it lies in the CT's own axes."""
    shape, affine = (4, 5, 6), affine_of("LPS", (1.5, 2.0, 3.0))
    structures(tmp_path / "s1", {"liver": [0, 1]}, shape, affine)
    mask = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    to = nib.orientations.ornt_transform(nib.io_orientation(affine),
                                         nib.orientations.axcodes2ornt(codes))
    write_nifti(tmp_path / "s1/segmentations/spleen.nii.gz", nib.apply_orientation(mask, to),
                affine @ nib.orientations.inv_ornt_aff(to, shape))
    assert prepare("totalsegmentator", tmp_path)[0] == 0
    merged = nib.load(tmp_path / "s1/labels.nii.gz")
    mask[:2] = 5                                             # the liver is painted over the spleen
    assert np.array_equal(np.asarray(merged.dataobj), mask)
    assert np.array_equal(merged.affine, affine)


def test_a_class_is_annotated_where_all_of_its_structures_have_a_file(tmp_path):
    """A left lung of two lobes needs both, a kidney cyst needs the files of both sides. Hidden
    masks and cases are passed over."""
    everything = {"liver": [0], "spleen": [1], "lung_upper_lobe_left": [2],
                  "lung_lower_lobe_left": [3], "kidney_cyst_left": [4], "kidney_cyst_right": [5]}
    structures(tmp_path / "s1", everything)
    structures(tmp_path / "s2", {k: v for k, v in everything.items() if k != "spleen"})
    structures(tmp_path / "s3", {k: v for k, v in everything.items() if "upper" not in k
                                 and k != "kidney_cyst_left"})
    structures(tmp_path / ".s4", everything)
    for file in ("s2/segmentations/._spleen.nii.gz", "s2/._ct.nii.gz"):
        (tmp_path / file).write_bytes(b"Mac OS X")
    _, info = prepare("totalsegmentator", tmp_path)
    assert info["annotated"] == {"s1": ["Spleen", "Liver", "Left Lung", "Kidney Cyst"],
                                 "s2": ["Liver", "Left Lung", "Kidney Cyst"],
                                 "s3": ["Spleen", "Liver"]}
    cases = datasets.read_dataset(tmp_path, labels.CLASSES)
    found = [class_names(case.annotated) for case in cases]
    assert found == [set(names) for names in info["annotated"].values()]


@pytest.mark.parametrize("file, damage", [
    ("ct", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    ("segmentations/liver", lambda path: path.write_bytes(path.read_bytes()[:-9])),
    ("segmentations/liver", lambda path: write_nifti(path, np.ones((6, 5, 4), np.uint8),
                                                     affine_of("RAS", (1, 1, 1)))),
    ("segmentations/liver", lambda path: path.unlink())],
    ids=["cut ct", "cut mask", "another place", "no mask"])
def test_a_case_that_cannot_be_merged_is_left_out_with_one_line(tmp_path, capsys, file, damage):
    for case in ("s1", "s2"):
        structures(tmp_path / case, {"liver": [0]})
    damage(tmp_path / f"s1/{file}.nii.gz")
    assert merged_names(tmp_path)[0] == "liver"
    captured = capsys.readouterr()
    line, = [line for line in captured.out.splitlines() if "left out" in line]
    assert str(tmp_path / "s1") in line and "Traceback" not in captured.out + captured.err
    assert [case.name[-2:] for case in datasets.read_dataset(tmp_path, labels.CLASSES)] == ["s2"]
    assert not (tmp_path / "s1/labels.nii.gz").exists() and not list(tmp_path.rglob("*.part*"))
    shutil.rmtree(tmp_path / "s2")
    (tmp_path / "dataset.json").unlink()
    assert prepare("totalsegmentator", tmp_path)[0] == 2


@pytest.mark.parametrize("foreign", ["a label map", "no NIfTI file"])
def test_a_label_map_of_somebody_else_is_never_overwritten(tmp_path, capsys, foreign):
    """One of ours is written again, with the same content."""
    for case in ("s1", "s2"):
        structures(tmp_path / case, {"liver": [0]})
    path = tmp_path / "s2/labels.nii.gz"
    write_nifti(path, np.ones((6, 5, 4), np.uint8), EYE)
    if foreign == "no NIfTI file":
        path.write_bytes(b"?")
    before = tree(tmp_path)
    assert prepare("totalsegmentator", tmp_path)[0] == 2
    error = error_line(capsys)
    assert "s2/labels.nii.gz" in error and "not overwritten" in error and tree(tmp_path) == before
    path.unlink()
    assert prepare("totalsegmentator", tmp_path)[0] == 0
    after = tree(tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert prepare("totalsegmentator", tmp_path)[0] == 0 and tree(tmp_path) == after


def test_pants_keeps_images_and_labels_apart(tmp_path):
    structures(tmp_path / "LabelTr/P1", {"liver": [0], "pancreas": [1, 2]}, ct="unused.nii.gz")
    (tmp_path / "ImageTr/P1").mkdir(parents=True)
    (tmp_path / "LabelTr/P1/unused.nii.gz").rename(tmp_path / "ImageTr/P1/ct.nii.gz")
    assert merged_names(tmp_path, name="pants")[:3] == ["liver", "pancreas", "pancreas"]
    case, = datasets.read_dataset(tmp_path, labels.CLASSES)
    assert case.name.endswith("/P1") and (tmp_path / "LabelTr/P1/labels.nii.gz").is_file()


# ---- preparing -----------------------------------------------------------------------------------
def pairs(folder, *cases):
    """Scans and labels, and the list of them as it stands in a dataset.json."""
    for case in cases:
        for part in ("imagesTr", "labelsTr"):
            write_nifti(folder / f"{part}/{case}.nii.gz", BOX % 2, EYE)
    return [{"image": f"imagesTr/{case}.nii.gz", "label": f"labelsTr/{case}.nii.gz"}
            for case in cases]


def test_a_distributors_dataset_json_is_refused_and_read_after_it_is_renamed(tmp_path, capsys):
    """Its list says which scans are used, and of AMOS only the CT scans."""
    training = pairs(tmp_path, "amos_0001", "amos_0507", "amos_0002")
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"0": "x"}, "modality": {"0": "CT", "1": "MRI"},
                                "training": [{key: f"./{file}" for key, file in pair.items()}
                                             for pair in training[:2]]}))
    before = tree(tmp_path)
    assert prepare("amos", tmp_path)[0] == 2
    assert f"mv {path} {tmp_path}/dataset.original.json" in error_line(capsys)
    assert tree(tmp_path) == before
    path.rename(tmp_path / "dataset.original.json")
    _, info = prepare("amos", tmp_path)
    assert "not listed in dataset.original.json: imagesTr/amos_0002.nii.gz" in \
        capsys.readouterr().out
    assert info["training"] == training[:1] and info["channel_names"] == {"0": "CT"}
    after = tree(tmp_path)
    assert prepare("amos", tmp_path)[0] == 0 and tree(tmp_path) == after
    assert "prepared already" in capsys.readouterr().out
    path.write_text("{")
    before = tree(tmp_path)
    assert prepare("amos", tmp_path)[0] == 2
    assert "dataset.json" in error_line(capsys) and tree(tmp_path) == before


def test_the_modality_of_a_distributors_dataset_json_is_taken_over(tmp_path):
    pairs(tmp_path, "a", "b")
    (tmp_path / "dataset.original.json").write_text('{"modality": {"0": "MRI"}}')
    prepare("word", tmp_path)
    cases = datasets.read_dataset(tmp_path, labels.CLASSES)
    assert [case.modality for case in cases] == ["mri", "mri"]


def test_stray_files_and_images_without_label_are_named_when_preparing(tmp_path, capsys):
    training = pairs(tmp_path, "amos_0001", "amos_0001 (1)", "amos_0002", "amos_0507",
                     "._amos_0001")
    (tmp_path / "labelsTr/amos_0002.nii.gz").unlink()
    _, info = prepare("amos", tmp_path)
    assert info["training"] == training[:1]
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert [line.split(": ")[-1] for line in lines] == [
        "imagesTr/amos_0001 (1).nii.gz", "imagesTr/amos_0002.nii.gz", "imagesTr/amos_0507.nii.gz"]


def test_the_official_parts_are_those_of_meta_csv_and_replace_no_other_file(tmp_path):
    (tmp_path / "meta.csv").write_text("image_id;split\ns1;train\ns2;test\ns9;val\n")
    for _ in range(2):
        public.write_official_parts(tmp_path, ["s1", "s2", "s3"])
    path = tmp_path / "splits_official.json"
    assert json.loads(path.read_text()) == {"train": ["s1"], "val": [], "test": ["s2"]}
    path.write_text('{"train": ["s3"]}')
    with pytest.raises(ValueError, match="has other folds; move it away"):
        public.write_official_parts(tmp_path, ["s1", "s2", "s3"])
    assert path.read_text() == '{"train": ["s3"]}'
