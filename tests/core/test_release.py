"""Equality with the authors' networks and with OpenAI's CLIP, by outputs stored in release.json.

Nothing has to be downloaded: weights and inputs are filled from a seed (release.py). float64 moves
the stored float32 numbers by at most 2e-5, so a difference above 2e-4 is a mistake, not rounding.
"""
import json

import numpy as np
import pytest
import release
import torch
from conftest import SHARED, needs_shared

import clip_text
import model
from support import fast

FORMS = {"plain": lambda network: network, "fast": fast.accelerate}
EVERY = 37                      # of the 512 numbers of a text embedding, every 37th is stored


def at(features: torch.Tensor, voxels) -> np.ndarray:
    """features (C, D, H, W) at n voxels -> (C, n)"""
    return np.stack([features[:, d, h, w].numpy() for d, h, w in voxels], axis=1)


@pytest.mark.parametrize("name, form", [
    ("unet", "plain"), pytest.param("unet", "fast", marks=pytest.mark.slow),
    pytest.param("swinunetr", "plain", marks=pytest.mark.slow),
    pytest.param("swinunetr", "fast", marks=pytest.mark.slow)])
def test_logits_and_features_equal_the_released_network(name, form):
    """64 x 96 x 64 voxels, 32 classes; the last decoder feature and the deepest encoder feature."""
    want = release.OUTPUTS[name]
    state = release.released_state(release.SHAPES[name], model.relative_position_index())
    network, w = model.load_released(state)
    network = FORMS[form](network)
    features = []          # copies, because the fast form reuses the memory of `fine`
    network.backbone.register_forward_hook(
        lambda module, inputs, outputs: features.extend(t.clone() for t in outputs))
    with torch.no_grad():
        logits = network(release.volume((64, 96, 64), seed=1), w)[0]
    deep, fine = features[0][0], features[1][0]
    assert abs(at(logits, want["voxels"]) - want["logits"]).max() < 2e-4
    assert abs(logits.mean((1, 2, 3)).numpy() - want["logits_mean"]).max() < 2e-4
    assert abs(logits.std((1, 2, 3)).numpy() - want["logits_std"]).max() < 2e-4
    fine = at(fine[want["fine"]["channels"]], want["voxels"][:3])
    assert abs(fine - want["fine"]["values"]).max() < 2e-4
    deep = at(deep[want["deep"]["channels"]], want["deep"]["voxels"])
    assert abs(deep - want["deep"]["values"]).max() < 2e-4


def test_text_embeddings_equal_openai_clip(tmp_path):
    """19 texts, whose token ids are stored, so that the merges file is not needed."""
    torch.save(release.fill(release.clip_shapes(), seed=1), tmp_path / "vit.pt")
    encoder = clip_text.load_text_encoder(tmp_path / "vit.pt")
    ids_of_text = dict(release.OUTPUTS["tokens"])
    texts = release.OUTPUTS["clip_text"]["texts"]
    tokens = torch.zeros(len(texts), clip_text.CONTEXT_LENGTH, dtype=torch.long)
    for n, text in enumerate(texts):
        tokens[n, :len(ids_of_text[text])] = torch.tensor(ids_of_text[text])
    with torch.no_grad():
        embeddings = encoder(tokens).numpy()
    assert abs(embeddings[:, ::EVERY] - release.OUTPUTS["clip_text"]["values"]).max() < 1e-4


@needs_shared
def test_tokens_equal_openai_clip():
    """With OpenAI's merges file, which the repository does not contain."""
    tokenizer = clip_text.Tokenizer(SHARED / "clip" / "bpe_simple_vocab_16e6.txt.gz")
    for text, ids in release.OUTPUTS["tokens"]:
        assert [tokenizer.start, *tokenizer.encode(text), tokenizer.end] == ids, text


@needs_shared
def test_the_stored_numbers_are_those_of_the_reference_files():
    """release.json is a part of the complete outputs."""
    for name in ("unet", "swinunetr"):
        shapes = json.loads((SHARED / "golden/state_dict_shapes.json").read_text())[name]
        assert {key: tuple(shape) for key, (_, shape) in shapes.items()} == release.SHAPES[name]
        whole = np.load(SHARED / f"golden/{name}_64x96x64_seed1.npz")
        want = release.OUTPUTS[name]
        stored = np.stack([whole["logits"][:, d // 8, h // 8, w // 8]
                           for d, h, w in want["voxels"]], axis=1)
        assert np.allclose(stored, want["logits"], rtol=1e-6)
