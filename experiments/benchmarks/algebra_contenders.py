"""Who competes in algebra.py: circuits_jax, NumPy, PyTorch, TransformerLens, and JAX's own eigenvalue solver.

Every contender has the same weights, and where it can the same memory. For a task it offers one or more
formulations, of which algebra.py keeps the fastest. NumPy and PyTorch share the code of theirs (their interfaces agree
far enough): thin factors throughout, GEMM-shaped products, triangular factors by QR or by a float64 Gram matrix, and a
batch of factorisations either in one call or split over Python threads, one for each core with single-threaded BLAS.
"""

import ctypes
import importlib.metadata
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from algebra_tasks import solver_batch

import circuits_jax as cj
from circuits_jax.circuits.eigenvalues import francis

MATRICES = ("W_E", "W_Q", "W_K", "W_V", "W_O", "W_U")
ROWS_AT_ONCE = 4096  # of W_E, when its Gram matrix is summed in float64
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)

Formulation = Callable[[], Any]
Outcome = list[np.ndarray]


class Contender(Protocol):
    """What algebra.py needs of a competitor."""

    name: str

    def formulations(self, task: str) -> dict[str, Formulation]:
        """Named ways of doing the task, each a function without arguments; none where the task is not for it."""

    def outcome(self, task: str, value: Any) -> Outcome:
        """What a formulation returned, as NumPy arrays with heads [L H,...] (or as many as were done) on axis 0."""

    def heads(self, task: str) -> Sequence[int]:
        """Which heads a formulation does; the time for all is scaled up from them."""


class CircuitsJax:
    """This project: public functions, jitted, compiled here and not while they are timed."""

    name = "circuits_jax"

    def __init__(self, weights: cj.CircuitWeights):
        """Of a model."""
        self.weights = weights

    def formulations(self, task: str) -> dict[str, Formulation]:
        """One, the public function."""
        functions: dict[str, Callable[..., Any]] = {
            "ov_singular_values": lambda w: cj.ov(w).singular_values(),
            "qk_singular_values": lambda w: cj.qk(w).singular_values(),
            "ov_svd": lambda w: cj.ov(w).svd(),
            "qk_svd": lambda w: cj.qk(w).svd(),
            "ov_eigenvalues": lambda w: cj.ov(w).eigenvalues(),
            "qk_eigenvalues": lambda w: cj.qk(w).eigenvalues(),
            "full_ov_eigenvalues": lambda w: cj.token_ov(w).eigenvalues(),
            "full_qk_singular_values": lambda w: cj.token_qk(w).singular_values(),
            "composition": cj.composition_scores,
            "eigenvalue_solver": francis,
        }
        given = solver_batch(self.weights) if task == "eigenvalue_solver" else self.weights
        compiled = jax.jit(functions[task]).lower(given).compile()
        return {"francis" if task == "eigenvalue_solver" else "": lambda: jax.block_until_ready(compiled(given))}

    def matmul_part(self) -> Formulation:
        """The products of full_ov_eigenvalues, without the eigenvalues."""

        def products(w: cj.CircuitWeights) -> jax.Array:
            mixed = cj.ov(w) @ jnp.matmul(w.W_U, w.W_E, precision="highest")
            return jnp.matmul(mixed.right, mixed.left, precision="highest")

        compiled = jax.jit(products).lower(self.weights).compile()
        return lambda: jax.block_until_ready(compiled(self.weights))

    def outcome(self, task: str, value: Any) -> Outcome:
        """See Contender."""
        if task == "composition":
            return [np.stack([value.q, value.k, value.v])]
        if task.endswith("_svd"):
            return [by_head(value.U), by_head(value.S, n_trailing=1), by_head(value.Vh.mT)]
        return [by_head(value, n_trailing=1)]

    def heads(self, task: str) -> Sequence[int]:
        """All of them."""
        return range(self.weights.W_Q.shape[0] * self.weights.W_Q.shape[1])


class JaxSolver:
    """jnp.linalg.eigvals, for eigenvalue_solver alone: what JAX users have, on CPU and GPU."""

    name = "jnp.linalg.eigvals"

    def __init__(self, weights: cj.CircuitWeights):
        """Of a model."""
        self.matrices = solver_batch(weights)

    def formulations(self, task: str) -> dict[str, Formulation]:
        """One, for one task."""
        if task != "eigenvalue_solver":
            return {}
        compiled = jax.jit(jnp.linalg.eigvals).lower(self.matrices).compile()
        return {"": lambda: jax.block_until_ready(compiled(self.matrices))}

    def outcome(self, task: str, value: Any) -> Outcome:
        """See Contender."""
        return [np.asarray(value)]

    def heads(self, task: str) -> Sequence[int]:
        """All of them."""
        return range(len(self.matrices))


class ArrayLibrary:
    """The best formulations that I could find in a library with NumPy's interface: NumPy and PyTorch."""

    name: str
    xp: Any
    split_only = False  # a batch in one call is not worth trying
    one_call_only = False

    def __init__(self, arrays: dict[str, Any], solver_matrices: Any):
        """Of the library's own arrays, by the names of CircuitWeights."""
        self.W_E, self.W_U = arrays["W_E"], arrays["W_U"]
        self.n_layers, self.n_heads, self.d_model, self.d_head = arrays["W_Q"].shape
        self.W_Q, self.W_K, self.W_V, self.W_O = (  # [L H,...]; W_O as [L H,D,K] like the others
            arrays[name].reshape(-1, *arrays[name].shape[2:]) for name in ("W_Q", "W_K", "W_V", "W_O")
        )
        self.W_O = self.W_O.swapaxes(-1, -2)
        self.solver_matrices = solver_matrices
        self.pool = ThreadPoolExecutor(CORES, initializer=self.one_thread)

    def formulations(self, task: str) -> dict[str, Formulation]:
        """Every combination that could win."""
        ov, qk = (self.W_V, self.W_O), (self.W_Q, self.W_K)
        factors = ov if task.startswith("ov") else qk
        match task:
            case "ov_singular_values" | "qk_singular_values":
                triangles = {"QR": self.triangle, "float64 Gram": self.gram_triangle}
                return self.ways(self.singular_values, triangles, *factors)
            case "ov_svd" | "qk_svd":
                orthonormal = {"QR": self.qr, "Cholesky QR twice": self.cholesky_qr_twice}
                return self.ways(self.svd, orthonormal, *factors)
            case "ov_eigenvalues" | "qk_eigenvalues":
                return self.ways(self.core_eigenvalues, {"K x K core": None}, factors[1].mT, factors[0])
            case "eigenvalue_solver":
                return self.ways(lambda _, x: self.xp.linalg.eigvals(x), {"LAPACK": None}, self.solver_matrices)
            case "full_ov_eigenvalues":
                return {how: partial(self.full_ov_eigenvalues, spread) for how, spread in self.spreads().items()}
            case "full_qk_singular_values":
                return {how: partial(self.full_qk_singular_values, spread) for how, spread in self.spreads().items()}
        return {
            f"{blocks}{', threads' * threads}": partial(self.composition, blocks == "by receiver", threads)
            for blocks in ("by pair", "by receiver")
            for threads in ((False,) if self.one_call_only else (False, True))
        }

    def spreads(self) -> dict[str, Callable[..., Any]]:
        """Ways to do a batch of small problems."""
        one_call = {} if self.split_only else {"one call": self.batched}
        return one_call if self.one_call_only else {**one_call, "threads": self.split}

    def ways(self, function: Any, choices: dict[str, Any], *arrays: Any) -> dict[str, Formulation]:
        """A function of a batch with each choice as its first argument, spread in each way."""
        return {
            f"{name}, {how}": partial(spread, partial(function, choice), *arrays)
            for name, choice in choices.items()
            for how, spread in self.spreads().items()
        }

    def batched(self, function: Any, *arrays: Any) -> Any:
        """function(*arrays)."""
        return function(*arrays)

    def split(self, function: Any, *arrays: Any) -> Any:
        """function(*arrays), with the batch split over one thread for each core."""
        bounds = np.linspace(0, len(arrays[0]), CORES + 1).astype(int).tolist()
        pieces = [[x[start:end] for start, end in itertools.pairwise(bounds)] for x in arrays]
        found = self.in_threads(function, *pieces)
        if isinstance(found[0], tuple):
            return tuple(self.xp.concatenate(parts) for parts in zip(*found, strict=True))
        return self.xp.concatenate(found)

    def in_threads(self, function: Any, *items: Any) -> list[Any]:
        """function of each item, over the pool."""
        return list(self.pool.map(function, *items))

    # What differs between the two libraries.

    def one_thread(self) -> None:
        """Makes BLAS in a thread of the pool use that thread alone."""
        raise NotImplementedError

    def cast(self, x: Any, dtype: str) -> Any:
        """X as float32 or float64."""
        raise NotImplementedError

    def zeros(self, dtype: str, *shape: int) -> Any:
        """Zeros on the device of the weights."""
        raise NotImplementedError

    def triangle(self, x: Any) -> Any:
        """R of a batched Householder QR."""
        raise NotImplementedError

    # The maths.

    def gram_triangle(self, x: Any) -> Any:
        """R with R^T R = x^T x, by a float64 Gram matrix."""
        x = self.cast(x, "float64")
        return self.cast(self.xp.linalg.cholesky(x.mT @ x), "float32").mT

    def qr(self, x: Any) -> tuple[Any, Any]:
        """Householder's thin QR."""
        return tuple(self.xp.linalg.qr(x))

    def cholesky_qr_twice(self, x: Any) -> tuple[Any, Any]:
        """Q and R by two passes of float32 Cholesky QR; for well-conditioned x only, which random heads are."""
        first = self.xp.linalg.cholesky(x.mT @ x).mT
        x = x @ self.xp.linalg.inv(first)
        second = self.xp.linalg.cholesky(x.mT @ x).mT
        return x @ self.xp.linalg.inv(second), second @ first

    def singular_values(self, triangle: Any, left: Any, right: Any) -> Any:
        """Of left right^T, through K x K."""
        return self.xp.linalg.svdvals(triangle(left) @ triangle(right).mT)

    def svd(self, qr: Any, left: Any, right: Any) -> tuple[Any, Any, Any]:
        """U, S, V of left right^T."""
        (q, r), (p, t) = qr(left), qr(right)
        u, s, vh = self.xp.linalg.svd(r @ t.mT, full_matrices=False)
        return q @ u, s, p @ vh.mT

    def core_eigenvalues(self, _: None, right: Any, left: Any) -> Any:
        """Of left right, through K x K."""
        return self.xp.linalg.eigvals(right @ left)

    def full_ov_eigenvalues(self, spread: Any) -> Any:
        """Eigenvalues of W_E W_V W_O W_U: W_U W_E once, one GEMM for all heads, K x K for each."""
        mixed = self.W_O.mT.reshape(-1, self.d_model) @ (self.W_U @ self.W_E)
        right = mixed.reshape(-1, self.d_head, self.d_model)
        return spread(partial(self.core_eigenvalues, None), right, self.W_V)

    def full_qk_singular_values(self, spread: Any) -> Any:
        """Singular values of W_E W_Q W_K^T W_E^T: the triangular factor of W_E once."""
        gram = self.zeros("float64", self.d_model, self.d_model)
        for start in range(0, len(self.W_E), ROWS_AT_ONCE):
            rows = self.cast(self.W_E[start : start + ROWS_AT_ONCE], "float64")
            gram = gram + rows.mT @ rows
        r = self.cast(self.xp.linalg.cholesky(gram), "float32").mT
        return spread(lambda q, k: self.singular_values(self.gram_triangle, r @ q, r @ k), self.W_Q, self.W_K)

    def composition(self, by_receiver: bool, threads: bool) -> Any:
        """[3,L,H,L,H]: layer pairs as one GEMM, triangular factors and norms folded in, earlier senders only."""
        n_layers, n_heads, d, k = self.n_layers, self.n_heads, self.d_model, self.d_head
        spread = list(self.spreads().values())[-1]
        r_q, r_k, r_v, r_o = (spread(self.gram_triangle, x) for x in (self.W_Q, self.W_K, self.W_V, self.W_O))
        ov_size, qk_size = (self.xp.linalg.matrix_norm(a @ b.mT)[:, None, None] for a, b in ((r_v, r_o), (r_q, r_k)))
        sent = ((r_v / ov_size) @ self.W_O.mT).reshape(n_layers, n_heads * k, d)
        into = self.xp.concatenate([self.W_Q @ (r_k / qk_size).mT, self.W_K @ (r_q / qk_size).mT,
                                    self.W_V @ (r_o / ov_size).mT])  # fmt: skip
        into = into.reshape(3, n_layers, n_heads, d, k).swapaxes(2, 3).swapaxes(0, 1).swapaxes(1, 2)
        into = into.reshape(n_layers, d, 3 * n_heads * k)
        scores = self.zeros("float32", n_layers, n_heads, n_layers, 3, n_heads)

        def pair(senders: slice, layer: int) -> None:
            product = sent[senders].reshape(-1, d) @ into[layer]
            product *= product
            sums = product.reshape(-1, k, 3 * n_heads * k).sum(1).reshape(-1, n_heads, 3, n_heads, k).sum(-1)
            scores[senders, :, layer] = self.xp.sqrt(sums)

        pairs = [(slice(0, m), m) for m in range(1, n_layers)]
        if not by_receiver:
            pairs = [(slice(a, a + 1), m) for m in range(1, n_layers) for a in range(m)]
        if threads:
            self.in_threads(pair, *zip(*pairs, strict=True))
        else:
            for senders, layer in pairs:
                pair(senders, layer)
        return scores

    def outcome(self, task: str, value: Any) -> Outcome:
        """See Contender."""
        if task == "composition":
            return [np.asarray(value).transpose(3, 0, 1, 2, 4)]
        return [np.asarray(x) for x in (value if isinstance(value, tuple) else (value,))]

    def heads(self, task: str) -> Sequence[int]:
        """All of them."""
        return range(self.n_layers * self.n_heads)


class Numpy(ArrayLibrary):
    """NumPy with the OpenBLAS of its wheel: all cores in a GEMM, and one thread of each pool worker otherwise."""

    name = "numpy"
    xp = np
    split_only = True  # with several threads in BLAS, batches of small factorisations run up to 20 times slower

    def __init__(self, weights: cj.CircuitWeights):
        """Of a model; on a GPU its weights are copied to the host."""
        wheel = Path(np.__file__).parent.parent / "numpy.libs"
        libraries = [ctypes.CDLL(str(path)) for path in wheel.glob("libscipy_openblas64*")]
        # What threadpoolctl does; elsewhere (conda, MKL) BLAS is left as it is.
        self.set_threads = [library.scipy_openblas_set_num_threads64_ for library in libraries]
        self.blas_threads(CORES)
        super().__init__(
            {name: np.asarray(getattr(weights, name)) for name in MATRICES}, np.asarray(solver_batch(weights))
        )

    def one_thread(self) -> None:
        """OpenBLAS has one setting for all threads; see in_threads."""

    def in_threads(self, function: Any, *items: Any) -> list[Any]:
        """With OpenBLAS at one thread meanwhile: several would fight over the cores."""
        self.blas_threads(1)
        try:
            return super().in_threads(function, *items)
        finally:
            self.blas_threads(CORES)

    def blas_threads(self, count: int) -> None:
        """For all threads of Python."""
        for set_threads in self.set_threads:
            set_threads(count)

    def cast(self, x: Any, dtype: str) -> Any:
        """X as float32 or float64."""
        return x.astype(dtype)

    def zeros(self, dtype: str, *shape: int) -> Any:
        """Zeros."""
        return np.zeros(shape, dtype)

    def triangle(self, x: Any) -> Any:
        """R of a batched Householder QR."""
        return np.linalg.qr(x, mode="r")


class Torch(ArrayLibrary):
    """PyTorch on the device of JAX: CPU, or CUDA where its build has it."""

    name = "torch"

    def __init__(self, weights: cj.CircuitWeights):
        """Raises ImportError or RuntimeError where PyTorch is missing or cannot use JAX's device."""
        import torch

        self.xp = torch
        self.on_gpu = jax.default_backend() == "gpu"
        self.one_call_only = self.on_gpu
        torch.set_grad_enabled(False)
        n_threads = torch.get_num_threads()
        super().__init__(
            {name: torch.from_dlpack(getattr(weights, name)) for name in MATRICES},
            torch.from_dlpack(solver_batch(weights)),
        )
        list(self.pool.map(lambda _: None, range(CORES)))  # the workers set theirs to one ...
        torch.set_num_threads(n_threads)  # ... and this thread keeps all

    def one_thread(self) -> None:
        """PyTorch has a setting for each thread."""
        self.xp.set_num_threads(1)

    def cast(self, x: Any, dtype: str) -> Any:
        """X as float32 or float64."""
        return x.to(getattr(self.xp, dtype))

    def zeros(self, dtype: str, *shape: int) -> Any:
        """Zeros on the device of the weights."""
        return self.W_Q.new_zeros(shape, dtype=getattr(self.xp, dtype))

    def triangle(self, x: Any) -> Any:
        """R of a batched Householder QR."""
        return self.xp.linalg.qr(x, mode="r").R

    def formulations(self, task: str) -> dict[str, Formulation]:
        """As for NumPy; on a GPU until it has finished."""
        return {name: partial(wait_for, self.xp, run) for name, run in super().formulations(task).items()}

    def outcome(self, task: str, value: Any) -> Outcome:
        """See Contender."""
        return super().outcome(task, tuple(x.cpu() for x in value) if isinstance(value, tuple) else value.cpu())


class TransformerLens:
    """TransformerLens by its public calls; head by head in token space, as in its demos, and a subset scaled up there.

    Composition is TransformerBridge.all_composition_scores on a bridge booted from a config alone (boot_native, no
    download), into which these weights are written.
    """

    name = "transformer_lens"

    def __init__(self, weights: cj.CircuitWeights, token_space_heads: int):
        """Raises ImportError or RuntimeError where it is missing or cannot use JAX's device."""
        import torch
        from transformer_lens import FactoredMatrix

        if int(importlib.metadata.version("transformer-lens").split(".")[0]) < 4:
            raise ImportError("transformer-lens is older than 4.3")
        torch.set_grad_enabled(False)
        self.torch, self.matrix = torch, FactoredMatrix
        self.W = {name: torch.from_dlpack(getattr(weights, name)) for name in MATRICES}
        self.n_layers, self.n_heads = self.W["W_Q"].shape[:2]
        n_all = self.n_layers * self.n_heads
        self.subset = np.unique(np.linspace(0, n_all - 1, min(token_space_heads, n_all)).astype(int)).tolist()

    def formulations(self, task: str) -> dict[str, Formulation]:
        """One, its public route."""
        w, matrix = self.W, self.matrix
        ov, qk = (w["W_V"], w["W_O"]), (w["W_Q"], w["W_K"].mT)
        places = [divmod(head, self.n_heads) for head in self.subset]
        run: Formulation
        match task:
            case "ov_singular_values" | "qk_singular_values":
                run = lambda: matrix(*(ov if task.startswith("ov") else qk)).S  # noqa: E731
            case "ov_svd" | "qk_svd":
                run = lambda: matrix(*(ov if task.startswith("ov") else qk)).svd()  # noqa: E731
            case "ov_eigenvalues" | "qk_eigenvalues":
                run = lambda: matrix(*(ov if task.startswith("ov") else qk)).eigenvalues  # noqa: E731
            case "full_ov_eigenvalues":
                run = lambda: [(w["W_E"] @ matrix(*ov)[place] @ w["W_U"]).eigenvalues for place in places]  # noqa: E731
            case "full_qk_singular_values":
                run = lambda: [(w["W_E"] @ matrix(*qk)[place] @ w["W_E"].T).S for place in places]  # noqa: E731
            case "composition":
                bridge = self.bridge()
                run = lambda: [bridge.all_composition_scores(mode).scores for mode in "QKV"]  # noqa: E731
            case _:
                return {}
        return {"": partial(wait_for, self.torch, run)}

    def bridge(self) -> Any:
        """A TransformerBridge with these weights; a vocabulary of two, which composition does not see."""
        from transformer_lens.model_bridge.sources import boot_native

        _, _, d, k = self.W["W_Q"].shape
        config = {
            "n_layers": self.n_layers, "n_heads": self.n_heads, "d_model": d, "d_head": k, "n_ctx": 8, "d_vocab": 2,
            "attn_only": True, "act_fn": "gelu", "normalization_type": None, "init_weights": False,
        }  # fmt: skip
        bridge = boot_native(config, device=self.W["W_Q"].device)
        for layer in range(self.n_layers):
            attention = bridge.blocks[layer].attn
            for name in ("W_Q", "W_K", "W_V", "W_O"):
                getattr(attention, name).copy_(self.W[name][layer])  # a view of the parameter
        return bridge

    def outcome(self, task: str, value: Any) -> Outcome:
        """See Contender."""
        if task == "composition":
            return [np.stack([x.cpu().numpy() for x in value])]
        if isinstance(value, list):
            return [np.stack([x.cpu().numpy() for x in value])]
        if isinstance(value, tuple):
            return [by_head(x.cpu().numpy(), n_trailing) for x, n_trailing in zip(value, (2, 1, 2), strict=True)]
        return [by_head(value.cpu().numpy(), n_trailing=1)]

    def heads(self, task: str) -> Sequence[int]:
        """All of them, but for token space."""
        return self.subset if task.startswith("full_") else range(self.n_layers * self.n_heads)


def wait_for(torch: Any, run: Formulation) -> Any:
    """run(), and wait until a GPU has done it."""
    value = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return value


def by_head(x: Any, n_trailing: int = 2) -> np.ndarray:
    """[L,H,...] as [L H,...]."""
    x = np.asarray(x)
    return x.reshape(-1, *x.shape[x.ndim - n_trailing :])
