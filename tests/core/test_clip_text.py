"""CLIP's text encoder: tokens worked by hand and equal to OpenAI's, features equal to those of the
transformers package, weights files read without running code, downloads."""
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
import torch
from conftest import SHARED, needs_shared
from torch import nn

import clip_text
from support import processes

MERGES_FILE = SHARED / "clip" / "bpe_simple_vocab_16e6.txt.gz"


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


# ---- tokenizer ---------------------------------------------------------------------------------
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
    assert tokenizer.encode("&amp;amp;") == tokenizer.encode("&")
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
    ours = clip_text.Tokenizer(MERGES_FILE)
    for text in strings(400):        # the oracle does not clean its text, so it gets clean text
        clean = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert ours.encode(text) == list(oracle.encode(" ".join(clean.split()))), text


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b broken", b"a b\nc d\n", b"\xff\xfe\x00"])
def test_a_wrong_merges_file_is_named(tmp_path, content):
    path = tmp_path / "merges.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="merges.gz: not"):
        clip_text.Tokenizer(path)


# ---- encoder and its files -----------------------------------------------------------------------
SIZES = {"tiny": (128, 2, 64, 49408, 77), "odd": (192, 3, 96, 49408, 77),
         "short": (64, 1, 128, 600, 20)}        # width, layers, embedding, vocabulary, length


def hf_model(size):
    transformers = pytest.importorskip("transformers")
    width, layers, embed, vocabulary, length = SIZES[size]
    torch.manual_seed(width)
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, projection_dim=embed,
        num_hidden_layers=layers, num_attention_heads=width // 64, hidden_act="quick_gelu",
        max_position_embeddings=length, eos_token_id=vocabulary - 1, bos_token_id=vocabulary - 2)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for p in model.parameters():        # norms and biases differ from one and zero, too
            p.add_(torch.randn_like(p) * 0.05)
    return model


def openai_state(model):
    """The same tensors under the names of OpenAI's state dict, with q, k and v joined."""
    hf, out = model.state_dict(), {}
    out["token_embedding.weight"] = hf["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = hf["text_model.embeddings.position_embedding.weight"]
    out["text_projection"] = hf["text_projection.weight"].t().contiguous()
    out["logit_scale"] = torch.tensor(4.6)
    out["visual.conv1.weight"] = torch.ones(3, 3)
    for end in ("weight", "bias"):
        out[f"ln_final.{end}"] = hf[f"text_model.final_layer_norm.{end}"]
        for i in range(model.config.num_hidden_layers):
            a, b = f"text_model.encoder.layers.{i}.", f"transformer.resblocks.{i}."
            out[f"{b}attn.in_proj_{end}"] = torch.cat(
                [hf[f"{a}self_attn.{x}_proj.{end}"] for x in "qkv"])
            for old, new in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"),
                             ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
                             ("mlp.fc2", "mlp.c_proj")):
                out[f"{b}{new}.{end}"] = hf[f"{a}{old}.{end}"]
    return out


class _Node(nn.Module):
    """A module that only holds parameters, to write a real TorchScript archive."""

    def forward(self, x):
        return x + 1


def torchscript(state, path):
    root = _Node()
    for name, tensor in state.items():
        node, *_ = root, None
        for part in name.split(".")[:-1]:
            if not hasattr(node, part):
                node.add_module(part, _Node())
            node = getattr(node, part)
        node.register_parameter(name.split(".")[-1], nn.Parameter(tensor.clone()))
    torch.jit.save(torch.jit.script(root.half()), path)


def write(model, kind, folder):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
        model.save_pretrained(folder)
        return folder / "model.safetensors"
    path = folder / {"bin": "pytorch_model.bin", "state": "a.pt", "script": "ViT.pt"}[kind]
    if kind == "bin":
        torch.save(model.state_dict(), path)
    elif kind == "state":
        torch.save({"state_dict": {f"module.{k}": v for k, v in openai_state(model).items()}}, path)
    else:
        torchscript(openai_state(model), path)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "state", "script"])
def test_features_equal_those_of_transformers(tmp_path, size, kind):
    model = hf_model(size)
    if kind == "script":                # the archive holds fp16: round the oracle's weights, too
        model = model.half().float()
    vocabulary, length = SIZES[size][3:]
    tokens = torch.randint(1, vocabulary - 2, (3, length),
                           generator=torch.Generator().manual_seed(1))
    for row, end in zip(tokens, (4, 9, length - 1), strict=True):
        row[0], row[end], row[end + 1:] = vocabulary - 2, vocabulary - 1, 0
    odd_name = tmp_path / "weights.xyz"     # the kind is found from the content, not the name
    os.replace(write(model, kind, tmp_path), odd_name)
    encoder = clip_text.load_text_encoder(odd_name)
    with torch.no_grad():
        want, got = model(input_ids=tokens).text_embeds, encoder(tokens)
    assert want.std() > 0.1 and not got.requires_grad
    assert torch.allclose(got, want, atol=1e-4)


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


class _Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


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
@pytest.mark.parametrize("kind", ["safetensors", "bin", "state", "script"])
def test_a_truncated_file_is_one_line(tmp_path, kind):
    path = write(hf_model("short"), kind, tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=f"{path.name}: ") as e:
        clip_text.load_text_encoder(path)
    assert "\n" not in str(e.value)


def test_a_missing_tensor_another_shape_and_another_model_are_named(tmp_path):
    model = hf_model("short")
    state, hugging_face = openai_state(model), model.state_dict()
    lost = "text_model.encoder.layers.0.self_attn.k_proj.bias"
    cases = [("Missing.*norm.bias", {k: v for k, v in state.items() if k != "ln_final.bias"}),
             ("'position_embedding'", {k: v for k, v in state.items() if k[:5] != "posit"}),
             (r"size mismatch for norm.weight.*\[3\]", {**state, "ln_final.weight": torch.ones(3)}),
             ("layers.0.self_attn.k_proj.bias",
              {k: v for k, v in hugging_face.items() if k != lost}),
             ("'token_embedding.weight'", {"backbone.conv.weight": torch.ones(2)})]
    for i, (what, content) in enumerate(cases):
        torch.save(content, tmp_path / f"{i}.pt")
        with pytest.raises(ValueError, match=f"{i}.pt: not a CLIP text encoder .*{what}") as e:
            clip_text.load_text_encoder(tmp_path / f"{i}.pt")
        assert "\n" not in str(e.value)
    torch.save([1, 2], tmp_path / "list.pt")
    for name, error in (("list.pt", ValueError), ("none.pt", OSError)):
        with pytest.raises(error, match=f"{name}: "):
            clip_text.load_text_encoder(tmp_path / name)
    header = json.dumps({"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(ValueError, match="a.safetensors: not a readable"):
        clip_text.load_text_encoder(tmp_path / "a.safetensors")


# ---- download ------------------------------------------------------------------------------------
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
@pytest.fixture
def small_clip(tmp_path, monkeypatch, toy_merges):
    """A tiny CLIP replaces the real one, and every download fails."""
    monkeypatch.setenv("CLIP_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(3)
    encoder = clip_text.TextEncoder(width=64, layers=1, heads=1, embed_dim=24)
    names = (("position_embedding", "positional_embedding"), ("layers.", "transformer.resblocks."),
             ("self_attn", "attn"), ("norm1", "ln_1"), ("norm2", "ln_2"), ("linear1", "mlp.c_fc"),
             ("linear2", "mlp.c_proj"))
    state = {}
    for key, value in encoder.state_dict().items():
        for new, old in names:
            key = key.replace(new, old)
        key = key.replace("norm.", "ln_final.") if key.startswith("norm.") else key
        state[key] = value
    state["text_projection"] = state.pop("projection.weight").t()
    path = tmp_path / "cache" / "ViT-B-32.pt"
    path.parent.mkdir()
    torch.save(state, path)
    (tmp_path / "cache" / "toy.txt.gz").write_bytes(toy_merges.read_bytes())
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
    with pytest.raises(OSError, match="nowhere.pt: cannot be read"):
        clip_text.encode_classes(["Liver"], weights=tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="no {}"):
        clip_text.encode_classes(["Liver"], "a template")


def test_command_writes_text_embeddings_and_prints_norms(small_clip, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--classes", "liver", "spleen", "--out", "text.pt", "--template", "V1"]
    assert clip_text.main(arguments) == 0
    want = clip_text.encode_classes(["Liver", "Spleen"], "A photo of a {}.")
    assert torch.equal(clip_text.read_text("text.pt", ["Liver", "Spleen"]), want)
    assert "2 text embeddings of width 24" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert clip_text.main(["--similarity"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [r.split("  ")[0] for r in lines[1:5]] == ["Spleen", "Right Kidney", "Left Kidney",
                                                      "Kidney Tumor"]
    assert (tmp_path / "similarity.png").stat().st_size > 10_000


@needs_shared
def test_released_text_embeddings_have_their_norms_and_neighbours():
    import labels
    names = [c.name for c in labels.CLASSES]
    w = clip_text.read_text(SHARED / "clip" / "txt_encoding.pth", names)
    norms = w.norm(dim=1)
    assert w.shape == (32, 512) and 8.0 < norms.min() < 8.2 and 9.5 < norms.max() < 9.7
    near = clip_text.cosine(w).fill_diagonal_(-1).argmax(1)
    assert names[near[names.index("Left Kidney")]] == "Right Kidney"
    assert names[near[names.index("Left Lung")]] == "Right Lung"
    alike = clip_text.cosine(w)[names.index("Liver")]
    assert alike[names.index("Liver Tumor")] > alike.mean()


def test_cosine_by_hand():
    """(3, 4) and (4, 3): 24 / 25."""
    assert torch.allclose(clip_text.cosine(torch.tensor([[3., 4.], [4., 3.]])),
                          torch.tensor([[1, 0.96], [0.96, 1]]))


# ---- activation ----------------------------------------------------------------------------------
def test_activations_by_hand():
    """x = 1: QuickGELU 1 / (1 + exp(-1.702)) = 0.84580, GELU Phi(1) = 0.84134."""
    one = torch.ones(())
    assert clip_text.ACTIVATIONS["quick_gelu"](one).item() == pytest.approx(0.84580, abs=1e-5)
    assert clip_text.ACTIVATIONS["gelu"](one).item() == pytest.approx(0.84134, abs=1e-5)


def test_an_activation_that_is_neither_is_refused(tmp_path):
    with pytest.raises(ValueError, match="activation must be one of .*quick_gelu.*got 'relu'"):
        clip_text.load_text_encoder(tmp_path / "a.pt", activation="relu")


@pytest.mark.filterwarnings("ignore")
def test_features_of_weights_with_gelu_equal_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = hf_model("short").config
    config.hidden_act = "gelu"
    torch.manual_seed(0)
    model = transformers.CLIPTextModelWithProjection(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3).add_(torch.randn_like(p) * 0.05)
    path = write(model, "bin", tmp_path)
    tokens = torch.tensor([[598, 5, 6, 7, 599]])
    with torch.no_grad():
        want = model(input_ids=tokens).text_embeds
        encoder = clip_text.load_text_encoder(path, activation="gelu")
        assert torch.allclose(encoder(tokens), want, atol=1e-4)
        assert not torch.allclose(clip_text.load_text_encoder(path)(tokens), want, atol=1e-3)


def test_encode_classes_passes_the_activation_on(small_clip):
    quick, exact = (clip_text.encode_classes(["Liver"], activation=name)
                    for name in ("quick_gelu", "gelu"))
    assert not torch.equal(quick, exact)


# ---- why a file is refused -----------------------------------------------------------------------
@pytest.mark.parametrize("what, wanted", [
    ("numpy scalar", r"it holds numpy\._?core\.multiarray\.scalar; only tensors"),
    ("cut", "not a readable"), ("empty", "not a readable"), ("text", "not a readable")])
@pytest.mark.parametrize("reader", ["embeddings", "weights"])
def test_a_refused_file_is_named_with_the_cause(tmp_path, reader, what, wanted):
    path = tmp_path / "file.pt"
    torch.save({"a": torch.ones(300, 300), "b": np.float64(1)}, path)
    if what == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    if what in ("empty", "text"):
        path.write_bytes(b"" if what == "empty" else b"hello world, this is text")
    read = {"embeddings": lambda file: clip_text.read_text(file, ["a"]),
            "weights": clip_text.read_tensors}[reader]
    with pytest.raises(ValueError, match=f"file.pt: .*{wanted}") as e:
        read(path)
    assert "\x1b" not in str(e.value) and "\n" not in str(e.value)
    assert "Re-running" not in str(e.value)                            # torch's bad advice


def test_the_command_never_writes_over_a_file_that_it_reads(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.pt"
    torch.save(torch.eye(32), rows)
    before = rows.read_bytes()
    assert processes.run(clip_text.main, ["--text", str(rows), "--out", str(rows)]) == 2
    (tmp_path / "similarity.png").symlink_to(rows)
    monkeypatch.chdir(tmp_path)
    assert processes.run(clip_text.main, ["--text", str(rows), "--similarity"]) == 2
    assert capsys.readouterr().err.count("would overwrite the input file") == 2
    assert rows.read_bytes() == before
