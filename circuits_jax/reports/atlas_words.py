"""What the head atlas says in words: facts, what was left out, and what the numbers of each section are."""

import math

import jax

from circuits_jax.models.config import TransformerConfig
from circuits_jax.models.transformer import init_params
from circuits_jax.reports.head_evidence import FEWEST_PAIRS, N_EXAMPLES, NULL_DRAWS
from circuits_jax.reports.material import Material
from circuits_jax.reports.studied_model import StudiedModel

CONVINCING = 2.0  # z from which a pair of heads is listed as partners


def left_out(config: TransformerConfig, material: Material) -> list[str]:
    """What a reader would miss or take wrongly, and why."""
    said = {
        "From weights alone: labels are structural, and attention on text, contexts and causal effects are missing.":
            material.tokens is None,
        "No causal effects: an encoder predicts no next token, so ablations have no loss to raise.":
            material.tokens is not None and not config.causal,
        "Head types look back: an encoder's head that looks ahead, or at later copies, is undetermined. Its positional "
        "kernel shows both sides.": not config.causal,
        "No composition: in a post-norm model gains of norms stand between what one layer writes and what the next "
        "one reads.": config.norm_position == "post",
        "In front of the unembedding this model has a nonlinear transform: pairs and copying scores of OV circuits "
        "compare embeddings, they are no logits.": config.unembed_transform,
        "Queries and keys are divided by their size: pairs, directions and spectra of QK circuits are those of W_QK "
        "without it.": config.qk_norm,
        "Rotary positions: W_QK changes with the offset; pairs, directions, spectra and composition are those at "
        "offset 0.": config.positions == "rotary",
        "Strongest pairs: every pair of which one token is among the 128 of largest projection is compared; weaker "
        "ones are left out.": config.n_vocab > 128,
    }  # fmt: skip
    return [note for note, holds in said.items() if holds]


def captions(config: TransformerConfig, material: Material) -> dict[str, str]:
    """What the numbers of each section are, and what they are held against."""
    n_sequences = 0 if material.tokens is None else len(material.tokens)
    n_predicted = 0 if material.predicted is None else int(material.predicted.sum())
    size = "" if config.norm == "none" else ", with both tokens at the mean size of an embedding"
    last = "" if config.norm == "none" else ", before the last norm divides it by the size of the residual stream"
    return {
        "labels": "Confidence is calibrated on planted heads of small models (heads/thresholds.py). On other models "
        "read it as a rank, not as a probability.",
        "evidence": "z: by weights against the same head turned at random in the residual stream, by activations "
        "against chance on designed inputs. Own batch: attention on the text, above what uniform attention gives. "
        "Bold: score beyond its threshold, null beaten at a false discovery rate of 5 % over all heads, and no type "
        "that says more.",
        "spectra": f"Band and z: {NULL_DRAWS} Gaussian circuits of the same shape and size. Eigenvalues: between "
        "tokens as embedded.",
        "kernel": "Attention by how many positions back the key is, among rows that differ by position alone. Mean "
        "over the queries that have such a key, so it need not sum to 1. Thin line: uniform attention.",
        "pairs": "The direct path: both sides as embedded, without what earlier heads and MLPs wrote. QK: attention "
        f"score{size}; “any query”: what the query bias adds. OV: logit{last}. Highest first, then lowest.",
        "directions": "Tokens as embedded, less their mean, along the singular directions of W_QK. Controls: random "
        f"directions of the tokens' covariance, by their {N_EXAMPLES}th largest activation over its standard "
        "deviation; not corrected for the number of directions.",
        "places": "Position vectors along the same directions.",
        "contexts": "Positions of the text as this layer reads them, along the same directions; the token is bold.",
        "probes": "Gain: size of d W_OV over that for a random direction. Cosine to itself: 1 copied, −1 suppressed.",
        "partners": f"Composition with z of at least {CONVINCING:g}.",
        "graph": "Frobenius composition. z: against pairs of heads within one layer, which cannot compose; where there "
        f"are fewer than {FEWEST_PAIRS}, against random rotations of the residual stream.",
        "effects": f"Zero-ablation of this head alone, in nats a token, over {n_predicted} tokens of {n_sequences} "
        "sequences. Other heads may make up for it.",
    }


def facts(model: StudiedModel, material: Material) -> list[tuple[str, str]]:
    """The model in numbers, and what it was shown."""
    config = model.config
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    groups = f", {config.n_groups} key/value heads" if config.n_groups != config.n_heads else ""
    return [
        ("layers × heads", f"{config.n_layers} × {config.n_heads}{groups}"),
        ("d_model, d_head, d_mlp", f"{config.d_model}, {config.d_head}, {config.d_mlp or 'none'}"),
        ("parameters", f"{sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)):,}"),
        ("vocabulary, context", f"{config.n_vocab:,}, {config.n_context:,}"),
        ("positions, norm", f"{config.positions}, {config.norm} ({config.norm_position})"),
        ("sequences begin with", "any token" if model.bos is None else material.token_names[model.bos]),
        ("shown", material.about or "nothing: weights alone"),
    ]
