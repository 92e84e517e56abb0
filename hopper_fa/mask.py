"""Which keys a query row sees, as numbers: the one mask rule in Python; common/mask.h has it in C++."""

from dataclasses import dataclass

import torch

UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class KeyBounds:
    """Row i sees the keys from i + shift - left to i + shift + right, both included, that exist.

    Causal masks, sliding windows and diagonals that begin anywhere are values of it.

    Attributes:
        shift: row i's own key is i + shift.
        left, right: how many keys before and after its own key a row sees; may be negative; UNBOUNDED: all.
    """

    shift: int
    left: int
    right: int

    def first_key(self, row: int) -> int:
        """The first key that `row` sees if it exists, from 0 on."""
        return 0 if self.left == UNBOUNDED else max(0, row + self.shift - self.left)

    def end_key(self, row: int, seqlen_k: int) -> int:
        """One past the last key that `row` sees, 0 to seqlen_k; at most `first_key` where no key is seen."""
        if self.right == UNBOUNDED:
            return seqlen_k
        return min(seqlen_k, max(0, row + self.shift + self.right + 1))

    @property
    def hides_nothing(self) -> bool:
        return self.left == UNBOUNDED and self.right == UNBOUNDED


def key_bounds(
    causal: bool,
    window_size: tuple[int, int],
    seqlen_q: int,
    seqlen_k: int,
    diagonal_shift: int | None = None,
) -> KeyBounds:
    """What FlashAttention's arguments mean.

    Args:
        causal: right is 0, whatever the window says.
        window_size: (left, right), both included, negative where unbounded.
        diagonal_shift: row i's own key is i + diagonal_shift. None: seqlen_k - seqlen_q, the last row's own
            key is the last one (bottom-right aligned). 0: the first row's is the first (top-left).
    """
    left, right = (UNBOUNDED if side < 0 else side for side in window_size)
    shift = seqlen_k - seqlen_q if diagonal_shift is None else diagonal_shift
    return KeyBounds(shift, left, 0 if causal else right)


def hidden(bounds: KeyBounds, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether each of `rows` must not see each of `keys`.

    Args:
        rows, keys: int64 positions, (rows,) and (keys,).

    Returns:
        (rows, keys) bool.
    """
    distance = keys[None, :] - rows[:, None] - bounds.shift
    out = torch.zeros_like(distance, dtype=torch.bool)
    if bounds.left != UNBOUNDED:
        out |= distance < -bounds.left
    if bounds.right != UNBOUNDED:
        out |= distance > bounds.right
    return out
