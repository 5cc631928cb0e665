"""The names of what a head can be: where it looks (QK types) and what it moves (OV types)."""

from typing import Literal, get_args

QKType = Literal[
    "previous_token",  # the token directly in front of the query
    "fixed_offset",  # k >= 2 positions back
    "first_token",  # the start of the sequence
    "same_position",  # the query's own position
    "duplicate_token",  # earlier copies of the query's token
    "induction",  # the position after an earlier copy of the query's token
    "content",  # keys by their token, other than copies
    "diffuse",  # all positions alike
]
OVType = Literal[
    "copying",  # raises the attended token
    "suppressing",  # lowers it
    "transforming",  # raises another token, or writes the token (or position) where a later head reads it
    "extracting",  # writes few features of it
    "inactive",  # moves nothing
]

QK_TYPES: tuple[str, ...] = get_args(QKType)
OV_TYPES: tuple[str, ...] = get_args(OVType)
