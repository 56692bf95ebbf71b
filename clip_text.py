"""CLIP's text encoder (Radford et al., 2021): tokenizer, transformer, weights, prompts -> w.

    python clip_text.py --out rows.pt                              the 32 classes of the paper
    python clip_text.py --classes liver "liver tumor" --template "A CT of a {}" --similarity
    python clip_text.py --rows txt_encoding.pth --similarity       existing text embeddings

This file imports nothing else of ours; only the command at its end uses labels.py, and its picture
data.py. The text embeddings w_k are not normalised to unit length, because the controller of the
released models was trained with them as they come out of CLIP (paper, Sec. 3.2).

N prompts   T tokens of a prompt (77)   E width of a text embedding (512)   K classes
"""
from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import html
import http.client
import json
import math
import os
import pickle
import re
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:                # Windows: several processes may then do the same work
    fcntl = None

import ftfy
import regex
import torch
from torch import Tensor, nn
from tqdm import tqdm

# address and SHA-256 of OpenAI's files
WEIGHTS = ("https://openaipublic.azureedge.net/clip/models/40d365715913c9da98579312b702a82c18be219cc"
           "2a73407c4526f58eba950af/ViT-B-32.pt",
           "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af")
MERGES = ("https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
          "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
TEMPLATE = "A computerized tomography of a {}"        # V3 of the paper
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
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such merges file") from None
    except (OSError, EOFError, UnicodeDecodeError, gzip.zlib.error) as e:
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
        self._encode_word = lru_cache(maxsize=1 << 16)(self._encode_word)

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

    def tokenize(self, texts: str | list[str], context_length: int = CONTEXT_LENGTH,
                 truncate: bool = False) -> Tensor:
        """Texts -> (N, T) int64: start, token ids, end, then zeros.

        raises  ValueError  if a text has too many tokens, unless `truncate` cuts it
        """
        if isinstance(texts, str):
            texts = [texts]
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for n, text in enumerate(texts):
            ids = [self.start, *self.encode(text), self.end]
            if len(ids) > context_length:
                if not truncate:
                    raise ValueError(f"prompt {text!r} has {len(ids)} tokens with start and end, "
                                     f"the limit is {context_length}; shorten it")
                ids = [*ids[:context_length - 1], self.end]
            tokens[n, :len(ids)] = torch.tensor(ids)
        return tokens


# ---- transformer -------------------------------------------------------------------------------
def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, with which most models of open_clip were trained."""
    return nn.functional.gelu(x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class TextEncoder(nn.Module):
    """CLIP's text encoder: a transformer with causal attention and layer norm before each block.

    A text is represented by the feature of its end token, which attends to all tokens of the text,
    projected to the width of the text embeddings. The defaults are those of ViT-B/32.

    activation  "quick_gelu" or "gelu": a weights file does not tell with which it was trained
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
            x = layer(x, src_mask=is_later, is_causal=True)                 # (N, T, width)
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


def _read_torchscript(archive: zipfile.ZipFile, root: str, wanted) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive whose names `wanted` accepts.

    root  the folder in the archive that holds data.pkl
    """
    with archive.open(f"{root}data.pkl") as file:
        module = _ArchiveUnpickler(file).load()
    found = {}
    for name, stored in _stored_tensors(module):
        if wanted(name):
            storage_type, key = stored.storage
            raw = bytearray(archive.read(f"{root}data/{key}"))
            flat = torch.frombuffer(raw, dtype=_STORAGE_DTYPES[storage_type])
            found[name] = flat.as_strided(stored.size, stored.stride, stored.offset).clone()
    return found


_SAFETENSORS_DTYPES = {
    "F16": torch.float16, "F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}


def _read_safetensors(path: Path, wanted) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names `wanted` accepts.

    The file: 8 bytes, the length of the header; the header, JSON; the little-endian tensors.
    """
    found = {}
    with open(path, "rb") as file:
        header_length, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_length))
        for name, entry in header.items():
            if name == "__metadata__" or not wanted(name):
                continue
            start, stop = entry["data_offsets"]                        # counted from the header
            file.seek(8 + header_length + start)
            raw = bytearray(file.read(stop - start))
            if len(raw) != stop - start:
                raise ValueError(f"cut off inside {name}")
            flat = torch.frombuffer(raw, dtype=_SAFETENSORS_DTYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"])
    return found


def _is_text(name: str) -> bool:
    """Whether a tensor of a CLIP file is not part of its image encoder."""
    name = name.removeprefix("module.")
    return not name.startswith(("visual.", "vision_model.", "visual_projection"))


def _is_safetensors(path: Path) -> bool:
    """Whether a file starts like safetensors: 8 bytes, then JSON; a zip archive starts with PK."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and not start.startswith(b"PK")


def _why_unreadable(path, error: Exception) -> str:
    """In a few words, why torch.load(weights_only=True) refused a file."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))                    # colours of a terminal
    with open(path, "rb") as file:
        start = file.read(4)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused and start.startswith((b"PK", b"\x80\x02")):
        return (f"it holds {refused[1]}, which is not loaded, because only tensors, plain numbers "
                "and strings are safe to load; save the file again without it")
    if not start:
        return "the file is empty"
    if not start.startswith((b"PK", b"\x80\x02")):
        return "not a file that torch.save has written"
    detail = text.split("WeightsUnpickler error:")[-1]                 # what precedes it is advice
    return f"cut off or damaged ({' '.join(detail.split())[:120]})"


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file that are not the image encoder's, under the file's own names.

    Whether it is safetensors, a TorchScript archive or a state dict is found from its content.
    raises  FileNotFoundError, ValueError  in one line with the path
    """
    path = Path(path)
    try:
        if _is_safetensors(path):
            return _read_safetensors(path, _is_text)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such weights file") from None
    except OSError as e:
        raise OSError(f"{path}: cannot be read ({e})") from None
    except Exception as e:          # json and struct raise all kinds on a damaged file
        raise ValueError(f"{path}: not a readable weights file, or cut off ({e!r:.150})") from None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                pickles = [name for name in names if name.endswith("/data.pkl")]
                if pickles and any("/code/" in name for name in names):            # TorchScript
                    root = pickles[0].removesuffix("data.pkl")
                    return _read_torchscript(archive, root, _is_text)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:          # zipfile and pickle raise all kinds on a damaged file
        raise ValueError(f"{path}: not a readable weights file: {_why_unreadable(path, e)}"
                         ) from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: a weights file is a dict of tensors, this is "
                         f"{type(state).__name__}")
    return {name: tensor for name, tensor in state.items()
            if isinstance(tensor, Tensor) and _is_text(str(name))}


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


def _rename(tensors: dict[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a CLIP file -> float32, under the names of TextEncoder."""
    tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if "token_embedding.weight" in tensors:
        renames = _FROM_OPENAI
    elif tensors.keys() & {"text_model.embeddings.token_embedding.weight",
                           "embeddings.token_embedding.weight"}:
        renames = _FROM_HUGGING_FACE
    else:
        example = f", such as {next(iter(tensors))}" if tensors else ""
        raise ValueError(f"{path}: no CLIP text encoder in it: found {len(tensors)} other tensors"
                         f"{example}")
    state = {}
    for name, tensor in tensors.items():
        for theirs, ours in renames:
            name = name.replace(theirs, ours)
        state[name] = tensor.float()
    if renames is _FROM_OPENAI and "text_projection" in state:
        state["projection.weight"] = state.pop("text_projection").t()      # theirs is x @ weight
    return state


def _join_attention(state: dict[str, Tensor]) -> None:
    """Hugging Face keeps the projections to q, k and v apart; nn.MultiheadAttention joins them."""
    for name in [name for name in state if ".self_attn.q_proj." in name]:
        separate = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        if all(part in state for part in separate):
            joined = name.replace("q_proj.", "in_proj_")
            state[joined] = torch.cat([state.pop(part) for part in separate])


def find_activation(path: str | Path) -> str:
    """The activation of a CLIP weights file: "quick_gelu" or "gelu".

    The weights are the same for both, so it is read from what lies beside them: config.json, as
    Hugging Face writes it (hidden_act), or open_clip_config.json (quick_gelu). Without such a file
    it is QuickGELU, that of OpenAI's models; many models of open_clip (LAION) use GELU.

    raises  ValueError  if another activation is named
    """
    folder = Path(path).parent
    content = _read_json(folder / "config.json")
    text = content.get("text_config")
    name = text.get("hidden_act") if isinstance(text, dict) else content.get("hidden_act")
    if name is not None:
        if name not in ACTIVATIONS:
            raise ValueError(f"{folder / 'config.json'}: hidden_act is {name!r}, expected one of "
                             f"{list(ACTIVATIONS)}")
        return name
    settings = _read_json(folder / "open_clip_config.json").get("model_cfg")
    if isinstance(settings, dict):
        return "quick_gelu" if settings.get("quick_gelu") else "gelu"
    if re.search("laion|open_?clip", Path(path).name.lower()):
        print(f"note: {path}: taken for a model with QuickGELU; if it has GELU, put its "
              "open_clip_config.json or config.json beside it")
    return "quick_gelu"


def _read_json(path: Path) -> dict:
    """The JSON object in a file; empty if there is no such file, or something else in it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def load_text_encoder(path: str | Path, activation: str = "") -> TextEncoder:
    """A CLIP weights file of OpenAI or Hugging Face -> TextEncoder, float32, eval mode, frozen.

    The sizes are read from the tensors, so ViT-B/32, B/16, L/14 and others like them all load.

    activation  "quick_gelu" or "gelu"; "": see find_activation
    raises  FileNotFoundError, ValueError  in one line with the path, and what is missing
    """
    state = _rename(read_tensors(path), path)
    _join_attention(state)
    numbers = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
    vocabulary, width = state["token_embedding.weight"].shape
    positions, projection = state.get("position_embedding"), state.get("projection.weight")
    with torch.device("meta"):                     # no memory is filled only to be replaced
        encoder = TextEncoder(
            vocabulary=vocabulary,
            context_length=CONTEXT_LENGTH if positions is None else len(positions),
            width=width,
            layers=max(numbers, default=-1) + 1,
            heads=max(1, width // HEAD_WIDTH),
            embed_dim=width if projection is None else len(projection),
            activation=activation or find_activation(path))
    expected = encoder.state_dict()
    missing = sorted(set(expected) - set(state))
    if missing:
        raise ValueError(f"{path}: missing {missing[:4]}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{path}: {name} has shape {tuple(state[name].shape)}, expected "
                             f"{tuple(tensor.shape)}")
    encoder.load_state_dict({name: state[name].contiguous() for name in expected}, assign=True)
    return encoder.eval().requires_grad_(False)


# ---- downloads -----------------------------------------------------------------------------------
def cache_folder() -> Path:
    """The folder that OpenAI's own package uses, so that files already there are found."""
    return Path(os.environ.get("CLIP_CACHE") or Path.home() / ".cache" / "clip")


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@contextlib.contextmanager
def _one_process_at_a_time(path: Path):
    """Let the other processes wait that come here for the same path, those of torchrun for example.

    The operating system releases the lock of a process that ends in any way.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "wb") as file:
        with contextlib.suppress(OSError):               # a file system without locks
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(url: str, part: Path, name: str) -> None:
    """Download to the file `part`, continuing after the bytes that it already holds.

    name    shown in the progress bar
    raises  OSError, http.client.HTTPException
    """
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:       # part is already complete
            return
        raise
    continued = reply.status == HTTPStatus.PARTIAL_CONTENT
    if not continued:                                                  # the server starts over
        have = 0
    total = have + int(reply.headers.get("Content-Length") or 0)
    with reply, open(part, "ab" if continued else "wb") as file, \
            tqdm(total=total or None, initial=have, desc=name, unit="B", unit_scale=True) as bar:
        while block := reply.read(1 << 20):
            file.write(block)
            bar.update(len(block))
            have += len(block)
    if have < total:
        raise OSError(f"broken off after {have} of {total} bytes; run again to go on")


def fetch(url: str, digest: str, folder: Path | None = None, alternative: str = "") -> Path:
    """A file of the cache folder, downloaded on first use.

    A download that breaks off leaves NAME.part, and the next call continues it. The file gets its
    name only after its SHA-256 was checked, so a good file is never replaced by a bad one.

    alternative  what else the user can do, for the error message
    raises       OSError, ValueError  in one line with the URL, the path and what can be done
    """
    path = (folder or cache_folder()) / url.rsplit("/", 1)[1]
    part = path.with_name(path.name + ".part")
    advice = f"put the file of {url} there yourself"
    if alternative:
        advice += f", or {alternative}"
    try:
        if path.is_file() and sha256(path) == digest:
            return path
        with _one_process_at_a_time(path):
            if path.is_file() and sha256(path) == digest:        # another process was faster
                return path
            _download(url, part, path.name)
            found = sha256(part)
            if found == digest:
                os.replace(part, path)
                return path
            part.unlink()
    except (OSError, http.client.HTTPException) as e:
        raise OSError(f"{path}: cannot download it ({e}); {advice}") from None
    raise ValueError(f"{path}: the download has SHA-256 {found[:12]}..., expected "
                     f"{digest[:12]}...; it was thrown away: try again, or {advice}")


# ---- text embeddings -----------------------------------------------------------------------------
def _save(content, path: Path) -> None:
    """torch.save to a temporary file that is then renamed: path is written completely or not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.save(content, part)
        os.replace(part, path)
    except RuntimeError as e:                                          # from torch's zip writer
        raise OSError(f"{path}: cannot be written, is the disk full? ({e})") from None
    finally:
        part.unlink(missing_ok=True)


def _read_prompts(path: Path) -> dict[str, Tensor]:
    """The text embeddings of the prompts encoded before: {prompt: (E,)}."""
    if not path.exists():
        return {}
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {str(prompt): embedding.float() for prompt, embedding in content.items()}
    except Exception as e:
        raise ValueError(f"{path}: unreadable cache of prompts: {_why_unreadable(path, e)}; "
                         "delete it") from None


def _encode(prompts: list[str], weights: str | Path | None, merges: str | Path | None,
            activation: str) -> Tensor:
    """The text embeddings (N, E) of prompts that are not in the cache."""
    weights = weights or fetch(
        *WEIGHTS, alternative="pass --clip-weights FILE (ViT-B-32.pt or Hugging Face's "
        "model.safetensors); train.py also takes --text onehot, or --text FILE with embeddings")
    tokenizer = Tokenizer(merges or fetch(*MERGES))
    encoder = load_text_encoder(weights, activation)
    tokens = tokenizer.tokenize(prompts, context_length=len(encoder.position_embedding))
    with torch.no_grad():
        return encoder(tokens)


def weights_id(weights: str | Path | None = None) -> str:
    """What tells CLIP weights, together with their activation, from all others.

    weights  a CLIP file; None: OpenAI's ViT-B/32, which need not be there
    """
    if weights is None:
        return WEIGHTS[1][:16]
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such weights file")
    activation = find_activation(weights)
    suffix = "" if activation == "quick_gelu" else f"-{activation}"
    return sha256(weights)[:16] + suffix


def encode_classes(names: list[str], template: str = TEMPLATE, *, weights: str | Path | None = None,
                   merges: str | Path | None = None) -> Tensor:
    """The text embeddings of classes, w (K, E) float32, not normalised to unit length.

    template  a text with {} for the name
    weights   a CLIP file; None: OpenAI's ViT-B/32 from the cache folder, downloaded on first use.
              Its activation is QuickGELU, unless a file beside it says GELU (see find_activation)
    merges    the tokenizer's merges file; None: likewise
    raises    ValueError, OSError  in one line

    Text embeddings are kept in the cache folder, by weights and prompt, so that a second call needs
    neither the weights nor the network.
    """
    if "{}" not in template:
        raise ValueError(f"prompt template {template!r} has no {{}} for the class name")
    prompts = [template.replace("{}", name) for name in names]
    cache = cache_folder() / f"prompts-{weights_id(weights)}.pt"
    activation = "quick_gelu" if weights is None else find_activation(weights)
    embeddings = _read_prompts(cache)
    if not embeddings.keys() >= set(prompts):
        with _one_process_at_a_time(cache):
            embeddings = _read_prompts(cache)            # another process may have been faster
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in embeddings]
            if new:
                w = _encode(new, weights, merges, activation)
                for prompt, embedding in zip(new, w, strict=True):
                    embeddings[prompt] = embedding.clone()       # a view would save all of w
                _save(embeddings, cache)
    return torch.stack([embeddings[prompt] for prompt in prompts])


# ---- the origin of text embeddings ---------------------------------------------------------------
# What a checkpoint and a file of text embeddings record about them, as plain strings, is one of
#   {"kind": "onehot"}
#   {"kind": "clip", "weights": weights_id, "template": the text with {} for the class name, or ""
#                                            where each class has a prompt of its own}
#   {"kind": "file", "name": "rows.pt", "sha256": "..."}     a file that records no origin
MIN_COSINE = 0.5            # of two text embeddings of one class in one space. In that of ViT-B/32
                            # even different classes have more, in different spaces it is near 0
MAX_NORM_RATIO = 1.5        # of the norms of two such embeddings; the released ones differ by 1.2


class Rows(NamedTuple):
    """The text embeddings of classes, and where they come from."""
    names: list[str]       # of the K classes
    w: Tensor              # (K, E)
    origin: dict           # one of the above; {}: not known


def clip_origin(template: str, weights: str | Path | None = None) -> dict:
    return {"kind": "clip", "weights": weights_id(weights), "template": template}


def origin_of_checkpoint(content: dict) -> dict:
    """The origin of the text embeddings of a checkpoint.

    content  the rest that model.load_checkpoint returns; {}, that of a released file: ViT-B/32
    """
    if not content:
        return clip_origin(TEMPLATE)
    if "text" in content:
        return content["text"] if _is_origin(content["text"]) else {}
    config = content.get("config", {})             # written before checkpoints recorded the origin
    text = config.get("text", "")
    if text == "onehot":
        return {"kind": "onehot"}
    if text == "clip":
        origin = clip_origin(config.get("prompt_template", TEMPLATE))
        if config.get("clip_weights"):
            del origin["weights"]                  # some others than ViT-B/32
        return origin
    return {"kind": "file", "name": Path(text).name} if text else {}


def _is_origin(origin) -> bool:
    """Whether something read from a file has the form of an origin."""
    return isinstance(origin, dict) and (origin.get("kind") != "file" or "name" in origin)


def is_onehot(rows: Rows) -> bool:
    """Whether each text embedding has one number that is not 0, whatever file it comes from."""
    if rows.origin.get("kind") == "onehot":
        return True
    return len(rows.w) > 0 and bool(((rows.w != 0).sum(1) == 1).all())


def describe_origin(rows: Rows) -> str:
    """In a few words, for notes and error messages."""
    origin = rows.origin
    if is_onehot(rows):
        return "one-hot vectors"
    if origin.get("kind") == "clip":
        weights = f"weights {origin['weights']}" if "weights" in origin else "unknown weights"
        template = f", template {origin['template']!r}" if origin.get("template") else ""
        return f"CLIP embeddings ({weights}{template})"
    if origin.get("kind") == "file":
        return f"the text embeddings of {origin['name']}"
    return "text embeddings of unknown origin"


def check_origin(path: str | Path, trained: Rows, given: Rows, advice: str) -> str:
    """Whether the network of a checkpoint can be given other text embeddings than its own.

    trained  the text embeddings that the network was trained with
    given    others. Where both have a class of the same name, its two embeddings are compared
    advice   what the user can do, for the error message
    returns  one line for the user, where the two differ; "" where they do not
    raises   ValueError  if they cannot be of one space: one-hot and not one-hot, CLIP embeddings of
             different weights, or of a class in both, embeddings of low cosine or different norm
    """
    before, now = describe_origin(trained), describe_origin(given)
    both = f"{path}: was trained with {before}, now there are {now}"
    if is_onehot(trained) != is_onehot(given):
        raise ValueError(f"{both}, which mean nothing to it; {advice}")
    if trained.w.shape[1] != given.w.shape[1]:
        raise ValueError(f"{both}, of width {given.w.shape[1]} instead of {trained.w.shape[1]}; "
                         f"{advice}")
    weights = [rows.origin.get("weights") for rows in (trained, given)]
    if None not in weights and weights[0] != weights[1]:
        raise ValueError(f"{both}: embeddings of other weights mean nothing to it; {advice}")

    shared = [name for name in given.names if name in trained.names]
    if not shared:
        if None not in weights or is_onehot(trained):
            return ""
        return f"note: {both}; no class has both, so they cannot be compared"
    return _compare_classes(both, trained, given, shared, advice)


def _compare_classes(both: str, trained: Rows, given: Rows, shared: list[str], advice: str) -> str:
    """The last step of check_origin: compare the two embeddings of every class that has both.

    both    the beginning of the line for the user, which names the checkpoint and the two origins
    shared  names of the classes that have both
    """
    old = torch.stack([trained.w[trained.names.index(name)] for name in shared]).double().cpu()
    new = torch.stack([given.w[given.names.index(name)] for name in shared]).double().cpu()
    if torch.equal(old, new):
        return ""
    cosines = nn.functional.cosine_similarity(old, new)                # (shared,)
    ratios = new.norm(dim=1) / old.norm(dim=1)
    for name, value, ratio in zip(shared, cosines.tolist(), ratios.tolist(), strict=True):
        if value < MIN_COSINE or not 1 / MAX_NORM_RATIO <= ratio <= MAX_NORM_RATIO:
            raise ValueError(f"{both}: those of {name!r} have cosine {value:.2f} and norms in "
                             f"the ratio {ratio:.2f}, so they mean something else to it; {advice}")
    changed = int((old != new).any(1).sum())
    lowest = int(cosines.argmin())
    return (f"note: {both}; {changed} of {len(shared)} classes have another one than in training, "
            f"{shared[lowest]!r} the most different (cosine {cosines[lowest]:.2f})")


# ---- files of text embeddings --------------------------------------------------------------------
def save_rows(rows: Rows, path: str | Path) -> None:
    content = {"w": rows.w.clone(), "names": list(rows.names), "text": rows.origin}
    _save(content, Path(path))


def read_rows(path: str | Path, names: list[str]) -> Rows:
    """The text embeddings of classes from a file: that of --out, or one with a single tensor (K, E)
    in the order of the names, such as the released txt_encoding.pth.

    raises  FileNotFoundError, ValueError  in one line with the path, and which class is missing
    """
    content = _load_rows(path)
    if isinstance(content, Tensor):
        if len(content) != len(names):
            raise ValueError(f"{path}: {len(content)} text embeddings for {len(names)} classes")
        digest = sha256(path)
        return Rows(names, content.float(), {"kind": "file", "name": Path(path).name,
                                             "sha256": digest})
    missing = [name for name in names if name not in content["names"]]
    if missing:
        raise ValueError(f"{path}: no text embedding of {missing[:4]}; it has those of "
                         f"{content['names']}")
    w = content["w"][[content["names"].index(name) for name in names]]
    return Rows(names, w.float(), content["text"])


def read_embeddings(path: str | Path) -> Tensor:
    """All text embeddings (K, E) of a file, in its order (see read_rows)."""
    content = _load_rows(path)
    return (content if isinstance(content, Tensor) else content["w"]).float()


def _load_rows(path: str | Path) -> Tensor | dict:
    """The content of a file of text embeddings: a tensor, or the dict of save_rows."""
    if Path(path).suffix == ".json":
        raise ValueError(f"{path}: a JSON file of prompts is for infer.py --text; encode prompts "
                         "with clip_text.py --out")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file of text embeddings") from None
    except OSError as e:
        raise OSError(f"{path}: cannot be read ({e})") from None
    except Exception as e:
        raise ValueError(f"{path}: not a readable file of text embeddings: "
                         f"{_why_unreadable(path, e)}") from None
    w, names = content, None
    if isinstance(content, dict) and content.keys() >= {"w", "names", "text"}:
        w, names = content["w"], content["names"]
    if not isinstance(w, Tensor) or w.ndim != 2 or not w.is_floating_point():
        raise ValueError(f"{path}: expected one tensor of text embeddings (K, E), got a "
                         f"{type(w).__name__} {tuple(getattr(w, 'shape', ()))}")
    if names is not None:
        is_whole = isinstance(names, list) and _is_origin(content["text"])
        if not is_whole or len(names) != len(w):
            raise ValueError(f"{path}: not a whole file of text embeddings: {len(w)} of them, the "
                             f"names {names!r:.80}, the origin {content['text']!r:.80}")
    return content


# ---- the command ---------------------------------------------------------------------------------
def cosine(w: Tensor) -> Tensor:
    """w (K, E) -> (K, K) cosine similarities."""
    unit = nn.functional.normalize(w.double(), dim=1)
    return (unit @ unit.t()).float()


def _classes_of(arguments: list[str]):
    """The value of --classes -> a class table: a JSON file, or names, known or new."""
    import labels
    if arguments and arguments[0].endswith(".json"):
        return labels.load_classes(arguments[0])
    if not arguments:
        return labels.CLASSES
    built_in = {c.name.lower(): c for c in labels.CLASSES}
    return tuple(built_in.get(name.lower(), labels.Class(name)) for name in arguments)


def _lesions_after_organs(classes) -> list[int]:
    """The indices of the classes, a class with parents right after the last of its parents."""
    names = [c.name for c in classes]

    def sort_key(k):
        parents = [names.index(parent) for parent in classes[k].parents if parent in names]
        host = max(parents, default=k)
        return host, host != k, k

    return sorted(range(len(classes)), key=sort_key)


def _report_similarity(classes, w: Tensor, png: str) -> None:
    """Print the cosine similarities and draw them."""
    from support import pictures
    order = _lesions_after_organs(classes)
    names = [classes[k].name for k in order]
    w = w[order]
    for name, row in zip(names, cosine(w), strict=True):
        print(f"{name:28}" + " ".join(f"{value:4.2f}" for value in row.tolist()))
    pictures.draw_similarity(png, names, w)
    print(f"written: {png}")


def main(argv=None) -> int:
    import data
    import labels
    ap = argparse.ArgumentParser(
        description="Compute the text embeddings of classes, and show how similar they are.")
    ap.add_argument("--classes", nargs="+", default=[], metavar="NAME",
                    help="class names, or a class table (JSON); default: the 32 classes of the "
                    "paper")
    ap.add_argument("--template", default="V3",
                    help="prompt template: V1, V2 or V3 of the paper, or a text with {} for the "
                    "class name (default: V3)")
    ap.add_argument("--clip-weights", metavar="FILE",
                    help="a CLIP weights file (default: OpenAI's ViT-B/32, downloaded on first "
                    "use); taken for a model with QuickGELU, unless a config.json or "
                    "open_clip_config.json beside it says that it has GELU")
    ap.add_argument("--rows", metavar="FILE",
                    help="read the text embeddings from this file instead of encoding prompts")
    ap.add_argument("--out", metavar="FILE",
                    help="write the text embeddings (K, E), the names of their classes and their "
                    "origin to this file")
    ap.add_argument("--similarity", action="store_true",
                    help="print the cosine similarities and draw them to similarity.png")
    args = ap.parse_args(argv)
    inputs = [file for file in (args.rows, args.clip_weights, *args.classes) if file]
    outputs = [args.out] if args.out else []
    if args.similarity:
        outputs.append("similarity.png")
    data.refuse_overwriting_inputs(inputs, outputs, "--out")
    classes = _classes_of(args.classes)
    names = [c.name for c in classes]
    if args.rows:
        rows = read_rows(args.rows, names)
    else:
        prompts = [c.sentence(args.template) for c in classes]
        w = encode_classes(prompts, "{}", weights=args.clip_weights)
        template = labels.TEMPLATES.get(args.template, args.template)
        rows = Rows(names, w, clip_origin(template, args.clip_weights))
    w = rows.w
    norms = w.norm(dim=1)
    print(f"{len(w)} text embeddings of width {w.shape[1]}, norms {norms.min():.2f} to "
          f"{norms.max():.2f}")
    if args.out:
        save_rows(rows, args.out)
    if args.similarity:
        _report_similarity(classes, w, "similarity.png")
    return 0


if __name__ == "__main__":
    import labels
    sys.exit(labels.run(main))
