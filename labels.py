"""What there is to segment: the class table, prompts, and what a dataset's label map means.

    python labels.py                        the 32 classes of the paper, with prompts and parents
    python labels.py --classes my.json      the same for a class table of your own
    python labels.py kits                   a public dataset's dataset.json
    python labels.py kits DIR               the same with its pairs of files, written to DIR

A class is an index 0..K-1 here and the value index + 1 in a segmentation file. A scan's label stays
one integer map; `LabelMap.regions` says which raw value belongs to which classes (a tumour voxel is
also an organ voxel: two trues in a row) and `LabelMap.annotated` which classes the dataset labels
at all (paper, Sec. 3.1: partial labels).

K classes   V rows of a label map   D, H, W voxels
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage

TEMPLATES = {
    "V1": "A photo of a {}.",
    "V2": "There is {} in this computerized tomography.",
    "V3": "A computerized tomography of a {}",      # the one used; as released, without a full stop
}


@dataclass(frozen=True)
class Class:
    """One row of the class table."""
    name: str                          # what people read
    parents: tuple[str, ...] = ()      # classes that contain this one; drawn below it
    side: str = ""                     # "left", "right" or ""
    lesion: bool = False               # tumour or cyst: scored apart, may be absent
    synonyms: tuple[str, ...] = ()     # other spellings found in public datasets
    prompt_name: str = ""              # what goes into the template where it is not the name
    prompt: str = ""                   # a whole sentence instead of a template

    def sentence(self, template: str) -> str:
        """The prompt of this class; `template` is a key of TEMPLATES or a text with {}."""
        text = TEMPLATES.get(template, template)
        if "{}" not in text:
            raise ValueError(f"prompt template {template!r} has no {{}}; known: {list(TEMPLATES)}")
        return self.prompt or text.replace("{}", self.prompt_name or self.name)


_KIDNEYS, _LUNGS = ("Right Kidney", "Left Kidney"), ("Right Lung", "Left Lung")

CLASSES = (     # order and prompt names as released; "Arota" and "Celiac Truck" are its spellings
    Class("Spleen"),
    Class("Right Kidney", side="right"),
    Class("Left Kidney", side="left"),
    Class("Gall Bladder", synonyms=("gallbladder",)),
    Class("Esophagus", synonyms=("oesophagus",)),
    Class("Liver"),
    Class("Stomach"),
    Class("Aorta", prompt_name="Arota"),
    Class("Postcava", synonyms=("inferior vena cava", "ivc", "post cava", "vena cava inferior")),
    Class("Portal Vein and Splenic Vein", synonyms=("portal and splenic vein",)),
    Class("Pancreas"),
    Class("Right Adrenal Gland", side="right"),
    Class("Left Adrenal Gland", side="left"),
    Class("Duodenum"),
    Class("Hepatic Vessel", parents=("Liver",), synonyms=("liver vessel",)),
    Class("Right Lung", side="right",
          synonyms=("right lung upper lobe", "right lung middle lobe", "right lung lower lobe")),
    Class("Left Lung", side="left", synonyms=("left lung upper lobe", "left lung lower lobe")),
    Class("Colon", synonyms=("large bowel", "large intestine")),
    Class("Intestine", synonyms=("small bowel", "small intestine")),
    Class("Rectum"),
    Class("Bladder", synonyms=("urinary bladder",)),
    Class("Prostate", synonyms=("prostate uterus",)),
    Class("Left Head of Femur", side="left", synonyms=("left femoral head",)),
    Class("Right Head of Femur", side="right", synonyms=("right femoral head",)),
    Class("Celiac Trunk", prompt_name="Celiac Truck",
          synonyms=("celiac truck", "coeliac trunk", "celiac artery")),
    Class("Kidney Tumor", parents=_KIDNEYS, lesion=True, synonyms=("renal tumor",)),
    Class("Liver Tumor", parents=("Liver",), lesion=True, synonyms=("hepatic tumor",)),
    Class("Pancreas Tumor", parents=("Pancreas",), lesion=True, synonyms=("pancreatic tumor",)),
    Class("Hepatic Vessel Tumor", parents=("Liver",), lesion=True),
    Class("Lung Tumor", parents=_LUNGS, lesion=True),
    Class("Colon Tumor", parents=("Colon",), lesion=True, synonyms=("colon cancer primaries",)),
    Class("Kidney Cyst", parents=_KIDNEYS, lesion=True, synonyms=("renal cyst",)),
)


def load_classes(path: str | Path | None = None) -> tuple[Class, ...]:
    """The built-in table, or one's own: a JSON list of names or of objects with Class's fields.

    raises ValueError  with the file and the row, if a field, a name or a parent is wrong
    """
    if path is None:
        return CLASSES
    try:
        rows = json.loads(Path(path).read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: not a readable class table (JSON): {e}") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f'{path}: a class table is a list such as ["Femur", {{"name": "Tibia"}}]')
    return make_classes(rows, where=str(path))


def make_classes(rows: list, where: str = "class table") -> tuple[Class, ...]:
    """[{field: value} or name, ...] -> classes, checked."""
    classes = []
    for i, row in enumerate(rows):
        row = {"name": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"]:
            raise ValueError(f"{where}: row {i} needs a name")
        wrong = set(row) - set(Class.__dataclass_fields__)
        if wrong:
            raise ValueError(f"{where}: {row['name']}: unknown field {sorted(wrong)}; "
                             f"known: {list(Class.__dataclass_fields__)}")
        row = {k: (v,) if k in ("parents", "synonyms") and isinstance(v, str) else v
               for k, v in row.items()}
        for key, value in row.items():
            want = {"lesion": bool, "parents": (list, tuple), "synonyms": (list, tuple)}
            items = value if key in ("parents", "synonyms") and isinstance(value, (list, tuple)) \
                else []
            if not isinstance(value, want.get(key, str)) or any(type(s) is not str for s in items):
                raise ValueError(f"{where}: {row['name']}: field {key} cannot be {value!r}")
        if row.get("side", "") not in ("", "left", "right"):
            raise ValueError(f"{where}: {row['name']}: side is left, right or empty")
        classes.append(Class(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}))
    keys = {}
    for c in classes:
        if not (key := _key(c.name)) or key in keys:
            raise ValueError(f"{where}: {c.name!r} and {keys.get(key)!r} are the same name")
        keys[key] = c.name
        if any(p not in {d.name for d in classes} or p == c.name for p in c.parents):
            raise ValueError(f"{where}: {c.name}: parents {list(c.parents)} must be other rows")
    for k, c in enumerate(classes):
        if k in ancestors(k, classes):
            raise ValueError(f"{where}: {c.name} is its own ancestor")
    return tuple(classes)


def ancestors(k: int, classes) -> set[int]:
    """Indices of all classes that contain class k, as far as they are among `classes`."""
    index = {c.name: i for i, c in enumerate(classes)}
    found, todo = set(), [k]
    while todo:
        new = {index[p] for p in classes[todo.pop()].parents if p in index} - found
        found |= new
        todo += new
    return found


# ---- names -------------------------------------------------------------------------------------
_ALIAS = {"l": "left", "r": "right", "tumour": "tumor", "tumours": "tumor", "tumors": "tumor",
          "cancer": "tumor", "cysts": "cyst", "kidneys": "kidney", "lungs": "lung",
          "veins": "vein", "vessels": "vessel", "adrenals": "adrenal"}
_SILENT = {"of", "the", "and", "gland", "glands"}


def _key(name: str) -> tuple[str, ...]:
    """A name without case, punctuation, word order and spelling variants."""
    words = re.sub(r"[\W_]+", " ", name.lower()).split()
    return tuple(sorted(_ALIAS.get(w, w) for w in words if w not in _SILENT))


def match(name: str, classes: tuple[Class, ...] = CLASSES) -> tuple[int, ...]:
    """The classes a dataset's name denotes.

    "kidney_left" -> (2,)   "kidney" -> (1, 2), right first: both sides   "femur_left" -> ()
    """
    key = _key(name)
    for i, c in enumerate(classes):
        if key in [_key(n) for n in (c.name, c.prompt_name, *c.synonyms) if n]:
            return (i,)
    sides = {c.side: i for i, c in enumerate(classes)
             if c.side and key == tuple(w for w in _key(c.name) if w != c.side)}
    return (sides["right"], sides["left"]) if len(sides) == 2 else ()


def select(names: list[str], classes: tuple[Class, ...]) -> list[int]:
    """Class indices of the names a user typed, in table order; a side-less name means both sides.

    raises ValueError  if a name matches nothing
    """
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise ValueError(f"expected a list of class names, got {names!r}")
    found = {n: match(n, classes) for n in names}
    missing = [n for n, ks in found.items() if not ks]
    if missing:
        raise ValueError(f"no class is called {missing}; known: {[c.name for c in classes]}")
    return sorted({k for ks in found.values() for k in ks})


# ---- what the numbers in a label file mean -----------------------------------------------------
@dataclass
class LabelMap:
    """Raw values of one dataset and what they mean.

    Row 0 is background. A map is stored as row numbers: raw value values[v] becomes row v, or row
    v + V where a structure that its dataset does not tell apart lies on the patient's left.
    """
    values: list[int]                  # V raw values, 0 first
    known: set[int]                    # every value dataset.json names, matched or not
    regions: np.ndarray                # (2V, K) bool: row belongs to class
    annotated: np.ndarray              # (K,) bool
    pairs: dict[tuple[int, int], list[int]]      # (right, left) -> rows to be told apart by side
    unmatched: list[str] = field(default_factory=list)

    def rows(self, raw: np.ndarray, where: str) -> np.ndarray:
        """(D, H, W) raw values -> row numbers, uint8 or uint16.

        raises ValueError  if a value is no integer or is not named in dataset.json
        """
        if raw.dtype.kind not in "iub":
            whole = np.rint(raw)
            if not np.all(np.abs(raw - whole) < 1e-3):
                raise ValueError(f"{where}: a label map must hold integers, found "
                                 f"{float(raw.flat[np.argmax(np.abs(raw - whole) >= 1e-3)])!r}")
            raw = whole.astype(np.int64)
        low, high = int(raw.min()), int(raw.max())
        if low < 0 or high > 65535:
            raise ValueError(f"{where}: label values must lie in 0..65535, found {low}..{high}")
        table = np.full(high + 1, -1, np.int32)
        table[[v for v in self.known if v <= high]] = 0
        for row, value in enumerate(self.values):
            if value <= high:
                table[value] = row
        if (table < 0).any():
            seen = np.flatnonzero(np.bincount(raw.ravel(), minlength=high + 1))
            unknown = [int(v) for v in seen if table[v] < 0]
            if unknown:
                raise ValueError(f"{where}: label values {unknown[:5]} are not named in "
                                 "dataset.json; name them there or remove them from the map")
        return table.astype(np.uint8 if len(self.regions) <= 256 else np.uint16)[raw]


def label_map(labels: dict, classes: tuple[Class, ...], where: str = "dataset.json") -> LabelMap:
    """What `labels` of a dataset.json means, in three spellings of the same thing:

    nnU-Net {"liver": 1}, nnU-Net's regions {"kidney": [1, 2, 3]} and MSD {"1": "liver"}.
    A child lies in its parent ("liver": 1, "liver tumor": 2 -> a tumour voxel is liver too).

    raises ValueError  if the table is malformed or no name matches a class
    """
    if not isinstance(labels, dict):
        raise ValueError(f'{where}: "labels" must be a table of names and values')
    msd = all(re.fullmatch(r"\d+", str(k)) for k in labels)
    named = [(str(b), [a]) if msd else (a, b if isinstance(b, list) else [b])
             for a, b in labels.items()]
    try:
        named = [(name, [int(str(v)) for v in values]) for name, values in named]
    except ValueError:
        raise ValueError(f"{where}: label values must be integers") from None
    if any(not 0 <= v <= 65535 for _, values in named for v in values):
        raise ValueError(f"{where}: label values must lie in 0..65535")

    K, index = len(classes), {c.name: k for k, c in enumerate(classes)}
    annotated = np.zeros(K, bool)
    sure: dict[int, set[int]] = {}                # raw value -> classes it belongs to
    open_: dict[int, set[tuple[int, int]]] = {}   # raw value -> (right, left): one of the two
    unmatched = []
    for name, values in named:
        if name.lower() == "background":
            continue
        ks = match(name, classes)
        if not ks:
            unmatched.append(name)
        annotated[list(ks)] = True
        for v in values:
            if v == 0 and ks:
                raise ValueError(f"{where}: {name!r} has value 0, which is background")
            if len(ks) == 1:
                sure.setdefault(v, set()).add(ks[0])
            elif ks:
                open_.setdefault(v, set()).add(ks)
    for v in sorted(set(sure) | set(open_)):      # a child belongs to its parents as well
        todo = list(sure.get(v, ()))
        while todo:
            parents = [index[p] for p in classes[todo.pop()].parents]
            if len(parents) == 1 and parents[0] not in sure[v]:
                sure[v].add(parents[0])
                todo.append(parents[0])
            elif len(parents) == 2 and not sure[v] & set(parents):
                open_.setdefault(v, set()).add((parents[0], parents[1]))
    if not annotated.any():
        raise ValueError(f"{where}: none of {[n for n, _ in named][:8]} is a class here; "
                         "see `python labels.py`, or pass a class table with --classes")

    values = [0, *sorted(set(sure) | set(open_))]
    V = len(values)
    regions = np.zeros((2 * V, K), bool)
    pairs: dict[tuple[int, int], list[int]] = {}
    for row, v in enumerate(values):
        for k in sure.get(v, ()):
            regions[[row, row + V], k] = True
        for right, left in open_.get(v, ()):
            regions[row, right] = regions[row + V, left] = True
            pairs.setdefault((right, left), []).append(row)
    known = {0, *(v for _, vs in named for v in vs)}
    return LabelMap(values, known, regions, annotated, pairs, unmatched)


def split_sides(rows: np.ndarray, lm: LabelMap, midline: float) -> np.ndarray:
    """Tell left from right where the dataset does not: rows v on the left become v + V.

    rows     (D, H, W)  row numbers, axis 0 growing towards the patient's right (RAS+)
    midline  voxels     position of the body's mid-sagittal plane on axis 0
    returns  (D, H, W)  a new map. A piece (26-connected, organ with its lesions) goes to the side
                        whose labelled organ it touches; else, with 80 % of it on one side of the
                        plane, to that side as a whole; else it is cut at the plane.
    """
    V = len(lm.values)
    out = rows.copy()
    for (right, left), todo in lm.pairs.items():
        mask = np.isin(rows, todo)
        pieces, n = ndimage.label(mask, np.ones((3, 3, 3)))
        fixed = [np.isin(rows, [r for r in range(V) if r not in todo and lm.regions[r, k]])
                 for k in (right, left)]
        on_left = np.arange(rows.shape[0])[:, None, None] < midline
        for i, box in enumerate(ndimage.find_objects(pieces), 1):
            box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)
            piece = pieces[box] == i
            rim = ndimage.binary_dilation(piece, np.ones((3, 3, 3)))
            touch_r, touch_l = ((f[box] & rim).sum() for f in fixed)
            side = np.broadcast_to(on_left[box[0]], piece.shape)
            share = side[piece].mean()
            if touch_r != touch_l:
                side = np.full_like(piece, touch_l > touch_r)
            elif max(share, 1 - share) >= 0.8:
                side = np.full_like(piece, share > 0.5)
            out[box][piece & side] = rows[box][piece & side] + V
    return out


# ---- public datasets ---------------------------------------------------------------------------
def _in_order(names: str) -> dict:
    """ "liver, -, spleen" -> {"liver": 1, "spleen": 3}"""
    return {n: i for i, n in enumerate(names.split(", "), 1) if n != "-"}


_BTCV = ("spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, aorta, "
         "postcava, portal vein and splenic vein, pancreas, right adrenal gland, left adrenal "
         "gland, duodenum")
_NNUNET, _MSD = ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"), ("imagesTr/{}.nii.gz",
                                                                     "labelsTr/{}.nii.gz")
# name: (labels, image pattern, label pattern); the raw values are those of the release's table
PUBLIC = {
    "btcv": (_in_order(_BTCV), "img/img{}.nii.gz", "label/label{}.nii.gz"),
    "lits": ({"liver": [1, 2], "liver tumor": 2}, "volume-{}.nii", "segmentation-{}.nii"),
    "kits": ({"kidney": [1, 2, 3], "kidney tumor": 2, "kidney cyst": 3},
             "{}/imaging.nii.gz", "{}/segmentation.nii.gz"),
    "word": (_in_order("liver, spleen, left kidney, right kidney, stomach, gallbladder, esophagus, "
                       "pancreas, duodenum, colon, intestine, adrenal gland, rectum, bladder, left "
                       "head of femur, right head of femur"), *_MSD),
    "abdomenct-1k": (_in_order("liver, kidney, spleen, pancreas"),
                     "Images/{}_0000.nii.gz", "Masks/{}.nii.gz"),
    "amos": (_in_order("spleen, right kidney, left kidney, gallbladder, esophagus, liver, stomach, "
                       "aorta, postcava, pancreas, right adrenal gland, left adrenal gland, "
                       "duodenum, bladder, prostate"), *_MSD),
    "ct-org": (_in_order("liver, bladder, lung, kidney, bone, brain"),
               "volume-{}.nii.gz", "labels-{}.nii.gz"),
    "abdomenct-12organ": (_in_order("liver, kidney, spleen, pancreas, aorta, postcava, stomach, "
                                    "gallbladder, esophagus, right adrenal gland, left adrenal "
                                    "gland, celiac trunk"), *_NNUNET),
    "msd-liver": ({"liver": [1, 2], "liver tumor": 2}, *_MSD),
    "msd-lung": ({"lung tumor": 1}, *_MSD),
    "msd-pancreas": ({"pancreas": [1, 2], "pancreas tumor": 2}, *_MSD),
    "msd-hepaticvessel": ({"hepatic vessel": 1, "hepatic vessel tumor": 2}, *_MSD),
    "msd-spleen": ({"spleen": 1}, *_MSD), "msd-colon": ({"colon tumor": 1}, *_MSD),
    "totalsegmentator": ({}, "{}/ct.nii.gz", "{}/labels.nii.gz"),
}
_DICOM = ("pancreas-ct", "chaos", "3d-ircadb")


def public_json(name: str, folder: Path | None = None) -> dict:
    """The dataset.json of a public dataset; with its folder also the pairs of files in it.

    TotalSegmentator's masks, one file a structure, are first merged into CASE/labels.nii.gz.
    raises ValueError  for an unknown dataset, one that is not NIfTI, or no pair of files
    """
    name = name.lower()
    if name in _DICOM:
        raise ValueError(f"{name} is not NIfTI as distributed; convert it first (`dcm2niix -z y -f "
                         "%i_0000 -o imagesTr DICOM_FOLDER`), put the label maps into labelsTr, "
                         "and write a dataset.json with their values")
    if name not in PUBLIC:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join([*PUBLIC, *_DICOM])}")
    names, image, label = PUBLIC[name]
    content = {"name": name, "channel_names": {"0": "CT"}, "labels": {"background": 0, **names}}
    if folder is None:
        return content
    start, end = image.split("{}")
    found = {str(p.relative_to(folder))[len(start):-len(end)]: p
             for p in sorted(folder.glob(image.replace("{}", "*")))}
    if name == "totalsegmentator":
        content["labels"] |= _merge_masks(folder, list(found))
    if name == "amos":
        found = {k: p for k, p in found.items() if int(k.split("_")[-1]) <= 500}   # the rest is MR
    content["training"] = [{"image": image.replace("{}", k), "label": label.replace("{}", k)}
                           for k in found if (folder / label.replace("{}", k)).is_file()]
    if not content["training"]:
        raise ValueError(f"{folder}: no pair {image} and {label} in it")
    if name == "btcv":
        content["annotated"] = {f"img{k}": [_BTCV.split(", ")[i - 1] for i in
                                            (1, 3, 4, 5, 6, 7, 11, 14)]
                                for k in found if int(k) >= 60}
    return content


def _merge_masks(folder: Path, cases: list[str]) -> dict:
    """CASE/segmentations/STRUCTURE.nii.gz -> CASE/labels.nii.gz; returns {structure: value}."""
    import nibabel as nib
    names = sorted({p.name.removesuffix(".nii.gz") for c in cases
                    for p in (folder / c / "segmentations").glob("*.nii.gz")
                    if match(p.name.removesuffix(".nii.gz"))})
    for c in cases:
        img, out = nib.load(folder / c / "ct.nii.gz"), None
        for value, n in enumerate(names, 1):
            file = folder / c / "segmentations" / f"{n}.nii.gz"
            if file.is_file():
                mask = np.asarray(nib.load(file).dataobj) > 0
                out = np.zeros(mask.shape, np.uint8) if out is None else out
                out[mask] = value
        if out is not None:
            part = folder / c / "labels.part.nii.gz"
            nib.save(nib.Nifti1Image(out, img.affine), part)
            part.replace(folder / c / "labels.nii.gz")
    return {n: value for value, n in enumerate(names, 1)}


def run(main, argv=None) -> int:
    """Run a command: what a user can cause ends in one line and exit status 2, no traceback."""
    try:
        return main(argv) or 0
    except (ValueError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def main(argv=None) -> int:
    ap = argparse.ArgumentParser(description="Print the class table, or prepare a public dataset.")
    ap.add_argument("dataset", nargs="?", help=f"print its dataset.json: {', '.join(PUBLIC)}")
    ap.add_argument("folder", nargs="?", type=Path, help="write it here, with the pairs of files; "
                    "touches nothing else (totalsegmentator: and one merged map per case)")
    ap.add_argument("--classes", metavar="FILE", help="a class table of your own (JSON)")
    ap.add_argument("--prompt-template", default="V3", help="V1, V2, V3 or a text with {}")
    args = ap.parse_args(argv)
    if args.dataset:
        text = json.dumps(public_json(args.dataset, args.folder), indent=1) + "\n"
        if args.folder is None:
            print(text, end="")
        else:
            part = args.folder / ".dataset.json.part"
            part.write_text(text)
            part.replace(args.folder / "dataset.json")
            print(f"written: {args.folder / 'dataset.json'}")
        return 0
    classes = load_classes(args.classes)
    print(f"{'value':>5}  {'name':29} {'parents':25} prompt")
    for i, c in enumerate(classes, 1):
        print(f"{i:5}  {c.name:29} {', '.join(c.parents) or '-':25} "
              f"{c.sentence(args.prompt_template)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
