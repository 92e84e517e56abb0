"""What FP8 attention does to its inputs and sums, as one object."""

import functools
import json
import math
from dataclasses import dataclass, replace

from hopper_fa.arguments import as_flag, as_float, as_int, as_text

Q_BLOCK = 64  # query rows that share a "block" scale: those of one warpgroup
K_BLOCK = 128  # keys that share a "block" scale, and keys a step of the FP8 kernel at every head dim
FLUSH_INTERVAL, SMOOTH_FLUSH_INTERVAL = 16, 32  # key blocks, see Fp8Recipe.interval
# Offset and threshold of lazy rescaling, with exact exponentials and without: see Fp8Recipe.p_range.
LAZY_RANGE, LINEAR_RANGE = (6.0, 2.8), (8.0, 0.8)
E4M3_MAX = 448.0
INT8_MAX = 127.0

_CHOICES = {
    "qk_dtype": ("e4m3", "int8"),
    "q_granularity": ("tensor", "group", "head", "block", "token"),
    "k_granularity": ("none", "tensor", "head", "block", "token"),
    "v_granularity": ("none", "tensor", "head", "channel"),
    "rotation": ("none", "hadamard"),
    "row_sum": ("product", "fp32"),
}
_FLAGS = ("smooth_k", "smooth_q", "smooth_v", "compensate_v", "sample_stats")


@dataclass(frozen=True)
class Fp8Recipe:
    """How Q, K and V become 8-bit numbers, and how P and the sums are formed. V and P are always e4m3.

    NumPy's numbers become Python's: equal recipes have one hash and one text.

    Attributes:
        qk_dtype: of Q and K: "e4m3" or "int8" (same speed on the tensor cores; sums of int8 are exact).
        q_granularity: which elements of Q share a scale: "tensor" (all), "group" (batch entry and key/value
            head, so all query heads that read it: FlashAttention-3's), "head" (batch entry and query head),
            "block" (of a head, Q_BLOCK rows) or "token" (each row).
        k_granularity: "none" (scale 1, e4m3 only: K is rotated and rounded, and saturates at 448), "tensor",
            "head", "block" (K_BLOCK keys) or "token".
        v_granularity: "none" (scale 1: V is only rounded, and saturates at 448), "tensor", "head", "channel".
        rotation: "hadamard" multiplies Q and K by one random orthogonal matrix, which spreads outliers over
            the channels and leaves q . k as it was.
        rotation_seed: of the random signs in that matrix, from -2**63 to 2**64 - 1.
        smooth_k: subtract K's mean over the keys of a head (see sample_stats). Exact: it shifts all scores of
            a row alike.
        smooth_q: subtract Q's mean over the rows of a head. What that takes out of the scores, a number a
            key, is added to them in float32.
        smooth_v: subtract V's mean over the keys of a head, and add it to the output. Exact.
        compensate_v: add the mean over the keys of V's rounding error to the output, channel by channel. The
            wider the attention of a row, the more of what rounding V did to it that undoes.
        sample_stats: the means that smoothing subtracts, and the channel maxima of V, are taken over a sample
            of the tokens (see `stats_shift`, `v_stats_shift`; spread over the sequence by
            `token_stats.sampled_tokens`), so that K and V are read once and not twice. Smoothing is exact
            with any vector. A channel of V whose other tokens exceed what its scale leaves room for gets the
            scale of its true maximum, and is read again. Where channels of V share a scale, all tokens count.
        linear_exp2: P not by exp2 and rounding but by its e4m3 code, which is linear in the exponent between
            powers of two (Schraudolph 1999, cutlass_kernels/common/exp2_linear.h): another -3.9 to 2.0% of
            error in P, and what is below 2**-6.9 is 0, where it is below 2**-10 otherwise. None: where that
            is the faster kernel, see `has_linear_exp2`.
        p_offset: P is exp2(score - maximum + p_offset): the higher, the fewer small P become 0. None, with
            rescale_threshold: as `p_range` says.
        rescale_threshold: growth of the row maximum, in log2, that the output is not yet rescaled for; 0
            rescales at every growth. The higher, the more blocks the kernel needs no row's maximum of.
            p_offset + rescale_threshold must not exceed log2(448) = 8.807. None: as p_offset.
        accumulation: the tensor core adds with 13 fraction bits and cuts the rest off. Every `accumulation`
            key blocks of K_BLOCK, counted from key 0, its sum is moved to float32 and starts again from zero,
            row sums as a product in every block; 0: never. None: as the fastest kernel, see `interval`.
        row_sum: what P V is divided by. "product": the same product with a column of ones, so that the
            rounding of P and the tensor core's cut are in numerator and denominator alike. "fp32": the
            float32 sum of the unrounded P (FlashAttention-3).

    Raises:
        TypeError: a field is of another type. NOTE: 0 and 1 are no bools, and 1.0 is no int.
        ValueError: a field has no such value, or P could exceed 448.
    """

    qk_dtype: str = "e4m3"
    q_granularity: str = "block"
    k_granularity: str = "block"
    v_granularity: str = "channel"
    rotation: str = "none"
    rotation_seed: int = 0
    smooth_k: bool = False
    smooth_q: bool = False
    smooth_v: bool = False
    compensate_v: bool = False
    sample_stats: bool = False
    linear_exp2: bool | None = False
    p_offset: float | None = 8.0
    rescale_threshold: float | None = 0.0
    accumulation: int | None = None
    row_sum: str = "product"

    def __post_init__(self) -> None:
        fields = self._checked_fields()
        # NOTE: the text is made here, as torch.compile can read it as a constant, and trace no more.
        vars(self).update(fields, _text=json.dumps(fields))

    def _checked_fields(self) -> dict[str, str | bool | int | float | None]:
        """All fields as Python's own types, so that equal recipes have equal texts.

        Raises:
            TypeError, ValueError: see the class.
        """
        fields = dict(vars(self))
        for name, choices in _CHOICES.items():
            if type(fields[name]) is not str or fields[name] not in choices:
                fields[name] = as_text(name, fields[name], choices)
        for name in _FLAGS:
            if fields[name] is not True and fields[name] is not False:
                fields[name] = as_flag(name, fields[name])
        fields["linear_exp2"] = as_flag("linear_exp2", self.linear_exp2, optional=True)
        fields["rotation_seed"] = seed = as_int("rotation_seed", self.rotation_seed)
        fields["accumulation"] = accumulation = as_int("accumulation", self.accumulation, optional=True)
        for name in ("p_offset", "rescale_threshold"):
            value = as_float(name, fields[name], optional=True)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(
                    f"{name} is {value}; it must be finite and at least 0; pass another or None."
                )
            fields[name] = value if value is None else abs(value)  # -0.0 is 0.0, also as a text
        if not -(2**63) <= seed < 2**64:
            raise ValueError(
                f"rotation_seed is {seed}; it must be from -2**63 to 2**64 - 1, as torch.Generator takes it; "
                "pass another."
            )
        if fields["k_granularity"] == "none" and fields["qk_dtype"] != "e4m3":
            raise ValueError(
                f'k_granularity is "none" and qk_dtype {self.qk_dtype!r}; only e4m3 can do without a scale; '
                'pass qk_dtype "e4m3", or another k_granularity.'
            )
        if accumulation is not None and not 0 <= accumulation < 2**31:
            raise ValueError(
                f"accumulation is {accumulation}; it must be a number of key blocks below 2**31, 0 for "
                "never, or None for the kernel's own; pass another."
            )
        p_offset, threshold = fields["p_offset"], fields["rescale_threshold"]
        if (p_offset is None) != (threshold is None):
            raise ValueError(
                f"p_offset is {p_offset} and rescale_threshold {threshold}; one is None without the other; "
                "pass both or neither."
            )
        if p_offset is not None and not p_offset + threshold <= math.log2(E4M3_MAX):
            raise ValueError(
                f"p_offset {p_offset} and rescale_threshold {threshold} let P reach "
                f"2**{p_offset + threshold:g}; e4m3 ends at 448 = 2**8.807; lower one."
            )
        return fields

    def to_text(self) -> str:
        """All fields as JSON, which `from_text` takes back: operators have no arguments of other types."""
        return self._text

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_text(text: str) -> "Fp8Recipe":
        """The recipe whose `to_text` this is."""
        return Fp8Recipe(**json.loads(text))

    @property
    def has_key_vectors(self) -> bool:
        """Whether every key has a scale of its own, or an addend to its scores."""
        return self.k_granularity == "token" or self.smooth_q

    def stats_shift(self, seqlen: int) -> int:
        """log2 of the neighbouring tokens of which the means of Q and K take one; 0: they take all.

        With sample_stats as many as leave 128 tokens of `seqlen`, but at most 64.
        """
        return min(6, max(1, seqlen // 128).bit_length() - 1) if self.sample_stats else 0

    def v_stats_shift(self, seqlen: int) -> int:
        """The same for the mean and maxima of V, which decide more: 8, where that leaves 128 tokens.

        And more, up to 64, where 1024 tokens are left. 0 where channels share a scale.
        """
        if self.v_granularity in ("tensor", "head"):
            return 0
        of_1024 = max(1, seqlen // 1024).bit_length() - 1
        return min(self.stats_shift(seqlen), max(3, of_1024))

    def interval(self, head_dim: int) -> int:
        """Key blocks whose P V is one sum of the tensor core; 0: all.

        `accumulation`, or where that is None 1, but above head dim 128, where registers have no room for a
        second level in every block (docs/fp8.md), FLUSH_INTERVAL, or SMOOTH_FLUSH_INTERVAL where smooth_v
        leaves little of one sign to add; 1 there too if every key has a scale or an addend.
        """
        if self.accumulation is not None:
            return self.accumulation
        if head_dim <= 128 or self.has_key_vectors:
            return 1
        return SMOOTH_FLUSH_INTERVAL if self.smooth_v else FLUSH_INTERVAL

    def has_linear_exp2(self, head_dim: int) -> bool:
        """`linear_exp2`; where that is None `takes_linear_exp2`."""
        return self.takes_linear_exp2(head_dim) if self.linear_exp2 is None else self.linear_exp2

    def takes_linear_exp2(self, head_dim: int) -> bool:
        """Whether there is a kernel with P by its code, whatever `linear_exp2` asks for.

        That is up to head dim 128, where two levels are in every block and no key has a scale or an addend.
        Above, the tensor cores bind.
        """
        in_registers = head_dim <= 128 and self.interval(head_dim) == 1
        return in_registers and self.row_sum == "product" and not self.has_key_vectors

    def p_range(self, head_dim: int) -> tuple[float, float]:
        """`p_offset` and `rescale_threshold`; where they are None LAZY_RANGE, or LINEAR_RANGE.

        The second by `has_linear_exp2`, where small P need the room more.
        """
        if self.p_offset is None or self.rescale_threshold is None:
            return LINEAR_RANGE if self.has_linear_exp2(head_dim) else LAZY_RANGE
        return self.p_offset, self.rescale_threshold

    @property
    def leaks_future(self) -> bool:
        """Whether, under a causal mask, a row's output can depend on queries or keys that the mask hides.

        It can through every statistic over tokens. Field by field:
            q_granularity, k_granularity: a scale over a tensor, group, head or block is the largest element
                of later tokens too; only "token" is a token's own, and "none" nobody's.
            v_granularity: every scale runs over all keys; only "none" does not.
            smooth_k, smooth_q, smooth_v, compensate_v: means over tokens. Smoothing is exact, but what is
                left to round changes.
            sample_stats: which tokens those two lines mean; others can still decide V's scale.
            rotation, linear_exp2, p_offset, rescale_threshold, accumulation, row_sum: never. A hidden key
                has P = 0, which adds an exact 0 to every sum.
        What leaks is the size of rounding errors, and nothing where they are 0. NaN in V is the exception in
        every recipe: 0 * NaN is NaN in the rows that share a key block with it, as in the BF16 kernel.
        """
        return (
            self.q_granularity != "token"
            or self.k_granularity not in ("none", "token")
            or self.v_granularity != "none"
            or self.smooth_k
            or self.smooth_q
            or self.smooth_v
            or self.compensate_v
        )

    @classmethod
    def default(cls) -> "Fp8Recipe":
        """int8 Q and K with a scale a block, e4m3 V with one a channel, rotation, smoothing, two levels.

        Up to head dim 128 P by its code, which is a tenth faster and has a tenth more error (docs/fp8.md).

        int8, because e4m3 Q and K alone exceed the error this preset allows itself on outliers
        (docs/notes/fp8_log.md).
        """
        return cls(
            qk_dtype="int8",
            rotation="hadamard",
            smooth_k=True,
            smooth_v=True,
            compensate_v=True,
            sample_stats=True,
            linear_exp2=None,
            p_offset=None,
            rescale_threshold=None,
        )

    @classmethod
    def accurate(cls) -> "Fp8Recipe":
        """`default` with a scale for each row of Q, statistics of every token, exact exponentials.

        And without lazy rescaling.
        """
        return replace(
            cls.default(),
            q_granularity="token",
            sample_stats=False,
            linear_exp2=False,
            p_offset=8.0,
            rescale_threshold=0.0,
        )

    @classmethod
    def causal_safe(cls) -> "Fp8Recipe":
        """No statistic over tokens, so nothing leaks from later ones (`leaks_future` is False).

        K and V are rounded as they are (K rotated): values above 448 saturate, and those below 2**-6 lose
        relative precision. A scale for each key (`k_granularity="token"`) does without that limit, but costs
        a multiplication a score: no faster than BF16 (docs/fp8.md).
        """
        return cls(
            q_granularity="token",
            k_granularity="none",
            v_granularity="none",
            rotation="hadamard",
            linear_exp2=None,
            p_offset=None,
            rescale_threshold=None,
        )

    @classmethod
    def fa3(cls) -> "Fp8Recipe":
        """What FlashAttention-3's kernel does: a scale a key/value head, no second level, float32 row sum."""
        return cls(
            q_granularity="group",
            k_granularity="head",
            v_granularity="head",
            accumulation=0,
            row_sum="fp32",
        )

    @classmethod
    def fa3_paper(cls) -> "Fp8Recipe":
        """What its paper describes: block scales and a Hadamard rotation on top of `fa3`.

        Source: Shah et al., "FlashAttention-3", arXiv 2407.08608, section 3.3.
        """
        return cls(rotation="hadamard", v_granularity="head", accumulation=0, row_sum="fp32")
