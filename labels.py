"""What there is to segment: the class table, its prompts, and the meaning of a label file.

    python labels.py                        print the 32 classes of the paper with their prompts
    python labels.py --classes my.json      print a class table of your own
    python labels.py kits                   print the dataset.json of a public dataset
    python labels.py kits DIR               write it to DIR, with the list of the scans in DIR
    python labels.py totalsegmentator DIR   the same, and merge the masks of each case into one map

In the code, a class is an index 0..K-1; in a segmentation file, its value is that index + 1. The
label of a scan stays one integer map. Two tables give it its meaning (paper, Sec. 3.1, partial
labels): `LabelMap.regions` says which classes a value belongs to (a tumour voxel is also an organ
voxel, so a row may hold two trues), and `LabelMap.annotated` says which classes the dataset labels
at all.

K classes   V values of a label map   D, H, W voxels
"""
from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import ndimage

TEMPLATES = {
    "V1": "A photo of a {}.",
    "V2": "There is {} in this computerized tomography.",
    "V3": "A computerized tomography of a {}",      # the default; the release has no full stop
}
MAX_VALUE = 65535           # the largest value that a label map may hold (16 bits)
WHOLE_SHARE = 0.8           # with this share of it on one side, a piece goes to that side whole


# ---- names -------------------------------------------------------------------------------------
_SAME_WORD = {
    "l": "left", "r": "right",
    "tumour": "tumor", "tumours": "tumor", "tumors": "tumor", "cancer": "tumor",
    "cysts": "cyst", "kidneys": "kidney", "lungs": "lung", "veins": "vein", "vessels": "vessel",
    "adrenals": "adrenal",
}
_IGNORED_WORDS = {"of", "the", "and", "gland", "glands"}

# What further words mean in the name of a lesion
_LESION_SAME_WORD = {
    "lesion": "tumor", "lesions": "tumor", "cancers": "tumor", "carcinoma": "tumor",
    "carcinomas": "tumor", "adenocarcinoma": "tumor", "mass": "tumor", "masses": "tumor",
    "metastasis": "tumor", "metastases": "tumor", "neoplasm": "tumor", "neoplasms": "tumor",
    "malignancy": "tumor",
    "hepatic": "liver", "renal": "kidney", "pancreatic": "pancreas", "pulmonary": "lung",
    "colonic": "colon", "splenic": "spleen", "gastric": "stomach", "duodenal": "duodenum",
    "esophageal": "esophagus", "rectal": "rectum", "prostatic": "prostate",
}
_LESION_ABBREVIATIONS = {
    "pdac": ("pancreas", "tumor"), "hcc": ("liver", "tumor"), "rcc": ("kidney", "tumor"),
    "nsclc": ("lung", "tumor"),
}
_LESION_FILLERS = {"primary", "primaries", "malignant"}
_LESION_KINDS = {"tumor", "cyst"}           # classes exist of these two kinds
_OTHER_LESIONS = {"nodule", "nodules", "abscess", "hemorrhage", "haematoma", "hematoma", "polyp"}


def name_key(name: str) -> tuple[str, ...]:
    """The normalised words of a name: names that differ only in case, punctuation, word order or
    a known spelling variant have the same key.

    >>> name_key("Left Adrenal Gland"), name_key("ADRENALS_L")
    (('adrenal', 'left'), ('adrenal', 'left'))
    """
    words = re.sub(r"[\W_]+", " ", name.lower()).split()
    return tuple(sorted(_SAME_WORD.get(word, word) for word in words
                        if word not in _IGNORED_WORDS))


def _lesion_words(name: str) -> frozenset[str]:
    """The words of a lesion's name in one form, whatever the usage of its dataset.

    >>> sorted(_lesion_words("hepatic_lesions")), sorted(_lesion_words("PDAC lesion"))
    (['liver', 'tumor'], ['pancreas', 'tumor'])
    """
    words: set[str] = set()
    for word in name_key(name):
        if word not in _LESION_FILLERS:
            words.update(_LESION_ABBREVIATIONS.get(word, (_LESION_SAME_WORD.get(word, word),)))
    return frozenset(words)


# ---- the class table ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Class:
    """One entry of the class table."""
    name: str                          # shown to users and matched against datasets' names
    parents: tuple[str, ...] = ()      # names of the classes that contain this one. Two parents
                                       # are the right and the left organ: it lies in one of them,
                                       # of which a table may hold only one
    side: str = ""                     # "left", "right", or "" for a structure without a side
    lesion: bool = False               # a tumour or cyst: may be absent, and is scored separately
    synonyms: tuple[str, ...] = ()     # other names that public datasets use for it
    prompt_name: str = ""              # fills the prompt template; "": the name does
    prompt: str = ""                   # a complete prompt, used instead of the template
    solid: float = 0.0                 # post-processing keeps a connected piece that has at least
                                       # this share of the largest piece's volume. 1: only the
                                       # largest; 0: every piece above a minimum volume
    vessel: bool = False               # a tubular structure, such as the aorta

    @property
    def organ(self) -> tuple[str, ...]:
        """The normalised words of the name without the side: the same for both sides of an organ.

        >>> Class("Right Kidney", side="right").organ, Class("kidney (left)", side="left").organ
        (('kidney',), ('kidney',))
        """
        return tuple(word for word in name_key(self.name) if word != self.side)

    def sentence(self, template: str) -> str:
        """The prompt of this class; `template` is a key of TEMPLATES or a text with {}."""
        text = TEMPLATES.get(template, template)
        if "{}" not in text:
            raise ValueError(f"prompt template {template!r} has no {{}}; known: {list(TEMPLATES)}")
        return self.prompt or text.replace("{}", self.prompt_name or self.name)


_KIDNEYS = ("Right Kidney", "Left Kidney")
_LUNGS = ("Right Lung", "Left Lung")

# In the order of the release, whose misspelt prompts "Arota" and "Celiac Truck" its weights need.
# solid is 0.1 for a lung, because the edge of a scan may cut its base into separate pieces.
CLASSES = (
    Class("Spleen", solid=1.0),
    Class("Right Kidney", side="right", solid=1.0),
    Class("Left Kidney", side="left", solid=1.0),
    Class("Gall Bladder", solid=1.0, synonyms=("gallbladder",)),
    Class("Esophagus", synonyms=("oesophagus",)),
    Class("Liver", solid=1.0),
    Class("Stomach", solid=1.0),
    Class("Aorta", vessel=True, prompt_name="Arota"),
    Class("Postcava", vessel=True,
          synonyms=("inferior vena cava", "ivc", "post cava", "vena cava inferior")),
    Class("Portal Vein and Splenic Vein", vessel=True, synonyms=("portal and splenic vein",)),
    Class("Pancreas", solid=1.0),
    Class("Right Adrenal Gland", side="right", solid=1.0),
    Class("Left Adrenal Gland", side="left", solid=1.0),
    Class("Duodenum"),
    Class("Hepatic Vessel", parents=("Liver",), vessel=True, synonyms=("liver vessel",)),
    Class("Right Lung", side="right", solid=0.1,
          synonyms=("right lung upper lobe", "right lung middle lobe", "right lung lower lobe")),
    Class("Left Lung", side="left", solid=0.1,
          synonyms=("left lung upper lobe", "left lung lower lobe")),
    Class("Colon", synonyms=("large bowel", "large intestine")),
    Class("Intestine", synonyms=("small bowel", "small intestine")),
    Class("Rectum"),
    Class("Bladder", solid=1.0, synonyms=("urinary bladder",)),
    Class("Prostate", solid=1.0, synonyms=("prostate uterus",)),
    Class("Left Head of Femur", side="left", solid=1.0, synonyms=("left femoral head",)),
    Class("Right Head of Femur", side="right", solid=1.0, synonyms=("right femoral head",)),
    Class("Celiac Trunk", vessel=True, prompt_name="Celiac Truck",
          synonyms=("celiac truck", "coeliac trunk", "celiac artery")),
    Class("Kidney Tumor", parents=_KIDNEYS, lesion=True, synonyms=("renal tumor",)),
    Class("Liver Tumor", parents=("Liver",), lesion=True, synonyms=("hepatic tumor",)),
    Class("Pancreas Tumor", parents=("Pancreas",), lesion=True, synonyms=("pancreatic tumor",)),
    Class("Hepatic Vessel Tumor", parents=("Liver",), lesion=True),
    Class("Lung Tumor", parents=_LUNGS, lesion=True),
    Class("Colon Tumor", parents=("Colon",), lesion=True, synonyms=("colon cancer primaries",)),
    Class("Kidney Cyst", parents=_KIDNEYS, lesion=True, synonyms=("renal cyst",)),
)
_SIDED_NAMES = {c.name for c in CLASSES if c.side}


def load_classes(path: str | Path | None = None,
                 beside: tuple[Class, ...] = ()) -> tuple[Class, ...]:
    """Read a class table: a JSON list of names, or of objects with the fields of Class.

    What make_classes says of bare names and of `beside` holds.

    path    None: the built-in table
    raises  ValueError  with the file and the entry, if a field, a name or a parent is wrong
    """
    if path is None:
        return CLASSES
    try:
        entries = json.loads(Path(path).read_bytes())    # UTF-8 or UTF-16, with or without a mark
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not a readable class table (JSON): {e}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{path}: a class table is a list such as ["Femur", {{"name": "Tibia"}}]')
    return make_classes(entries, where=str(path), beside=beside)


def make_classes(entries: list, where: str = "class table",
                 beside: tuple[Class, ...] = ()) -> tuple[Class, ...]:
    """Names, or dicts of the fields of Class -> a checked class table.

    A bare name that means a built-in class takes everything else from that class: side, lesion,
    solid, vessel, prompt, the parents that the table holds, and the synonyms that are free. A dict
    keeps what it says, and nothing is added to it.

    where   what an error message names as the source
    beside  the classes of a model to which these are added; parents may be among them
    raises  ValueError  if a field, a name or a parent is wrong

    >>> kidney, tumor = make_classes(["kidney_left", "Kidney Tumor"])
    >>> kidney.side, kidney.sentence("V3"), tumor.lesion
    ('left', 'A computerized tomography of a Left Kidney', True)
    """
    classes = tuple(_make_class(entry, i, where) for i, entry in enumerate(entries))
    seen: dict[tuple[str, ...], str] = {}
    for c in classes:
        key = name_key(c.name)
        if not key or key in seen:
            raise ValueError(f"{where}: {c.name!r} and {seen.get(key)!r} are the same name")
        seen[key] = c.name
    bare = [isinstance(entry, str) for entry in entries]
    classes = _complete_bare_names(classes, bare, beside)
    names = {c.name for c in (*classes, *beside)}
    for c in classes:
        missing = set(c.parents) - names
        side_is_missing = len(c.parents) == 2 and len(missing) == 1 and missing <= _SIDED_NAMES
        if c.name in c.parents or missing and not side_is_missing:
            raise ValueError(f"{where}: {c.name}: parents {list(c.parents)} must be names of "
                             "other classes of the table")
    for k, c in enumerate(classes):
        if k in ancestors(k, classes):
            raise ValueError(f"{where}: {c.name} is its own ancestor")
    return classes


def _complete_bare_names(classes: tuple[Class, ...], bare: list[bool],
                         beside: tuple[Class, ...]) -> tuple[Class, ...]:
    """Fill the rows of a class table that are bare names of built-in classes, as make_classes says.

    classes   the table, in which a bare name has nothing but its name
    bare      for every class, whether it is a bare name
    """
    table = (*classes, *beside)
    meant = _built_in_classes([c.name for c in table])
    rows = {known.name: c.name for known, c in zip(meant, table, strict=True) if known}
    by_key = {name_key(c.name): c.name for c in table}
    taken = {name_key(spelling) for c in table for spelling in (c.name, *c.synonyms)}
    completed = []
    for i, c in enumerate(classes):
        known = meant[i]
        if bare[i] and known:
            prompt_name = known.prompt_name
            if c.name != known.name:
                prompt_name = prompt_name or known.name
            synonyms = [spelling for spelling in (known.name, *known.synonyms)
                        if name_key(spelling) not in taken]
            c = replace(known, name=c.name, parents=_hosts_in_table(known, rows, by_key),
                        prompt_name=prompt_name, synonyms=tuple(synonyms))
        completed.append(c)
    return tuple(completed)


def _built_in_classes(names: list[str]) -> list[Class | None]:
    """The built-in class that each name of a class table means, or None.

    A synonym means the class only if no other name of the table does, so that a table can tell the
    two apart. A lobe is not its lung, although a dataset's lobes are matched to the lung.

    >>> names = ["aorta", "IVC", "Kidney", "right lung lower lobe", "Intestine", "Small Bowel"]
    >>> [known and known.name for known in _built_in_classes(names)]
    ['Aorta', 'Postcava', None, None, 'Intestine', None]
    """
    found: list[Class | None] = []
    for name in names:
        indices = match(name)
        whole = len(indices) == 1 and not _is_part(name, CLASSES[indices[0]])
        found.append(CLASSES[indices[0]] if whole else None)
    return [known if known and (name_key(name) == name_key(known.name) or found.count(known) == 1)
            else None for name, known in zip(names, found, strict=True)]


def _hosts_in_table(known: Class, rows: dict[str, str], by_key: dict) -> tuple[str, ...]:
    """The parents of a built-in class under their names in a class table.

    rows     {name of a built-in class: its name in the table}
    by_key   {name_key of a name in the table: the name}

    | the table holds             | the parents of "Kidney Tumor" are                       |
    |-----------------------------|---------------------------------------------------------|
    | both kidneys                | both                                                    |
    | "Kidney", without a side    | "Kidney"                                                |
    | only one of the two kidneys | both, for the tumour need not lie in the one that it    |
    |                             | holds                                                   |
    | no kidney                   | none                                                    |
    """
    hosts = [c for c in CLASSES if c.name in known.parents]
    held = [c for c in hosts if c.name in rows]
    if len(held) < len(hosts):
        whole = [by_key[c.organ] for c in hosts if c.organ in by_key]
        if whole:
            return (whole[0],)
        if not held:
            return ()
    return tuple(rows.get(c.name, c.name) for c in hosts)


def _make_class(entry, i: int, where: str) -> Class:
    """Entry number i of a class table -> Class, its fields checked."""
    if isinstance(entry, str):
        entry = {"name": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise ValueError(f"{where}: entry {i} needs a name")
    name = entry["name"]
    known = list(Class.__dataclass_fields__)
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ValueError(f"{where}: {name}: unknown field {unknown}; known: {known}")
    fields = {}
    for key, value in entry.items():
        if key in ("parents", "synonyms"):
            value = (value,) if isinstance(value, str) else value
            value = tuple(value) if isinstance(value, list) else value
        if not _is_valid(key, value):
            raise ValueError(f"{where}: {name}: field {key} cannot be {value!r}")
        fields[key] = value
    if fields.get("side", "") not in ("", "left", "right"):
        raise ValueError(f"{where}: {name}: side is left, right or empty")
    return Class(**fields)


def _is_valid(field_name: str, value) -> bool:
    """Whether a field of Class may have this value."""
    if field_name in ("parents", "synonyms"):
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if field_name in ("lesion", "vessel"):
        return isinstance(value, bool)
    if field_name == "solid":
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return isinstance(value, str)


def classes_of_checkpoint(content: dict, rows: int | None = None,
                          where: str = "checkpoint") -> tuple[Class, ...]:
    """The class table of a checkpoint, as load_checkpoint returns its content.

    A released checkpoint holds no classes: they are the built-in ones. A checkpoint written before
    Class had the fields solid and vessel takes both from the built-in class of the same name.

    rows    how many text embeddings the checkpoint has, if that is to be checked
    where   the file, for error messages
    raises  ValueError  if the table is malformed, or has not a class for every text embedding
    """
    if "classes" not in content:
        if rows not in (None, len(CLASSES)):
            raise ValueError(f"{where}: {rows} text embeddings and no class names; they are not "
                             f"the {len(CLASSES)} built-in classes. `train.py --init FILE "
                             "--classes TABLE` takes the weights for classes of your own")
        return CLASSES
    entries = []
    for entry in content["classes"]:
        if isinstance(entry, dict) and "solid" not in entry:
            for c in CLASSES:
                if c.name == entry.get("name"):
                    entry = {**entry, "solid": c.solid, "vessel": c.vessel}
        entries.append(entry)
    classes = make_classes(entries, where="classes of the checkpoint")
    if rows not in (None, len(classes)):
        raise ValueError(f"{where}: {rows} text embeddings for {len(classes)} classes")
    return classes


def ancestors(k: int, classes) -> set[int]:
    """Indices of all classes that contain class k, as far as they are among `classes`."""
    index = {c.name: i for i, c in enumerate(classes)}
    found: set[int] = set()
    todo = [k]
    while todo:
        parents = {index[p] for p in classes[todo.pop()].parents if p in index}
        todo += parents - found
        found |= parents
    return found


def other_side(k: int, classes) -> int | None:
    """The index of the same organ on the other side of the body, or None.

    >>> other_side(1, CLASSES), other_side(5, CLASSES)      # Right Kidney, Liver
    (2, None)
    """
    opposite = {"right": "left", "left": "right"}.get(classes[k].side)
    for i, c in enumerate(classes):
        if c.side and c.side == opposite and c.organ == classes[k].organ:
            return i
    return None


def match(name: str, classes: tuple[Class, ...] = CLASSES) -> tuple[int, ...]:
    """The indices of the classes that a dataset's name denotes.

    One class, or none; or, for an organ's name without a side, both sides, the right one first.

    >>> match("kidney_left"), match("kidney"), match("femur_left")
    ((2,), (1, 2), ())
    """
    key = name_key(name)
    for k, c in enumerate(classes):
        spellings = [c.name, *c.synonyms]
        if c.prompt_name:
            spellings.append(c.prompt_name)
        if key in [name_key(spelling) for spelling in spellings]:
            return (k,)
    for right, c in enumerate(classes):
        if c.side == "right" and c.organ == key:
            left = other_side(right, classes)
            if left is not None:
                return (right, left)
    return ()


def match_lesion(name: str, classes: tuple[Class, ...] = CLASSES,
                 organ: frozenset[str] = frozenset()) -> tuple[int, ...]:
    """The class of a lesion by one of its usual names, and its host if the name tells the side.

    organ    words of the host of a lesion whose name does not tell it, such as "cancer"
    returns  (), (lesion,) or (lesion, host)

    >>> match_lesion("renal mass"), match_lesion("kidney_cyst_left"), match_lesion("cancer")
    ((25,), (31, 2), ())
    >>> match_lesion("cancer", organ=frozenset({"liver"}))      # Liver Tumor
    (26,)
    """
    words = _lesion_words(name)
    side = words & {"left", "right"}
    words -= side
    if not words & _LESION_KINDS:
        return ()
    if words <= _LESION_KINDS:
        words |= organ
    found = [k for k, c in enumerate(classes) if c.lesion
             and words in [_lesion_words(spelling) for spelling in (c.name, *c.synonyms)]]
    if len(found) != 1:
        return ()
    hosts = [k for k, c in enumerate(classes)
             if c.name in classes[found[0]].parents and c.side in side]
    return (found[0], *hosts)


def match_structure(name: str, classes: tuple[Class, ...] = CLASSES) -> tuple[int, ...]:
    """The indices of all classes to which a voxel of a structure of this name surely belongs.

    Their parents are not among them, unless the name tells them.

    >>> match_structure("liver"), match_structure("kidney_cyst_left"), match_structure("kidney")
    ((5,), (31, 2), ())
    """
    indices = match(name, classes)
    if len(indices) == 1:
        return indices
    return () if indices else match_lesion(name, classes)


def select(names: list[str], classes: tuple[Class, ...]) -> list[int]:
    """Indices of the classes that a user named, in table order; without a side, both sides.

    raises  ValueError  if a name matches nothing
    """
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"expected a list of class names, got {names!r}")
    matches = {name: match(name, classes) or match_lesion(name, classes)[:1] for name in names}
    missing = [name for name, indices in matches.items() if not indices]
    if missing:
        raise ValueError(f"no class is called {missing}; known: {[c.name for c in classes]}")
    return sorted({k for indices in matches.values() for k in indices})


# ---- the meaning of a label file -----------------------------------------------------------------
@dataclass
class LabelMap:
    """The values of one dataset's label files, and their meaning.

    A label file is converted to label rows, the indices into `regions`. Row 0 is background, and
    the value values[v] becomes row v. Where the dataset does not tell left from right,
    `split_sides` moves the voxels on the patient's left from row v to row v + V.
    """
    values: list[int]              # the V values that belong to a class, after 0 for background
    named: set[int]                # every value that dataset.json names, with a class or without
    regions: np.ndarray            # (2V, K) bool: voxels with this label row belong to class k
    known: np.ndarray              # (2V, K) bool: False where a row says nothing about class k;
                                   # such voxels are left out of the loss of the class
    annotated: np.ndarray          # (K,) bool: the dataset labels class k
    unsplit: dict[tuple[int, int], list[int]]    # (right, left) classes: the label rows that are
                                                 # one of the two, to be told apart by position
    unmatched: list[str] = field(default_factory=list)     # names that are background here
    table: list[str] = field(default_factory=list)         # what each value means, in words

    def to_label_rows(self, raw: np.ndarray, where: str) -> np.ndarray:
        """(D, H, W) values of a label file -> label rows, uint8 or uint16.

        where   the file, for error messages
        raises  ValueError  if a value is not an integer or is not named in dataset.json
        """
        raw = _as_integers(raw, where)
        low, high = int(raw.min()), int(raw.max())
        if low < 0 or high > MAX_VALUE:
            raise ValueError(f"{where}: label values must lie in 0..{MAX_VALUE}, "
                             f"found {low}..{high}")
        row_of_value = np.full(high + 1, -1, np.int32)                 # -1: not named
        row_of_value[[v for v in self.named if v <= high]] = 0
        for row, value in enumerate(self.values):
            if value <= high:
                row_of_value[value] = row
        if (row_of_value < 0).any():
            present = np.flatnonzero(np.bincount(raw.ravel(), minlength=high + 1))
            unknown = [int(v) for v in present if row_of_value[v] < 0]
            if unknown:
                raise ValueError(f"{where}: label values {unknown[:5]} are not named in "
                                 "dataset.json; name them there or remove them from the map")
        dtype = np.uint8 if len(self.regions) <= 256 else np.uint16
        return row_of_value.astype(dtype)[raw]


def _as_integers(raw: np.ndarray, where: str) -> np.ndarray:
    """A label map stored as floating-point numbers -> integers; others are returned as they are."""
    if raw.dtype.kind in "iub":
        return raw
    rounded = np.rint(raw)
    off = ~(np.abs(raw - rounded) < 1e-3)            # NaN is off, too
    if off.any():
        raise ValueError(f"{where}: a label map must hold integers, found "
                         f"{float(raw.flat[np.argmax(off)])!r}")
    return rounded.astype(np.int64)


def label_map(labels: dict, classes: tuple[Class, ...], where: str = "dataset.json", *,
              context: str = "") -> LabelMap:
    """The meaning of `labels`, the table of names and values in a dataset.json.

    where    the file, for error messages
    context  the dataset's name, which may tell the organ of a "tumor" or a "vessel"
    raises   ValueError  if the table is malformed or no name matches a class
    """
    named_values = parse_labels(labels, where)
    context = re.sub(r"^(Task|Dataset)\d+_", "", context)
    context = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", context)              # HepaticVessel: two words
    meaning, annotated, unmatched = match_labels(named_values, classes, where, context)
    values, regions, unsplit = build_regions(meaning, classes)
    known = build_known(values, meaning, regions)
    named = {0, *(v for _, values_of_name in named_values for v in values_of_name)}
    table = describe_values(named_values, meaning, classes)
    return LabelMap(values, named, regions, known, annotated, unsplit, unmatched, table)


def parse_labels(labels: dict, where: str) -> list[tuple[str, list[int]]]:
    """Step 1 of label_map: a table in one of three spellings -> [(name, values), ...].

    >>> parse_labels({"liver": 1, "liver tumor": 2}, "nnU-Net")
    [('liver', [1]), ('liver tumor', [2])]
    >>> parse_labels({"liver": [1, 2], "liver tumor": 2}, "nnU-Net, region-based")
    [('liver', [1, 2]), ('liver tumor', [2])]
    >>> parse_labels({"1": "liver", "2": "liver tumor"}, "MSD")
    [('liver', [1]), ('liver tumor', [2])]
    """
    if not isinstance(labels, dict):
        raise ValueError(f'{where}: "labels" must be a table of names and values')
    if all(re.fullmatch(r"\d+", str(key)) for key in labels):                       # MSD
        pairs = [(str(name), [value]) for value, name in labels.items()]
    else:
        pairs = [(name, value if isinstance(value, list) else [value])
                 for name, value in labels.items()]
    try:
        named_values = [(name, [int(str(v)) for v in values]) for name, values in pairs]
    except ValueError:
        raise ValueError(f"{where}: label values must be integers") from None
    if any(not 0 <= v <= MAX_VALUE for _, values in named_values for v in values):
        raise ValueError(f"{where}: label values must lie in 0..{MAX_VALUE}")
    return named_values


@dataclass
class Meaning:
    """What the names of one value say about a voxel that has it."""
    sure: set[int] = field(default_factory=set)          # classes that it belongs to
    either: set[tuple[int, int]] = field(default_factory=set)      # (right, left): it belongs to
                                                         # one of the two
    unknown: set[int] = field(default_factory=set)       # classes of which nothing is said


def match_labels(named_values: list[tuple[str, list[int]]], classes: tuple[Class, ...], where: str,
                 context: str = "") -> tuple[dict[int, Meaning], np.ndarray, list[str]]:
    """Step 2 of label_map: what each value says about the classes, by the names given to it.

    returns  meaning    {value: Meaning} of the values that are not simply background
             annotated  (K,) bool
             unmatched  the names that are background here

    >>> named_values = [("kidney", [1, 2]), ("cancer", [2]), ("sacrum", [3]), ("ignore", [4])]
    >>> meaning, annotated, unmatched = match_labels(named_values, CLASSES, "dataset.json")
    >>> meaning[1].either, meaning[2].sure        # 1 and 2: Right and Left Kidney, 25: Kidney Tumor
    ({(1, 2)}, {25})
    >>> len(meaning[4].unknown), np.flatnonzero(annotated).tolist(), unmatched
    (32, [1, 2, 25], ['sacrum'])
    """
    organ = _only_organ([name for name, _ in named_values], classes, context)
    meaning: dict[int, Meaning] = {}
    annotated = np.zeros(len(classes), bool)
    unmatched = []
    for name, values in named_values:
        if name.lower() == "background":
            continue
        around = [other for other, its_values in named_values
                  if other != name and set(values) <= set(its_values)]     # region-based
        own_organ = _only_organ(around, classes, "") or organ
        of_name = meaning_of_name(name, classes, own_organ, context)
        if of_name == Meaning():
            unmatched.append(name)
            continue
        classes_of_name = {*of_name.sure, *(k for pair in of_name.either for k in pair)}
        hosts = {i for k in classes_of_name for i in ancestors(k, classes)}
        annotated[list(classes_of_name - hosts)] = True        # "left renal cyst": not the kidney
        for value in values:
            if value == 0:
                raise ValueError(f"{where}: {name!r} has value 0, which is background")
            of_value = meaning.setdefault(value, Meaning())
            of_value.sure |= of_name.sure
            of_value.either |= of_name.either
            of_value.unknown |= of_name.unknown | possible_hosts(of_name.sure, classes)
    if not annotated.any():
        raise ValueError(f"{where}: none of {[n for n, _ in named_values][:8]} is a class here; "
                         "see `python labels.py`, or pass a class table with --classes")
    return meaning, annotated, unmatched


def meaning_of_name(name: str, classes: tuple[Class, ...], organ: frozenset[str] = frozenset(),
                    context: str = "") -> Meaning:
    """What a name in dataset.json says.

    a class                        the class, or one of the two sides
    a lesion with a clear host     the class of the lesion; see match_lesion
    "ignore" (nnU-Net)             nothing about any class
    a lesion without a clear host  nothing about any class
    a name with an organ in it     nothing about that organ, and if it is a lesion, about the
                                   lesions of that organ: "liver segment 4", "liver abscess"
    any other                      background: Meaning()

    organ, context  tell the host of a lesion whose name does not, and the organ of a "vessel"
    """
    everything = set(range(len(classes)))
    words = name_key(name)
    if words == ("ignore",):
        return Meaning(unknown=everything)
    indices = _match_in_context(name, classes, organ, context)
    if len(indices) == 2 and other_side(indices[0], classes) == indices[1]:
        return Meaning(either={indices})
    if indices:
        return Meaning(sure=set(indices))
    lesion_words = _lesion_words(name)
    is_lesion = bool(lesion_words & (_LESION_KINDS | _OTHER_LESIONS))
    inside = _organs_in(lesion_words if is_lesion else frozenset(words), classes)
    if is_lesion:
        inside |= {k for k, c in enumerate(classes)
                   if c.lesion and any(classes[i].name in c.parents for i in inside)}
        return Meaning(unknown=inside or everything)
    return Meaning(unknown=inside)


def _match_in_context(name: str, classes, organ: frozenset[str], context: str) -> tuple[int, ...]:
    """The classes that a name denotes in a dataset: by itself, as a lesion of the organ, or as a
    part of the dataset's name, the context.

    >>> _match_in_context("Vessel", CLASSES, frozenset(), "Hepatic Vessel")     # Hepatic Vessel
    (14,)
    """
    indices = match(name, classes) or match_lesion(name, classes, organ)
    words = set(name_key(name))
    if not indices and words and words < set(name_key(context)):
        indices = match(context, classes)
    return indices


def _organs_in(words: frozenset[str], classes) -> set[int]:
    """The organs whose name is part of a longer name; with a side, only those of that side."""
    sides = words & {"left", "right"}
    found = set()
    for k, c in enumerate(classes):
        spellings = [set(name_key(spelling)) - {c.side} for spelling in (c.name, *c.synonyms)]
        is_other_side = c.side and sides and c.side not in sides
        if not c.lesion and not is_other_side and any(part < words for part in spellings):
            found.add(k)
    return found


def _only_organ(names: list[str], classes, context: str) -> frozenset[str]:
    """The words of the only organ that a dataset labels, without its side; else no words.

    The host of a labelled lesion counts; organs inside of others do not count beside them. Where
    no organ is labelled, the dataset's name, the context, may tell it.

    >>> _only_organ(["background", "pancreas", "cancer"], CLASSES, "")
    frozenset({'pancreas'})
    >>> _only_organ(["liver", "spleen", "tumor"], CLASSES, "")
    frozenset()
    """
    found: set[int] = set()
    for name in names:
        found.update(_match_in_context(name, classes, frozenset(), context))
    hosts = {parent for k in found if classes[k].lesion for parent in classes[k].parents}
    found = {k for k in range(len(classes)) if classes[k].name in hosts
             or k in found and not classes[k].lesion}
    if not found:
        found = set(match(context, classes))
    outermost = {k for k in found if not ancestors(k, classes) & found}
    organs = {_lesion_words(classes[k].name) - {classes[k].side, *_LESION_KINDS}
              for k in outermost}
    return organs.pop() if len(organs) == 1 else frozenset()


def add_parents(sure: set[int], either: set[tuple[int, int]], classes) -> tuple[set, set]:
    """What a value means, with the parents of its classes: a child lies inside its parent.

    A class with two parents lies in one of the two, unless one of them is sure already. If only one
    of the two is in the table, nothing is added (see possible_hosts).

    >>> add_parents({26}, set(), CLASSES)       # Liver Tumor: in the Liver
    ({26, 5}, set())
    >>> add_parents({25}, set(), CLASSES)       # Kidney Tumor: in the right or the left kidney
    ({25}, {(1, 2)})
    >>> add_parents({25, 2}, set(), CLASSES)    # Kidney Tumor and Left Kidney
    ({25, 2}, set())
    """
    index = {c.name: k for k, c in enumerate(classes)}
    sure, either = set(sure), set(either)
    todo = list(sure)
    while todo:
        k = todo.pop()
        parents = [index[p] for p in classes[k].parents if p in index]
        if len(parents) < len(classes[k].parents):
            continue
        if len(parents) == 1 and parents[0] not in sure:
            sure.add(parents[0])
            todo.append(parents[0])
        elif len(parents) == 2 and not sure & set(parents):
            either.add((parents[0], parents[1]))
    return sure, either


def possible_hosts(sure: set[int], classes) -> set[int]:
    """The parents in which a voxel of these classes may lie or not: one of two sides of an organ,
    of which the other one is not in the table.

    >>> table = make_classes(["Kidney Tumor", "Right Kidney"])
    >>> add_parents({0}, set(), table), possible_hosts({0}, table)
    (({0}, set()), {1})
    """
    index = {c.name: k for k, c in enumerate(classes)}
    hosts = set()
    for k in sure:
        in_table = {index[p] for p in classes[k].parents if p in index}
        if len(in_table) < len(classes[k].parents):
            hosts |= in_table - sure
    return hosts


def build_regions(meaning: dict[int, Meaning], classes) -> tuple[list, np.ndarray, dict]:
    """Step 3 of label_map: add the parents and build `regions`.

    returns  values (V), regions (2V, K), unsplit, as in LabelMap. Row v + V is the value of row v
             on the patient's left; the two rows differ where the value belongs to either side.

    >>> meaning = {1: Meaning(either={(1, 2)}), 2: Meaning({25}, {(1, 2)})}   # kidney, its tumour
    >>> values, regions, unsplit = build_regions(meaning, CLASSES)
    >>> values, unsplit
    ([0, 1, 2], {(1, 2): [1, 2]})
    >>> [np.flatnonzero(row).tolist() for row in regions]
    [[], [1], [1, 25], [], [2], [2, 25]]
    """
    values = [0, *sorted(meaning)]
    V = len(values)
    regions = np.zeros((2 * V, len(classes)), bool)
    unsplit: dict[tuple[int, int], list[int]] = {}
    for row, value in enumerate(values[1:], 1):
        sure, either = add_parents(meaning[value].sure, meaning[value].either, classes)
        regions[row, list(sure)] = True
        regions[row + V, list(sure)] = True
        for right, left in either:
            regions[row, right] = True
            regions[row + V, left] = True
            unsplit.setdefault((right, left), []).append(row)
    return values, regions, unsplit


def build_known(values: list[int], meaning: dict[int, Meaning], regions: np.ndarray) -> np.ndarray:
    """Step 4 of label_map: `known` (2V, K), as in LabelMap.

    What another name of the same value says for sure is known: a voxel of the kidney that is also
    an unclear lesion is kidney.
    """
    known = np.ones_like(regions)
    V = len(values)
    for row, value in enumerate(values[1:], 1):
        unknown = list(meaning[value].unknown)
        known[row, unknown] = False
        known[row + V, unknown] = False
    return known | regions


def describe_values(named_values, meaning: dict[int, Meaning], classes) -> list[str]:
    """The meaning of every value in words, one line each; background values share one line.

    "2 liver, cancer -> Liver + Liver Tumor"
    """
    names_of_value: dict[int, list[str]] = {}
    for name, values_of_name in named_values:
        for value in values_of_name:
            names_of_value.setdefault(value, []).append(name)
    lines, background = [], []
    for value, names in sorted(names_of_value.items()):
        if value not in meaning:
            background += [name for name in names if name.lower() != "background"]
            continue
        sure, either = add_parents(meaning[value].sure, meaning[value].either, classes)
        parts = [f"{classes[right].name} or {classes[left].name}" for right, left in sorted(either)]
        if sure:
            parts.append(" + ".join(classes[k].name for k in sorted(sure)))
        unknown = meaning[value].unknown - sure
        if len(unknown | sure) == len(classes):
            parts.append(f"left out of the loss of every {'other ' if sure else ''}class")
        elif unknown:
            left_out = ", ".join(classes[k].name for k in sorted(unknown))
            parts.append(f"left out of the loss of {left_out}")
        lines.append(f"{value} {', '.join(names)} -> {'; '.join(parts)}")
    if background:
        more = f" and {len(background) - 12} more" if len(background) > 12 else ""
        lines.append(f"background: {', '.join(background[:12])}{more}")
    return lines


def split_sides(label_rows: np.ndarray, label_map: LabelMap, midline: float | None) -> np.ndarray:
    """Tell left from right where the dataset does not: on the left, row v becomes row v + V.

    label_rows  (D, H, W)  axis 0 runs towards the patient's right (RAS+)
    midline     voxels     position of the body's mid-sagittal plane on axis 0; None: unknown, then
                           only what touches a labelled organ is told apart (see undecided_sides)
    returns     (D, H, W)  a new map

    An organ with its lesions is split piece by piece (26-connected); see `_left_part`.
    """
    V = len(label_map.values)
    on_left = np.arange(label_rows.shape[0])[:, None, None] < (-1 if midline is None else midline)
    out = label_rows.copy()
    for pair in label_map.unsplit:
        for box, piece, touches_right, touches_left in _unsplit_pieces(label_rows, label_map, pair):
            to_left = _left_part(piece, on_left[box[0]], touches_right, touches_left)
            out[box][to_left] = label_rows[box][to_left] + V
    return out


def undecided_sides(label_rows: np.ndarray, label_map: LabelMap) -> list[int]:
    """The classes of which split_sides cannot tell right from left without a midline.

    label_rows  (D, H, W)  before split_sides
    returns     [k, ...]   both classes of a pair, if some piece of the organ has no side and
                           touches no voxel that has one
    """
    undecided = set()
    for pair in label_map.unsplit:
        for _, _, touches_right, touches_left in _unsplit_pieces(label_rows, label_map, pair):
            if touches_right == touches_left:
                undecided.update(pair)
    return sorted(undecided)


def _unsplit_pieces(label_rows: np.ndarray, label_map: LabelMap, pair: tuple[int, int]):
    """The connected pieces of an organ whose side the dataset does not name.

    pair    the classes (right, left)
    yields  box            three slices around the piece, one voxel wider where there is room
            piece          (d, h, w) bool, inside the box
            touches_right  how many voxels with the right class's label the piece touches
            touches_left   the same for the left class
    """
    unsplit_rows = label_map.unsplit[pair]
    split_rows = [row for row in range(len(label_map.values)) if row not in unsplit_rows]
    is_right, is_left = (np.isin(label_rows, [r for r in split_rows if label_map.regions[r, k]])
                         for k in pair)
    cube = np.ones((3, 3, 3))
    pieces, _ = ndimage.label(np.isin(label_rows, unsplit_rows), cube)
    for i, box in enumerate(ndimage.find_objects(pieces), 1):
        box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
        piece = pieces[box] == i
        rim = ndimage.binary_dilation(piece, cube)
        yield box, piece, int((is_right[box] & rim).sum()), int((is_left[box] & rim).sum())


def _left_part(piece: np.ndarray, on_left: np.ndarray, touches_right: int,
               touches_left: int) -> np.ndarray:
    """The voxels of one connected piece that belong to the left organ, (d, h, w) bool.

    A piece goes as a whole to the side whose labelled organ it touches more; otherwise to the side
    of the plane that holds WHOLE_SHARE of it; otherwise it is cut at the plane.

    piece                        (d, h, w) bool
    on_left                      (d, 1, 1) bool  on the left of the body's mid-sagittal plane
    touches_right, touches_left  voxels that the dataset labels as right and as left
    """
    if touches_left > touches_right:
        return piece
    if touches_right > touches_left:
        return np.zeros_like(piece)
    share = np.broadcast_to(on_left, piece.shape)[piece].mean()
    if share >= WHOLE_SHARE:
        return piece
    if 1 - share >= WHOLE_SHARE:
        return np.zeros_like(piece)
    return piece & on_left


# ---- public datasets ---------------------------------------------------------------------------
class PublicDataset(NamedTuple):
    labels: dict        # name -> value or values, as in the release's table
    image: str          # file of a case relative to the dataset's folder; {} is the case's name
    label: str


def _numbered(names: str) -> dict[str, int]:
    """
    >>> _numbered("liver, spleen")
    {'liver': 1, 'spleen': 2}
    """
    return {name: i for i, name in enumerate(names.split(", "), 1)}


_BTCV = _numbered("spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, "
                  "aorta, postcava, portal vein and splenic vein, pancreas, right adrenal gland, "
                  "left adrenal gland, duodenum")
# only these are annotated in the scans numbered 60 and up
_BTCV_FROM_60 = ["spleen", "left kidney", "gallbladder", "esophagus", "liver", "stomach",
                 "pancreas", "duodenum"]
_MSD_FILES = ("imagesTr/{}.nii.gz", "labelsTr/{}.nii.gz")
_NNUNET_FILES = ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz")

PUBLIC = {
    "btcv": PublicDataset(_BTCV, "img/img{}.nii.gz", "label/label{}.nii.gz"),
    "lits": PublicDataset(
        {"liver": [1, 2], "liver tumor": 2}, "volume-{}.nii", "segmentation-{}.nii"),
    "kits": PublicDataset(
        {"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3},
        "{}/imaging.nii.gz", "{}/segmentation.nii.gz"),
    "word": PublicDataset(
        _numbered("liver, spleen, left kidney, right kidney, stomach, gallbladder, esophagus, "
                  "pancreas, duodenum, colon, intestine, adrenal gland, rectum, bladder, "
                  "left head of femur, right head of femur"), *_MSD_FILES),
    "abdomenct-1k": PublicDataset(
        _numbered("liver, kidney, spleen, pancreas"),
        "Images/{}_0000.nii.gz", "Masks/{}.nii.gz"),
    "amos": PublicDataset(
        _numbered("spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, "
                  "aorta, postcava, pancreas, right adrenal gland, left adrenal gland, duodenum, "
                  "bladder, prostate"), *_MSD_FILES),
    "ct-org": PublicDataset(
        _numbered("liver, bladder, lung, kidney, bone, brain"),
        "volume-{}.nii.gz", "labels-{}.nii.gz"),
    "abdomenct-12organ": PublicDataset(
        _numbered("liver, kidney, spleen, pancreas, aorta, postcava, stomach, gallbladder, "
                  "esophagus, right adrenal gland, left adrenal gland, celiac trunk"),
        *_NNUNET_FILES),
    "msd-liver": PublicDataset({"liver": [1, 2], "liver tumor": 2}, *_MSD_FILES),
    "msd-lung": PublicDataset({"lung tumor": 1}, *_MSD_FILES),
    "msd-pancreas": PublicDataset({"pancreas": [1, 2], "pancreas tumor": 2}, *_MSD_FILES),
    "msd-hepaticvessel": PublicDataset(
        {"hepatic vessel": 1, "hepatic vessel tumor": 2}, *_MSD_FILES),
    "msd-spleen": PublicDataset({"spleen": 1}, *_MSD_FILES),
    "msd-colon": PublicDataset({"colon tumor": 1}, *_MSD_FILES),
    "totalsegmentator": PublicDataset({}, "{}/ct.nii.gz", "{}/labels.nii.gz"),
    "abdomenatlas": PublicDataset({}, "{}/ct.nii.gz", "{}/labels.nii.gz"),
    "pants": PublicDataset({}, "ImageTr/{}/ct.nii.gz", "LabelTr/{}/labels.nii.gz"),
}
# One file per structure, segmentations/NAME.nii.gz, beside the label map that is made of them
PER_STRUCTURE = ("totalsegmentator", "abdomenatlas", "pants")
MERGED = "merged by labels.py"      # the description in the header of such a label map
# Structures of TotalSegmentator that are classes here, in the order of its class list (version 2,
# task "total"). Where two of its masks overlap, the later one holds.
OVERLAP_ORDER = (
    "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas",
    "adrenal_gland_right", "adrenal_gland_left", "lung_upper_lobe_left", "lung_lower_lobe_left",
    "lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right", "esophagus",
    "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate", "kidney_cyst_left",
    "kidney_cyst_right", "aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein")
AMOS_FIRST_MRI = 501        # cases of AMOS from this number on are MR scans
CASE_NAMES = {"btcv": r"\d+", "amos": r"amos_\d+"}      # where the number of a case decides
NOT_NIFTI = ("pancreas-ct", "chaos", "3d-ircadb")


def is_amos_mri(case: str) -> bool:
    """Whether this is the name of an MR scan of AMOS, whose dataset.json mixes CT and MR.

    >>> is_amos_mri("amos_0001"), is_amos_mri("amos_0507")
    (False, True)
    """
    number = re.fullmatch(r"amos_(\d+)", case)
    return number is not None and int(number[1]) >= AMOS_FIRST_MRI


def public_json(name: str, folder: Path | None = None) -> dict:
    """The content of dataset.json for a public dataset.

    folder  where the dataset lies: its pairs of image and label are listed, too, and masks in one
            file per structure are merged into a label map (see merge_structures)
    raises  ValueError  for an unknown dataset, one that is not NIfTI, or a folder without a pair
    """
    name = name.lower()
    if name in NOT_NIFTI:
        raise ValueError(f"{name} is not NIfTI as distributed; convert it first (`dcm2niix -z y -f "
                         "%i_0000 -o imagesTr DICOM_FOLDER`), put the label maps into labelsTr, "
                         "and write a dataset.json with their values")
    if name not in PUBLIC:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(PUBLIC)}")
    content = {"name": name, "channel_names": {"0": "CT"},
               "labels": {"background": 0, **PUBLIC[name].labels}}
    if name.startswith("msd-"):
        content["tensorImageSize"] = "3D"        # tells an MSD task, see data.Case
    if folder is not None:
        cases = _find_cases(name, folder)
        if name in PER_STRUCTURE:
            values, annotated = merge_structures(name, folder, cases)
            content["labels"] |= values
            incomplete = {case: names for case, names in annotated.items() if names is not None}
            if incomplete:
                content["annotated"] = incomplete
            cases = list(annotated)
        content["training"] = _find_pairs(name, folder, cases)
        if name == "btcv":
            content["annotated"] = {f"img{case}": _BTCV_FROM_60
                                    for case in cases if int(case) >= 60}
    return content


def _find_cases(name: str, folder: Path) -> list[str]:
    """The names of the cases whose image lies in the folder of a public dataset.

    Hidden files are passed over. What is left out for another reason is printed.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    image = PUBLIC[name].image
    before, after = image.split("{}")
    files = [path.relative_to(folder) for path in sorted(folder.glob(image.format("*")))]
    files = [file.as_posix() for file in files
             if not any(part.startswith(".") for part in file.parts)]
    cases = [file[len(before):-len(after)] for file in files]
    unusual = [case for case in cases if not re.fullmatch(CASE_NAMES.get(name, ".*"), case)]
    _report_left_out("not named as the images of this dataset", image, unusual)
    cases = [case for case in cases if case not in unusual]
    if name == "amos":
        mri = [case for case in cases if is_amos_mri(case)]
        _report_left_out("MRI (number above 500)", image, mri)
        cases = [case for case in cases if case not in mri]
    return cases


def _find_pairs(name: str, folder: Path, cases: list[str]) -> list[dict[str, str]]:
    """The image and label files, relative to the folder, of the cases that have a label."""
    _, image, label = PUBLIC[name]
    unlabelled = [case for case in cases if not (folder / label.format(case)).is_file()]
    pairs = [{"image": image.format(case), "label": label.format(case)} for case in cases
             if case not in unlabelled]
    if not pairs:
        raise ValueError(f"{folder}: no pair {image.format('NAME')} and {label.format('NAME')} in "
                         "it")
    _report_left_out(f"no {label}", image, unlabelled)
    return pairs


def _report_left_out(reason: str, image: str, cases: list[str]) -> None:
    """Print one line that names images that are left out, if there are any."""
    if cases:
        more = f" and {len(cases) - 5} more" if len(cases) > 5 else ""
        names = ", ".join(image.format(case) for case in cases[:5])
        print(f"left out, {reason}: {names}{more}")


# ---- one file per structure ----------------------------------------------------------------------
def merge_structures(name: str, folder: Path,
                     cases: list[str]) -> tuple[dict[str, int], dict[str, list[str] | None]]:
    """Merge segmentations/STRUCTURE.nii.gz of every case into the label map labels.nii.gz.

    Structures that match no class are left out, but for lesions of which the name does not tell
    where they lie: label_map leaves their voxels out of the loss. Organs are painted first and what
    lies in them after them, so that vessels, cysts and tumours stay. Where two organs overlap, the
    later one in OVERLAP_ORDER stays; names outside of that list come first, alphabetically.

    A case whose CT or one of whose masks cannot be used is left out, with one line that says why.

    returns  values     {structure: value}
             annotated  {case: the classes annotated in it; None: those of the whole dataset}
    raises   ValueError  if a labels.nii.gz was not written by this command, or no case is left
    """
    from tqdm import tqdm

    import data
    _, image, label = PUBLIC[name]
    files = {case: _structure_files((folder / label.format(case)).parent) for case in cases}
    found = {structure for files_of_case in files.values() for structure in files_of_case}
    found = {structure for structure in found
             if _classes_of(structure) or _is_unclear_lesion(structure)}
    if not any(_classes_of(structure) for structure in found):
        raise ValueError(f"{folder}: no file segmentations/NAME.nii.gz whose name is a class here")
    order = sorted(found, key=_paint_order)
    values = {structure: i for i, structure in enumerate(sorted(order), 1)}
    for case in cases:
        _refuse_foreign(folder / label.format(case))
    annotated: dict[str, list[str] | None] = {}
    for case in tqdm(cases, desc="merge", unit="case", disable=None):
        ct, out = folder / image.format(case), folder / label.format(case)
        present = [structure for structure in order if structure in files[case]]
        masks = [(files[case][structure], values[structure]) for structure in present]
        try:
            merged = merge_masks(ct, masks)
        except (ValueError, OSError) as e:
            tqdm.write(f"left out: {' '.join(str(e).split())}")
            continue
        data.save_like(out, merged, like=ct, description=MERGED)
        annotated[case] = None
        if present != order:
            annotated[case] = _annotated_by(set(present), set(order))
    if not annotated:
        raise ValueError(f"{folder}: no case with {image} and segmentations/NAME.nii.gz that can "
                         "be used")
    return values, annotated


def _structure_files(case: Path) -> dict[str, Path]:
    """{structure: file} of the masks of a case, without hidden files."""
    return {file.name.removesuffix(".nii.gz"): file
            for file in (case / "segmentations").glob("*.nii.gz")
            if not file.name.startswith(".")}


def _classes_of(structure: str) -> tuple[int, ...]:
    """The classes that a structure's mask shows, without those that contain others of them.

    >>> _classes_of("kidney_left"), _classes_of("kidney"), _classes_of("rib_left_1")
    ((2,), (1, 2), ())
    """
    indices = match(structure) or match_structure(structure)
    return tuple(k for k in indices if not any(k in ancestors(i, CLASSES) for i in indices))


def _is_unclear_lesion(structure: str) -> bool:
    """Whether it is a lesion whose name does not tell its class, such as "tumor"."""
    is_lesion = _lesion_words(structure) & (_LESION_KINDS | _OTHER_LESIONS)
    return bool(is_lesion) and not _classes_of(structure)


def _paint_order(structure: str) -> tuple:
    """Sort key: parents before children, lesions last, then OVERLAP_ORDER, then the alphabet.

    >>> sorted(["hepatic_vessel", "colon", "liver", "bladder"], key=_paint_order)
    ['liver', 'colon', 'bladder', 'hepatic_vessel']
    """
    classes = _classes_of(structure)
    depth = max((_depth(k) for k in classes), default=len(CLASSES))
    lesion = any(CLASSES[k].lesion for k in classes)
    place = -1
    for i, listed in enumerate(OVERLAP_ORDER):
        if classes and _classes_of(listed) == classes:
            place = i
    return depth, lesion, place, structure


def _depth(k: int) -> int:
    """How many classes contain class k, one in the other: 0 for an organ."""
    return max((1 + _depth(parent) for parent in ancestors(k, CLASSES)), default=0)


def _annotated_by(present: set[str], names: set[str]) -> list[str]:
    """The classes that a case annotates if it has only some of the dataset's structures.

    One file is enough that shows a whole class. Where the dataset splits a class into parts, as a
    lung into lobes or cysts into left and right ones, all of its parts are needed.

    >>> lobes = {"lung_upper_lobe_left", "lung_lower_lobe_left"}
    >>> _annotated_by({"lung_upper_lobe_left", "liver"}, {*lobes, "liver", "spleen"})
    ['Liver']
    """
    annotated = []
    for k, c in enumerate(CLASSES):
        of_class = {name for name in names if k in _classes_of(name)}
        parts = {name for name in of_class if _is_part(name, c)}
        if present & (of_class - parts) or parts and parts <= present:
            annotated.append(c.name)
    return annotated


def _is_part(structure: str, c: Class) -> bool:
    """Whether a structure is one of several that make up the class: a lobe, or one side."""
    words = name_key(structure)
    return "lobe" in words or not c.side and ("left" in words or "right" in words)


def merge_masks(ct: Path, masks: list[tuple[Path, int]]) -> np.ndarray:
    """The masks of one case, painted one over the other, in the RAS+ axes of its CT.

    masks    (file, value); the last one that covers a voxel gives its value
    returns  (D, H, W) uint8, or uint16 for values above 255
    raises   ValueError, OSError  if there is no mask, or a file cannot be read or lies in another
                                  grid than the CT
    """
    import data
    if not masks:
        raise ValueError(f"{ct}: no segmentations/NAME.nii.gz with a name that is a class here")
    volume = data.read_checked(ct)
    dtype = np.uint8 if max(value for _, value in masks) <= 255 else np.uint16
    merged = np.zeros(volume.array.shape, dtype)
    for file, value in masks:
        mask = data.read_checked(file)
        data.check_same_grid(file, mask, ct, volume)
        merged[mask.array > 0.5] = value
    return merged


def _refuse_foreign(path: Path) -> None:
    """Raise ValueError if a file of this name exists that merge_structures has not written."""
    import nibabel as nib
    if not path.exists():
        return
    try:
        description = bytes(nib.load(path).header["descrip"]).rstrip(b"\0").decode("ascii")
    except Exception:
        description = ""
    if description != MERGED:
        raise ValueError(f"{path}: it was not written by this command and is not overwritten; "
                         "move it away")


# ---- commands ----------------------------------------------------------------------------------
def run(main, argv=None) -> int:
    """Run a command. An error that a user can cause is printed as one line, with exit status 2."""
    try:
        return main(argv) or 0
    except (ValueError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print_table(classes: tuple[Class, ...], template: str) -> None:
    print(f"{'value':>5}  {'name':29} {'properties':18} {'parents':25} {'prompt':62} synonyms")
    for i, c in enumerate(classes, 1):
        properties = [c.side] if c.side else []
        properties += ["lesion"] if c.lesion else []
        properties += ["vessel"] if c.vessel else []
        properties += [f"solid {c.solid:g}"] if c.solid else []
        print(f"{i:5}  {c.name:29} {', '.join(properties) or '-':18} "
              f"{', '.join(c.parents) or '-':25} {c.sentence(template):62} "
              f"{', '.join(c.synonyms) or '-'}")


KEPT = "dataset.original.json"      # the copy of the dataset.json that came with a dataset


def _prepare(name: str, folder: Path | None) -> None:
    """Print the dataset.json of a public dataset, or write it into the dataset's folder.

    A dataset.json that came with the dataset is copied to dataset.original.json, and its facts are
    taken over. A second run finds them in the copy, and gives the same result.
    """
    if folder is None:
        print(json.dumps(public_json(name), indent=1))
        return
    import data
    path, copy = folder / "dataset.json", folder / KEPT
    original, to_copy = _original_json(path, copy)
    _check_msd_name(name, original, path)
    content = public_json(name, folder)
    facts = _facts_of(name.lower(), original)
    content |= facts
    content["prepared_by"] = f"labels.py {_checksum(content)}"
    if to_copy:
        with data.atomic_write(copy) as part:
            part.write_bytes(path.read_bytes())
    with data.atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}, {len(content['training'])} cases")
    if name.lower() in PER_STRUCTURE and "annotated" in content:
        print(f"{len(content['annotated'])} cases lack some of the structures; \"annotated\" lists "
              "the classes that they have")
    if original:
        print(f"kept: {copy}; taken over from it: {', '.join(facts) or 'nothing'}")


def _original_json(path: Path, copy: Path) -> tuple[dict, bool]:
    """The dataset.json that came with a dataset ({}: none), and whether it must still be copied.

    raises ValueError  if writing dataset.json would lose something
    """
    import data
    kept = data.read_json(copy) if copy.is_file() else {}
    if not path.is_file():
        return kept, False
    content = data.read_json(path)
    if "prepared_by" in content:
        if content["prepared_by"] != f"labels.py {_checksum(content)}":
            raise ValueError(f"{path}: edited after labels.py wrote it, and not overwritten; move "
                             "it away to have it written again")
        return kept, False
    if copy.is_file() and kept != content:
        raise ValueError(f"{path}: neither written by labels.py nor the same as {copy.name}; move "
                         "one of the two away")
    return content, not copy.is_file()


FOLDS_FILE = "splits_final.json"    # as nnU-Net calls it


def write_folds(folder: Path, k: int) -> None:
    """Write splits_final.json for a dataset: k folds, each of which holds out as many consecutive
    cases in the order of their names.

    5 folds of the 30 training scans of BTCV hold out 6 each, img0001 to img0006 first.

    raises ValueError  if a splits_final.json with other folds is there, or there are fewer cases
    """
    import data
    cases = sorted(case.name.removeprefix(f"{case.dataset}/")
                   for case in data.read_dataset(folder, CLASSES))
    if not 2 <= k <= len(cases):
        raise ValueError(f"--folds {k}: must be from 2 to the number of cases, {len(cases)}")
    ends = [round(i * len(cases) / k) for i in range(k + 1)]
    folds = []
    for start, stop in zip(ends[:-1], ends[1:], strict=True):
        folds.append({"train": cases[:start] + cases[stop:], "val": cases[start:stop]})
    path = folder / FOLDS_FILE
    if path.exists() and data.read_json(path, (dict, list)) != folds:
        raise ValueError(f"{path}: exists and has other folds; move it away")
    with data.atomic_write(path) as part:
        part.write_text(json.dumps(folds, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}, {k} folds, for train.py --split {path} --fold 0 to {k - 1}")


def _checksum(content: dict) -> str:
    """A hash of a dataset.json that this command writes, to tell later whether it was edited."""
    rest = {key: value for key, value in content.items() if key != "prepared_by"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16]


def _facts_of(name: str, original: dict) -> dict:
    """What the dataset.json that came with a dataset says and its label table does not."""
    facts = {}
    if original.get("tensorImageSize"):
        facts["tensorImageSize"] = original["tensorImageSize"]
    channels = original.get("channel_names") or original.get("modality")
    if channels and name != "amos":              # of which only the CT scans are listed
        facts["channel_names"] = channels
    return facts


def _check_msd_name(name: str, original: dict, path: Path) -> None:
    """Raise ValueError if dataset.json of an MSD task tells another task than the user named."""
    own_name = re.sub(r"[\W_]", "", str(original.get("name", "")).lower())
    organ = name.lower().removeprefix("msd-")
    if name.lower().startswith("msd-") and own_name and organ not in own_name:
        raise ValueError(f"{path}: its name is {original['name']!r}, which is not {name}")


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(
        description="Print the class table, or prepare a public dataset for training.")
    ap.add_argument("dataset", nargs="?",
                    help="print the dataset.json of this public dataset instead of the class "
                    f"table: {', '.join(PUBLIC)}")
    ap.add_argument("folder", nargs="?", type=Path,
                    help="the folder with the files of the dataset: write dataset.json into it, "
                    "with the list of its pairs of image and label; one that came with the "
                    "dataset is kept as dataset.original.json (totalsegmentator, abdomenatlas, "
                    "pants: the masks of a case are also merged into its labels.nii.gz)")
    ap.add_argument("--classes", metavar="FILE",
                    help="print this class table (JSON) instead of the built-in one")
    ap.add_argument("--prompt-template", default="V3",
                    help="template of the prompts printed: V1, V2 or V3 of the paper, or a text "
                    "with {} for the class name (default: V3)")
    ap.add_argument("--folds", type=int, metavar="K",
                    help="also write splits_final.json into the folder: K folds of consecutive "
                    "scans (BTCV: 5)")
    args = ap.parse_args(argv)
    if args.folds is not None and args.folder is None:
        ap.error("--folds needs a dataset and its folder")
    if args.dataset:
        _prepare(args.dataset, args.folder)
        if args.folds is not None:
            write_folds(args.folder, args.folds)
    else:
        _print_table(load_classes(args.classes), args.prompt_template)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
