"""What the tests of claims share: indirect object identification solved by hand, decoys beside it, and a slow forward.

A sentence is <bos> S IO S to IO, or <bos> IO S S to IO: the answer is asked at place 4. Every part of the residual
stream is one-hot, so that attention, effects and falls have a closed form:

    0.0 name mover      from "to" to places 1 and 2, both names alike, and raises what it finds by RAISED
    0.1 S suppressor    from "to" to place 3, and lowers what it finds by LOWERED
    0.2 sink            keys and values of the name mover, and a score SINK for <bos>: never looks anywhere else

The name mover alone gives both names alike, the suppressor alone prefers every other name to S: together they answer.
"""

import json

import jax.numpy as jnp
import numpy as np

from circuits_jax import CircuitWeights, params_from_weights
from circuits_jax.heads import claims
from circuits_jax.tasks import ioi

N_NAMES, T, K, L, H = 16, 6, 16, 2, 4
END = T - 2
LOOKS, SINK, RAISED, LOWERED = 6.0, 26.0, 4.0, 3.0
PARTS = {"name": N_NAMES, "other": N_NAMES, "out": N_NAMES, "place": T, "word": 2}
STARTS = dict(zip(PARTS, np.cumsum([0, *PARTS.values()]), strict=False))
D = sum(PARTS.values())
MOVER, SUPPRESSOR, SINKS, FOURTH, LATER = (0, 0), (0, 1), (0, 2), (0, 3), (1, 0)

TASK, WORDING = ioi.ioi_words(ioi.NAMES[:N_NAMES], ioi.PLACES[:2], ioi.OBJECTS[:2], ["[S][IO][S] to[IO]"])
V = TASK.n_vocab
CLAIM = claims.load_claim("ioi_words")


def claim_of(path, **changes):
    """The shipped claim about indirect objects with other entries, by way of a file."""
    data = json.loads(claims.shipped()["ioi_words"].read_text()) | changes
    (path / "claim.json").write_text(json.dumps(data))
    return claims.load_claim(path / "claim.json")


def part(name):
    """The columns of a part of the residual stream."""
    return slice(STARTS[name], STARTS[name] + PARTS[name])


def copying(to, gain, of="name"):
    """W_V, W_O that write gain times the part of to another one."""
    w_v, w_o = np.zeros((D, K)), np.zeros((K, D))
    w_v[part(of), : PARTS[of]] = np.eye(PARTS[of])
    w_o[: PARTS[of], part(to)] = gain * np.eye(PARTS[of])
    return w_v, w_o


def looking(places, sink=0.0):
    """W_Q, W_K of a score LOOKS from "to" to places, and sink to <bos>; 0 to all others and from all others."""
    w_q, w_k = np.zeros((D, K)), np.zeros((D, K))
    to = STARTS["word"]
    w_q[to, :2] = np.sqrt(K)
    w_k[[STARTS["place"] + place for place in places], 0] = LOOKS
    w_k[to + 1, 1] = sink
    return w_q, w_k


def itself():
    """W_Q, W_K of a query that looks at its own place alone."""
    w = np.zeros((D, K))
    w[part("place"), :T] = np.eye(T)
    return 60 * np.sqrt(K) * w, w


def gathering():
    """W_Q, W_K from place 3 to the two names before it."""
    w_q, w_k = np.zeros((D, K)), np.zeros((D, K))
    w_q[STARTS["place"] + 3, 0] = 40 * np.sqrt(K)
    w_k[[STARTS["place"] + 1, STARTS["place"] + 2], 0] = 1
    return w_q, w_k


SOLVING = {
    MOVER: (*looking((1, 2)), *copying("out", RAISED)),
    SUPPRESSOR: (*looking((3,)), *copying("out", -LOWERED)),
    SINKS: (*looking((1, 2), SINK), *copying("out", RAISED)),
}
MODELS = {
    "erased names": SOLVING | {FOURTH: (*itself(), *copying("name", -1.0)), LATER: SOLVING[MOVER]},
    "erased places": SOLVING | {FOURTH: (*itself(), *copying("place", -1.0, "place")), LATER: SOLVING[MOVER]},
    # 0.3 says IO (and S) at the second S, where 1.0 looks and reads the name alone.
    "decoy variable": SOLVING | {FOURTH: (*gathering(), *copying("other", 2.0)), LATER: SOLVING[SUPPRESSOR]},
}


def planted(heads):
    """Config and params of {(layer, head): (W_Q, W_K, W_V, W_O)}; all other heads do nothing."""
    shapes = {"W_Q": (D, K), "W_K": (D, K), "W_V": (D, K), "W_O": (K, D)}
    arrays = {name: np.zeros((L, H, *shape), np.float32) for name, shape in shapes.items()}
    for place, matrices in heads.items():
        for array, matrix in zip(arrays.values(), matrices, strict=True):
            array[place] = matrix
    w_e, w_p, w_u = np.zeros((V, D)), np.zeros((T, D)), np.zeros((D, V))
    names = np.asarray(TASK.names)
    w_e[names, part("name")], w_u[part("out"), names] = np.eye(N_NAMES), np.eye(N_NAMES)
    w_e[[WORDING.vocabulary.index("to"), WORDING.vocabulary.index("<bos>")], part("word")] = np.eye(2)
    w_p[:, part("place")] = np.eye(T)
    arrays |= {"W_E": w_e, "W_P": w_p, "W_U": w_u}
    return params_from_weights(CircuitWeights(**{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}))


# One forward pass of one sentence, in float64 and head by head -----------------------------------------------------


def numpy_forward(config, params, tokens, place=None, query=None, key=None, into=None, change=0.0):
    """Residual [L+1,T,D], patterns [L,H,T,T] and head outputs [L,H,T,D], with one head disturbed at one query.

    Args:
        config, params: attention-only, pre-norm.
        tokens: [T].
        place: (layer, head) that is disturbed.
        query, key: where.
        into: "q", "k" or "v": the change [D] is added to the normed row that it reads, no gain or bias in it yet, the
            last two for this query alone; "block" lets it not look at the key.
        change: of "q", "k", "v".
    """
    get = lambda *names: np.asarray(_inside(params, names), np.float64)  # noqa: E731
    length, group = len(tokens), config.n_heads // config.n_groups
    x = get("W_E")[tokens] + (get("W_P")[:length] if config.positions == "learned" else 0.0)
    residual, patterns, outputs = [x], [], []
    for layer in range(config.n_layers):
        unit, name = unit_rows(config, x), f"layer_{layer}"
        gain, bias = norm_of(config, params, (name, "attention_norm"))
        added = get("W_P")[:length] if config.positions == "shortformer" else np.zeros_like(x)
        written, looked = np.zeros((config.n_heads, *x.shape)), np.zeros((config.n_heads, length, length))
        for head in range(config.n_heads):

            def projected(row, at, kind, head=head, gain=gain, bias=bias, added=added, name=name):
                of = head if kind == "Q" else head // group
                read = row * gain + bias + (added[at] if kind != "V" else 0.0)
                y = read @ get(name, "attention", f"W_{kind}")[of]
                y = y + get(name, "attention", f"b_{kind}")[of] if config.bias else y
                if kind == "V":
                    return y
                if config.qk_norm:
                    y = y / np.sqrt((y**2).mean() + config.norm_epsilon)
                    y = y * get(name, "attention", f"{kind.lower()}_gain")
                return turned(config, y, at) if config.positions == "rotary" else y

            for t in range(length):
                here = (layer, head) == place and t == query
                rows = {kind: unit.copy() for kind in "qkv"}
                if here and into in rows:
                    rows[into][t if into == "q" else key] += change
                q = projected(rows["q"][t], t, "Q")
                scores = [q @ projected(rows["k"][s], s, "K") / np.sqrt(config.d_head) for s in range(t + 1)]
                if here and into == "block":
                    scores[key] = -np.inf
                weight = np.exp(np.array(scores) - np.max(scores))
                looked[head, t, : t + 1] = weight / weight.sum()
                z = sum(looked[head, t, s] * projected(rows["v"][s], s, "V") for s in range(t + 1))
                written[head, t] = z @ get(name, "attention", "W_O")[head]
        x = x + written.sum(0) + (get(name, "attention", "b_O") if config.bias else 0.0)
        residual.append(x)
        patterns.append(looked)
        outputs.append(written)
    return np.array(residual), np.array(patterns), np.array(outputs)


def frozen_logits(config, params, moved, last):
    """What a change [D] of the last residual does to the logits [V] when the final norm divides as it did for last."""
    gain, _ = norm_of(config, params, ("final_norm",))
    w_u = np.asarray(params["W_E"], np.float64).T if config.tied else np.asarray(params["W_U"], np.float64)
    if config.norm == "layer":
        moved, last = moved - moved.mean(), last - last.mean()
    size = 1.0 if config.norm == "none" else np.sqrt((last**2).mean() + config.norm_epsilon)
    return (moved / size * gain) @ w_u


def unit_rows(config, x):
    """Rows [T,D] as the norm leaves them without gain and bias."""
    x = np.asarray(x, np.float64)
    if config.norm == "none":
        return x
    x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)


def norm_of(config, params, names):
    """Gain and bias of a norm, each [D] or a number."""
    if config.norm == "none":
        return 1.0, 0.0
    of = _inside(params, names)
    return np.asarray(of["scale"], np.float64), np.asarray(of["bias"], np.float64) if config.norm == "layer" else 0.0


def turned(config, y, at):
    """A query or key [K] in "half" pairs turned by its position."""
    half = config.d_head // 2
    angle = at * config.rotary_base ** (-np.arange(half) / half)
    a, b = y[:half], y[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)])


def _inside(params, names):
    for name in names:
        params = params[name]
    return params
