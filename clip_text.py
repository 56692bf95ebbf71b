"""CLIP's text encoder (Radford et al., 2021): tokenizer, transformer, weights, prompts -> w.

    python clip_text.py --out text.pt                              the 32 classes of the release
    python clip_text.py --classes liver "liver tumor" --template "A CT of a {}" --similarity
    python clip_text.py --text txt_encoding.pth --similarity       existing text embeddings

The functions need nothing else of this project; the command at the end uses labels.py and support/.
The text embeddings w_k are not normalised to unit length, because the controller of the released
models was trained with them as they come out of CLIP.

N prompts   T tokens of a prompt (77)   E width of a text embedding (512)   K classes
"""
from __future__ import annotations

import argparse
import gzip
import html
import http.client
import json
import math
import os
import pickle
import re
import struct
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex
import torch
from torch import Tensor, nn

# address and SHA-256 of OpenAI's files
WEIGHTS = ("https://openaipublic.azureedge.net/clip/models/40d365715913c9da98579312b702a82c18be219cc"
           "2a73407c4526f58eba950af/ViT-B-32.pt",
           "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af")
MERGES = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
          "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
TEMPLATE = "A computerized tomography of a {}"        # V3 of labels.TEMPLATES
CONTEXT_LENGTH = 77                                   # tokens of a prompt, start and end included
HEAD_WIDTH = 64                                       # channels of an attention head, in every CLIP


# ---- tokenizer ---------------------------------------------------------------------------------
START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408
# The vocabulary: 256 bytes, the same 256 at the end of a word, one token per merge, START and END.
N_MERGES = VOCABULARY_SIZE - 256 - 256 - 2
END_OF_WORD = "</w>"

# A text is cut into the special tokens, English contractions, runs of letters, single digits, and
# runs of other characters that are not white space.
_WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>"
                      r"|'s|'t|'re|'ve|'m|'ll|'d"
                      r"|\p{L}+"
                      r"|\p{N}"
                      r"|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


def _byte_letters() -> dict[int, str]:
    """A visible letter for each of the 256 bytes.

    The merges file is plain text, so it cannot hold blanks and control characters. Bytes that are
    printable in Latin-1 stand for themselves; the others, in order, are written as the letters from
    U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    for i, byte in enumerate(others):
        letters[byte] = chr(0x100 + i)
    return letters


def _read_merges(path: str | Path) -> list[tuple[str, str]]:
    """The pairs of OpenAI's merges file, plain or gzipped, the most frequent pair first."""
    try:
        raw = Path(path).read_bytes()
        if raw.startswith(b"\x1f\x8b"):                                # gzip
            raw = gzip.decompress(raw)
        lines = raw.decode("utf-8").split("\n")
    except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, gzip.zlib.error) as e:
        raise ValueError(f"{path}: not a readable merges file ({e})") from None
    merges = [tuple(line.split()) for line in lines[1:N_MERGES + 1]]   # line 0 is a version
    if len(merges) != N_MERGES or any(len(pair) != 2 for pair in merges):
        raise ValueError(f"{path}: not CLIP's merges file: expected {N_MERGES} lines of "
                         f"two parts after the first line, got {len(merges)}")
    return merges


def _merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of a pair of neighbours, from left to right.

    >>> _merge_pair(["l", "i", "v", "l", "i"], ("l", "i"))
    ['li', 'v', 'li']
    """
    merged = []
    i = 0
    while i < len(parts):
        if tuple(parts[i:i + 2]) == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return merged


class Tokenizer:
    """OpenAI's byte-pair encoding, read from its public merges file.

    A word starts as a sequence of bytes, the last of them marked as the end of the word. As long as
    two neighbours form a pair of the merges file, the pair that comes first in the file is merged.
    Each remaining part is one token.

    >>> Tokenizer(path).encode("a liver")               # doctest: +SKIP
    [320, 12639]
    """

    def __init__(self, merges_path: str | Path):
        merges = _read_merges(merges_path)
        self.letters = _byte_letters()
        letters = list(self.letters.values())
        self.tokens = [
            *letters,
            *(letter + END_OF_WORD for letter in letters),
            *(first + second for first, second in merges),
            START,
            END,
        ]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.start, self.end = self.ids[START], self.ids[END]

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Token ids of one word, which is spelt in byte letters."""
        if word in (START, END):
            return (self.ids[word],)
        parts = [*word[:-1], word[-1] + END_OF_WORD]
        while len(parts) > 1:
            pairs = zip(parts[:-1], parts[1:], strict=True)
            best = min(pairs, key=lambda pair: self.rank.get(pair, math.inf))
            if best not in self.rank:
                break
            parts = _merge_pair(parts, best)
        return tuple(self.ids[part] for part in parts)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without start and end."""
        text = ftfy.fix_text(text)                       # repair text decoded the wrong way
        text = html.unescape(html.unescape(text))        # twice, as OpenAI does
        text = regex.sub(r"\s+", " ", text.strip()).strip().lower()
        ids = []
        for word in _WORD.findall(text):
            letters = "".join(self.letters[byte] for byte in word.encode("utf-8"))
            ids.extend(self._encode_word(letters))
        return ids

    def decode(self, ids) -> str:
        """The text of token ids, with a space after every word."""
        byte_of_letter = {letter: byte for byte, letter in self.letters.items()}
        letters = "".join(self.tokens[int(i)] for i in ids).replace(END_OF_WORD, " ")
        raw = bytearray()
        for letter in letters:
            if letter in byte_of_letter:
                raw.append(byte_of_letter[letter])
            else:                                        # the space that replaced END_OF_WORD
                raw.extend(letter.encode("utf-8"))
        return raw.decode("utf-8", errors="replace")

    def tokenize(self, texts: str | list[str], context_length: int = CONTEXT_LENGTH) -> Tensor:
        """Texts -> (N, T) int64: start, token ids, end, then zeros.

        raises  ValueError  if a text has too many tokens
        """
        if isinstance(texts, str):
            texts = [texts]
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for n, text in enumerate(texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length:
                raise ValueError(f"prompt {text!r} has {len(ids)} tokens with start and end, the "
                                 f"limit is {context_length}; shorten it")
            tokens[n, :len(ids)] = torch.tensor(ids)
        return tokens


# ---- transformer -------------------------------------------------------------------------------
def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


# of CLIP, and of most models of open_clip
ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": nn.functional.gelu}


class TextEncoder(nn.Module):
    """CLIP's text encoder: a transformer with causal attention and layer norm before each block.

    A text is represented by the feature of its end token, which attends to all tokens of the text,
    projected to the width of the text embeddings. The defaults are those of ViT-B/32.

    activation  "quick_gelu" or "gelu"
    """

    def __init__(self, *, vocabulary: int = VOCABULARY_SIZE, context_length: int = CONTEXT_LENGTH,
                 width: int = 512, layers: int = 12, heads: int = 8, embed_dim: int = 512,
                 activation: str = "quick_gelu"):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Parameter(torch.empty(context_length, width).normal_(0, 0.01))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model=width, nhead=heads, dim_feedforward=4 * width,
                                       dropout=0.0, activation=ACTIVATIONS[activation],
                                       batch_first=True, norm_first=True)
            for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        N, T = tokens.shape
        x = self.token_embedding(tokens) + self.position_embedding[:T]      # (N, T, width)
        # (T, T), True where attention is forbidden: token i must not see a token j > i
        is_later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(diagonal=1)
        for layer in self.layers:
            x = layer(x, src_mask=is_later)                                 # (N, T, width)
        end = tokens.argmax(dim=1)             # (N,) END has the largest id of the vocabulary
        x = x[torch.arange(N, device=x.device), end]                        # (N, width)
        return self.projection(self.norm(x))                                # (N, E)


# ---- reading weights: no code in a file is ever run ----------------------------------------------
class _StoredTensor(NamedTuple):
    """Where a tensor lies in a TorchScript archive."""
    storage: tuple[str, str]       # its type, such as HalfStorage, and its file below data/
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Inert:
    """Stands in for every class that an archive names: keeps the attributes, runs no code."""

    def __init__(self, *args):
        self.state = {}

    def __setstate__(self, state):
        self.state = state


class _ArchiveUnpickler(pickle.Unpickler):
    """Reads data.pkl of a TorchScript archive: modules become _Inert, tensors _StoredTensor."""

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _StoredTensor(storage, offset, size,
                                                                           stride)
        if module == "torch" and name.endswith("Storage"):
            return name
        return _Inert

    def persistent_load(self, pid):
        _, storage_type, key, *_ = pid             # ("storage", type, key, device, length)
        return storage_type, key


_STORAGE_DTYPES = {
    "HalfStorage": torch.float16, "FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def _stored_tensors(module: _Inert, prefix: str = ""):
    """(name, _StoredTensor) of every tensor in a module and its submodules."""
    if not isinstance(module.state, dict):
        return
    for key, value in module.state.items():
        if isinstance(value, _Inert):
            yield from _stored_tensors(value, f"{prefix}{key}.")
        elif isinstance(value, _StoredTensor):
            yield f"{prefix}{key}", value


def _is_not_image(name: str) -> bool:
    """Whether a tensor of a CLIP file is not part of its image encoder."""
    name = name.removeprefix("module.")
    return not name.startswith(("visual.", "vision_model.", "visual_projection"))


def _read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive but for the image encoder's."""
    root = archive.namelist()[0].split("/")[0]             # the folder that holds everything
    with archive.open(f"{root}/data.pkl") as file:
        module = _ArchiveUnpickler(file).load()
    found = {}
    for name, stored in _stored_tensors(module):
        if _is_not_image(name):
            storage_type, key = stored.storage
            raw = bytearray(archive.read(f"{root}/data/{key}"))
            flat = torch.frombuffer(raw, dtype=_STORAGE_DTYPES[storage_type])
            found[name] = flat.as_strided(stored.size, stored.stride, stored.offset).clone()
    return found


_SAFETENSORS_DTYPES = {
    "F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file but for the image encoder's.

    The file: 8 bytes, the length of the header; the header, JSON; the little-endian tensors.
    """
    found = {}
    with open(path, "rb") as file:
        header_length, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_length))
        for name, entry in header.items():
            if name == "__metadata__" or not _is_not_image(name):
                continue
            start, stop = entry["data_offsets"]                        # counted from the header
            file.seek(8 + header_length + start)
            raw = bytearray(file.read(stop - start))
            flat = torch.frombuffer(raw, dtype=_SAFETENSORS_DTYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"])
    return found


def _one_line(error: Exception) -> str:
    """What torch.load or load_state_dict says about a file, in one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))                   # colours of a terminal
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it holds {refused[1]}; only tensors, numbers and strings are loaded"
    text = text.split("WeightsUnpickler error:")[-1].strip()           # what precedes it is advice
    lines = [textwrap.shorten(line, 200, placeholder=" ...") for line in text.splitlines()[:4]]
    return " ".join([f"{type(error).__name__}:", *lines])


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file that are not the image encoder's, under the file's own names.

    Whether it is safetensors, a TorchScript archive or a state dict is found from its content.
    raises  OSError, ValueError  in one line with the path
    """
    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"      # 8 bytes, then JSON
        if is_safetensors:
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any("/code/" in name for name in archive.namelist()):           # TorchScript
                    return _read_torchscript(archive)
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = content.get("state_dict", content)
        return {name: tensor for name, tensor in state.items()
                if isinstance(tensor, Tensor) and _is_not_image(name)}
    except OSError as e:
        raise OSError(f"{path}: cannot be read ({e.strerror or e})") from None
    except Exception as e:          # json, struct, zipfile and pickle raise all kinds
        raise ValueError(f"{path}: not a readable weights file, or cut off ({_one_line(e)})"
                         ) from None


# Parts of a public name -> the same part in TextEncoder, replaced one after the other.
_FROM_OPENAI = (
    ("positional_embedding",   "position_embedding"),
    ("transformer.resblocks.", "layers."),
    (".attn.",                 ".self_attn."),
    (".ln_1.",                 ".norm1."),
    (".ln_2.",                 ".norm2."),
    (".mlp.c_fc.",             ".linear1."),
    (".mlp.c_proj.",           ".linear2."),
    ("ln_final.",              "norm."),
)
_FROM_HUGGING_FACE = (
    ("text_model.",                          ""),
    ("embeddings.token_embedding.weight",    "token_embedding.weight"),
    ("embeddings.position_embedding.weight", "position_embedding"),
    ("encoder.layers.",                      "layers."),
    (".layer_norm1.",                        ".norm1."),
    (".layer_norm2.",                        ".norm2."),
    (".mlp.fc1.",                            ".linear1."),
    (".mlp.fc2.",                            ".linear2."),
    ("final_layer_norm.",                    "norm."),
    ("text_projection.weight",               "projection.weight"),
)


def _rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a CLIP file -> float32, under the names of TextEncoder."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    is_openai = "token_embedding.weight" in tensors
    renames = _FROM_OPENAI if is_openai else _FROM_HUGGING_FACE
    state = {}
    for name, tensor in tensors.items():
        if is_openai and name == "text_projection":
            name, tensor = "projection.weight", tensor.t()             # theirs is x @ weight
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        state[name] = tensor.float().contiguous()
    return state


def _join_attention(state: dict[str, Tensor]) -> None:
    """Hugging Face keeps the projections to q, k and v apart; nn.MultiheadAttention joins them."""
    for name in [name for name in state if ".q_proj." in name]:
        separate = [state.pop(name.replace("q_proj", part))
                    for part in ("q_proj", "k_proj", "v_proj")]
        state[name.replace("q_proj.", "in_proj_")] = torch.cat(separate)


def load_text_encoder(path: str | Path, activation: str = "quick_gelu") -> TextEncoder:
    """A CLIP weights file of OpenAI or Hugging Face -> TextEncoder, float32, eval mode, frozen.

    The sizes are read from the tensors, so ViT-B/32, B/16, L/14 and others like them all load.

    activation  which the weights were trained with, as the file does not say it: "quick_gelu" for
                OpenAI's models, "gelu" for most of open_clip's
    raises      OSError, ValueError  in one line with the path, and what is missing
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    state = _rename(read_tensors(path))
    try:
        _join_attention(state)
        vocabulary, width = state["token_embedding.weight"].shape
        layers = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
        with torch.device("meta"):                 # no memory is filled only to be replaced
            encoder = TextEncoder(
                vocabulary=vocabulary,
                context_length=len(state["position_embedding"]),
                width=width,
                layers=max(layers) + 1,
                heads=max(1, width // HEAD_WIDTH),
                embed_dim=len(state["projection.weight"]),
                activation=activation)
        # Files also hold what is no part of a text encoder, such as logit_scale
        own = {name: state[name] for name in encoder.state_dict() if name in state}
        encoder.load_state_dict(own, assign=True)
    except Exception as e:          # PyTorch refuses odd sizes with all kinds of errors
        raise ValueError(f"{path}: not a CLIP text encoder ({_one_line(e)})") from None
    return encoder.eval().requires_grad_(False)


# ---- downloads -----------------------------------------------------------------------------------
def cache_folder() -> Path:
    """The folder that OpenAI's own package uses, so that files already there are found."""
    return Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")


def fetch(url: str, digest: str) -> Path:
    """A file of the cache folder, downloaded on first use.

    A download gets its name only after its SHA-256 was checked, so a file that is there is used
    without reading all of it again. Several processes that download at once do not disturb each
    other: each writes a temporary file of its own.

    raises  OSError  in one line with the URL, the path and what the user can do
    """
    path = cache_folder() / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest)
    except (OSError, RuntimeError, http.client.HTTPException) as e:    # RuntimeError: another hash
        raise OSError(f"{path}: cannot download {url} ({_one_line(e)}); put the file there "
                      "yourself, or do without: --clip-weights FILE names other CLIP weights, "
                      "--text FILE embeddings of clip_text.py --out, and train.py --text onehot "
                      "needs none") from None
    return path


# ---- text embeddings -----------------------------------------------------------------------------
def encode_classes(names: list[str], template: str = TEMPLATE, *, weights: str | Path | None = None,
                   merges: str | Path | None = None, activation: str = "quick_gelu") -> Tensor:
    """The text embeddings of classes, w (K, E) float32, not normalised to unit length.

    template    a text with {} for the name
    weights     a CLIP file; None: OpenAI's ViT-B/32 from the cache folder, downloaded on first use
    merges      the tokenizer's merges file; None: likewise
    activation  that of the weights, see load_text_encoder
    raises      ValueError, OSError  in one line
    """
    if "{}" not in template:
        raise ValueError(f"prompt template {template!r} has no {{}} for the class name")
    prompts = [template.replace("{}", name) for name in names]
    encoder = load_text_encoder(weights or fetch(*WEIGHTS), activation)
    tokenizer = Tokenizer(merges or fetch(*MERGES))
    tokens = tokenizer.tokenize(prompts, context_length=len(encoder.position_embedding))   # (K, T)
    return encoder(tokens)                                                                 # (K, E)


# ---- files of text embeddings --------------------------------------------------------------------
def read_embeddings(path: str | Path, names: list[str]) -> Tensor:
    """The text embeddings (K, E) of classes, from the file of --out, or from one with a single
    tensor (K, E) in the order of the names, such as the released txt_encoding.pth.

    raises ValueError  in one line with the path, and which class is missing
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                       # torch raises all kinds on a damaged file
        raise ValueError(f"{path}: not a readable file of text embeddings: "
                         f"{_one_line(e)}") from None
    if isinstance(content, Tensor):
        content = {"names": names, "w": content}
    if not isinstance(content, dict) or not content.keys() >= {"names", "w"}:
        raise ValueError(f"{path}: expected the text embeddings that clip_text.py --out writes, or "
                         f"one tensor (K, E), got {type(content).__name__}")
    stored, w = content["names"], content["w"]
    if w.ndim != 2 or len(w) != len(stored):
        raise ValueError(f"{path}: expected {len(stored)} text embeddings ({len(stored)}, E), got "
                         f"{tuple(w.shape)}")
    missing = [name for name in names if name not in stored]
    if missing:
        raise ValueError(f"{path}: no text embedding of {missing[:4]}; it has those of {stored}")
    return w[[stored.index(name) for name in names]].float()


# ---- the command ---------------------------------------------------------------------------------
def cosine(w: Tensor) -> Tensor:
    """w (K, E) -> (K, K) cosine similarities."""
    unit = nn.functional.normalize(w.double(), dim=1)
    return (unit @ unit.t()).float()


def _classes_of(arguments: list[str]):
    """The value of --classes -> a class table: a JSON file, or names, known or new."""
    import labels
    from support import class_tables
    if arguments and arguments[0].endswith(".json"):
        return class_tables.load_classes(arguments[0])
    if not arguments:
        return labels.CLASSES
    built_in = {c.name.lower(): c for c in labels.CLASSES}
    return tuple(built_in.get(name.lower(), labels.Class(name)) for name in arguments)


def main(argv=None) -> int:
    from support import pictures, results, transfer
    ap = argparse.ArgumentParser(
        description="Compute the text embeddings of classes, and show how similar they are.")
    ap.add_argument("--classes", nargs="+", default=[], metavar="NAME",
                    help="class names, or a class table (JSON); default: the 32 classes of the "
                    "release")
    ap.add_argument("--template", default="V3",
                    help="prompt template: V1, V2 or V3, or a text with {} for the "
                    "class name (default: V3)")
    ap.add_argument("--clip-weights", metavar="FILE",
                    help="a CLIP weights file of a model with QuickGELU (default: OpenAI's "
                    "ViT-B/32, downloaded on first use)")
    ap.add_argument("--text", metavar="FILE",
                    help="read the text embeddings from this file instead of encoding prompts")
    ap.add_argument("--out", metavar="FILE",
                    help="write the text embeddings (K, E) and the names of their classes to this "
                    "file")
    ap.add_argument("--similarity", action="store_true",
                    help="print the cosine similarities and draw them to similarity.png")
    args = ap.parse_args(argv)
    inputs = [file for file in (args.text, args.clip_weights, *args.classes) if file]
    outputs = [args.out] if args.out else []
    if args.similarity:
        outputs.append("similarity.png")
    results.refuse_overwriting_inputs(inputs, outputs, "--out")
    classes = _classes_of(args.classes)
    names = [c.name for c in classes]
    if args.text:
        w = read_embeddings(args.text, names)
    else:
        prompts = [c.sentence(args.template) for c in classes]
        w = encode_classes(prompts, "{}", weights=args.clip_weights)
    norms = w.norm(dim=1)
    print(f"{len(w)} text embeddings of width {w.shape[1]}, norms {norms.min():.2f} to "
          f"{norms.max():.2f}")
    if args.out:
        transfer.save_text(args.out, names, w)
    if args.similarity:
        pictures.report_similarity("similarity.png", classes, w)
    return 0


if __name__ == "__main__":
    from support import processes
    sys.exit(processes.run(main))
