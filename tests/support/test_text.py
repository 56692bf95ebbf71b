"""Other text for a trained network: what is compared, what is refused, files of text embeddings,
and asking a trained model for a class in other words."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import segment_with, untrained

import clip_text
import data
import infer
import labels
import train
from support import class_tables, results, transfer


# ---- files of text embeddings --------------------------------------------------------------------
def test_a_file_of_text_embeddings_finds_classes_by_name_and_a_tensor_holds_them_in_order(tmp_path):
    path = tmp_path / "text.pt"
    torch.save(torch.arange(6).view(3, 2), path)
    w = clip_text.read_embeddings(path, ["x", "y", "z"])
    assert w.tolist() == [[0, 1], [2, 3], [4, 5]] and w.dtype == torch.float32
    transfer.save_text(path, ["a", "b", "c"], torch.arange(6.).view(3, 2))
    assert clip_text.read_embeddings(path, ["c", "a"]).tolist() == [[4, 5], [0, 1]]
    with pytest.raises(ValueError, match=r"text.pt: no text embedding of \['d'\].*'a', 'b', 'c'"):
        clip_text.read_embeddings(path, ["a", "d"])


def test_a_file_of_text_embeddings_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "text.pt"
    path.write_bytes(b"the old file")

    def full(content, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="text.pt: .*No space left"):
        transfer.save_text(path, ["a"], torch.ones(1, 2))
    assert path.read_bytes() == b"the old file" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content, words", [
    (torch.ones(3, 2), r"expected 2 text embeddings \(2, E\), got \(3, 2\)"),
    (torch.ones(2), r"got \(2,\)"),
    ({"w": torch.ones(2, 2), "names": ["x"]}, r"expected 1 text embeddings"),
    ({"a": 1}, "one tensor"), ([1], "one tensor"),
])
def test_a_file_without_text_embeddings_is_named_in_one_line(tmp_path, content, words):
    torch.save(content, tmp_path / "text.pt")
    with pytest.raises(ValueError, match=f"text.pt: .*{words}") as e:
        clip_text.read_embeddings(tmp_path / "text.pt", ["x", "y"])
    assert "\n" not in str(e.value)


# ---- what may be mixed ---------------------------------------------------------------------------
W = torch.tensor([[3., 4., 0.], [4., 3., 0.]])         # of "a" and "b": norm 5, cosine 24/25


def note(names, w, trained=W):
    text = transfer.TrainedText("m.pt", ["a", "b"][:len(trained)], trained, [])
    return transfer.check_text(text, names, w)


def test_other_words_are_a_note_that_names_the_cosine():
    """Of a, (3, 4) and (4, 3): cosine 24 / 25."""
    line = note(["a", "b"], W[[1, 1]])
    assert "that of 'a' differs most (cosine 0.96)" in line and len(line.splitlines()) == 1
    assert "differs most" in note(["a", "b"], W * 1.1)                 # only the norms
    assert "cannot be compared" in note(["c"], W[:1])
    assert note(["b", "c"], W[[1, 0]]) == ""
    assert note(["a", "b"], W + torch.tensor([0., 0., 0.04])) == ""    # rounding: 0.04 of 5


@pytest.mark.parametrize("trained, given, words", [
    (W, torch.eye(2, 4), "of width 3, now they have width 4"),
    (W, W.roll(1, 1), "'a' has a cosine of 0.48"),                     # (0, 3, 4): 12 / 25
    (W, -W, "'a' has a cosine of -1.00"),
    (W, W * 2, "2.00 times its norm"),
    (W, W * 0, "a cosine of 0.00"),
    (W, W * torch.nan, "a cosine of nan"),
    (torch.eye(2, 3), torch.eye(3)[[0, 2]], "'b' has a cosine of 0.00"),
    (torch.eye(3)[[2, 1]] * 5, W, "'a' has a cosine of 0.00"),         # one-hot, CLIP
])
def test_text_embeddings_of_different_spaces_are_refused_in_one_line(trained, given, words):
    with pytest.raises(ValueError, match=f"^m.pt: .*{words}") as e:
        note(["a", "b"], given, trained)
    assert "\n" not in str(e.value)


# ---- CLIP, replaced by a table -------------------------------------------------------------------
CLIP_W = torch.tensor([[3., 4., 1.], [4., 3., 1.], [4., 4., 0.]])
OTHER = torch.tensor([3., 4., 1.5])                    # of any prompt that is not in the table
CLASSES = class_tables.make_classes(["Liver", "Spleen", "Colon"])            # of runs.untrained
V3 = [c.sentence(clip_text.TEMPLATE) for c in CLASSES]
SPLEEN, HEART = "A computerized tomography of a spleen", "A CT of a heart"


@pytest.fixture
def clip(monkeypatch):
    """encode_classes knows the prompts of the three classes; the prompts that it was asked for."""
    asked, known = [], dict(zip(V3, CLIP_W, strict=True))

    def encode(prompts, template, weights=None):
        asked.extend(prompts)
        return torch.stack([known.get(prompt, OTHER) for prompt in prompts])
    monkeypatch.setattr(clip_text, "encode_classes", encode)
    return asked


@pytest.fixture
def no_clip(monkeypatch):
    monkeypatch.setattr(clip_text, "encode_classes", None)


def trained_with(folder, w, **more) -> str:
    """The path of a checkpoint of the three classes, of which Liver and Spleen were trained."""
    return str(untrained(folder / "m.pt", w=w, **more))


def words_in(folder, prompts: dict) -> Path:
    (folder / "words.json").write_text(json.dumps(prompts))
    return folder / "words.json"


ONEHOT = torch.eye(transfer.ONEHOT_WIDTH)[[2, 1, 0]] * transfer.ONEHOT_NORM
OTHER_TEXT = [                                         # what a model of other text says
    (ONEHOT, "of width 512, now they have width 3"),
    (torch.eye(3)[[2, 1, 0]] * 8.8, "the text embedding of 'Liver' has a cosine of 0.20"),
    (-CLIP_W, "has a cosine of -1.00"),
]


def test_the_prompts_of_a_checkpoint_are_recorded_or_those_of_the_release():
    text = transfer.trained_text("m.pt", CLIP_W, {"prompts": ["x", "y", "z"]}, CLASSES)
    assert text.prompts == ["x", "y", "z"]
    for content in ({}, {"prompts": []}):
        assert transfer.trained_text("m.pt", CLIP_W, content, CLASSES).prompts == V3


# ---- train.py --init and --extend ----------------------------------------------------------------
def task(tmp_path, start, names, **how):
    (tmp_path / "new.json").write_text(json.dumps(names))
    return train.load_task(train.Config(device="cpu", classes=str(tmp_path / "new.json"), patch=64,
                                        **how, **start))


@pytest.mark.parametrize("flag", ["init", "extend"])
@pytest.mark.parametrize("w, words", OTHER_TEXT)
def test_a_network_is_not_given_text_of_another_kind(tmp_path, clip, w, words, flag):
    """Also where no class is in both: one of the network's own prompts is encoded."""
    start = {flag: trained_with(tmp_path, w)}
    with pytest.raises(ValueError, match=f"m.pt: .*{words}"):
        task(tmp_path, start, ["Aorta"], text="clip")


def test_new_classes_get_prompts_and_old_ones_keep_theirs(tmp_path, clip, capsys):
    start = trained_with(tmp_path, CLIP_W, prompts=V3)
    given = task(tmp_path, {"init": start}, ["Liver", "Aorta"], text="clip", prompt_template="V1")
    assert given.prompts == ["A photo of a Liver.", "A photo of a Arota."]
    assert given.w.tolist() == [OTHER.tolist()] * 2
    assert "that of 'Liver' differs most" in capsys.readouterr().out
    given = task(tmp_path, {"extend": start}, ["Liver", "Aorta"], text="clip",
                 prompt_template="V1")
    assert given.prompts == [*V3, "A photo of a Arota."]
    assert torch.equal(given.w, torch.cat([CLIP_W, OTHER[None]]))
    assert "note" not in capsys.readouterr().out


def test_a_file_for_init_is_compared_by_the_classes_of_both(tmp_path, no_clip, capsys):
    start = {"init": trained_with(tmp_path, CLIP_W)}
    file = tmp_path / "text.pt"
    torch.save(CLIP_W[[1, 2]], file)
    given = task(tmp_path, start, ["Spleen", "Aorta"], text=str(file))
    assert torch.equal(given.w, CLIP_W[[1, 2]]) and given.prompts == []
    assert "note" not in capsys.readouterr().out
    task(tmp_path, start, ["Heart", "Aorta"], text=str(file))
    assert "cannot be compared" in capsys.readouterr().out
    torch.save(-CLIP_W[[1, 2]], file)
    with pytest.raises(ValueError, match="'Spleen' has a cosine of -1.00"):
        task(tmp_path, start, ["Spleen", "Aorta"], text=str(file))


# ---- infer.py --text -----------------------------------------------------------------------------
def job(checkpoint, *flags):
    args = infer.parse(["--checkpoint", checkpoint, "--input", "x", "--output", "y", "--device",
                        "cpu", *map(str, flags)])
    infer.check_flags(args)
    return infer.load_job(args)


def test_a_class_is_asked_for_by_another_prompt(tmp_path, clip, capsys):
    """Liver gets the embedding of its prompt, Spleen keeps its own; the record says so."""
    path = trained_with(tmp_path, CLIP_W)
    given = job(path, "--text", words_in(tmp_path, {"liver": "The hepatic organ"}))
    assert given.w.tolist() == [[3, 4, 1.5], [4, 3, 1]]
    assert given.settings["text"]["prompts"] == {"Liver": "The hepatic organ"}
    assert Path(given.settings["text"]["file"]["path"]) == tmp_path / "words.json"
    assert "'Liver' differs most (cosine 1.00); results may be" in capsys.readouterr().out
    plain = job(path)
    assert torch.equal(plain.w, CLIP_W[:2]) and "text" not in plain.settings


def test_a_file_of_embeddings_replaces_those_of_all_classes(tmp_path, no_clip, capsys):
    torch.save(CLIP_W * 1.1, tmp_path / "text.pt")
    given = job(trained_with(tmp_path, CLIP_W), "--text", tmp_path / "text.pt", "--classes",
                "spleen")
    assert torch.equal(given.w, CLIP_W[[1]] * 1.1)
    assert "results may be far worse" in capsys.readouterr().out


def test_a_one_hot_model_refuses_other_text(tmp_path, clip):
    path = trained_with(tmp_path, torch.eye(3)[[2, 1, 0]] * 8.8)
    torch.save(CLIP_W, tmp_path / "text.pt")
    for file in (words_in(tmp_path, {"Liver": "The hepatic organ"}), tmp_path / "text.pt"):
        with pytest.raises(ValueError, match="m.pt: the text embedding of 'Liver' has a cosine of"):
            job(path, "--text", file)


@pytest.mark.parametrize("content, words", [
    ("[1]", "expected a JSON object"), ("{", "not readable JSON"), ("{}", "expected prompts"),
    ('{"Liver": 3}', "Liver: a prompt is a text, got 3"), ('{"Heart": "A heart"}', "no class is"),
    ('{"Liver": " "}', "a prompt is a text"), ('{"Liver": "a", "liver": "b"}', "one prompt for"),
    ('{"kidney": "A CT of a kidney"}', "stands for Right Kidney and Left Kidney"),
])
def test_a_wrong_file_of_prompts_is_named(tmp_path, content, words):
    path = tmp_path / "words.json"
    path.write_text(content)
    classes = labels.CLASSES if "kidney" in content else CLASSES
    with pytest.raises(ValueError, match=f"words.json: .*{words}") as e:
        transfer.read_prompts(path, classes)
    assert "\n" not in str(e.value)


def test_a_class_of_an_extension_keeps_the_embedding_by_which_it_is_known(tmp_path, clip):
    trained = transfer.TrainedText("m.pt", [c.name for c in CLASSES], CLIP_W, V3)
    owner = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="'Colon' was added by --extend"):
        transfer.replace_text(trained, words_in(tmp_path, {"Colon": "The large bowel"}), CLASSES,
                              owner=owner)
    file = tmp_path / "text.pt"
    torch.save(CLIP_W * torch.tensor([[1.4], [1.], [1.]]), file)              # Colon's unchanged
    w, _ = transfer.replace_text(trained, file, CLASSES, owner=owner)
    assert torch.equal(w[1:], CLIP_W[1:]) and not torch.equal(w[0], CLIP_W[0])


def test_clip_weights_without_prompts_are_refused(tmp_path):
    for flags in ((), ("--text", "text.pt")):
        with pytest.raises(ValueError, match="--clip-weights encodes prompts"):
            job("m.pt", "--clip-weights", "m.pt", *flags)


# ---- infer.py --prompt ---------------------------------------------------------------------------
def test_a_prompt_is_a_class_of_its_own_after_those_of_the_checkpoint(tmp_path, clip, capsys):
    """Of (3, 4, 1.5), Liver's text (3, 4, 1) is the nearest: cosine 26.5 / sqrt(27.25 * 26), which
    is 0.996. The first prompt of training is encoded with it and compared."""
    path = trained_with(tmp_path, CLIP_W)
    given = job(path, "--prompt", f" {SPLEEN} ")
    assert clip == [SPLEEN, V3[0]]
    assert given.w.tolist() == [[3, 4, 1.5]] and given.indices == [3]
    assert [c.name for c in given.classes] == ["Liver", "Spleen", "Colon", SPLEEN]
    assert given.settings["prompts"] == [SPLEEN] and "clip_weights" not in given.settings
    assert f"prompt {SPLEEN!r}: of the texts of training, that of 'Liver' is the most similar " \
           "(cosine 0.996)\n" in capsys.readouterr().out
    other = job(path, "--prompt", SPLEEN, "--clip-weights", path)
    assert other.settings["clip_weights"]["path"] == path              # other weights, other result


@pytest.mark.parametrize("embedding, line", [
    ([4., 4, 0], "cosine 0.971)\n"), ([4., 8, 0], "cosine 0.965)\n"),
    ([0., 4, 0], "cosine 0.784); what is found may mean nothing\n")])
def test_a_prompt_far_from_every_trained_text_is_doubted(tmp_path, monkeypatch, capsys, embedding,
                                                         line):
    """Colon's text is (4, 4, 0), but Colon was not trained; Liver's is (3, 4, 1). The cosines are
    28 / sqrt(32 * 26), 44 / sqrt(80 * 26) and 16 / sqrt(16 * 26)."""
    w = torch.tensor([embedding, CLIP_W[0].tolist()])
    monkeypatch.setattr(clip_text, "encode_classes", lambda *args, **more: w)
    job(trained_with(tmp_path, CLIP_W), "--prompt", SPLEEN)
    assert line in capsys.readouterr().out


def test_prompts_stand_beside_classes_and_other_words_for_them(tmp_path, clip):
    given = job(trained_with(tmp_path, CLIP_W), "--classes", "spleen", "--prompt", SPLEEN,
                "--prompt", HEART, "--text", words_in(tmp_path, {"Spleen": "The lien"}))
    assert given.indices == [1, 3, 4] and given.settings.keys() >= {"text", "prompts"}
    assert given.w.tolist() == [OTHER.tolist()] * 3


@pytest.mark.parametrize("prompts, words", [
    (["spleen"], "'Spleen' is a class of the checkpoint; ask for it with --classes"),
    ([SPLEEN, SPLEEN], "is given twice"),
    ([" "], "is empty; write what is to be segmented"),
])
def test_a_prompt_that_names_nothing_new_is_refused(tmp_path, no_clip, prompts, words):
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    with pytest.raises(ValueError, match=words):
        job(trained_with(tmp_path, CLIP_W), *flags)


@pytest.mark.parametrize("w, words", OTHER_TEXT)
def test_a_prompt_for_a_model_of_other_texts_is_refused(tmp_path, clip, w, words):
    """A model of one-hot text, of other CLIP weights, and of another width."""
    with pytest.raises(ValueError, match=f"m.pt: .*{words}"):
        job(trained_with(tmp_path, w), "--prompt", SPLEEN)


def test_the_prompt_of_a_class_finds_what_the_class_finds(tmp_path, tiny, monkeypatch, capsys):
    """The result is named after the prompt, in the JSON, in the file of the mask and in ITK-SNAP's
    label file; its voxels are those of Liver, before post-processing. The same words keep a result,
    other words make it again."""
    prompt = 'The organ called "liver"'
    monkeypatch.setattr(clip_text, "encode_classes", lambda prompts, *_, **__: CLIP_W[:1].expand(
        len(prompts), -1))
    path = trained_with(tmp_path, CLIP_W)
    content = torch.load(path, weights_only=True)
    content["model"]["controller.out.bias"][-1] = 0         # an untrained head finds nothing
    torch.save(content, path)
    scan, out = tiny / "raw/Dataset901_Liver/imagesTr/c0_0000.nii.gz", tmp_path / "out"
    flags = ["--classes", "liver", "--masks", "--no-postprocess", "--overlap", "0"]
    assert segment_with(path, scan, out, *flags, "--prompt", prompt) == 0
    liver, asked = json.loads((out / "c0.json").read_text())["classes"]
    assert asked == {"value": 4, "name": prompt, "volume_ml": liver["volume_ml"]}
    assert asked["volume_ml"] > 0
    first, second = (data.load_volume(out / "c0" / file).array
                     for file in ("liver.nii.gz", 'the_organ_called_"liver".nii.gz'))
    assert np.array_equal(first, second)
    assert '"The organ called \'liver\'"' in (out / "itksnap_labels.txt").read_text()
    for words in ("The hepatic organ", "The liver"):
        file = words_in(tmp_path, {"Liver": words})
        for said in ("1 scan(s)", "1 there already"):
            capsys.readouterr()
            assert segment_with(path, scan, out, *flags, "--text", str(file)) == 0
            assert said in capsys.readouterr().out


def test_a_prompt_too_long_for_a_file_is_refused_before_anything_is_computed():
    assert results.result_files("c0", ["x" * 193], masks=True)[-1] == f"c0/{'x' * 193}.nii.gz"
    with pytest.raises(ValueError, match="too long for the name of a file; shorten the name"):
        results.result_files("c0", ["x" * 194], masks=True)
    assert results.result_files("c0", ["x" * 194]) == ["c0.nii.gz", "c0.json"]
