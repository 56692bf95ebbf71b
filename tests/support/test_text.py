"""Other text for a trained network: what is compared, what is refused, files of text embeddings,
and asking a trained model for a class in other words."""
import json
from pathlib import Path

import pytest
import torch

import clip_text
import data
import infer
import labels
import train
from model import build_model
from support import checkpoints, class_tables, processes, results, transfer

ONEHOT = torch.eye(transfer.ONEHOT_WIDTH) * transfer.ONEHOT_NORM
W = torch.tensor([[3., 4., 0.], [4., 3., 0.]])         # of "a" and "b": norm 5, cosine 24/25
AB = ["a", "b"]


def note(names, w, trained=W):
    text = transfer.TrainedText("m.pt", AB[:len(trained)], trained, [])
    return transfer.check_text(text, names, w)


# ---- files of text embeddings --------------------------------------------------------------------
def test_a_file_of_text_embeddings_finds_classes_by_name(tmp_path):
    path = tmp_path / "text.pt"
    transfer.save_text(path, ["a", "b", "c"], torch.arange(6.).view(3, 2))
    assert clip_text.read_embeddings(path, ["c", "a"]).tolist() == [[4, 5], [0, 1]]
    with pytest.raises(ValueError, match=r"text.pt: no text embedding of \['d'\].*'a', 'b', 'c'"):
        clip_text.read_embeddings(path, ["a", "d"])


def test_a_plain_tensor_holds_the_classes_in_order(tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(torch.arange(6).view(3, 2), path)
    w = clip_text.read_embeddings(path, ["x", "y", "z"])
    assert w[2].tolist() == [4, 5] and w.dtype == torch.float32


@pytest.mark.parametrize("content, words", [
    (torch.ones(3, 2), r"expected 2 text embeddings \(2, E\), got \(3, 2\)"),
    (torch.ones(2), r"got \(2,\)"),
    ({"w": torch.ones(2, 2), "names": ["x"]}, r"expected 1 text embeddings"),
    ({"a": 1}, "one tensor"), ([1], "one tensor"), (b"", "not a readable file"),
    (b"text", "not a readable file"), (None, "not a readable file"),
])
def test_a_file_without_text_embeddings_is_named_in_one_line(tmp_path, content, words):
    path = tmp_path / "text.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"text.pt: .*{words}") as e:
        clip_text.read_embeddings(path, ["x", "y"])
    assert len(str(e.value).splitlines()) == 1


def test_the_command_writes_a_file_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_text, "encode_classes", lambda *a, **k: W.clone())
    path = tmp_path / "text.pt"
    assert clip_text.main(["--classes", "liver", "spleen", "--out", str(path)]) == 0
    assert torch.equal(clip_text.read_embeddings(path, ["Spleen", "Liver"]), W[[1, 0]])


# ---- what may be mixed ---------------------------------------------------------------------------
def test_equal_text_embeddings_need_no_note():
    assert note(["b", "c"], W[[1, 0]]) == ""
    assert note(AB, W + torch.tensor([0., 0., 0.04])) == ""            # rounding: 0.04 of 5


def test_other_words_are_a_note_that_names_the_cosine():
    """Of a, (3, 4) and (4, 3): cosine 24 / 25."""
    line = note(AB, W[[1, 1]])
    assert "that of 'a' differs most (cosine 0.96)" in line and len(line.splitlines()) == 1
    assert "differs most" in note(AB, W * 1.1)                         # only the norms


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
    with pytest.raises(ValueError) as e:
        note(AB, given, trained)
    assert words in str(e.value) and str(e.value).startswith("m.pt: ")
    assert len(str(e.value).splitlines()) == 1


def test_what_cannot_be_compared_is_said():
    assert "cannot be compared" in note(["c"], W[:1])


# ---- CLIP, replaced by a table -------------------------------------------------------------------
CLASSES = [{"name": "Liver"}, {"name": "Spleen"}, {"name": "Colon"}]
CLIP_W = torch.tensor([[3., 4., 0., 1.], [4., 3., 1., 0.], [4., 4., 0., 0.]])
OTHER = torch.tensor([3., 4., 0., 1.5])                # of any prompt that is not in the table
V3 = [clip_text.TEMPLATE.replace("{}", c["name"]) for c in CLASSES]
SPLEEN = "A computerized tomography of a spleen"


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
    def encode(*args, **kwargs):
        raise AssertionError("CLIP was asked for")
    monkeypatch.setattr(clip_text, "encode_classes", encode)


def write_checkpoint(path, w, **more) -> str:
    torch.manual_seed(0)
    spec = {"backbone": "unet", "width": 8, "text_dim": w.shape[1]}
    torch.save({"format": checkpoints.FORMAT, "spec": spec,
                "model": build_model(spec).state_dict(), "w": w,
                "classes": CLASSES, "trained": ["Liver", "Spleen"],
                "config": {"spacing_mm": 4.0, "patch": 64}, **more}, path)
    return str(path)


def test_the_prompts_of_a_checkpoint_are_recorded_or_those_of_the_release():
    classes = class_tables.make_classes(CLASSES)
    text = transfer.trained_text("m.pt", CLIP_W, {"prompts": ["x", "y", "z"]}, classes)
    assert text.prompts == ["x", "y", "z"]
    for content in ({}, {"prompts": []}, {"text": {"kind": "clip"}}):
        assert transfer.trained_text("m.pt", CLIP_W, content, classes).prompts == V3


# ---- train.py --init and --extend ----------------------------------------------------------------
def task(tmp_path, start, names, **how):
    (tmp_path / "new.json").write_text(json.dumps(names))
    return train.load_task(train.Config(device="cpu", classes=str(tmp_path / "new.json"), patch=64,
                                        **how, **start))


@pytest.mark.parametrize("flag", ["init", "extend"])
@pytest.mark.parametrize("w, text, words", [
    (ONEHOT[:3], "clip", "of width 512, now they have width 4"),
    (torch.eye(4)[[2, 1, 0]] * 8.8, "clip", "the text embedding of 'Liver' has a cosine of 0.00"),
    (-CLIP_W, "clip", "has a cosine of -1.00"),
    (CLIP_W, "onehot", "was not trained with --text onehot"),
])
def test_a_network_is_not_given_text_of_another_kind(tmp_path, clip, w, text, words, flag):
    """Also where no class is in both: one of the network's own prompts is encoded."""
    start = {flag: write_checkpoint(tmp_path / "m.pt", w)}
    with pytest.raises(ValueError, match=f"m.pt: .*{words}"):
        task(tmp_path, start, ["Aorta"], text=text)


def test_new_classes_get_prompts_and_old_ones_keep_theirs(tmp_path, clip, capsys):
    start = write_checkpoint(tmp_path / "m.pt", CLIP_W, prompts=[*V3])
    given = task(tmp_path, {"init": start}, ["Liver", "Aorta"], text="clip", prompt_template="V1")
    assert given.prompts == ["A photo of a Liver.", "A photo of a Arota."]
    assert given.w.tolist() == [OTHER.tolist()] * 2
    assert "that of 'Liver' differs most" in capsys.readouterr().out
    given = task(tmp_path, {"extend": start}, ["Liver", "Aorta"], text="clip",
                 prompt_template="V1")
    assert given.prompts == [*V3, "A photo of a Arota."]
    assert torch.equal(given.w, torch.cat([CLIP_W, OTHER[None]]))
    assert "note" not in capsys.readouterr().out


def test_a_file_for_init_is_compared_by_the_classes_of_both(tmp_path, capsys):
    start = {"init": write_checkpoint(tmp_path / "m.pt", CLIP_W)}
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
    args = infer.parse(["--checkpoint", str(checkpoint), "--input", "x", "--output", "y",
                        "--device", "cpu", *map(str, flags)])
    infer.check_flags(args)
    return infer.load_job(args)


def test_a_class_is_asked_for_by_another_prompt(tmp_path, clip, capsys):
    """Liver gets the embedding of its prompt, Spleen keeps its own; the record says so."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    file = tmp_path / "words.json"
    file.write_text('{"liver": "The hepatic organ"}')
    given = job(path, "--text", file)
    assert given.w.tolist() == [[3, 4, 0, 1.5], [4, 3, 1, 0]]
    assert given.settings["text"]["prompts"] == {"Liver": "The hepatic organ"}
    assert "'Liver' differs most (cosine 1.00); results may be" in capsys.readouterr().out
    plain = job(path)
    assert torch.equal(plain.w, CLIP_W[:2]) and "text" not in plain.settings


def test_a_file_of_embeddings_replaces_those_of_all_classes(tmp_path, capsys):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    torch.save(CLIP_W * 1.1, tmp_path / "text.pt")
    given = job(path, "--text", tmp_path / "text.pt", "--classes", "spleen")
    assert torch.equal(given.w, CLIP_W[[1]] * 1.1)
    assert Path(given.settings["text"]["file"]["path"]) == tmp_path / "text.pt"
    assert "results may be far worse" in capsys.readouterr().out


def test_a_one_hot_model_refuses_other_text(tmp_path, clip):
    path = write_checkpoint(tmp_path / "m.pt", torch.eye(4)[[2, 1, 0]] * 8.8)
    (tmp_path / "words.json").write_text('{"Liver": "The hepatic organ"}')
    torch.save(CLIP_W, tmp_path / "text.pt")
    for file in ("words.json", "text.pt"):
        with pytest.raises(ValueError, match="m.pt: the text embedding of 'Liver' has a cosine of"):
            job(path, "--text", tmp_path / file)


@pytest.mark.parametrize("content, words", [
    ("[1]", "expected a JSON object"), ("{", "not readable JSON"), ("{}", "expected prompts"),
    ('{"Liver": 3}', "Liver: a prompt is a text, got 3"), ('{"Heart": "A heart"}', "no class is"),
    ('{"Liver": " "}', "a prompt is a text"), ('{"Liver": "a", "liver": "b"}', "one prompt for"),
])
def test_a_wrong_file_of_prompts_is_named(tmp_path, content, words):
    path = tmp_path / "words.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as e:
        transfer.read_prompts(path, class_tables.make_classes(CLASSES))
    assert str(e.value).startswith(str(path)) and len(str(e.value).splitlines()) == 1


def test_a_prompt_for_both_sides_names_them(tmp_path):
    path = tmp_path / "words.json"
    path.write_text('{"kidney": "A CT of a kidney"}')
    with pytest.raises(ValueError, match="stands for Right Kidney and Left Kidney"):
        transfer.read_prompts(path, labels.CLASSES)


def test_a_class_of_an_extension_keeps_the_embedding_by_which_it_is_known(tmp_path, clip):
    classes = class_tables.make_classes(CLASSES)
    trained = transfer.TrainedText("m.pt", [c.name for c in classes], CLIP_W, V3)
    (tmp_path / "words.json").write_text('{"Colon": "The large bowel"}')
    owner = torch.tensor([0, 0, 1])
    with pytest.raises(ValueError, match="'Colon' was added by --extend"):
        transfer.replace_text(trained, tmp_path / "words.json", classes, owner=owner)
    file = tmp_path / "text.pt"
    torch.save(CLIP_W * torch.tensor([[2.], [1.], [1.]]).sqrt(), file)        # Colon's unchanged
    w, _ = transfer.replace_text(trained, file, classes, owner=owner)
    assert torch.equal(w[1:], CLIP_W[1:]) and not torch.equal(w[0], CLIP_W[0])


def test_clip_weights_without_prompts_are_refused(tmp_path):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    for flags in ((), ("--text", "text.pt")):
        with pytest.raises(ValueError, match="--clip-weights encodes prompts"):
            job(path, "--clip-weights", "m.pt", *flags)


def test_the_json_of_a_result_says_which_words_were_used(tmp_path, tiny, clip, capsys):
    """A second run with the same words keeps the result, one with other words redoes it."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    scan = sorted((tiny / "raw/Dataset901_Liver/imagesTr").iterdir())[0]
    words, out = tmp_path / "words.json", tmp_path / "out"
    command = ["--checkpoint", path, "--input", str(scan), "--output", str(out), "--text",
               str(words), "--classes", "liver", "--device", "cpu", "--overlap", "0"]
    words.write_text('{"Liver": "The hepatic organ"}')
    assert processes.run(infer.main, command) == 0
    made_with = json.loads(next(out.glob("c0.json")).read_text())["made_with"]
    assert made_with["text"]["prompts"] == {"Liver": "The hepatic organ"}
    assert Path(made_with["text"]["file"]["path"]) == words.resolve()
    capsys.readouterr()
    assert processes.run(infer.main, command) == 0
    assert "1 there already" in capsys.readouterr().out
    words.write_text('{"Liver": "The liver"}')
    assert processes.run(infer.main, command) == 0
    assert "there already" not in capsys.readouterr().out


# ---- infer.py --prompt ---------------------------------------------------------------------------
HEART = "A CT of a heart"


def test_a_prompt_is_a_class_of_its_own_after_those_of_the_checkpoint(tmp_path, clip, capsys):
    """Of (3, 4, 0, 1.5), Liver's text (3, 4, 0, 1) is the nearest: cosine 26.5 / sqrt(27.25 * 26),
    which is 0.996. The first prompt of training is encoded with it and compared."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    given = job(path, "--prompt", f" {SPLEEN} ")
    assert clip == [SPLEEN, V3[0]]
    assert given.w.tolist() == [[3, 4, 0, 1.5]] and given.indices == [3]
    assert [c.name for c in given.classes] == ["Liver", "Spleen", "Colon", SPLEEN]
    assert given.settings["prompts"] == [SPLEEN] and "clip_weights" not in given.settings
    assert f"prompt {SPLEEN!r}: of the texts of training, that of 'Liver' is the most similar " \
           "(cosine 0.996)\n" in capsys.readouterr().out
    other = job(path, "--prompt", SPLEEN, "--clip-weights", path)
    assert other.settings["clip_weights"]["path"] == path              # other weights, other result


def test_a_prompt_far_from_every_trained_text_is_doubted(tmp_path, monkeypatch, capsys):
    """Colon's text is that of the prompt, but Colon was not trained. Of (4, 4, 0, 0), Liver's
    (3, 4, 0, 1) has cosine 28 / sqrt(32 * 26) = 0.971, Spleen's the same; of (4, 8, 0, 0), Liver's
    44 / sqrt(80 * 26) = 0.965; of (0, 4, 0, 0), Liver's 16 / sqrt(16 * 26) = 0.784."""
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    for embedding, line in (([4., 4, 0, 0], "cosine 0.971)\n"), ([4., 8, 0, 0], "cosine 0.965)\n"),
                            ([0., 4, 0, 0], "cosine 0.784); what is found may mean nothing\n")):
        w = torch.tensor([embedding, CLIP_W[0].tolist()])
        monkeypatch.setattr(clip_text, "encode_classes", lambda *a, _w=w, **k: _w)
        job(path, "--prompt", SPLEEN)
        assert line in capsys.readouterr().out


def test_prompts_stand_beside_classes_and_other_words_for_them(tmp_path, clip):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    (tmp_path / "words.json").write_text('{"Spleen": "The lien"}')
    given = job(path, "--classes", "spleen", "--prompt", SPLEEN, "--prompt", HEART,
                "--text", tmp_path / "words.json")
    assert given.indices == [1, 3, 4]
    assert given.w.tolist() == [OTHER.tolist()] * 3


@pytest.mark.parametrize("prompts, words", [
    (["spleen"], "'Spleen' is a class of the checkpoint; ask for it with --classes"),
    ([SPLEEN, SPLEEN], "is given twice"),
    ([" "], "is empty; write what is to be segmented"),
])
def test_a_prompt_that_names_nothing_new_is_refused(tmp_path, no_clip, prompts, words):
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    with pytest.raises(ValueError, match=words):
        job(path, *flags)


@pytest.mark.parametrize("w, words", [
    (torch.eye(4)[[2, 1, 0]] * 8.8, "a cosine of 0.00"), (-CLIP_W, "a cosine of -1.00"),
    (ONEHOT[:3], "of width 512, now they have width 4"),
])
def test_a_prompt_for_a_model_of_other_texts_is_refused(tmp_path, clip, w, words):
    """A model of one-hot text, of other CLIP weights, and of another width."""
    path = write_checkpoint(tmp_path / "m.pt", w)
    with pytest.raises(ValueError, match=f"m.pt: .*{words}"):
        job(path, "--prompt", SPLEEN)


def test_the_prompt_of_a_class_finds_what_the_class_finds(tmp_path, tiny, monkeypatch):
    """The result is named after the prompt, in the JSON, in the file of the mask and in ITK-SNAP's
    label file; its voxels are those of Liver, before post-processing."""
    prompt = 'The organ called "liver"'
    monkeypatch.setattr(clip_text, "encode_classes", lambda *args, **kwargs: CLIP_W[[0, 0]])
    path = write_checkpoint(tmp_path / "m.pt", CLIP_W)
    content = torch.load(path, weights_only=True)
    content["model"]["controller.out.bias"][-1] = 0         # an untrained head finds nothing
    torch.save(content, path)
    scan = sorted((tiny / "raw/Dataset901_Liver/imagesTr").iterdir())[0]
    out = tmp_path / "out"
    command = ["--checkpoint", path, "--input", str(scan), "--output", str(out), "--classes",
               "liver", "--prompt", prompt, "--masks", "--no-postprocess", "--device", "cpu",
               "--overlap", "0"]
    assert processes.run(infer.main, command) == 0
    liver, asked = json.loads((out / "c0.json").read_text())["classes"]
    assert asked == {"value": 4, "name": prompt, "volume_ml": liver["volume_ml"]}
    assert asked["volume_ml"] > 0
    masks = [data.load_volume(out / "c0" / file).array
             for file in ("liver.nii.gz", 'the_organ_called_"liver".nii.gz')]
    assert (masks[0] == masks[1]).all()
    assert '"The organ called \'liver\'"' in (out / "itksnap_labels.txt").read_text()


def test_a_prompt_too_long_for_a_file_is_refused_before_anything_is_computed():
    assert results.result_files("c0", ["x" * 193], masks=True)[-1] == f"c0/{'x' * 193}.nii.gz"
    with pytest.raises(ValueError, match="too long for the name of a file; shorten the name"):
        results.result_files("c0", ["x" * 194], masks=True)
    assert results.result_files("c0", ["x" * 194]) == ["c0.nii.gz", "c0.json"]
