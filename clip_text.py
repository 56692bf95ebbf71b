"""CLIP's text side (Radford et al., 2021): tokenizer, transformer, weights, prompt -> w_k.

    python clip_text.py --out rows.pt                              the 32 classes of the paper
    python clip_text.py --classes liver "liver tumor" --template "A CT of a {}" --similarity
    python clip_text.py --rows txt_encoding.pth --similarity       rows you already have

Leans on nothing else of ours (labels.py only for the command). The rows are not normalised: the
controller was trained on them as they come (paper, Sec. 3.2).

N prompts   T tokens (77)   E embedding width (512)
"""
from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import http.client
import json
import math
import os
import pickle
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor, nn
from tqdm import tqdm

WEIGHTS = ("https://openaipublic.azureedge.net/clip/models/40d365715913c9da98579312b702a82c18be219cc"
           "2a73407c4526f58eba950af/ViT-B-32.pt",
           "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af")
MERGES = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
          "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
TEMPLATE = "A computerized tomography of a {}"        # V3 of the paper


# ---- tokenizer ---------------------------------------------------------------------------------
N_MERGES = 49408 - 2 * 256 - 2      # what single letters and the two marks leave of the vocabulary
_WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
                      r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def _byte_letters() -> dict[int, str]:
    """Every byte as a visible letter: printable ones stay, the others follow from U+0100 on."""
    stay = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in stay]
    return {**{b: chr(b) for b in stay}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class Tokenizer:
    """OpenAI's byte-pair encoding, read from its public merges file.

    A word's bytes are merged pair by pair, the pair that comes first in the file first; the last
    letter of a word carries the mark `</w>`.

    >>> Tokenizer(path).encode("a liver")               # doctest: +SKIP
    [320, 12639]
    """

    def __init__(self, merges_path: str | Path):
        try:
            raw = Path(merges_path).read_bytes()
            text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
            merges = [tuple(line.split()) for line in text.split("\n")[1:N_MERGES + 1]]
        except FileNotFoundError:
            raise FileNotFoundError(f"{merges_path}: no such merges file") from None
        except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error) as e:
            raise ValueError(f"{merges_path}: not a readable merges file ({e})") from None
        if len(merges) != N_MERGES or any(len(pair) != 2 for pair in merges):
            raise ValueError(f"{merges_path}: not CLIP's merges file: expected {N_MERGES} lines of "
                             f"two parts after the first line, got {len(merges)}")
        self.letters = _byte_letters()
        single = list(self.letters.values())
        vocabulary = [*single, *(s + "</w>" for s in single), *map("".join, merges),
                      "<|startoftext|>", "<|endoftext|>"]
        self.ids = {token: i for i, token in enumerate(vocabulary)}
        self.tokens = vocabulary
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = self.ids["<|startoftext|>"], self.ids["<|endoftext|>"]
        self._merge = lru_cache(1 << 16)(self._merge)

    def _merge(self, word: str) -> tuple[int, ...]:
        """One word of letters -> token ids."""
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return (self.ids[word],)
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:], strict=False),
                       key=lambda p: self.rank.get(p, math.inf))
            if pair not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                hit = tuple(parts[i:i + 2]) == pair
                merged.append("".join(pair) if hit else parts[i])
                i += 1 + hit
            parts = merged
        return tuple(self.ids[p] for p in parts)

    def encode(self, text: str) -> list[int]:
        """Token ids, without start and end."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = regex.sub(r"\s+", " ", text.strip()).strip().lower()
        words = ("".join(self.letters[b] for b in word.encode()) for word in _WORD.findall(text))
        return [i for word in words for i in self._merge(word)]

    def decode(self, ids) -> str:
        """The text of token ids; `</w>` becomes a space."""
        byte = {letter: b for b, letter in self.letters.items()}
        letters = "".join(self.tokens[int(i)] for i in ids)
        marks = letters.replace("</w>", " ")
        return b"".join(bytes([byte[c]]) if c in byte else c.encode() for c in marks).decode(
            "utf-8", errors="replace")

    def tokenize(self, texts: str | list[str], context_length: int = 77,
                 truncate: bool = False) -> Tensor:
        """texts -> (N, T) int64: start, ids, end, zeros.

        raises ValueError  if a text has more tokens than fit, unless `truncate` cuts it
        """
        texts = [texts] if isinstance(texts, str) else texts
        out = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(out, texts, strict=True):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length:
                if not truncate:
                    raise ValueError(f"prompt {text!r} has {len(ids)} tokens with start and end, "
                                     f"the limit is {context_length}; shorten it")
                ids = [*ids[:context_length - 1], self.end]
            row[:len(ids)] = torch.tensor(ids)
        return out


# ---- transformer -------------------------------------------------------------------------------
def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class TextEncoder(nn.Module):
    """Pre-norm causal transformer; the feature of the end-of-text token, projected.

    Defaults are ViT-B/32's. Every public CLIP has heads of 64 channels.
    """

    def __init__(self, *, vocabulary: int = 49408, context_length: int = 77, width: int = 512,
                 layers: int = 12, heads: int = 8, embed_dim: int = 512):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(context_length, width).normal_(0, 0.01))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, quick_gelu, batch_first=True,
                                       norm_first=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.token(tokens) + self.position[:T]                     # (N, T, width)
        ahead = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, src_mask=ahead, is_causal=True)               # (N, T, width)
        end = tokens.argmax(1)             # the end of text has the highest id of all tokens
        x = self.norm(x[torch.arange(len(x), device=x.device), end])   # (N, width)
        return self.projection(x)                                      # (N, E)


# ---- reading weights: nothing in a file is ever run ----------------------------------------------
class _Inert:
    """Stands for every class an archive names: keeps the attributes, runs nothing."""

    def __init__(self, *args):
        self.state = {}

    def __setstate__(self, state):
        self.state = state


class _ArchiveUnpickler(pickle.Unpickler):
    """data.pkl of a TorchScript archive: tensors become (storage, offset, size, stride)."""

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
        if module == "torch" and name.endswith("Storage"):
            return name
        return _Inert

    def persistent_load(self, pid):
        return pid[1], pid[2]                                          # type name, key


_STORAGE = {"HalfStorage": torch.float16, "FloatStorage": torch.float32,
            "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "BoolStorage": torch.bool}


def _read_torchscript(archive: zipfile.ZipFile, root: str, wanted) -> dict[str, Tensor]:
    """The tensors of a TorchScript module whose names `wanted` accepts."""
    found: dict[str, Tensor] = {}

    def walk(thing, prefix):
        for key, value in (thing.state.items() if isinstance(thing.state, dict) else ()):
            name = f"{prefix}{key}"
            if isinstance(value, _Inert):
                walk(value, name + ".")
            elif isinstance(value, tuple) and len(value) == 4 and wanted(name):
                (kind, storage), offset, size, stride = value
                flat = torch.frombuffer(bytearray(archive.read(f"{root}data/{storage}")),
                                        dtype=_STORAGE[kind])
                found[name] = flat.as_strided(size, stride, offset).clone()

    with archive.open(f"{root}data.pkl") as file:
        walk(_ArchiveUnpickler(file).load(), "")
    return found


_SAFE = {"F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64,
         "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def _read_safetensors(path: Path, wanted) -> dict[str, Tensor]:
    """8 bytes of header length, a JSON header, then raw little-endian tensors."""
    found = {}
    with open(path, "rb") as file:
        n, = struct.unpack("<Q", file.read(8))
        for name, about in json.loads(file.read(n)).items():
            if name != "__metadata__" and wanted(name):
                start, stop = about["data_offsets"]
                file.seek(8 + n + start)
                raw = bytearray(file.read(stop - start))
                if len(raw) != stop - start:
                    raise ValueError(f"cut off inside {name}")
                found[name] = torch.frombuffer(raw, dtype=_SAFE[about["dtype"]]).reshape(
                    about["shape"])
    return found


def _is_text(name: str) -> bool:
    name = name.removeprefix("module.")
    return not name.startswith(("visual.", "vision_model.", "visual_projection"))


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The text-side tensors of a weights file, by the names it has for them.

    The kind of file is found from its content: safetensors, TorchScript archive, or a state dict.
    raises FileNotFoundError, ValueError  in one line with the path
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if len(head) == 9 and head[8:] == b"{" and head[:2] != b"PK":
            return _read_safetensors(path, _is_text)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                pkl = next((n for n in names if n.endswith("/data.pkl")), None)
                if pkl and any("/code/" in n for n in names):
                    return _read_torchscript(archive, pkl.removesuffix("data.pkl"), _is_text)
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {k: v for k, v in state.items() if isinstance(v, Tensor) and _is_text(k)}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such weights file") from None
    except Exception as e:      # whatever a damaged file provokes in json, struct, zipfile, pickle
        reason = str(e).strip().split("\n")[0][:150]
        raise ValueError(f"{path}: not a readable weights file, or cut off ({reason})") from None


_FROM_OPENAI = (("token_embedding.weight", "token.weight"), ("positional_embedding", "position"),
                ("transformer.resblocks.", "layers."), (".attn.", ".self_attn."),
                (".ln_1.", ".norm1."), (".ln_2.", ".norm2."), (".mlp.c_fc.", ".linear1."),
                (".mlp.c_proj.", ".linear2."), ("ln_final.", "norm."))
_FROM_HF = (("text_model.", ""), ("embeddings.token_embedding.weight", "token.weight"),
            ("embeddings.position_embedding.weight", "position"), ("encoder.layers.", "layers."),
            (".layer_norm1.", ".norm1."), (".layer_norm2.", ".norm2."), (".mlp.fc1.", ".linear1."),
            (".mlp.fc2.", ".linear2."), ("final_layer_norm.", "norm."),
            ("text_projection.weight", "projection.weight"))


def load_text_encoder(path: str | Path) -> TextEncoder:
    """A CLIP weights file (OpenAI's or Hugging Face's) -> TextEncoder, float32, eval, frozen.

    Sizes are read off the tensors, so ViT-B/32, B/16, L/14 and their like all load.
    raises FileNotFoundError, ValueError  in one line with the path, and what is missing
    """
    raw = {k.removeprefix("module."): v for k, v in read_tensors(path).items()}
    openai = "token_embedding.weight" in raw
    if not openai and not any(k.endswith("embeddings.token_embedding.weight") for k in raw):
        raise ValueError(f"{path}: no CLIP text encoder in it: found {len(raw)} other tensors"
                         + (f", such as {next(iter(raw))}" if raw else ""))
    state = {}
    for name, tensor in raw.items():
        for old, new in _FROM_OPENAI if openai else _FROM_HF:
            name = name.replace(old, new)
        state[name] = tensor.float()
    if openai and "text_projection" in state:
        state["projection.weight"] = state.pop("text_projection").t()
    for name in [k for k in state if ".self_attn.q_proj." in k]:       # q, k, v apart: join them
        joined = name.replace("q_proj.", "in_proj_")
        parts = [state.pop(name.replace("q_proj", p), None) for p in ("q_proj", "k_proj", "v_proj")]
        if all(p is not None for p in parts):
            state[joined] = torch.cat(parts)
    layers = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("layers.")), default=-1)
    vocabulary, width = state["token.weight"].shape
    length = len(state["position"]) if "position" in state else 77
    embed = len(state["projection.weight"]) if "projection.weight" in state else width
    with torch.device("meta"):
        encoder = TextEncoder(vocabulary=vocabulary, context_length=length, width=width,
                              layers=layers, heads=max(1, width // 64), embed_dim=embed)
    wanted = encoder.state_dict()
    missing = sorted(set(wanted) - set(state))
    wrong = [k for k in wanted if k in state and wanted[k].shape != state[k].shape]
    if missing or wrong:
        raise ValueError(f"{path}: " + (f"missing {missing[:4]}" if missing else
                         f"{wrong[0]} has shape {tuple(state[wrong[0]].shape)}, expected "
                         f"{tuple(wanted[wrong[0]].shape)}"))
    encoder.load_state_dict({k: state[k].contiguous() for k in wanted}, assign=True)
    return encoder.eval().requires_grad_(False)


# ---- files from the network ----------------------------------------------------------------------
def cache_folder() -> Path:
    """Where OpenAI's own package keeps its files, so that an existing copy is found."""
    return Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fetch(url: str, digest: str, folder: Path | None = None, alternative: str = "") -> Path:
    """The file in the cache folder, downloaded on first use.

    A broken download leaves NAME.part and goes on from there next time; a file takes its name only
    after its SHA-256 was checked, so a good old file is never touched.
    raises OSError, ValueError  in one line: URL, expected path, what else can be done
    """
    path = (folder or cache_folder()) / url.rsplit("/", 1)[1]
    advice = f"put the file of {url} there yourself{alternative and ', or '}{alternative}"
    try:
        if path.is_file() and sha256(path) == digest:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        have = part.stat().st_size if part.is_file() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            reply = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as e:
            if e.code != 416:                       # 416: the part is already as long as the file
                raise
            reply = None
        if reply is not None:
            with reply, open(part, "ab" if reply.status == 206 else "wb") as file:
                have = have if reply.status == 206 else 0
                total = have + int(reply.headers.get("Content-Length") or 0)
                with tqdm(total=total or None, initial=have, desc=path.name, unit="B",
                          unit_scale=True) as bar:
                    while block := reply.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                    have = bar.n
            if have < total:
                raise OSError(f"broken off after {have} of {total} bytes; run again to go on")
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"{path}: cannot download it ({e}); {advice}") from None
    found = sha256(part)
    if found != digest:
        part.unlink()
        raise ValueError(f"{path}: the download has SHA-256 {found[:12]}..., expected "
                         f"{digest[:12]}...; it was thrown away: try again, or {advice}")
    os.replace(part, path)
    return path


# ---- prompt -> w -------------------------------------------------------------------------------
def _save(content, path: Path) -> None:
    """The whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except RuntimeError as e:                                          # of torch's zip writer
        raise OSError(f"{path}: cannot be written, is the disk full? ({e})") from None
    finally:
        part.unlink(missing_ok=True)


def encode_classes(names: list[str], template: str = TEMPLATE, *, weights: str | Path | None = None,
                   merges: str | Path | None = None) -> Tensor:
    """names -> w (K, E) float32, not normalised; `template` is a text with {} for the name.

    weights  a CLIP file; default OpenAI's ViT-B/32 from the cache folder, downloaded on first use
    Rows are kept in the cache folder by weights and prompt: a second call needs neither weights nor
    network. raises ValueError, OSError  in one line
    """
    if "{}" not in template:
        raise ValueError(f"prompt template {template!r} has no {{}} for the class name")
    prompts = [template.replace("{}", name) for name in names]
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such weights file")
    digest = WEIGHTS[1] if weights is None else sha256(Path(weights))
    store = cache_folder() / f"prompts-{digest[:16]}.pt"
    rows: dict[str, Tensor] = {}
    if store.exists():
        try:
            rows = torch.load(store, map_location="cpu", weights_only=True)
            rows = {str(k): v.float() for k, v in rows.items()}
        except Exception as e:
            raise ValueError(f"{store}: unreadable cache of prompts ({str(e)[:80]!r}); delete it"
                             ) from None
    todo = [p for p in dict.fromkeys(prompts) if p not in rows]
    if todo:
        path = weights or fetch(*WEIGHTS, alternative="pass --clip-weights FILE (ViT-B-32.pt or "
                                "Hugging Face's model.safetensors), or --text onehot or a file")
        tokenizer = Tokenizer(merges or fetch(*MERGES))
        encoder = load_text_encoder(path)
        with torch.no_grad():
            new = encoder(tokenizer.tokenize(todo, encoder.position.shape[0]))
        rows |= dict(zip(todo, new.clone(), strict=True))
        store.parent.mkdir(parents=True, exist_ok=True)
        _save({k: v.clone() for k, v in rows.items()}, store)
    return torch.stack([rows[p] for p in prompts])


def read_embeddings(path: str | Path) -> Tensor:
    """A file of rows (the released txt_encoding.pth, or what --out wrote) -> w (K, E) float32."""
    try:
        rows = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of text rows") from None
    except Exception as e:
        reason = str(e).strip().split("\n")[0][:150]
        raise ValueError(f"{path}: not a readable file of text rows ({reason})") from None
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(f"{path}: expected one tensor of rows (K, E), got a "
                         f"{type(rows).__name__} {tuple(getattr(rows, 'shape', ()))}")
    return rows.float()


def cosine(w: Tensor) -> Tensor:
    """w (K, E) -> (K, K) cosine similarities."""
    w = nn.functional.normalize(w.double(), dim=1)
    return (w @ w.t()).float()


def draw(names: list[str], w: Tensor, png: str | Path) -> None:
    """Heat map of the similarities and the rows on their first two principal axes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    c = cosine(w)
    fig = Figure(figsize=(17, 8), layout="constrained")
    FigureCanvasAgg(fig)
    left, right = fig.subplots(1, 2)
    image = left.imshow(c.numpy(), vmin=c.min(), vmax=1, aspect="auto")
    left.set_xticks(range(len(names)), names, rotation=90)
    left.set_yticks(range(len(names)), names)
    fig.colorbar(image, ax=left, shrink=0.7, label="cosine")
    unit = nn.functional.normalize(w.double(), dim=1)
    u, s, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    x, y = (u * s)[:, :2].t().numpy()
    right.scatter(x, y)
    for name, a, b in zip(names, x, y, strict=True):
        right.annotate(name, (a, b), xytext=(4, 3), textcoords="offset points", fontsize=9)
    right.set(xlabel="first principal axis", ylabel="second principal axis")
    fig.savefig(png, dpi=75)


def main(argv=None) -> int:
    import labels
    ap = argparse.ArgumentParser(description="Text rows of classes, and how alike they are.")
    ap.add_argument("--classes", nargs="+", default=[], metavar="NAME",
                    help="class names, or a class table (JSON); default: the 32 of the paper")
    ap.add_argument("--template", default="V3", help="V1, V2, V3 of the paper or a text with {}")
    ap.add_argument("--clip-weights", metavar="FILE", help="a CLIP file (default: download once)")
    ap.add_argument("--rows", metavar="FILE", help="take these rows instead of encoding")
    ap.add_argument("--out", metavar="FILE", help="write the rows (K, E) here")
    ap.add_argument("--similarity", action="store_true", help="print cosines, draw similarity.png")
    args = ap.parse_args(argv)
    table = [n for n in args.classes[:1] if n.endswith(".json")]
    classes = labels.load_classes(*table)
    if args.classes and not table:
        built_in = {c.name.lower(): c for c in classes}
        classes = tuple(built_in.get(n.lower(), labels.Class(n)) for n in args.classes)
    w = read_embeddings(args.rows) if args.rows else encode_classes(
        [c.sentence(args.template) for c in classes], "{}", weights=args.clip_weights)
    if len(w) != len(classes):
        raise ValueError(f"{args.rows}: {len(w)} rows for {len(classes)} classes")
    norms = w.norm(dim=1)
    print(f"{len(w)} rows of {w.shape[1]}, norms {norms.min():.2f} to {norms.max():.2f}")
    if args.out:
        _save(w.clone(), Path(args.out))
    if args.similarity:
        names = [c.name for c in classes]
        host = [max([names.index(p) for p in c.parents if p in names], default=i)
                for i, c in enumerate(classes)]
        order = sorted(range(len(names)), key=lambda i: (host[i], host[i] != i, i))
        names, w = [names[i] for i in order], w[order]
        for name, row in zip(names, cosine(w), strict=True):
            print(f"{name:28}" + " ".join(f"{v:4.2f}" for v in row.tolist()))
        draw(names, w, "similarity.png")
        print("written: similarity.png")
    return 0


if __name__ == "__main__":
    import labels
    sys.exit(labels.run(main))
