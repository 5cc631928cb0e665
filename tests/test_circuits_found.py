"""Figures of circuits on a model of two layers whose circuits are written by hand."""

import numpy as np

from circuits_jax import TransformerConfig, circuit_of
from circuits_jax.reports import circuits_found

CONFIG = TransformerConfig(5, 8, n_layers=2, n_heads=2, d_model=8)
PATH = ["embedding->0.1.v", "0.1->1.0.k", "1.0->logits"]
BACKUP = ["embedding->0.0.v", "0.0->1.0.k"]


def part():
    """Two models: one with a backup; weights name the first K-edge of both, and one more that no circuit has."""
    small, large = circuit_of(CONFIG, PATH).kept, circuit_of(CONFIG, PATH + BACKUP).kept
    predicted = np.zeros((2, 2, 2, 2, 2))
    predicted[:, 0, 1, 1, 0] = 0.5
    predicted[1, 0, 0, 1, 1] = 0.5
    qualities = {f"{which}_{name}": np.ones(2) for which in ("circuit", "union") for name in circuits_found.QUALITIES}
    return qualities | {
        "number": np.array([0, 3]), "circuit": np.stack([small, small]), "union": np.stack([small, large]),
        "n_alternatives": np.array([1, 2]), "predicted": predicted,
    }  # fmt: skip


def test_figures_count_edges_backups_and_what_weights_name():
    figures = {name: figure.value for name, figure in circuits_found.figures([CONFIG], [part()]).items()}
    assert figures["circuits"] == 2
    assert figures["circuit_edges"] == 3
    assert figures["union_edges"] == 4
    assert figures["backed_up"] == 0.5
    # In the unions: 0.1->1.0 twice, 0.0->1.0 once. Named: 0.1->1.0 twice, 0.0->1.1 once.
    assert figures["k_edges_named"] == 2 / 3
    assert figures["k_edges_found"] == 2 / 3


def test_the_table_names_edges_and_heads():
    header, rows = circuits_found.table([CONFIG], ["trained"], [part()])
    assert all(len(row) == len(header) for row in rows)
    assert [row[1] for row in rows] == ["0", "3"]
    assert set(rows[0][2].split(", ")) == set(PATH)
    assert rows[1][5] == "0.0, 0.1, 1.0"
