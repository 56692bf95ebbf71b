"""The class table, the names of structures, and the meaning of label files."""
import doctest
import json

import numpy as np
import pytest

import labels
from support import class_tables, datasets


def name(k):
    return labels.CLASSES[k].name


def test_examples_in_the_docstrings_hold():
    result = doctest.testmod(labels)
    assert result.failed == 0 and result.attempted > 10


# ---- names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, want", [
    ("kidney_left", ["Left Kidney"]), ("KIDNEY-LEFT", ["Left Kidney"]),
    ("gallbladder", ["Gall Bladder"]), ("inferior_vena_cava", ["Postcava"]), ("IVC", ["Postcava"]),
    ("portal_vein_and_splenic_vein", ["Portal Vein and Splenic Vein"]),
    ("adrenal_gland_right", ["Right Adrenal Gland"]), ("small_bowel", ["Intestine"]),
    ("urinary_bladder", ["Bladder"]), ("lung_upper_lobe_left", ["Left Lung"]),
    ("colon cancer primaries", ["Colon Tumor"]), ("lung_tumour", ["Lung Tumor"]),
    ("Hepatic Vessels", ["Hepatic Vessel"]), ("Celiac Truck", ["Celiac Trunk"]),
    ("Arota", ["Aorta"]), ("kidney", ["Right Kidney", "Left Kidney"]),
    ("lungs", ["Right Lung", "Left Lung"]), ("head_of_femur_r", ["Right Head of Femur"]),
    ("renal mass", ["Kidney Tumor"]), ("kidney_cyst_left", ["Kidney Cyst"]),
    ("PDAC lesion", ["Pancreas Tumor"]), ("liver cyst", []), ("femur_left", []),
    ("liver segment", []), ("background", []), ("", []), ("tumor", []),
])
def test_names_of_public_datasets_match_their_class(text, want):
    assert [name(k) for k in labels.match(text)] == want


def test_no_name_or_synonym_denotes_two_classes():
    seen = {}
    for c in labels.CLASSES:
        for key in c.keys:
            assert seen.setdefault(key, c.name) == c.name


def test_organ_is_the_name_without_case_word_order_and_side():
    for spelling in ("Right Kidney", "right kidney", "KIDNEY, RIGHT", "kidney_r"):
        assert labels.Class(spelling, side="right").organ == {"kidney"}
    assert labels.Class("Head of Left Femur", side="left").organ == {"femur", "head"}
    assert labels.Class("Left Atrium").organ == {"atrium", "left"}      # no side: nothing removed


# ---- the built-in table --------------------------------------------------------------------------
def test_the_built_in_table_has_the_papers_order_and_the_releases_prompts():
    assert len(labels.CLASSES) == 32
    assert [name(k) for k in (0, 7, 24, 31)] == ["Spleen", "Aorta", "Celiac Trunk", "Kidney Cyst"]
    assert labels.CLASSES[7].sentence("V3") == "A computerized tomography of a Arota"
    assert labels.CLASSES[5].sentence("V1") == "A photo of a Liver."
    with pytest.raises(ValueError, match="no {}"):
        labels.CLASSES[0].sentence("spleen")


def test_solid_of_the_built_in_table():
    assert {c.name for c in labels.CLASSES if c.solid == 1.0} == {
        "Spleen", "Right Kidney", "Left Kidney", "Gall Bladder", "Liver", "Stomach", "Pancreas",
        "Right Adrenal Gland", "Left Adrenal Gland", "Bladder", "Prostate", "Left Head of Femur",
        "Right Head of Femur"}
    assert {c.name: c.solid for c in labels.CLASSES if 0 < c.solid < 1} == \
        {"Right Lung": 0.1, "Left Lung": 0.1}


def test_other_side_of_every_built_in_class():
    pairs = [(k, labels.other_side(k, labels.CLASSES)) for k in range(len(labels.CLASSES))]
    assert {(name(a), name(b)) for a, b in pairs if b is not None and a < b} == {
        ("Right Kidney", "Left Kidney"), ("Right Adrenal Gland", "Left Adrenal Gland"),
        ("Right Lung", "Left Lung"), ("Left Head of Femur", "Right Head of Femur")}
    assert all(labels.other_side(b, labels.CLASSES) == a for a, b in pairs if b is not None)


# ---- the meaning of a table of names and values --------------------------------------------------
def test_three_spellings_of_one_label_table():
    """LiTS as nnU-Net, region-based nnU-Net and MSD write it: a tumour voxel is liver in each."""
    forms = [{"background": 0, "liver": 1, "liver tumor": 2},
             {"background": 0, "liver": ["1", 2], "liver tumor": [2]},
             {"0": "background", "1": "liver", "2": "liver tumor"}]
    for form in forms:
        label_map = labels.label_map(form, labels.CLASSES)
        assert label_map.values == [0, 1, 2] and not label_map.left_row
        assert [np.flatnonzero(r).tolist() for r in label_map.regions] == [[], [5], [5, 26]]
        assert np.flatnonzero(label_map.annotated).tolist() == [5, 26] and label_map.known.all()


def test_kidneys_without_sides_become_two_classes():
    table = {"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3}
    label_map = labels.label_map(table, labels.CLASSES)
    assert np.flatnonzero(label_map.annotated).tolist() == [1, 2, 25, 31]
    assert label_map.values == [0, 1, 1, 2, 2, 3, 3] and label_map.left_row == {1: 2, 3: 4, 5: 6}
    assert np.flatnonzero(label_map.regions[3]).tolist() == [1, 25]        # tumour on the right
    assert np.flatnonzero(label_map.regions[4]).tolist() == [2, 25]        # and on the left
    assert label_map.to_label_rows(np.array([0, 1, 2, 3])).tolist() == [0, 1, 3, 5]


def test_what_says_nothing_about_a_class_is_left_out_of_its_loss():
    """With two organs, "lesion" has no clear host; "sacrum" says that a voxel is no organ."""
    table = {"liver": 1, "spleen": 2, "ignore": 3, "lesion": 4, "liver abscess": 5,
             "liver segment 4": 6, "left kidney stone": 7, "sacrum": 8, "vertebrae L1": 9}
    label_map = labels.label_map(table, labels.CLASSES)
    assert label_map.values == [0, 1, 2, 3, 4, 5, 6, 7] and not label_map.regions[3:8].any()
    unknown = [np.flatnonzero(~row).tolist() for row in label_map.known]
    assert unknown == [[], [], [], [*range(32)], [*range(32)], [5, 26, 28], [5], [2]]
    assert label_map.to_label_rows(np.array([[[0, 2, 8]]])).tolist() == [[[0, 2, 0]]]


def test_what_another_name_of_a_value_says_is_known():
    """Region-based: value 3 is spleen, and an abscess, which alone would leave everything open."""
    label_map = labels.label_map({"liver": 1, "spleen": [2, 3], "abscess": 3}, labels.CLASSES)
    assert label_map.known[3].tolist() == [k == 0 for k in range(32)]


LEFT_OUT_OF = "left out of the loss of"
MEANINGS = {            # the name of the dataset, its table, and what each value means
    "LiTS by nnU-Net's converter": (
        "", {"background": 0, "liver": [1, 2], "tumor": 2},
        ["1 liver -> Liver", "2 liver, tumor -> Liver + Liver Tumor"]),
    "KiTS23 by nnU-Net's converter: a region of several kinds of lesions is none of them": (
        "", {"kidney": [1, 2, 3], "masses": [2, 3], "tumor": 2},
        ["1 kidney -> Right Kidney or Left Kidney",
         "2 kidney, masses, tumor -> Right Kidney or Left Kidney; Kidney Tumor; "
         f"{LEFT_OUT_OF} Kidney Cyst",
         f"3 kidney, masses -> Right Kidney or Left Kidney; {LEFT_OUT_OF} Kidney Tumor, "
         "Kidney Cyst"]),
    "a region that holds the cysts": (
        "", {"left kidney": 1, "kidney lesion": [2, 3], "kidney cyst": 3},
        ["1 left kidney -> Left Kidney",
         f"2 kidney lesion -> Right Kidney or Left Kidney; {LEFT_OUT_OF} Kidney Tumor, "
         "Kidney Cyst",
         "3 kidney lesion, kidney cyst -> Right Kidney or Left Kidney; Kidney Cyst; "
         f"{LEFT_OUT_OF} Kidney Tumor"]),
    "the side of a lesion tells its host": (
        "", {"kidney_cyst_left": 1, "right renal mass": 2, "PDAC lesion": 3},
        ["1 kidney_cyst_left -> Left Kidney + Kidney Cyst",
         "2 right renal mass -> Right Kidney + Kidney Tumor",
         "3 PDAC lesion -> Pancreas + Pancreas Tumor"]),
    "the name of an MSD task tells the organ": (
        "Task06_Lung", {"0": "background", "1": "cancer"},
        ["1 cancer -> Right Lung or Left Lung; Lung Tumor"]),
    "a name of two words": (
        "HepaticVessel", {"1": "Vessel", "2": "Tumour"},
        ["1 Vessel -> Liver + Hepatic Vessel", "2 Tumour -> Liver + Hepatic Vessel Tumor"]),
    "the dataset is tried before the only organ": (
        "Liver", {"spleen": 1, "tumor": 2, "stone": 3},
        ["1 spleen -> Spleen", "2 tumor -> Liver + Liver Tumor", "background: stone"]),
    "both sides are one organ": (
        "", {"left kidney": 1, "right kidney": 2, "cyst": 3},
        ["1 left kidney -> Left Kidney", "2 right kidney -> Right Kidney",
         "3 cyst -> Right Kidney or Left Kidney; Kidney Cyst"]),
    "no clear host": (
        "", {"liver": 1, "spleen": 2, "lesion": 3, "liver abscess": 4, "sacrum": 5},
        ["1 liver -> Liver", "2 spleen -> Spleen", f"3 lesion -> {LEFT_OUT_OF} every class",
         f"4 liver abscess -> {LEFT_OUT_OF} Liver, Liver Tumor, Hepatic Vessel Tumor",
         "background: sacrum"]),
}


def meaning_of(table, context="", classes=labels.CLASSES) -> list[str]:
    return datasets.describe_values(labels.label_map(table, classes, context=context), classes)


@pytest.mark.parametrize("what", MEANINGS)
def test_the_values_of_a_dataset_mean(what):
    context, table, want = MEANINGS[what]
    assert meaning_of(table, context) == want


def test_the_usual_names_of_a_lesion_are_its_class_inside_its_host():
    for lesion in ("liver_lesion", "Liver Lesions", "hepatic tumour", "HCC", "liver metastases",
                   "liver carcinoma", "malignant liver neoplasm", "cancer", "Tumor", "lesion"):
        assert meaning_of({"liver": 1, lesion: 2})[1] == f"2 {lesion} -> Liver + Liver Tumor"


def test_no_lesion_in_an_organ_is_taught_as_background():
    """Whatever its name: it belongs to the organ, or is left out of the organ's loss."""
    words = labels.LESION_WORDS | {word for word, kind in labels.SAME_WORD.items()
                                   if "tumor" in kind}
    for organ in ("spleen", "kidney", "left kidney", "liver", "adrenal gland"):
        for word in words:
            label_map = labels.label_map({organ: 1, f"{organ} {word}": 2, "stomach": 3},
                                         labels.CLASSES)
            values = np.array(label_map.values)
            own = np.flatnonzero(label_map.regions[values == 1].any(0))
            regions, known = label_map.regions[values == 2], label_map.known[values == 2]
            assert len(own), organ
            for k in own:
                assert regions[:, k].any() or not known[:, k].any(), (organ, word)


@pytest.mark.parametrize("names, table, want", [
    (["Right Kidney", "Liver"], {"liver": 1, "kidney": 2, "left kidney": 3},
     ["1 liver -> Liver", f"2 kidney -> {LEFT_OUT_OF} Right Kidney", "background: left kidney"]),
    (["Liver", "Liver Tumor"], {"liver": [1, 2], "liver tumor": 2, "spinal cord": 3},
     ["1 liver -> Liver", "2 liver, liver tumor -> Liver + Liver Tumor",
      "background: spinal cord"]),
    (["Spinal Cord"], {"liver": [1, 2], "spinal cord": 3},
     ["3 spinal cord -> Spinal Cord", "background: liver, liver"]),
    (["Kidney", "Kidney Tumor"], {"kidney": 1, "tumor": 2},
     ["1 kidney -> Kidney", "2 tumor -> Kidney + Kidney Tumor"]),
    (["Spleen", "Right Kidney", "Left Kidney", "Kidney Cyst"],
     {"kidney": 1, "kidney tumor": 2, "kidney cyst": 3},
     ["1 kidney -> Right Kidney or Left Kidney",
      f"2 kidney tumor -> {LEFT_OUT_OF} Right Kidney, Left Kidney, Kidney Cyst",
      "3 kidney cyst -> Right Kidney or Left Kidney; Kidney Cyst"])])
def test_the_values_of_a_dataset_mean_in_a_table_of_ones_own(names, table, want):
    """An organ of which the table has one side is not background without its side."""
    assert meaning_of(table, classes=class_tables.make_classes(names)) == want


@pytest.mark.parametrize("table, what", [
    ({"sacrum": 1}, "is a class here"), ({"liver": "one"}, "integers"), ([1], "table of names"),
    ({"liver": 0}, "background"), ({"liver": -1}, "0..65535"), ({}, "is a class here")])
def test_a_malformed_label_table_is_refused_with_the_reason(table, what):
    with pytest.raises(ValueError, match=what):
        labels.label_map(table, labels.CLASSES, "some/dataset.json")


def test_values_that_are_not_named_or_not_integers_are_refused():
    label_map = labels.label_map({"liver": 1}, labels.CLASSES)
    with pytest.raises(ValueError, match=r"a.nii: label values \[7\]"):
        label_map.to_label_rows(np.array([0, 1, 7]), "a.nii")
    for raw in ([0.0, 1.4], [0.0, np.nan]):
        with pytest.raises(ValueError, match="a.nii: a label must hold integers"):
            label_map.to_label_rows(np.array(raw), "a.nii")
    assert label_map.to_label_rows(np.array([0.0, 0.9999]), "a.nii").tolist() == [0, 1]


# ---- class tables of one's own -------------------------------------------------------------------
def test_a_class_table_of_ones_own_replaces_the_built_in_one(tmp_path):
    path = tmp_path / "knee.json"
    path.write_text(json.dumps(["Femur", {
        "name": "Medial Meniscus", "prompt": "A 3D MRI scan of the medial meniscus", "parents": [],
        "solid": 0.25}]))
    table = class_tables.load_classes(path)
    assert table[0] == labels.Class("Femur")
    assert labels.match("medial_meniscus", table) == (1,)
    assert table[1].sentence("V1") == "A 3D MRI scan of the medial meniscus"
    assert [c.solid for c in table] == [0, 0.25]


def test_bare_names_of_the_built_in_table_are_the_built_in_table():
    names = [c.name for c in labels.CLASSES]
    assert class_tables.make_classes(names) == labels.CLASSES
    assert class_tables.make_classes(names[::-1]) == labels.CLASSES[::-1]


def test_a_bare_name_keeps_its_spelling_and_takes_the_rest_also_by_a_synonym():
    kidney, cava, celiac = class_tables.make_classes(["kidney_left", "IVC", "Celiac Artery"])
    assert kidney == labels.Class("kidney_left", side="left", solid=1.0, prompt_name="Left Kidney",
                                  synonyms=("Left Kidney",))
    assert cava.sentence("V3") == "A computerized tomography of a Postcava"     # as trained
    for spelling in ("IVC", "ivc", "postcava", "inferior vena cava"):
        assert labels.match(spelling, (cava,)) == (0,), spelling
    assert celiac.prompt_name == "Celiac Truck" and labels.match("celiac_trunk", (celiac,)) == (0,)


def test_an_object_with_the_name_of_a_built_in_class_keeps_what_it_says():
    entries = [{"name": "Right Kidney"}, {"name": "Kidney Tumor", "parents": ["Right Kidney"]}]
    table = class_tables.make_classes(entries)
    assert table == (
        labels.Class("Right Kidney"), labels.Class("Kidney Tumor", parents=("Right Kidney",)))
    assert labels.other_side(0, class_tables.make_classes([*entries, "Left Kidney"])) is None


def test_other_side_ignores_case_and_word_order():
    table = (labels.Class("Liver"), labels.Class("left femur head", side="left"),
             labels.Class("Head of Femur (R)", side="right"))
    assert [labels.other_side(k, table) for k in range(3)] == [None, 2, 1]
    assert labels.match("femur head", table) == (2, 1)                  # both sides, right first


def test_a_lobe_is_not_its_lung():
    """Its row stays bare, and its name is not the lung's any more."""
    table = class_tables.make_classes(["Right Lung", "right lung upper lobe",
                                 {"name": "Middle", "synonyms": ["right lung middle lobe"]}])
    assert table[0].synonyms == ("right lung lower lobe",) and table[0].side == "right"
    assert table[1] == labels.Class("right lung upper lobe")
    assert [labels.match(f"lung_{part}_lobe_right", table)
            for part in ("upper", "middle", "lower")] == [(1,), (2,), (0,)]


@pytest.mark.parametrize("names, parents", [
    (["Kidney Tumor", "Left Kidney", "Right Kidney"], ("Right Kidney", "Left Kidney")),
    (["Kidney Tumor", "kidney_l", "KIDNEY R"], ("KIDNEY R", "kidney_l")),
    (["Kidney Tumor", "Kidney"], ("Kidney",)),
    (["Kidney Tumor", "Left Kidney", "Kidney"], ("Kidney",)),
    (["Kidney Tumor", "Liver"], ()),
    (["Colon Tumor", "Large Bowel"], ("Large Bowel",)),
    (["Liver Tumor", {"name": "liver", "prompt": "a liver"}], ("liver",))])
def test_parents_of_a_bare_name_are_those_that_the_table_holds(names, parents):
    tumor, *_ = class_tables.make_classes(names)
    assert tumor.parents == parents and tumor.lesion


def test_parents_may_be_among_the_classes_of_a_model_that_is_extended():
    old = class_tables.make_classes(["Right Kidney", "kidney (left)", "Postcava"])
    new, = class_tables.make_classes(["Kidney Cyst"], beside=old)
    assert new.parents == ("Right Kidney", "kidney (left)")
    own = [{"name": "Renal Scar", "parents": ["Right Kidney"]}]
    assert class_tables.make_classes(own, beside=old)[0].parents == ("Right Kidney",)
    with pytest.raises(ValueError, match="parents"):
        class_tables.make_classes(own)


@pytest.mark.parametrize("table", [
    ["a", "A"], ["IVC", "Postcava"], ["Prostate", "prostate uterus"],
    ["Liver Tumor", "hepatic lesion"], [{"name": "X", "synonyms": ["y"]}, {"name": "Y"}]])
def test_two_names_of_one_structure_are_refused(table):
    with pytest.raises(ValueError, match="are the same name"):
        class_tables.make_classes(table)


def test_a_table_with_one_of_two_kidneys_and_their_tumor_is_refused():
    """Whether the tumour lies in the kidney of the table would not be known."""
    with pytest.raises(ValueError, match="t.json: Kidney Tumor lies in Right Kidney or Left"):
        class_tables.make_classes(["Kidney Tumor", "kidney right"], where="t.json")


@pytest.mark.parametrize("content, what", [
    ("{", "JSON"), ("{}", "list"), ("[]", "list"), ("[3]", "name"), ('[{"prompt": "x"}]', "name"),
    ('[{"name": 3}]', "name"), ('["()"]', "no word"), ('[{"name": "a", "colour": 1}]', "colour"),
    ('[{"name": "a", "parents": "b"}]', "parents"),
    ('[{"name": "a", "parents": ["b"]}]', "parents"),
    ('["b", "c", {"name": "a", "parents": ["b", "c"]}]', "the right and the left side"),
    ('[{"name": "a", "parents": ["b"]}, {"name": "b", "parents": ["a"]}]', "ancestor"),
    ('[{"name": "a", "parents": ["a"]}]', "ancestor"),
    ('[{"name": "a", "synonyms": [1]}]', "synonyms"), ('[{"name": "a", "lesion": "no"}]', "lesion"),
    ('[{"name": "a", "side": "up"}]', "side"), ('[{"name": "a", "solid": 1.5}]', "solid"),
    ('[{"name": "a", "solid": true}]', "solid"), ('[{"name": "a", "solid": NaN}]', "solid")])
def test_a_malformed_class_table_is_refused_with_the_reason(tmp_path, content, what):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=f"t.json.*{what}"):
        class_tables.load_classes(tmp_path / "t.json")


# ---- the command ---------------------------------------------------------------------------------
def test_command_prints_the_table_and_what_bare_names_take(tmp_path, capsys):
    assert labels.main([]) == 0
    out = capsys.readouterr().out
    assert "Celiac Trunk" in out and "Kidney Cyst" in out and out.count("\n") == 33
    (tmp_path / "t.json").write_text('["liver cancer", "liver", {"name": "Aorta"}]')
    assert labels.main(["--classes", str(tmp_path / "t.json")]) == 0
    rows = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        "value name properties parents prompt synonyms",
        "1 liver cancer lesion liver A computerized tomography of a Liver Tumor Liver Tumor",
        "2 liver solid 1 - A computerized tomography of a Liver Liver",
        "3 Aorta - - A computerized tomography of a Aorta -"]
