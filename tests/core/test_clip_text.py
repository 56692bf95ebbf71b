"""CLIP's text encoder: tokens worked by hand and equal to another implementation's, features equal
to those of the transformers package, weights files read without running code, downloads.

Tokens and features of OpenAI's own code are compared in test_release.py.
"""
import gzip
import hashlib
import html
import itertools
import json
import os
import pickle
import struct
import zipfile

import ftfy
import numpy as np
import pytest
import release
import torch
from conftest import SHARED, needs_shared
from torch import nn

import clip_text
import labels
from support import processes


@pytest.fixture(scope="session")
def toy_merges(tmp_path_factory):
    """A merges file of the right length whose first lines make "liver" one token."""
    first = [("l", "i"), ("e", "r</w>"), ("li", "v"), ("liv", "er</w>")]
    letters = [*map(chr, range(256, 500))]
    filler = itertools.islice(itertools.product(letters, letters), clip_text.N_MERGES - len(first))
    path = tmp_path_factory.mktemp("merges") / "toy.txt.gz"
    lines = ["#version: 0.2", *(" ".join(p) for p in [*first, *filler]), "beyond the end"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


# ---- tokenizer -----------------------------------------------------------------------------------
def test_tokens_by_hand(toy_merges):
    """Bytes: '!' is token 0 and 'a' is 64; at the end of a word, 256 more. Merges start at 512.

    "liver": l i v e r</w> -> li v e r</w> -> li v er</w> -> liv er</w> -> liver</w>, the fourth
    merge: 515. "live" ends as liv (514) and e</w> (68 + 256). "er" is the second merge: 513.
    """
    tokenizer = clip_text.Tokenizer(toy_merges)
    assert tokenizer.encode("A liver") == [64 + 256, 515]
    assert tokenizer.encode("live er") == [514, 68 + 256, 513]
    assert (tokenizer.start, tokenizer.end, len(tokenizer.ids)) == (49406, 49407, 49408)
    assert tokenizer.encode("") == [] and tokenizer.encode(" \n\t ") == []


def test_cleaning_by_hand(toy_merges):
    """HTML is unescaped twice, broken UTF-8 repaired, white space collapsed, upper case lowered;
    every digit is a token."""
    tokenizer = clip_text.Tokenizer(toy_merges)
    assert tokenizer.encode("< &amp;amp;") == tokenizer.encode("< &")     # after "<" not by ftfy
    assert tokenizer.encode("cafÃ©") == tokenizer.encode("café")
    assert tokenizer.encode("  A \n LIVER ") == tokenizer.encode("a liver")
    assert tokenizer.encode("12") == [ord("1") - 33 + 256, ord("2") - 33 + 256]
    assert tokenizer.encode("isn't") == tokenizer.encode("isn") + tokenizer.encode("'t")
    assert tokenizer.encode("<|endoftext|>") == [tokenizer.end]


def test_decode_undoes_encode(toy_merges):
    tokenizer = clip_text.Tokenizer(toy_merges)
    assert tokenizer.decode(tokenizer.encode("a liver in CT")) == "a liver in ct "
    assert tokenizer.decode(tokenizer.encode("naïve 肝 🫀")) == "naïve 肝 🫀 "


def test_tokenize_pads_and_refuses_a_prompt_that_is_too_long(toy_merges):
    """Nine tokens, with start and end, fit into eleven; ten do not."""
    tokenizer = clip_text.Tokenizer(toy_merges)
    tokens = tokenizer.tokenize(["liver", "liver " * 9], context_length=11)
    assert tokens.dtype == torch.long
    assert tokens[0].tolist() == [49406, 515, 49407, *[0] * 8]
    assert tokens[1].tolist() == [49406, *[515] * 9, 49407]
    with pytest.raises(ValueError, match=r"'liver liver.* has 12 tokens.* limit is 11"):
        tokenizer.tokenize("liver " * 10, context_length=11)


def strings(n, seed=0):
    """n random mixtures of words, numbers, emoji, entities, contractions, accents and scripts."""
    rng = np.random.default_rng(seed)
    parts = ["liver", "Tumor's", "they'll", "WE'VE", "don't", "&amp;", "&lt;b&gt;", "&#233;", "é",
             "naïve", "Ångström", "肝臓", "печень", "الكبد", "🫀", "👩‍⚕️", "🇩🇪", "3.14", "1,000",
             "x²", "½", "--", "...", "?!", "(", ")", "[HU]", "mm³", "a" * 90, "hepatocholangio" * 4,
             "\u00a0",
             "\t", "\n", "e\u0301", "ﬁ", "“q”", "it’s", "\u200b", "C++", "#tag", "@me", "a_b", "ǅ"]
    yield ""
    for _ in range(n - 1):
        k = rng.integers(1, 9)
        yield rng.choice(["", " ", "  "]).join(rng.choice(parts, k).tolist())


@needs_shared
def test_tokens_match_another_implementation():
    oracle = pytest.importorskip("instant_clip_tokenizer").Tokenizer()
    ours = clip_text.Tokenizer(SHARED / "clip" / "bpe_simple_vocab_16e6.txt.gz")
    for text in strings(400):        # the oracle does not clean its text, so it gets clean text
        clean = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert ours.encode(text) == list(oracle.encode(" ".join(clean.split()))), text


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b broken", b"a b\nc d\n", b"\xff\xfe\x00"])
def test_a_wrong_merges_file_is_named(tmp_path, content):
    path = tmp_path / "merges.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="merges.gz: not"):
        clip_text.Tokenizer(path)


# ---- the transformer -----------------------------------------------------------------------------
def test_activations_by_hand():
    """x = 1: QuickGELU 1 / (1 + exp(-1.702)) = 0.84580, GELU Phi(1) = 0.84134."""
    one = torch.ones(())
    assert clip_text.ACTIVATIONS["quick_gelu"](one).item() == pytest.approx(0.84580, abs=1e-5)
    assert clip_text.ACTIVATIONS["gelu"](one).item() == pytest.approx(0.84134, abs=1e-5)


def hugging_face_model(width, layers, embed_dim, vocabulary=600, length=20,
                       activation="quick_gelu"):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width,
        projection_dim=embed_dim, num_hidden_layers=layers, num_attention_heads=width // 64,
        hidden_act=activation, max_position_embeddings=length,
        eos_token_id=vocabulary - 1, bos_token_id=vocabulary - 2)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for p in model.parameters():        # norms and biases differ from one and zero, too
            p.mul_(3).add_(torch.randn_like(p) * 0.05)
    return model


def write_hugging_face(model, kind, folder):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
        model.save_pretrained(folder)
        return folder / "model.safetensors"
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, activation, size", [
    ("safetensors", "quick_gelu", (128, 2, 64, 49408, 77)), ("bin", "quick_gelu", (192, 3, 96)),
    ("bin", "gelu", (64, 1, 128))])
def test_features_equal_those_of_transformers(tmp_path, kind, activation, size):
    """The sizes are read from the tensors, and the kind of a file is found from its content."""
    model = hugging_face_model(*size, activation=activation)
    vocabulary, length = model.config.vocab_size, model.config.max_position_embeddings
    tokens = torch.randint(1, vocabulary - 2, (3, length),
                           generator=torch.Generator().manual_seed(1))
    for row, end in zip(tokens, (4, 9, length - 1), strict=True):
        row[0], row[end], row[end + 1:] = vocabulary - 2, vocabulary - 1, 0
    odd_name = tmp_path / "weights.xyz"
    os.replace(write_hugging_face(model, kind, tmp_path), odd_name)
    encoder = clip_text.load_text_encoder(odd_name, activation)
    with torch.no_grad():
        want, got = model(input_ids=tokens).text_embeds, encoder(tokens)
    assert want.std() > 0.1 and not got.requires_grad
    assert torch.allclose(got, want, atol=1e-4 * want.abs().max())
    other, = set(clip_text.ACTIVATIONS) - {activation}
    wrong = clip_text.load_text_encoder(odd_name, other)
    assert not torch.allclose(wrong(tokens), want, atol=1e-3 * want.abs().max())


def test_tokens_after_the_end_do_not_change_the_feature():
    torch.manual_seed(0)
    encoder = clip_text.TextEncoder(vocabulary=50, context_length=9, width=64, layers=2, heads=1,
                                    embed_dim=8)
    a = torch.tensor([[48, 3, 4, 49, 0, 0]])
    b = torch.tensor([[48, 3, 4, 49, 7, 9]])
    c = torch.tensor([[48, 3, 5, 49, 0, 0]])
    with torch.no_grad():
        assert torch.equal(encoder(a), encoder(b))
        assert not torch.allclose(encoder(a), encoder(c))


# ---- weights files -------------------------------------------------------------------------------
def small_openai():
    """A small CLIP under OpenAI's names, and a tensor of its image encoder."""
    shapes = release.clip_shapes(width=64, layers=1, embed_dim=24, vocabulary=600, length=20)
    return {**release.fill(shapes, seed=1), "visual.conv1.weight": torch.ones(3, 3)}


class _Node(nn.Module):
    """A module that only holds parameters, to write a real TorchScript archive."""

    def forward(self, x):
        return x + 1


def write_torchscript(state, path):
    """Matrices are views, whose strides the archive keeps."""
    root = _Node()
    for name, tensor in state.items():
        node = root
        *parts, last = name.split(".")
        for part in parts:
            if not hasattr(node, part):
                node.add_module(part, _Node())
            node = getattr(node, part)
        tensor = tensor.t().contiguous().t() if tensor.ndim == 2 else tensor.clone()
        node.register_parameter(last, nn.Parameter(tensor))
    torch.jit.save(torch.jit.script(root.half()), path)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_holds_what_a_state_dict_holds(tmp_path):
    """In fp16, as OpenAI's own file does."""
    state = {name: tensor.half() for name, tensor in small_openai().items()}
    write_torchscript(state, tmp_path / "ViT.pt")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
               tmp_path / "state.pt")
    got, want = (clip_text.load_text_encoder(tmp_path / name).state_dict()
                 for name in ("ViT.pt", "state.pt"))
    assert len(want) == 17 and got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert torch.equal(want["projection.weight"], state["text_projection"].t().float())


class _Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_in_a_weights_file_is_run(tmp_path):
    """pickle.loads runs the code in these files, which creates a file; ours do not."""
    target = tmp_path / "owned"
    evil = pickle.dumps({"token_embedding.weight": _Attack(target)})
    pickle.loads(evil)
    assert target.exists()
    target.unlink()
    torch.save({"token_embedding.weight": _Attack(target)}, tmp_path / "state.pt")
    (tmp_path / "legacy.bin").write_bytes(evil)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as z:
        z.writestr("m/data.pkl", evil)
        z.writestr("m/code/__torch__.py", f"open({str(target)!r}, 'w')")
        z.writestr("m/version", "3")
    for name in ("state.pt", "legacy.bin", "script.pt"):
        with pytest.raises(ValueError, match=name):
            clip_text.load_text_encoder(tmp_path / name)
        assert not target.exists(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what, wanted", [
    ("safetensors, cut", "not a readable"), ("state dict, cut", "not a readable"),
    ("archive, cut", "not a readable"), ("text", "not a readable"),
    ("numpy scalar", r"it holds numpy\._?core\.multiarray\.scalar; only tensors"),
    ("missing", "No such file")])
def test_an_unreadable_file_is_named_with_the_cause_in_one_line(tmp_path, what, wanted):
    path = tmp_path / "file.pt"
    if what == "safetensors, cut":
        os.replace(write_hugging_face(hugging_face_model(64, 1, 8), "safetensors", tmp_path), path)
    if what == "state dict, cut":
        torch.save(small_openai(), path)
    if what == "archive, cut":
        write_torchscript(small_openai(), path)
    if "cut" in what:
        path.write_bytes(path.read_bytes()[:-2000])
    if what == "text":
        path.write_bytes(b"hello world, this is text")
    if what == "numpy scalar":
        torch.save({"a": torch.ones(3), "b": np.float64(1)}, path)
    with pytest.raises((ValueError, OSError), match=f"file.pt: .*{wanted}") as e:
        clip_text.load_text_encoder(path)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)
    assert "Re-running" not in str(e.value)                            # torch's bad advice


def test_a_missing_tensor_another_shape_and_another_model_are_named(tmp_path):
    path, state = tmp_path / "file.pt", small_openai()
    hugging_face = hugging_face_model(64, 1, 8).state_dict()
    lost = "text_model.encoder.layers.0.self_attn.k_proj.bias"
    for what, content in (
            ("Missing.*norm.bias", {k: v for k, v in state.items() if k != "ln_final.bias"}),
            ("'position_embedding'", {k: v for k, v in state.items() if k[:5] != "posit"}),
            (r"size mismatch for norm.weight.*\[3\]", {**state, "ln_final.weight": torch.ones(3)}),
            ("layers.0.self_attn.k_proj.bias",
             {k: v for k, v in hugging_face.items() if k != lost}),
            ("'token_embedding.weight'", {"backbone.conv.weight": torch.ones(2)})):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f"file.pt: not a CLIP text encoder .*{what}") as e:
            clip_text.load_text_encoder(path)
        assert "\n" not in str(e.value)
    header = json.dumps({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(ValueError, match="file.pt: not a readable"):
        clip_text.load_text_encoder(path)
    with pytest.raises(ValueError, match="activation must be one of .*quick_gelu.*got 'relu'"):
        clip_text.load_text_encoder(path, activation="relu")


# ---- downloads -----------------------------------------------------------------------------------
CONTENT = bytes(i * 7 % 251 for i in range(300_000))
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_downloaded_once_and_a_download_that_breaks_off_leaves_nothing(server, cache):
    handler, url = server
    handler.content, handler.stop_after = CONTENT, 100_000
    with pytest.raises(OSError, match="invalid hash value"):
        clip_text.fetch(url, DIGEST)
    assert list(cache.iterdir()) == []
    handler.stop_after = None
    for _ in range(2):
        assert clip_text.fetch(url, DIGEST) == cache / "file.bin"
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == {"file.bin": CONTENT}
    assert handler.requests == 2


def test_a_failed_download_is_one_line_with_url_path_and_alternatives(server, cache):
    handler, url = server
    handler.content = CONTENT[:-1] + b"x"
    for address, cause in ((url, "invalid hash value"),
                           ("http://127.0.0.1:9/file.bin", "Connection refused")):
        with pytest.raises(OSError, match=cause) as e:
            clip_text.fetch(address, DIGEST)
        assert "\n" not in str(e.value) and list(cache.iterdir()) == []
        for part in (address, str(cache / "file.bin"), "--clip-weights FILE", "--text onehot"):
            assert part in str(e.value)


# ---- text embeddings -----------------------------------------------------------------------------
def test_cosine_by_hand():
    """(3, 4) and (4, 3): 24 / 25."""
    assert torch.allclose(clip_text.cosine(torch.tensor([[3., 4.], [4., 3.]])),
                          torch.tensor([[1, 0.96], [0.96, 1]]))


@pytest.fixture
def small_clip(cache, monkeypatch, toy_merges):
    """A small CLIP replaces the real one, and every download fails -> its file."""
    cache.mkdir()
    path = cache / "ViT-B-32.pt"
    torch.save(release.fill(release.clip_shapes(width=64, layers=1, embed_dim=24), seed=3), path)
    (cache / "toy.txt.gz").write_bytes(toy_merges.read_bytes())
    for name, file in (("WEIGHTS", "ViT-B-32.pt"), ("MERGES", "toy.txt.gz")):
        monkeypatch.setattr(clip_text, name, (f"http://127.0.0.1:9/{file}", "its hash"))
    return path


def test_encode_classes_gives_the_encoders_features_of_the_prompts(small_clip):
    w = clip_text.encode_classes(["Liver", "Spleen", "Liver"], "A photo of a {}.")
    encoder = clip_text.load_text_encoder(small_clip)
    tokenizer = clip_text.Tokenizer(small_clip.parent / "toy.txt.gz")
    want = encoder(tokenizer.tokenize(["A photo of a Liver.", "A photo of a Spleen."]))
    assert torch.allclose(w[0], w[2], atol=1e-6) and not torch.allclose(w[0], w[1], atol=1e-3)
    assert torch.allclose(w[:2], want, atol=1e-6) and not w.requires_grad


def test_encode_classes_takes_other_weights_and_needs_a_place_for_the_name(small_clip, tmp_path):
    w = clip_text.encode_classes(["Liver"])
    state = torch.load(small_clip, weights_only=True)
    state["ln_final.bias"] = state["ln_final.bias"] + 1
    torch.save(state, tmp_path / "other.pt")
    assert not torch.allclose(clip_text.encode_classes(["Liver"], weights=tmp_path / "other.pt"), w)
    assert not torch.allclose(clip_text.encode_classes(["Liver"], activation="gelu"), w)
    with pytest.raises(OSError, match="nowhere.pt: cannot be read"):
        clip_text.encode_classes(["Liver"], weights=tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="no {}"):
        clip_text.encode_classes(["Liver"], "a template")


@needs_shared
def test_released_text_embeddings_have_their_norms_and_neighbours():
    names = [c.name for c in labels.CLASSES]
    w = clip_text.read_embeddings(SHARED / "clip" / "txt_encoding.pth", names)
    norms = w.norm(dim=1)
    assert w.shape == (32, 512) and 8.0 < norms.min() < 8.2 and 9.5 < norms.max() < 9.7
    near = clip_text.cosine(w).fill_diagonal_(-1).argmax(1)
    assert names[near[names.index("Left Kidney")]] == "Right Kidney"
    assert names[near[names.index("Left Lung")]] == "Right Lung"


# ---- the command ---------------------------------------------------------------------------------
def test_command_writes_text_embeddings_and_prints_norms(small_clip, tmp_path, capsys):
    arguments = ["--classes", "liver", "spleen", "--out", "text.pt", "--template", "V1"]
    assert clip_text.main(arguments) == 0
    want = clip_text.encode_classes(["Liver", "Spleen"], "A photo of a {}.")
    assert torch.equal(clip_text.read_embeddings("text.pt", ["Liver", "Spleen"]), want)
    assert "2 text embeddings of width 24" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert clip_text.main(["--similarity"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [r.split("  ")[0] for r in lines[1:5]] == ["Spleen", "Right Kidney", "Left Kidney",
                                                      "Kidney Tumor"]
    assert (tmp_path / "similarity.png").stat().st_size > 10_000


def test_the_command_never_writes_over_a_file_that_it_reads(tmp_path, capsys):
    rows = tmp_path / "rows.pt"
    torch.save(torch.eye(32), rows)
    before = rows.read_bytes()
    assert processes.run(clip_text.main, ["--text", str(rows), "--out", str(rows)]) == 2
    (tmp_path / "similarity.png").symlink_to(rows)
    assert processes.run(clip_text.main, ["--text", str(rows), "--similarity"]) == 2
    assert capsys.readouterr().err.count("would overwrite the input file") == 2
    assert rows.read_bytes() == before
