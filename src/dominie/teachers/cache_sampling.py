"""Which of a teacher's probabilities are stored: its most likely tokens, or unbiased samples.

`threshold` (the default) stores every token of at least probability τ as it is, and draws the rest:
m = ⌈tail/τ⌉ systematic samples, each worth tail/m ≤ τ. Every token's expected probability is its
own, so the gradient of a forward KL is unbiased; and for the samples drawn the variance is least,
within a token (threshold sampling: Duffield, Lund and Thorup, J. ACM 54(6), 2007) and over tokens:
Σ tail²/m at a given Σ m is least where m is proportional to tail, which one τ for all tokens is.

The rarest ids are pooled: those that hold a tenth of the mass of all tails (`pooled`). Of a token
their joint mass is stored, and within the pool its share of them follows the teacher's average.
Samples of them would be all noise, one in a thousand tokens and then at weight τ, which the
normalised steps of Adam make much of; `pooled: 0` draws them too, and is unbiased without
exception.

`sampled` draws from the whole distribution (Sparse Logit Sampling, arXiv 2503.16870): also
unbiased, and noisier. `top` stores the likeliest tokens, as many as reach a mass, and the tail as
one outcome: no noise, and nothing is known of the tail but its mass.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import numpy as np
import torch

from dominie.core.io import check_file
from dominie.core.references import Reference

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SchemeName = Literal["threshold", "sampled", "top"]
SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)

#: What each scheme depends on, beside how finely probabilities are stored.
_OPTIONS: dict[SchemeName, tuple[str, ...]] = {
    "threshold": ("threshold", "pooled"),
    "sampled": ("samples",),
    "top": ("top_p", "k_max"),
}

_NPY_HEADER = 16_384  # bytes, more than numpy reads of one
_LEAST_TAIL = math.exp(-16)  # below it a tail is nothing: less than float32 can say of a sum to 1


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How the predictions of a stage's teachers are stored.

    Attributes:
        enabled: whether they are; a bare `cache: true` or `false` is this.
        scheme: what is stored of a distribution: `threshold`, `sampled` or `top`.
        threshold: τ of `threshold`; half of it doubles the samples and halves their variance.
        pooled: share of the tails' mass whose ids, the rarest, `threshold` pools.
        samples: draws of `sampled`.
        top_p: mass that `top` stores, if `k_max` tokens reach it.
        k_max: most tokens that `top` stores.
        levels: steps in which a probability's logarithm is stored, per nat.
        folder: of the cache; None is the run's own folder.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}
    enabled: bool = True
    scheme: SchemeName = "threshold"
    threshold: float = 0.006
    pooled: float = 0.1
    samples: int = 50
    top_p: float = 0.98
    k_max: int = 64
    levels: int = 24
    folder: Annotated[str, Reference("output")] | None = None

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme is one of {', '.join(SCHEMES)}, got {self.scheme!r}")
        if self.folder is not None and not self.folder.strip():
            raise ValueError("folder is empty")
        if not 1e-6 <= self.threshold < 1.0:
            raise ValueError(f"threshold must be from 1e-6 to below 1, got {self.threshold}")
        if not 0.0 <= self.pooled < 1.0:
            raise ValueError(f"pooled must be from 0 to below 1, got {self.pooled}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        for name in ("samples", "k_max", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def identity(self) -> dict[str, Any]:
        """What the stored probabilities depend on."""
        return {name: asdict(self)[name] for name in ("scheme", *_OPTIONS[self.scheme], "levels")}

    @property
    def most_temperature(self) -> float:
        """The highest temperature at which a student learns from the cache as from the teacher.

        At T distributions are flatter, and the loss carries T²: noise grows as T² times the weight
        of a sample. Up to a product of 0.06 students were within a tenth of those of the live
        teacher in KL, at 0.18 and more up to three times behind (docs/cache.md); `top` keeps ever
        less of a flat distribution. Nothing above 10 was measured.
        """
        if self.scheme == "top":
            return 1.5
        weight = self.threshold if self.scheme == "threshold" else 1 / self.samples
        return min(10.0, max(1.0, math.sqrt(0.06 / weight)))

    def draws(self, tokens: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """The random numbers that `choose` needs of so many tokens."""
        columns = self.samples if self.scheme == "sampled" else 1
        return generator.random((tokens, columns), dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is stored of N tokens' distributions.

    Attributes:
        heads: [N] how many ids of each stand for themselves.
        head_ids: [Σ heads] token ids, those of a token together.
        head_probabilities: [Σ heads].
        samples: [N] how many draws from the rest of each.
        sample_ids: [Σ samples] token ids, one as often as it was drawn.
        tail: [N] what heads and pool leave.
        tail_entropy: [N] in nats, of tail and pool as a distribution of their own; 0 without
            samples or pool.
        pooled: [N] mass on the ids of the pool that are no heads.
    """

    heads: NDArray[np.int64]
    head_ids: NDArray[np.int64]
    head_probabilities: NDArray[np.float64]
    samples: NDArray[np.int64]
    sample_ids: NDArray[np.int64]
    tail: NDArray[np.float64]
    tail_entropy: NDArray[np.float64]
    pooled: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.heads)

    def split(self, sizes: NDArray[np.int64]) -> list[Chosen]:
        """Parts of so many tokens each."""
        ends = np.cumsum(sizes)[:-1]
        heads, samples = (np.concatenate([[0], np.cumsum(x)]) for x in (self.heads, self.samples))
        places = {"head_ids": heads, "head_probabilities": heads, "sample_ids": samples}
        pieces = [
            np.split(getattr(self, name), places[name][ends] if name in places else ends)
            for name in Chosen.__dataclass_fields__
        ]
        return [Chosen(*parts) for parts in zip(*pieces, strict=True)]


def joined(parts: list[Chosen]) -> Chosen:
    """The tokens of all parts, in order."""
    names = list(Chosen.__dataclass_fields__)
    return Chosen(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@torch.no_grad()
def choose(
    logits: Tensor, settings: CacheSettings, draws: Tensor, pool: Tensor | None = None
) -> Chosen:
    """What is stored of the distributions softmax(logits).

    Args:
        logits: [N, V] float, divided by the temperature.
        settings: which scheme.
        draws: [N, 1 or samples] uniform in [0, 1), from `settings.draws`.
        pool: [V] whether an id is pooled; None pools none.
    """
    tokens, vocabulary = logits.shape
    if settings.scheme == "top":
        most = min(settings.k_max, vocabulary)
        return _likeliest(logits.softmax(-1), most, settings.top_p)
    # Few passes over [N, V]: all else is by the token or by the entry.
    largest = logits.amax(-1, keepdim=True)
    weights = (logits - largest).exp_()
    total = weights.sum(-1)
    heads = torch.zeros(tokens, dtype=torch.int64, device=logits.device)
    head_ids, head_probabilities = heads[:0], total[:0]
    if settings.scheme == "threshold":
        least = settings.threshold * total[:, None]
        token, head_ids = (weights >= least).nonzero(as_tuple=True)
        heads = torch.bincount(token, minlength=tokens)
        head_probabilities = weights[token, head_ids] / total[token]
        weights[token, head_ids] = 0.0
    # Σ p·log p of the rest, as Σ p·z − log Σ exp z: without a logarithm of each.
    log_sum, logit_sum = largest[:, 0] + total.log(), torch.linalg.vecdot(weights, logits) / total
    pooled = torch.zeros_like(total)
    if pool is not None:
        pooled = weights @ pool.to(weights.dtype) / total
        weights.mul_((~pool).to(weights.dtype))
    reach = weights.cumsum(-1)
    tail = reach[:, -1] / total
    tail[tail < _LEAST_TAIL] = 0.0
    if settings.scheme == "threshold":
        samples = torch.ceil(tail / settings.threshold).long()
        most = int(samples.max()) if tokens else 0
        steps = torch.arange(most, device=tail.device)
        positions = (draws + steps) / samples[:, None].clamp(min=1)
    else:
        samples = torch.full_like(heads, settings.samples)
        positions, most = draws, settings.samples
    drawn = torch.arange(most, device=tail.device) < samples[:, None]
    # Just below the end at most, so that rounding never points behind the last token.
    positions = positions.clamp(max=1 - 1e-6) * reach[:, -1:]
    sample_ids = torch.searchsorted(reach, positions, right=True).clamp_(max=vocabulary - 1)
    left = tail + pooled
    left_or_one = left.where(left > 0, torch.ones_like(left))
    tail_entropy = (left_or_one.log() - logit_sum / left_or_one + log_sum).clamp_(min=0)
    return _on_host(
        heads,
        head_ids,
        head_probabilities,
        samples,
        sample_ids[drawn],
        tail,
        tail_entropy.where(left > 0, torch.zeros_like(tail)),
        pooled,
    )


def _likeliest(probabilities: Tensor, most: int, mass: float) -> Chosen:
    """The fewest tokens that reach a mass, `most` at most; the tail is one outcome."""
    values, ids = probabilities.topk(most)
    before = values.double().cumsum(-1) - values
    kept = before < mass
    kept[:, 0] = True
    heads = kept.sum(-1)
    # What is left is summed, not subtracted: 1 − Σ would be the rounding error of a sure teacher.
    left = probabilities.scatter(1, ids.where(kept, ids[:, :1]), 0.0).sum(-1, dtype=torch.float64)
    none = torch.zeros_like(heads)
    nothing = torch.zeros_like(left)
    return _on_host(heads, ids[kept], values[kept], none, ids[:0, 0], left, nothing, nothing)


def _on_host(*columns: Tensor) -> Chosen:
    whole, real = np.int64, np.float64
    kinds = (whole, whole, real, whole, whole, real, real, real)
    arrays: list[NDArray[Any]] = [
        column.cpu().numpy().astype(kind) for column, kind in zip(columns, kinds, strict=True)
    ]
    return Chosen(*arrays)


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Measured once, when a cache is begun, on its first rows; part of the cache from then on.

    Attributes:
        ids: [V] the commonest first, by the teacher's mean probability.
        tails: [V] the mean probability of each id when it was no head.
        pooled: share of the tails' mass whose ids, the rarest, are pooled.
    """

    ids: NDArray[np.int64]
    tails: NDArray[np.float32]
    pooled: float

    @cached_property
    def is_pooled(self) -> NDArray[np.bool_] | None:
        """[V] whether an id is of the pool; None if there is none."""
        mass = self.tails[self.ids[::-1]].cumsum(dtype=np.float64)  # the rarest first
        count = int(np.searchsorted(mass, self.pooled * mass[-1])) if mass[-1] > 0 else 0
        if count < 2:
            return None
        pool = np.zeros(len(self.ids), bool)
        pool[self.ids[::-1][:count]] = True
        return pool

    @cached_property
    def pool_shape(self) -> NDArray[np.float32] | None:
        """[V] the teacher's average over the pool, a distribution."""
        if self.is_pooled is None:
            return None
        shape = np.where(self.is_pooled, self.tails.astype(np.float64) + 1e-12, 0.0)
        normalised: NDArray[np.float32] = (shape / shape.sum()).astype(np.float32)
        return normalised

    def save(self, path: Path) -> str:
        """Write it, and return the checksum of what was written."""
        with path.open("wb") as file:
            np.save(file, np.stack([self.ids.astype(np.float64), self.tails.astype(np.float64)]))
        return _checksum(path)


def load_token_stats(path: Path, size: int, pooled: float) -> TokenStats:
    """The inverse of `TokenStats.save`.

    Args:
        path: named by the checksum of its content.
        size: ids there have to be.
        pooled: see `TokenStats`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written.
    """
    check_file(path, 16 * size + _NPY_HEADER)
    if _checksum(path) != path.name.partition(".")[0]:
        raise ValueError("its checksum is another")
    # Mapped: a header that claims more than there is fails before memory is asked for.
    with np.errstate(over="ignore"):
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    if stored.shape != (2, size) or stored.dtype != np.float64:
        raise ValueError(f"not the ids of the vocabulary: {stored.dtype} {list(stored.shape)}")
    ids, tails = np.array(stored)
    if not np.array_equal(np.sort(ids), np.arange(size)):
        raise ValueError("not the ids of the vocabulary")
    return TokenStats(ids.astype(np.int64), tails.astype(np.float32), pooled)


def _checksum(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
