"""Circuits between tokens, W_E W_QK W_E^T and W_E W_OV W_U, for all heads at once and without V x V.

A circuit E M U with M [D,D] of rank K has the non-zero eigenvalues of M (U E), and U E [D,D] is one product for the
whole model; its singular values are those of R_E M R_U^T with the triangular factors of E and U^T, also once for the
whole model. So a head costs what it costs in the residual stream, whatever the vocabulary. Entries come block by block.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from circuits_jax.circuits.attention import ov, qk
from circuits_jax.circuits.linear_algebra import einsum, matmul, svd
from circuits_jax.circuits.low_rank import ENTRIES_AT_ONCE, Entries, LowRank
from circuits_jax.circuits.orthonormalisation import triangle
from circuits_jax.circuits.weights import CircuitWeights

ROUNDING = 1e-6  # singular values below this share of the largest are those of a circuit of lower rank


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCircuit:
    """embed @ inner @ unembed, [...,V,V]: inner circuits [...,D,D] between the same two maps of tokens.

    Attributes:
        embed: [V,D].
        inner: LowRank [...,D,D].
        unembed: [D,V]; None where it is embed^T, as in QK circuits.
    """

    embed: Array
    inner: LowRank
    unembed: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[...,V,V]."""
        return (*self.inner.shape[:-2], len(self.embed), len(self.embed))

    def __getitem__(self, index: Any) -> "TokenCircuit":
        """Picks heads, for example circuit[layer, head]."""
        return dataclasses.replace(self, inner=self.inner[index])

    def low_rank(self) -> LowRank:
        """The same circuit with factors [...,V,K] and [...,K,V]: for a few heads, or a small vocabulary."""
        return LowRank(matmul(self.embed, self.inner.left), matmul(self.inner.right, self._unembed))

    def eigenvalues(self) -> Array:
        """The eigenvalues that can differ from zero, complex [...,min(V,D,K)]; see LowRank.eigenvalues."""
        if self._few_tokens:
            return self.low_rank().eigenvalues()
        return (self.inner @ matmul(self._unembed, self.embed)).eigenvalues()

    def singular_values(self) -> Array:
        """[...,min(V,D,K)] in falling order; see LowRank.singular_values."""
        return self._residual_sized().singular_values()

    def frobenius_norm(self) -> Array:
        """||E M U||_F, [...]."""
        return self._residual_sized().frobenius_norm()

    def trace(self) -> Array:
        """Sum of the diagonal, [...]."""
        return (self.inner @ matmul(self._unembed, self.embed)).trace()

    def sum(self) -> Array:
        """Sum over all V x V entries, [...]."""
        left = einsum("d,...dk->...k", self.embed.sum(0), self.inner.left)
        return einsum("...k,...kd,d->...", left, self.inner.right, self._unembed.sum(1))

    def diagonal(self) -> Array:
        """The entries (i,i), [...,V]: of a token for itself."""
        return self._by_head(lambda head: head.diagonal())

    def rows(self, index: ArrayLike) -> Array:
        """The rows of these tokens [I]: [...,I,V]; NaN for a token that does not exist."""
        picked = LowRank(self.embed, self.inner.left).rows(index)
        return matmul(matmul(picked, self.inner.right), self._unembed)

    def columns(self, index: ArrayLike) -> Array:
        """The columns of these tokens [I]: [...,V,I]; NaN for a token that does not exist."""
        picked = LowRank(self.inner.right, self._unembed).columns(index)
        return matmul(self.embed, matmul(self.inner.left, picked))

    def block(self, rows: ArrayLike, columns: ArrayLike) -> Array:
        """The entries of these tokens [I] for those [J]: [...,I,J]; NaN for a token that does not exist."""
        left = LowRank(self.embed, self.inner.left).rows(rows)
        return matmul(left, LowRank(self.inner.right, self._unembed).columns(columns))

    def top_k(self, k: int) -> Entries:
        """The k strongest pairs of tokens of every head, row token -> column token; see LowRank.top_k."""
        return self._by_head(lambda head: head.top_k(k))

    def likely_extremes(self, k: int, n_candidates: int = 128) -> tuple[Entries, Entries, Array]:
        """The k highest and the k lowest entries of every head, as far as n long rows and n long columns hold them.

        Tokens are vectors l_i and r_j with l_i . r_j the entry (i,j), in the basis where both sides have the same
        singular values (those of the circuit are their squares), which no basis of the head's own changes. Searched
        whole are the n rows of longest l_i and the n columns of longest r_j, for 2 n / V of top_k's products: a pair
        is missed only where neither of its tokens is among them.

        Where the lengths of token vectors vary, none is missed; where all are about equally long, as of Gaussian ones,
        about half of the strongest are (tests/test_token_space.py; LOG.md, 2026-11-22).

        Args:
            k: how many pairs at either end, at most n V.
            n_candidates: n; with n >= V every pair is searched.

        Returns:
            The highest entries in falling and the lowest in rising order, [...,k] each, all pairs of one end distinct,
            all NaN if any entry of the head is; and a bound [...], max |l_i| max |r_j| over what was not searched,
            -inf where nothing is left: no entry left out is larger in size. So an end is exact, to rounding, where the
            bound is at most the size of its last value and that has the end's sign.

        Raises:
            ValueError: k is not between 1 and n V, or n_candidates is less than 1.
        """
        n_vocab = len(self.embed)
        n = min(n_candidates, n_vocab)
        if n < 1:
            raise ValueError(f"n_candidates must be at least 1; got {n_candidates}")
        if not 1 <= k <= n * n_vocab:
            raise ValueError(f"k must be between 1 and the number of entries {n * n_vocab} of {n} rows; got {k}")

        def of_head(inner: LowRank) -> tuple[Entries, Entries, Array]:
            left = matmul(self.embed, inner.left)
            # Neither side with a transposed table of tokens, which is half as fast on CPU.
            right = matmul(self.embed, inner.right.T) if self.unembed is None else matmul(inner.right, self.unembed).T
            (rows, shorter_rows), (columns, shorter_columns) = _longest(left, n), _longest(right, n)
            taken = jnp.zeros(n_vocab, bool).at[rows].set(True)  # entries of these rows are not looked at twice
            ends = _ends(left[rows], right, jnp.zeros(n_vocab, bool), k), _ends(right[columns], left, taken, k)

            def extreme(sign: float, one: tuple[Array, Array], two: tuple[Array, Array]) -> Entries:
                values = sign * jnp.concatenate([one[0], two[0]])
                of_rows = jnp.broadcast_to(rows[:, None], one[1].shape), one[1]
                of_columns = two[1], jnp.broadcast_to(columns[:, None], two[1].shape)
                places = (jnp.concatenate(both) for both in zip(of_rows, of_columns, strict=True))
                best = jax.lax.top_k(sign * values.ravel(), k)[1]
                return jax.tree.map(lambda x: x.ravel()[best], Entries(values, *places))

            bound = shorter_rows * shorter_columns if n < n_vocab else jnp.array(-jnp.inf, left.dtype)
            (high_rows, low_rows), (high_columns, low_columns) = ends
            return extreme(1.0, high_rows, high_columns), extreme(-1.0, low_rows, low_columns), bound

        return self._balanced().one_by_one(of_head)

    def own_row_rank(self) -> Array:
        """How many other tokens have at least a token's own value in its row, int [...,V] in [0, V - 1].

        0 where a token prefers itself to all others: for OV it raises its own logit most, for QK it looks for its own
        copies. Ties and NaN count against it, so that a zero or broken head does not look like a perfect copier.
        """

        def of_head(head: LowRank) -> Array:
            def of_token(place: Array) -> Array:
                row = matmul(head.left[place], head.right)
                return jnp.sum(~(row < row[place])) - 1

            height = max(1, ENTRIES_AT_ONCE // len(self.embed))
            return jax.lax.map(of_token, jnp.arange(len(self.embed)), batch_size=min(height, len(self.embed)))

        return self._by_head(of_head)

    @property
    def _unembed(self) -> Array:
        return self.embed.T if self.unembed is None else self.unembed

    @property
    def _few_tokens(self) -> bool:
        return self.embed.shape[0] <= self.embed.shape[1]

    def _residual_sized(self) -> LowRank:
        """The inner circuits between triangular factors: the same singular values, without the vocabulary."""
        r_embed = triangle(self.embed)
        r_unembed = r_embed if self.unembed is None else triangle(self.unembed.T)
        return LowRank(matmul(r_embed, self.inner.left), matmul(self.inner.right, r_unembed.T))

    def _balanced(self) -> LowRank:
        """The inner circuits with G and its inverse between their factors, so that E left and (right U)^T are balanced.

        With E left = Q_l R_l, (right U)^T = Q_r R_r and R_l R_r^T = U S V^T, G = R_r^T V S^-1/2 makes them Q_l U S^1/2
        and Q_r V S^1/2. Singular values of rounding are dropped.
        """
        small = self._residual_sized()
        r_left, r_right = triangle(small.left), triangle(small.right.mT)
        u, s, vh = svd(matmul(r_left, r_right.mT))
        kept = ~(s <= ROUNDING * s[..., :1])  # NaN stays
        scale = jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, s, 1.0)), 0.0)[..., None, :]
        left = matmul(self.inner.left, matmul(r_right.mT, vh.mT * scale))
        return LowRank(left, matmul(matmul((u * scale).mT, r_left), self.inner.right))

    def _by_head(self, function: Callable[[LowRank], Any]) -> Any:
        """A function of the low-rank circuit [V,V] of one head, over the heads in turn: memory is that of one."""
        return self.inner.one_by_one(lambda head: function(TokenCircuit(self.embed, head, self.unembed).low_rank()))


def token_qk(weights: CircuitWeights, offset: ArrayLike = 0) -> TokenCircuit:
    """W_E W_QK W_E^T of every head, [L,H,V,V]: how much a query token wants a key token, positions aside."""
    return TokenCircuit(weights.W_E, qk(weights, offset))


def token_ov(weights: CircuitWeights) -> TokenCircuit:
    """W_E W_OV W_U of every head, [L,H,V,V]: what attending to a token (row) does to each logit (column).

    In models with an unembed_transform, or post-norm, it is no logit but how alike what is moved and embeddings are.
    """
    return TokenCircuit(weights.W_E, ov(weights), weights.W_U)


def key_preference(weights: CircuitWeights, offset: ArrayLike = 0) -> Array:
    """b_Q R_offset W_K^T W_E^T of every head, [L,H,V]: how much any query wants this key token; zero without b_Q.

    The part of the score, times sqrt(K), that the query bias gives to a key by its token alone.
    """
    if weights.b_Q is None:
        return jnp.zeros((*weights.W_Q.shape[:2], len(weights.W_E)), weights.W_E.dtype)
    keys = qk(dataclasses.replace(weights, W_Q=weights.b_Q[..., None, :]), offset).rows(0)
    return matmul(keys, weights.W_E.T)[..., 0, :]


def _longest(vectors: Array, n: int) -> tuple[Array, Array]:
    """Which n of the vectors [V,K] are the longest, [n], and how long the longest of the others is, [] (0 if none)."""
    lengths, order = jax.lax.top_k(jnp.linalg.norm(vectors, axis=-1), min(n + 1, len(vectors)))
    return order[:n], lengths[n] if n < len(vectors) else jnp.zeros((), vectors.dtype)


def _ends(vectors: Array, others: Array, taken: Array, k: int) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Of each vector [n,K] the k highest and the k lowest products with others [V,K] that are not taken [V].

    Returns:
        ((values, places), (minus the values, places)), [n,min(k,V)] each; -inf where all others are taken.
    """

    def of_vector(vector: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        row = matmul(others, vector)
        high, low = (jax.lax.top_k(jnp.where(taken, -jnp.inf, x), min(k, len(others))) for x in (row, -row))
        return (high[0], high[1]), (low[0], low[1])

    return jax.lax.map(of_vector, vectors, batch_size=32)


def top_share(ranks: Array, k: int) -> Array:
    """Share of the tokens [...,V] whose own_row_rank is among the first k, [...] in [0, 1]: top-1, top-5, ..."""
    return jnp.mean(ranks < k, axis=-1)
