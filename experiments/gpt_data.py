"""Text that every machine has: the sources and docs of Python's standard library and installed packages.

One token a byte. The files, ordered by the hash of their contents, are joined and cut at a size; every
20th, by the same hash, is held out. The same files give the same tokens, and `Corpus.digest` tells whether
two machines had the same.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

END_OF_FILE = 256
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
SMALLEST_FILE, LARGEST_FILE = 512, 256 * 1024  # bytes; beyond it are stubs and tables of data
HELD_OUT_OF = 20
READ_AT_MOST = 160 * 1024 * 1024  # bytes of files read for the choice by hash


@dataclass(frozen=True)
class Corpus:
    """Tokens to train on and held-out ones, int16, and what they are made of."""

    train: torch.Tensor
    held_out: torch.Tensor
    digest: str
    files: int

    def facts(self) -> dict[str, object]:
        """For the result's JSON."""
        return {
            "sha256": self.digest,
            "files": self.files,
            "train_tokens": len(self.train),
            "held_out_tokens": len(self.held_out),
        }


def installed_roots() -> list[Path]:
    """The standard library's folder, then those of installed packages."""
    paths = sysconfig.get_paths()
    return list(dict.fromkeys(Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")))


def text_files(roots: Iterable[Path]) -> Iterator[Path]:
    """Text files below the roots in sorted order; a root inside another one comes only once, as itself."""
    roots = list(roots)
    for root in roots:
        for folder, folders, names in os.walk(root):
            here = Path(folder)
            folders[:] = sorted(n for n in folders if n != "__pycache__" and here / n not in roots)
            yield from (here / name for name in sorted(names) if name.endswith(SUFFIXES))


def load_corpus(roots: Iterable[Path], max_tokens: int) -> Corpus:
    """At most `max_tokens` tokens, held-out ones included.

    Raises:
        ValueError: the roots hold too little text.
    """
    contents: dict[bytes, bytes] = {}  # by hash: no file twice
    read = 0
    for path in text_files(roots):
        try:
            if not SMALLEST_FILE <= path.stat().st_size <= LARGEST_FILE:
                continue
            text = path.read_bytes()
            text.decode()
        except (OSError, UnicodeDecodeError):
            continue
        contents[hashlib.sha256(text).digest()] = text
        read += len(text)
        if read > READ_AT_MOST:
            break
    parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
    digest = hashlib.sha256()
    total = files = 0
    for key in sorted(contents):
        text = contents[key]
        if total + len(text) + 1 > max_tokens:
            break
        tokens = np.full(len(text) + 1, END_OF_FILE, dtype=np.int16)
        tokens[:-1] = np.frombuffer(text, dtype=np.uint8)
        parts[key[-1] % HELD_OUT_OF == 0].append(tokens)
        digest.update(key)
        total += len(tokens)
        files += 1
    if not parts[False] or not parts[True]:
        raise ValueError(
            f"the folders hold {len(contents)} files of text, too few to train and to validate; add others"
        )
    train, held_out = (torch.from_numpy(np.concatenate(parts[held])) for held in (False, True))
    return Corpus(train, held_out, digest.hexdigest(), files)


class Batches:
    """Batches of `batch` windows by number: an own shuffle of all windows every epoch, none twice in one."""

    def __init__(self, tokens: torch.Tensor, context: int, batch: int, seed: int) -> None:
        self.tokens, self.context, self.batch, self.seed = tokens, context, batch, seed
        self.windows = (len(tokens) - 1) // context
        self.in_epoch = self.windows // batch
        if self.in_epoch == 0:
            raise ValueError(
                f"{len(tokens)} tokens hold {self.windows} windows of {context}, less than a batch "
                f"of {batch}; pass a smaller batch or more text"
            )
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64, device="cpu")

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, the tokens that follow), (batch, context) int64 each."""
        epoch, place = divmod(index, self.in_epoch)
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(self.seed + epoch)
            order = torch.randperm(self.windows, generator=generator, dtype=torch.int64, device="cpu")
            self._order = order.to(self.tokens.device)
            self._epoch = epoch
        chosen = self._order[place * self.batch : (place + 1) * self.batch]
        steps = torch.arange(self.context + 1, dtype=torch.int64, device=self.tokens.device)
        places = chosen[:, None] * self.context + steps
        windows = self.tokens[places].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
