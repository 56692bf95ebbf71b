"""Where text embeddings come from: what checkpoints and files record, what may be mixed, and asking
a trained model for a class in other words."""
import hashlib
import json
from pathlib import Path

import pytest
import torch

import clip_text
import data
import infer
import labels
import train
from clip_text import Rows
from model import FORMAT, build_model

CLIP = {"kind": "clip", "weights": "w1", "template": "A {}"}
OTHER_TEMPLATE = {"kind": "clip", "weights": "w1", "template": "B {}"}
OTHER_WEIGHTS = {"kind": "clip", "weights": "w2", "template": "A {}"}
FILE = {"kind": "file", "name": "rows.pt", "sha256": "0"}
ONEHOT = {"kind": "onehot"}
W = torch.tensor([[3., 4., 0.], [4., 3., 0.]])         # of "a" and "b": norm 5, cosine 24/25
AB = ["a", "b"]


def note(trained, given):
    return clip_text.check_origin("m.pt", trained, given, "do this")


# ---- what is recorded ----------------------------------------------------------------------------
@pytest.mark.parametrize("content, origin", [
    ({}, {"kind": "clip", "weights": "40d365715913c9da", "template": clip_text.TEMPLATE}),
    ({"text": FILE, "config": {"text": "onehot"}}, FILE),
    ({"config": {"text": "onehot"}}, ONEHOT),
    ({"config": {"text": "clip", "prompt_template": "V1", "clip_weights": ""}},
     {"kind": "clip", "weights": "40d365715913c9da", "template": "V1"}),
    ({"config": {"text": "clip", "prompt_template": "V1", "clip_weights": "x.pt"}},
     {"kind": "clip", "template": "V1"}),
    ({"config": {"text": "some/rows.pt"}}, {"kind": "file", "name": "rows.pt"}),
    ({"config": {}}, {}),
])
def test_released_and_earlier_checkpoints_have_an_origin_as_far_as_it_is_known(content, origin):
    assert clip_text.origin_of_checkpoint(content) == origin


def test_a_file_of_text_embeddings_carries_names_and_origin(tmp_path):
    path = tmp_path / "rows.pt"
    clip_text.save_rows(Rows(["a", "b", "c"], torch.arange(6.).view(3, 2), CLIP), path)
    rows = clip_text.read_rows(path, ["c", "a"])
    assert rows.w.tolist() == [[4, 5], [0, 1]] and rows.origin == CLIP and rows.names == ["c", "a"]
    assert torch.equal(clip_text.read_embeddings(path), torch.arange(6.).view(3, 2))
    with pytest.raises(ValueError, match=r"rows.pt: no text embedding of \['d'\].*'a', 'b', 'c'"):
        clip_text.read_rows(path, ["a", "d"])
    for names, text in ((["a"], {}), (3, {}), (["a", "b"], "clip")):
        torch.save({"w": torch.ones(2, 2), "names": names, "text": text}, path)
        with pytest.raises(ValueError, match="rows.pt: not a whole file of text embeddings: 2 of"):
            clip_text.read_rows(path, ["a"])


def test_a_plain_tensor_is_a_file_without_an_origin_of_its_own(tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(torch.arange(6.).view(3, 2), path)
    rows = clip_text.read_rows(path, ["x", "y", "z"])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows.origin == {"kind": "file", "name": "plain.pth", "sha256": digest}
    assert rows.w[2].tolist() == [4, 5]
    with pytest.raises(ValueError, match="3 text embeddings for 2 classes"):
        clip_text.read_rows(path, ["x", "y"])


def test_the_command_records_the_template_and_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_text, "encode_classes", lambda *a, **k: W.clone())
    path = tmp_path / "rows.pt"
    assert clip_text.main(["--classes", "liver", "spleen", "--template", "V1", "--out",
                           str(path)]) == 0
    rows = clip_text.read_rows(path, ["Spleen", "Liver"])
    assert torch.equal(rows.w, W[[1, 0]])
    assert rows.origin == clip_text.clip_origin("A photo of a {}.")


# ---- what may be mixed ---------------------------------------------------------------------------
def test_equal_text_embeddings_need_no_note_whatever_is_recorded():
    for origin in (CLIP, OTHER_TEMPLATE, FILE, {}):
        assert note(Rows(AB, W, CLIP), Rows(["b", "c"], W[[1, 0]], origin)) == ""


def test_another_template_is_a_note_that_names_both_and_the_cosine():
    """Of a, (3, 4) and (4, 3): cosine 24 / 25."""
    line = note(Rows(AB, W, CLIP), Rows(AB, W[[1, 1]], OTHER_TEMPLATE))
    assert "'A {}'" in line and "'B {}'" in line and len(line.splitlines()) == 1
    assert "1 of 2 classes" in line and "'a' the most different (cosine 0.96)" in line


@pytest.mark.parametrize("trained, given, words", [
    (Rows(AB, torch.eye(2, 3) * 8.8, {}), Rows(AB, W, CLIP), "one-hot vectors, now there are C"),
    (Rows(AB, -torch.eye(2, 3), {}), Rows(["c"], W[:1], FILE), "one-hot vectors, now there are t"),
    (Rows(AB, W, CLIP), Rows(["c"], torch.eye(1, 3), ONEHOT), "now there are one-hot vectors"),
    (Rows(AB, W, CLIP), Rows(AB, torch.eye(2, 3), FILE), "now there are one-hot vectors"),
    (Rows(AB, W, CLIP), Rows(AB, W, OTHER_WEIGHTS), "of other weights"),
    (Rows(AB, W, CLIP), Rows([], W[:0], OTHER_WEIGHTS), "of other weights"),
    (Rows(AB, W, CLIP), Rows([], W[:0], ONEHOT), "one-hot"),
    (Rows(AB, W, CLIP), Rows(AB, torch.ones(2, 4), FILE), "of width 4 instead of 3"),
    (Rows(AB, W, FILE), Rows(AB, W.roll(1, 1), {}), "'a' have cosine 0.48"),     # (0, 3, 4): 12/25
    (Rows(AB, W, FILE), Rows(AB, W * 2, FILE), "norms in the ratio 2.00"),
    (Rows(AB, W, FILE), Rows(AB, W * 0, FILE), "cosine 0.00"),
    (Rows(AB, W, FILE), Rows(AB, W * torch.nan, FILE), "cosine nan"),
    (Rows(AB, torch.eye(2), ONEHOT), Rows(AB, torch.eye(2)[[1, 0]], FILE), "cosine 0.00"),
])
def test_text_embeddings_of_different_spaces_are_refused_in_one_line(trained, given, words):
    with pytest.raises(ValueError) as e:
        note(trained, given)
    assert words in str(e.value) and str(e.value).startswith("m.pt: was trained with")
    assert str(e.value).endswith("; do this") and len(str(e.value).splitlines()) == 1


def test_without_a_common_class_the_origin_decides_or_is_said_to_be_unknown():
    assert note(Rows(AB, W, CLIP), Rows(["c"], W[:1], OTHER_TEMPLATE)) == ""
    assert note(Rows(AB, torch.eye(2), ONEHOT), Rows(["c"], -torch.eye(2)[:1], ONEHOT)) == ""
    assert "cannot be compared" in note(Rows(AB, W, CLIP), Rows(["c"], W[:1], FILE))


# ---- train.py --init and --extend ----------------------------------------------------------------
CLASSES = [{"name": "Liver"}, {"name": "Spleen"}, {"name": "Colon"}]
CLIP_ROWS = torch.tensor([[3., 4., 0., 1.], [4., 3., 1., 0.], [4., 4., 0., 0.]])
VIT_B_32 = {"kind": "clip", "weights": "40d365715913c9da", "template": clip_text.TEMPLATE}


def write_checkpoint(path, w, **more) -> str:
    torch.manual_seed(0)
    spec = {"backbone": "unet", "width": 8, "text_dim": w.shape[1]}
    torch.save({"format": FORMAT, "spec": spec, "model": build_model(spec).state_dict(), "w": w,
                "classes": CLASSES, "trained": ["Liver", "Spleen"],
                "config": {"spacing_mm": 4.0, "patch": 64}, **more}, path)
    return str(path)


@pytest.fixture
def no_clip(monkeypatch):
    def encode(*args, **kwargs):
        raise AssertionError("CLIP was asked for")
    monkeypatch.setattr(clip_text, "encode_classes", encode)


@pytest.fixture
def spoken(monkeypatch):
    """encode_classes gives the rows of CLIP_ROWS in turn; the prompts that it was asked for."""
    asked = []

    def encode(prompts, template, weights=None):
        asked.extend(prompts)
        return CLIP_ROWS[torch.arange(len(prompts)) % 3] + torch.tensor([0., 0., 0., 0.5])
    monkeypatch.setattr(clip_text, "encode_classes", encode)
    return asked


@pytest.mark.parametrize("flag", ["init", "extend"])
@pytest.mark.parametrize("w, text, fitting", [
    (torch.eye(3, 4) * 8.8, "clip", "--text onehot"),
    (CLIP_ROWS, "onehot", "--text clip"),
])
def test_training_goes_on_with_text_of_the_same_origin_only(tmp_path, no_clip, w, text, fitting,
                                                            flag):
    """CLIP's weights are not downloaded only to be refused."""
    start = write_checkpoint(tmp_path / "m.pt", w, text=VIT_B_32 if text == "onehot" else ONEHOT)
    (tmp_path / "new.json").write_text('["Liver", "Aorta"]')
    cfg = train.Config(text=text, device="cpu", classes=str(tmp_path / "new.json"), patch=64,
                       **{flag: start})
    with pytest.raises(ValueError, match=f"m.pt: was trained with .*pass {fitting}"):
        train.load_task(cfg)


def test_init_tells_of_another_template_and_records_its_own(tmp_path, spoken, capsys):
    start = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    (tmp_path / "new.json").write_text('["Liver", "Aorta"]')
    cfg = train.Config(text="clip", prompt_template="V1", device="cpu", init=start, patch=64,
                       classes=str(tmp_path / "new.json"))
    task = train.load_task(cfg)
    assert task.text == {**VIT_B_32, "template": "A photo of a {}."}
    out = capsys.readouterr().out
    assert "A photo of a {}." in out and clip_text.TEMPLATE in out and "1 of 1 classes" in out
    extended = train.load_task(train.Config(
        text="clip", prompt_template="V1", device="cpu", extend=start, patch=64,
        classes=str(tmp_path / "new.json")))
    assert extended.text == VIT_B_32                  # of the old classes, which stay as they are
    assert torch.equal(extended.w[:3], CLIP_ROWS)


def test_a_file_for_init_is_compared_by_the_classes_of_both(tmp_path):
    start = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    rows = tmp_path / "rows.pt"
    (tmp_path / "classes.json").write_text('["Spleen", "Aorta"]')
    cfg = train.Config(text=str(rows), device="cpu", init=start, patch=64,
                       classes=str(tmp_path / "classes.json"))
    torch.save(CLIP_ROWS[[1, 2]], rows)
    assert train.load_task(cfg).text["name"] == "rows.pt"
    torch.save(-CLIP_ROWS[[1, 2]], rows)
    with pytest.raises(ValueError, match="'Spleen' have cosine -1.00"):
        train.load_task(cfg)


def test_a_checkpoint_says_where_its_text_comes_from(tmp_path, tiny_scans):
    rows = tmp_path / "rows.pt"
    clip_text.save_rows(Rows([c.name for c in labels.CLASSES], torch.eye(32, 40) + 1, CLIP), rows)
    cfg = train.Config(out=str(tmp_path / "run"), text=str(rows), patch=32, width=8, device="cpu")
    run = train.start_run(cfg, train.load_task(cfg), tiny_scans, [], ["Liver"])
    train.save(tmp_path / "last.pt", run, cfg)
    content = torch.load(tmp_path / "last.pt", weights_only=True)
    assert content["text"] == CLIP and content["w"][3, 3] == 2


# ---- infer.py --text -----------------------------------------------------------------------------
def job(checkpoint, *flags):
    args = infer.parse(["--checkpoint", str(checkpoint), "--input", "x", "--output", "y",
                        "--device", "cpu", *map(str, flags)])
    infer.check_flags(args)
    return infer.load_job(args)


def test_a_class_is_asked_for_by_another_prompt(tmp_path, spoken, capsys):
    """Liver gets the embedding of its prompt, Spleen keeps its own; the record says so."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    file = tmp_path / "words.json"
    file.write_text('{"liver": "The hepatic organ"}')
    given = job(path, "--text", file)
    assert spoken == ["The hepatic organ"]
    assert given.w.tolist() == [[3, 4, 0, 1.5], [4, 3, 1, 0]]
    assert given.settings["text"]["prompts"] == {"Liver": "The hepatic organ"}
    assert given.settings["text"]["origin"] == {**VIT_B_32, "template": ""}
    out = capsys.readouterr().out
    assert "1 of 1 classes" in out and "'Liver' the most different (cosine 1.00)" in out
    plain = job(path)
    assert torch.equal(plain.w, CLIP_ROWS[:2]) and "text" not in plain.settings


def test_a_file_of_embeddings_replaces_those_of_all_classes(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    torch.save(CLIP_ROWS * 1.1, tmp_path / "rows.pt")
    given = job(path, "--text", tmp_path / "rows.pt", "--classes", "spleen")
    assert torch.equal(given.w, CLIP_ROWS[[1]] * 1.1)
    assert given.settings["text"]["origin"]["name"] == "rows.pt"
    assert "3 of 3 classes have another one" in capsys.readouterr().out


def test_prompts_for_a_one_hot_model_are_refused_before_clip_is_needed(tmp_path, no_clip):
    path = write_checkpoint(tmp_path / "m.pt", torch.eye(3) * 8.8, config={
        "text": "onehot", "spacing_mm": 4.0, "patch": 64})
    (tmp_path / "words.json").write_text('{"Liver": "The hepatic organ"}')
    with pytest.raises(ValueError, match="one-hot vectors, now there are CLIP.*leave out --text"):
        job(path, "--text", tmp_path / "words.json")
    torch.save(CLIP_ROWS, tmp_path / "rows.pt")
    with pytest.raises(ValueError, match="one-hot vectors, now there are the text embeddings of"):
        job(path, "--text", tmp_path / "rows.pt")


@pytest.mark.parametrize("content, words", [
    ("[1]", "expected a JSON object"), ("{", "not readable JSON"), ("{}", "expected prompts"),
    ('{"Liver": 3}', "Liver: a prompt is a text, got 3"), ('{"Heart": "A heart"}', "no class is"),
    ('{"Liver": " "}', "a prompt is a text"), ('{"Liver": "a", "liver": "b"}', "one prompt for"),
])
def test_a_wrong_file_of_prompts_is_named(tmp_path, content, words):
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as e:
        infer.read_prompts(path, labels.make_classes(CLASSES))
    assert str(e.value).startswith(str(path)) and len(str(e.value).splitlines()) == 1


def test_a_prompt_for_both_sides_names_them(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"kidney": "A CT of a kidney"}')
    with pytest.raises(ValueError, match="stands for Right Kidney and Left Kidney"):
        infer.read_prompts(path, labels.CLASSES)


def test_a_class_of_an_extension_keeps_the_embedding_by_which_it_is_known(tmp_path, spoken):
    classes = labels.make_classes(CLASSES)
    trained = Rows([c.name for c in classes], CLIP_ROWS, VIT_B_32)
    args = infer.parse(["--checkpoint", "m.pt", "--input", "x", "--output", "y", "--text",
                        str(tmp_path / "words.json")])
    (tmp_path / "words.json").write_text('{"Colon": "The large bowel"}')
    with pytest.raises(ValueError, match="'Colon' was added by --extend"):
        infer.read_text(args, classes, trained, torch.tensor([0, 0, 1]))
    args.text = tmp_path / "rows.pt"
    torch.save(CLIP_ROWS * torch.tensor([[2.], [1.], [1.]]).sqrt(), args.text)   # Colon's unchanged
    w, _ = infer.read_text(args, classes, trained, torch.tensor([0, 0, 1]))
    assert torch.equal(w[1:], CLIP_ROWS[1:]) and not torch.equal(w[0], CLIP_ROWS[0])


def test_clip_weights_without_prompts_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS)
    for flags in ((), ("--text", "rows.pt")):
        with pytest.raises(ValueError, match="--clip-weights encodes prompts"):
            job(path, "--clip-weights", "m.pt", *flags)


def test_the_json_of_a_result_says_which_words_were_used(tmp_path, tiny, spoken, capsys):
    """A second run with the same words keeps the result, one with other words redoes it."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    scan = sorted((tiny / "raw/Dataset901_Liver/imagesTr").iterdir())[0]
    words, out = tmp_path / "words.json", tmp_path / "out"
    command = ["--checkpoint", path, "--input", str(scan), "--output", str(out), "--text",
               str(words), "--classes", "liver", "--device", "cpu", "--overlap", "0"]
    words.write_text('{"Liver": "The hepatic organ"}')
    assert labels.run(infer.main, command) == 0
    made_with = json.loads(next(out.glob("c0.json")).read_text())["made_with"]
    assert made_with["text"]["prompts"] == {"Liver": "The hepatic organ"}
    assert Path(made_with["text"]["file"]["path"]) == words.resolve()
    capsys.readouterr()
    assert labels.run(infer.main, command) == 0
    assert "1 there already" in capsys.readouterr().out
    words.write_text('{"Liver": "The liver"}')
    assert labels.run(infer.main, command) == 0
    assert "there already" not in capsys.readouterr().out


# ---- infer.py --prompt ---------------------------------------------------------------------------
SPLEEN = "A computerized tomography of a spleen"


def test_a_prompt_is_a_class_of_its_own_after_those_of_the_checkpoint(tmp_path, spoken, capsys):
    """Of (3, 4, 0, 1.5), Liver's text (3, 4, 0, 1) is the nearest: cosine 26.5 / sqrt(27.25 * 26),
    which is 0.996."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    given = job(path, "--prompt", f" {SPLEEN} ")
    assert spoken == [SPLEEN]
    assert given.w.tolist() == [[3, 4, 0, 1.5]] and given.indices == [3]
    assert [c.name for c in given.classes] == ["Liver", "Spleen", "Colon", SPLEEN]
    assert given.settings["prompts"] == {"prompts": [SPLEEN],
                                         "origin": {**VIT_B_32, "template": ""}}
    assert f"prompt {SPLEEN!r}: of the texts of training, that of 'Liver' is the most similar " \
           "(cosine 0.996)\n" in capsys.readouterr().out


def test_a_prompt_far_from_every_trained_text_is_doubted(tmp_path, monkeypatch, capsys):
    """Colon's text is that of the prompt, but Colon was not trained. Of (4, 4, 0, 0), Liver's
    (3, 4, 0, 1) has cosine 28 / sqrt(32 * 26) = 0.971, Spleen's the same; of (4, 8, 0, 0), Liver's
    44 / sqrt(80 * 26) = 0.965; of (0, 4, 0, 0), Liver's 16 / sqrt(16 * 26) = 0.784."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    for embedding, line in (([4., 4, 0, 0], "cosine 0.971)\n"), ([4., 8, 0, 0], "cosine 0.965)\n"),
                            ([0., 4, 0, 0], "cosine 0.784); what is found may mean nothing\n")):
        w = torch.tensor([embedding])
        monkeypatch.setattr(clip_text, "encode_classes", lambda *a, _w=w, **k: _w)
        job(path, "--prompt", SPLEEN)
        assert line in capsys.readouterr().out


def test_prompts_stand_beside_classes_and_other_words_for_them(tmp_path, spoken):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    (tmp_path / "words.json").write_text('{"Spleen": "The lien"}')
    given = job(path, "--classes", "spleen", "--prompt", SPLEEN, "--prompt", "A CT of a heart",
                "--text", tmp_path / "words.json")
    assert given.indices == [1, 3, 4]
    assert given.w.tolist() == [[3, 4, 0, 1.5], [3, 4, 0, 1.5], [4, 3, 1, 0.5]]


@pytest.mark.parametrize("prompts, words", [
    (["spleen"], "'Spleen' is a class of the checkpoint; ask for it with --classes"),
    ([SPLEEN, SPLEEN], "is given twice"),
    ([" "], "is empty; write what is to be segmented"),
])
def test_a_prompt_that_names_nothing_new_is_refused(tmp_path, no_clip, prompts, words):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    with pytest.raises(ValueError, match=words):
        job(path, *flags)


def test_a_prompt_for_a_model_of_other_texts_is_refused_before_clip_is_needed(tmp_path, no_clip):
    for w, text, words in ((torch.eye(3) * 8.8, ONEHOT, "one-hot vectors, now there are CLIP"),
                           (CLIP_ROWS, OTHER_WEIGHTS, "of other weights")):
        path = write_checkpoint(tmp_path / "m.pt", w, text=text)
        with pytest.raises(ValueError, match=f"{words}.*--prompt needs a checkpoint"):
            job(path, "--prompt", SPLEEN)


def test_missing_weights_are_named(tmp_path):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        job(path, "--prompt", SPLEEN, "--clip-weights", "none.pt")
    with pytest.raises(ValueError, match="words.json: a JSON file of prompts is for infer.py"):
        clip_text.read_rows("words.json", ["Liver"])


def test_a_prompt_unlike_every_text_of_training_is_refused(tmp_path, spoken):
    """Embeddings of unknown origin that point the other way are not of its space. The nearest to
    that of the prompt, (3, 4, 0, 1.5), is -(4, 3, 1, 0): -24 / sqrt(27.25 * 26) = -0.90."""
    path = write_checkpoint(tmp_path / "m.pt", -CLIP_ROWS, text=FILE)
    with pytest.raises(ValueError, match="m.pt: its text embeddings have a cosine .* -0.90"):
        job(path, "--prompt", SPLEEN)


def test_the_prompt_of_a_class_finds_what_the_class_finds(tmp_path, tiny, monkeypatch):
    """The result is named after the prompt, in the JSON, in the file of the mask and in ITK-SNAP's
    label file; its voxels are those of Liver, before post-processing."""
    prompt = 'The organ called "liver"'
    monkeypatch.setattr(clip_text, "encode_classes", lambda *args, **kwargs: CLIP_ROWS[:1])
    path = write_checkpoint(tmp_path / "m.pt", CLIP_ROWS, text=VIT_B_32)
    content = torch.load(path, weights_only=True)
    content["model"]["controller.out.bias"][-1] = 0         # an untrained head finds nothing
    torch.save(content, path)
    scan = sorted((tiny / "raw/Dataset901_Liver/imagesTr").iterdir())[0]
    out = tmp_path / "out"
    command = ["--checkpoint", path, "--input", str(scan), "--output", str(out), "--classes",
               "liver", "--prompt", prompt, "--masks", "--no-postprocess", "--device", "cpu",
               "--overlap", "0"]
    assert labels.run(infer.main, command) == 0
    liver, asked = json.loads((out / "c0.json").read_text())["classes"]
    assert asked == {"value": 4, "name": prompt, "volume_ml": liver["volume_ml"]}
    assert asked["volume_ml"] > 0
    masks = [data.load_volume(out / "c0" / file).array
             for file in ("liver.nii.gz", 'the_organ_called_"liver".nii.gz')]
    assert (masks[0] == masks[1]).all()
    assert '"The organ called \'liver\'"' in (out / "itksnap_labels.txt").read_text()


def test_a_prompt_too_long_for_a_file_is_refused_before_anything_is_computed():
    assert infer.result_files("c0", ["x" * 193], masks=True)[-1] == f"c0/{'x' * 193}.nii.gz"
    with pytest.raises(ValueError, match="too long for the name of a file; shorten the name"):
        infer.result_files("c0", ["x" * 194], masks=True)
    assert infer.result_files("c0", ["x" * 194]) == ["c0.nii.gz", "c0.json"]


def test_an_origin_that_train_py_cannot_have_written_is_unknown():
    for text in (5, None, {"kind": "file"}):
        assert clip_text.origin_of_checkpoint({"text": text}) == {}
