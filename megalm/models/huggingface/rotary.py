"""Rotary positions in a `config.json`: read from where transformers 5 takes them, written to where every version does.

What a file says at one place and otherwise at another, which other versions read, is refused: nobody knows which of
the two the weights were trained with.
"""

from __future__ import annotations

import math
from typing import Any

from megalm.config.model import ModelSection
from megalm.models.huggingface.fields import Fields

_TURNS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
_LENGTH = "original_max_position_embeddings"


def read_rotary(fields: Fields, family: str, theta: float, share: float | None, head: int) -> dict[str, Any]:
    """Return our keys of rotary positions, from either form: rope_parameters, or rope_theta and rope_scaling.

    `theta` and `share` are what a family takes where nothing is said (share None: a whole head turns, always), `head`
    the features of one.
    """
    old = "rope_scaling" if fields.section("rope_scaling") else "rope_parameters"
    rope = Fields(fields.section(old), f"{fields.where}: {old}")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise fields.wrong(old, "has rotary positions by kinds of layers, which megalm has not")
    partial = share is not None
    _take(rope, fields, "rope_theta", "rotary_emb_base" if partial else "rope_theta", theta)
    _take(rope, fields, "partial_rotary_factor", "rotary_pct" if partial else "partial_rotary_factor", share or 1.0)
    if not partial and rope.values["partial_rotary_factor"] != 1.0:
        raise rope.wrong("partial_rotary_factor", f"is not 1, the one that {family} has")
    turning = int(head * rope.number("partial_rotary_factor", 1e-9, 1.0))
    if turning % 2 or turning == 0:  # transformers then has angles for one feature more
        raise rope.wrong("partial_rotary_factor", f"turns {turning} of a head's {head} features, which are no pairs")
    found: dict[str, Any] = {
        "rotary_base": rope.number("rope_theta", 1.0 + 1e-9, 1e15),
        "rotary_share": rope.number("partial_rotary_factor", 1e-9, 1.0),
    }
    kind = rope.values.setdefault("rope_type", rope.values.get("type", "default"))
    return found if kind == "default" else found | _scaling(rope, fields, kind)


def _take(rope: Fields, fields: Fields, key: str, outside: str, default: float) -> None:
    """Set a value that stands in the object, else at the top under the name `outside`, as transformers looks for it."""
    place = outside
    if key in rope.values:
        place = f"{key} of {rope.where.rpartition(' ')[2]}"
    else:
        rope.values[key] = fields.values[outside] if fields.has(outside) else default
    for name in dict.fromkeys((outside, key)):
        if fields.has(name) and fields.values[name] != rope.values[key]:
            taken = f"from which transformers takes {repr(rope.values[key])[:40]}"
            raise fields.wrong(name, f"contradicts {place}, {taken}; leave one of the two out")


def _scaling(rope: Fields, fields: Fields, kind: Any) -> dict[str, Any]:
    if kind not in ("linear", "llama3", "yarn"):
        raise rope.wrong("rope_type", "is a scaling that megalm lacks; it has default, linear, llama3, yarn")
    found: dict[str, Any] = {"rotary_scaling": kind, "rotary_factor": rope.number("factor", 1.0, 1e6)}
    if kind == "linear":
        return found
    if fields.has(_LENGTH):  # which goes before the object's
        found["rotary_original"] = fields.count(_LENGTH)
    else:
        rope.values.setdefault(_LENGTH, fields.values.get("max_position_embeddings"))
        found["rotary_original"] = rope.count(_LENGTH)
    if kind == "yarn":
        growth = 0.1 * math.log(found["rotary_factor"]) + 1.0
        if rope.has("attention_factor") and not math.isclose(rope.number("attention_factor"), growth, rel_tol=1e-6):
            raise rope.wrong("attention_factor", f"is not yarn's {growth:.6g}, the one that megalm has")
        if rope.has("mscale") or rope.has("mscale_all_dim"):
            raise rope.wrong("mscale", "is a growth that megalm lacks")
    for key, value in (_TURNS if kind == "llama3" else _YARN).items():
        if rope.has(key) and rope.values[key] != value:
            raise rope.wrong(key, f"is not {value}, the one that megalm has")
    return found


def write_rotary(model: ModelSection, partial: bool) -> dict[str, Any]:
    """Return the keys that every version of transformers reads; `partial`: of a family in which a share turns."""
    values: dict[str, Any] = {"rotary_emb_base" if partial else "rope_theta": model.rotary_base}
    share = _share(model)
    if partial:
        values["rotary_pct"] = share
    kind = model.rotary_scaling
    if kind in ("linear", "llama3", "yarn"):
        scaling: dict[str, Any] = {"rope_type": kind, "factor": model.rotary_factor}
        if kind != "linear":
            scaling[_LENGTH] = model.rotary_original
        values["rope_scaling"] = scaling | (_TURNS if kind == "llama3" else {})
        if partial:  # these take both from the one object
            scaling |= {"rope_theta": model.rotary_base, "partial_rotary_factor": share}
    return values


def _share(model: ModelSection) -> float:
    """Return a share that gives as many features as turn, an even number, where it is multiplied and cut off."""
    if int(model.head_size * model.rotary_share) == model.rotary_size:
        return model.rotary_share
    share = model.rotary_size / model.head_size
    return share if int(model.head_size * share) == model.rotary_size else math.nextafter(share, 1.0)
