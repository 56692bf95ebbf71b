"""Names, label maps and sides."""
import json

import numpy as np
import pytest
from conftest import write_nifti

import labels


def name(i):
    return labels.CLASSES[i].name


@pytest.mark.parametrize("text, want", [
    ("kidney_left", ["Left Kidney"]), ("Left Kidney", ["Left Kidney"]),
    ("KIDNEY-LEFT", ["Left Kidney"]), ("gallbladder", ["Gall Bladder"]),
    ("inferior_vena_cava", ["Postcava"]), ("IVC", ["Postcava"]), ("aorta", ["Aorta"]),
    ("portal_vein_and_splenic_vein", ["Portal Vein and Splenic Vein"]),
    ("adrenal_gland_right", ["Right Adrenal Gland"]), ("small_bowel", ["Intestine"]),
    ("urinary_bladder", ["Bladder"]), ("lung_upper_lobe_left", ["Left Lung"]),
    ("colon cancer primaries", ["Colon Tumor"]), ("lung_tumour", ["Lung Tumor"]),
    ("Hepatic Vessels", ["Hepatic Vessel"]), ("Celiac Truck", ["Celiac Trunk"]),
    ("Arota", ["Aorta"]), ("kidney", ["Right Kidney", "Left Kidney"]),
    ("lungs", ["Right Lung", "Left Lung"]), ("head_of_femur_r", ["Right Head of Femur"]),
    ("femur_left", []), ("liver segment", []), ("background", []), ("", []), ("tumor", []),
])
def test_names_of_public_datasets_find_their_class(text, want):
    assert [name(i) for i in labels.match(text)] == want


def test_table_has_the_papers_order_and_spelling():
    assert len(labels.CLASSES) == 32
    assert [name(i) for i in (0, 7, 24, 31)] == ["Spleen", "Aorta", "Celiac Trunk", "Kidney Cyst"]
    assert labels.CLASSES[7].sentence("V3") == "A computerized tomography of a Arota"
    assert labels.CLASSES[5].sentence("V1") == "A photo of a Liver."
    with pytest.raises(ValueError, match="no {}"):
        labels.CLASSES[0].sentence("spleen")


def test_no_spelling_means_two_classes():
    keys = [(labels._key(n), c.name) for c in labels.CLASSES
            for n in {c.name, *c.synonyms, c.prompt_name} if n]
    seen = {}
    for key, owner in keys:
        assert seen.setdefault(key, owner) == owner


def test_three_spellings_of_one_label_table():
    """LiTS in nnU-Net, region and MSD form: a tumour voxel is liver in all three."""
    forms = [{"background": 0, "liver": 1, "liver tumor": 2},
             {"background": 0, "liver": [1, 2], "liver tumor": [2]},
             {"0": "background", "1": "liver", "2": "liver tumor"}]
    for form in forms:
        lm = labels.label_map(form, labels.CLASSES)
        assert lm.values == [0, 1, 2] and not lm.pairs
        assert [np.flatnonzero(r).tolist() for r in lm.regions] == [[], [5], [5, 26]] * 2
        assert np.flatnonzero(lm.annotated).tolist() == [5, 26]


def test_kidneys_without_sides_become_two_classes():
    lm = labels.label_map({"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3}, labels.CLASSES)
    assert np.flatnonzero(lm.annotated).tolist() == [1, 2, 25, 31]
    assert lm.pairs == {(1, 2): [1, 2, 3]}
    assert np.flatnonzero(lm.regions[2]).tolist() == [1, 25]        # tumour on the right
    assert np.flatnonzero(lm.regions[2 + 4]).tolist() == [2, 25]    # and on the left


def test_names_without_class_are_reported_and_their_values_are_background():
    lm = labels.label_map({"liver": 3, "sacrum": 25}, labels.CLASSES)
    assert lm.unmatched == ["sacrum"]
    raw = np.array([[[0, 3, 25]]])
    assert lm.rows(raw, "x").tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("table, what", [
    ({"sacrum": 1}, "is a class here"), ({"liver": "one"}, "integers"), ([1], "table of names"),
    ({"liver": 0}, "background"), ({"liver": -1}, "0..65535"), ({}, "is a class here")])
def test_malformed_label_tables_are_one_line(table, what):
    with pytest.raises(ValueError, match=what):
        labels.label_map(table, labels.CLASSES, "some/dataset.json")


def test_values_that_are_not_named_or_not_integers_are_refused():
    lm = labels.label_map({"liver": 1}, labels.CLASSES)
    with pytest.raises(ValueError, match=r"a.nii: label values \[7\]"):
        lm.rows(np.array([0, 1, 7]), "a.nii")
    with pytest.raises(ValueError, match="integers"):
        lm.rows(np.array([0.0, 1.4]), "a.nii")
    assert lm.rows(np.array([0.0, 0.9999]), "a.nii").tolist() == [0, 1]


def sided(shape=(40, 12, 12)):
    lm = labels.label_map({"kidney": [1, 2], "kidney tumor": 2}, labels.CLASSES)
    return lm, np.zeros(shape, np.uint8)


def test_pieces_go_to_their_side_of_the_bodys_plane_not_of_the_image():
    """Axis 0 grows to the right; the body's plane is at 14, the image's middle at 20."""
    lm, rows = sided()
    rows[16:20, 3:7, 3:7] = 1             # right of the body, left of the image's middle
    rows[4:9, 3:7, 3:7] = 1               # left kidney
    rows[6:8, 4:6, 4:6] = 2               # with a tumour
    rows[30, 9, 9] = 1                    # a speck on the right
    out = labels.split_sides(rows, lm, 14.0)
    V = len(lm.values)
    assert (out[16:20, 3:7, 3:7] == 1).all() and out[30, 9, 9] == 1
    assert set(np.unique(out[4:9, 3:7, 3:7])) == {1 + V, 2 + V}


def test_a_single_kidney_keeps_its_side_by_position():
    for at, want in ((2, 2), (30, 1)):
        lm, rows = sided()
        rows[at:at + 5, 3:7, 3:7] = 1
        assert np.flatnonzero(lm.regions[labels.split_sides(rows, lm, 20.0)].any((0, 1, 2))) == [want]


def test_a_piece_across_the_plane_is_cut_only_when_it_lies_on_both_sides():
    lm, rows = sided()
    rows[10:20, 3:7, 3:7] = 1
    most = labels.split_sides(rows, lm, 11.0)            # 90 % right of the plane: not cut
    half = labels.split_sides(rows, lm, 15.0)            # half and half: cut
    V = len(lm.values)
    assert set(np.unique(most)) == {0, 1} and set(np.unique(half)) == {0, 1, 1 + V}
    assert (half[10:15, 3:7, 3:7] == 1 + V).all() and (half[15:20, 3:7, 3:7] == 1).all()


def test_a_tumour_follows_the_labelled_lung_it_touches():
    lm = labels.label_map({"lung_left": 1, "lung_right": 2, "lung tumor": 3}, labels.CLASSES)
    rows = np.zeros((30, 8, 8), np.uint8)
    rows[2:17], rows[20:28] = lm.values.index(1), lm.values.index(2)
    rows[15:17, 3:5, 3:5] = lm.values.index(3)      # left lung reaching beyond the plane at 14
    out = labels.split_sides(rows, lm, 14.0)
    assert np.flatnonzero(lm.regions[out[15, 3, 3]]).tolist() == [16, 29]


def test_own_table_replaces_the_built_in_one(tmp_path):
    path = tmp_path / "knee.json"
    path.write_text(json.dumps(["Femur", {"name": "Medial Meniscus", "prompt": "A 3D MRI scan of "
                                          "the medial meniscus", "parents": []}]))
    table = labels.load_classes(path)
    assert [c.name for c in table] == ["Femur", "Medial Meniscus"]
    assert labels.match("medial_meniscus", table) == (1,)
    assert table[1].sentence("V1") == "A 3D MRI scan of the medial meniscus"


@pytest.mark.parametrize("content, what", [
    ("{", "JSON"), ("{}", "list"), ("[]", "list"), ("[3]", "name"), ('[{"prompt": "x"}]', "name"),
    ('[{"name": "a", "colour": 1}]', "colour"), ('["a", "A"]', "same name"),
    ('[{"name": "a", "parents": "b"}]', "parents"), ('[{"name": "a", "side": "up"}]', "side"),
    ('[{"name": "a", "lesion": "no"}]', "lesion"), ('["a", "a"]', "same name"),
    ('[{"name": "a", "parents": "b"}, {"name": "b", "parents": "a"}]', "ancestor")])
def test_malformed_class_tables_are_one_line(tmp_path, content, what):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=what):
        labels.load_classes(tmp_path / "t.json")


def test_command_prints_the_table(capsys):
    assert labels.main([]) == 0
    out = capsys.readouterr().out
    assert "Celiac Trunk" in out and "Kidney Cyst" in out and out.count("\n") == 33


# ---- public datasets ---------------------------------------------------------------------------
REPLICAS = {    # dataset: (files of one case, raw value, classes it belongs to, some annotated)
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
    "msd-hepaticvessel": (("imagesTr/hv_001.nii.gz", "labelsTr/hv_001.nii.gz"), 2,
                          {"Hepatic Vessel Tumor", "Liver"}, "Hepatic Vessel"),
    "msd-colon": (("imagesTr/colon_001.nii.gz", "labelsTr/colon_001.nii.gz"), 1,
                  {"Colon Tumor", "Colon"}, "Colon Tumor"),
}


@pytest.mark.parametrize("name", REPLICAS)
def test_a_miniature_replica_gives_the_right_regions(name, tmp_path, capsys):
    import data
    (image, label), value, belongs, annotated = REPLICAS[name]
    for file in (image, label):
        write_nifti(tmp_path / name / file, np.full((4, 4, 4), value, np.int16), np.eye(4))
    before = {p for p in (tmp_path / name).rglob("*")}
    assert labels.main([name, str(tmp_path / name)]) == 0
    assert {p for p in (tmp_path / name).rglob("*")} - before == {tmp_path / name / "dataset.json"}
    case, = data.read_dataset(tmp_path / name, labels.CLASSES)
    row = case.lm.rows(np.array([value]), "x")[0]
    assert {c.name for k, c in enumerate(labels.CLASSES) if case.lm.regions[row, k]} == belongs
    assert case.annotated[[c.name for c in labels.CLASSES].index(annotated)]
    assert case.image == tmp_path / name / image and not case.lm.unmatched or name == "ct-org"
    assert data.find_datasets([tmp_path]) == [tmp_path / name]


def test_remarks_on_single_scans(tmp_path):
    """BTCV from 60 on has eight classes; AMOS above 500 is MR and left out."""
    import data
    for n in ("0007", "0061"):
        for file in (f"img/img{n}.nii.gz", f"label/label{n}.nii.gz"):
            write_nifti(tmp_path / "btcv" / file, np.ones((4, 4, 4), np.int16), np.eye(4))
    labels.main(["btcv", str(tmp_path / "btcv")])
    whole, part = data.read_dataset(tmp_path / "btcv", labels.CLASSES)
    assert whole.annotated.sum() == 14 and part.annotated.sum() == 8
    for n in ("0500", "0507"):
        for part in ("imagesTr", "labelsTr"):
            write_nifti(tmp_path / f"amos/{part}/amos_{n}.nii.gz", np.ones((4, 4, 4), np.int16),
                        np.eye(4))
    labels.main(["amos", str(tmp_path / "amos")])
    assert [c.name for c in data.read_dataset(tmp_path / "amos", labels.CLASSES)] == ["amos/amos_0500"]


def test_totalsegmentators_masks_become_one_map(tmp_path):
    import data
    write_nifti(tmp_path / "s0001/ct.nii.gz", np.zeros((4, 4, 4), np.int16), np.eye(4))
    for i, name in enumerate(("liver", "kidney_left", "rib_left_1")):
        mask = np.zeros((4, 4, 4), np.uint8)
        mask[i] = 1
        write_nifti(tmp_path / f"s0001/segmentations/{name}.nii.gz", mask, np.eye(4))
    assert labels.main(["totalsegmentator", str(tmp_path)]) == 0
    case, = data.read_dataset(tmp_path, labels.CLASSES)
    assert {c.name for c, a in zip(labels.CLASSES, case.annotated, strict=True) if a} == \
        {"Liver", "Left Kidney"}
    raw = data.load_volume(case.label).array
    assert raw[:, 0, 0].tolist() == [2, 1, 0, 0] and case.name.endswith("/s0001")


def test_every_public_dataset_prints_a_table_that_is_understood(capsys):
    for name in labels.PUBLIC:
        if name != "totalsegmentator":
            labels.main([name])
            lm = labels.label_map(json.loads(capsys.readouterr().out)["labels"], labels.CLASSES)
            assert lm.unmatched in ([], ["bone", "brain"]), name


@pytest.mark.parametrize("args, what", [(["chaos"], "dcm2niix"), (["nonsense"], "unknown dataset"),
                                        (["kits", "{tmp}"], "no pair")])
def test_a_dataset_that_cannot_be_prepared_is_one_line(tmp_path, capsys, args, what):
    assert labels.run(labels.main, [a.format(tmp=tmp_path) for a in args]) == 2
    assert what in capsys.readouterr().err and not list(tmp_path.iterdir())
