"""Universal checkpoints of DeepSpeed, which ds_to_universal makes, of a GPT of Megatron-DeepSpeed.

    DIR/latest_universal                                        the name of a directory beside it
    DIR/global_stepN_universal/mp_rank_00_model_states.pt       arguments, iteration
    DIR/global_stepN_universal/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt

Each NAME is a parameter of the whole model: tensor, pipeline and data ranks are joined already, and rows that pad the
vocabulary are gone. So the master weights and what Adam keeps come over, and training goes on where it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megalm.config.model import ModelSection
from megalm.distributed.sharding import Fragment
from megalm.errors import CheckpointError
from megalm.models.foreign.assembly import Assembly, rows_of, section_of
from megalm.models.foreign.imported_model import ForeignModel, latest
from megalm.models.foreign.megatron import arguments, facts_of, precision_of, vocabulary
from megalm.models.foreign.megatron_arguments import model_of, zero_centered
from megalm.models.foreign.names import ENDS, LAYER, Place, is_no_weight, place_of
from megalm.models.foreign.torch_file import Piece, StoredTensor, read_file, read_files

POINTER = "latest_universal"
WEIGHTS, MOMENTS = "fp32", ("exp_avg", "exp_avg_sq")
_NAME = re.compile(r"[A-Za-z0-9_.]{1,200}")
_NUMBERED = re.compile(r"([0-9]{1,6})\.(.+)")
_TIED = "tied_modules.embed."


@dataclass
class _Parameter:
    """One parameter's files: its name, its place, and the mappings that they hold."""

    name: str
    layer: int | None
    place: Place
    states: dict[str, dict[str, Any]]
    step: Any = None

    def tensor(self, kind: str) -> StoredTensor:
        value = self.states.get(kind, {}).get("param")
        if not isinstance(value, StoredTensor):
            raise CheckpointError(f"{self.name}/{kind}.pt: holds no tensor `param`; convert the checkpoint again")
        return value


def universal_directory(directory: Path) -> Path | None:
    """Return the directory of the newest universal checkpoint below, or `directory` itself; None: there is none."""
    word = latest(directory, POINTER)
    if word is not None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}", word) or word in (".", ".."):
            raise CheckpointError(f"{directory / POINTER}: {word[:40]!r} is no directory's name; name one yourself")
        if not (directory / word / "zero").is_dir():
            raise CheckpointError(f"{directory / word}: is no universal checkpoint, though {POINTER} names it")
        return directory / word
    return directory if (directory / "zero").is_dir() else None


def read_universal(directory: Path, vocab: int | None = None) -> ForeignModel:
    """Return the model of a universal checkpoint, with what Adam keeps; `vocab` leaves out rows beyond.

    Raises CheckpointError for what a recipe cannot express, and where tensors are missing or left over.
    """
    file = directory / "mp_rank_00_model_states.pt"
    common = read_file(file)
    if not isinstance(common, dict) or not isinstance(common.get("args"), dict):
        raise CheckpointError(
            f"{file}: holds no `args`, which Megatron-DeepSpeed saves; a model of another program has no shape here"
        )
    given = arguments(common["args"], str(file))
    section = model_of(given, str(file))
    parameters = _parameters(directory / "zero")
    _check_gates(parameters, given, directory)
    rows = rows_of(str(directory), ((item.place, [item.tensor(WEIGHTS)]) for item in parameters))
    section["vocab"] = vocabulary(rows, vocab, str(directory))
    model = section_of(section, str(directory))
    weights = _assembly(parameters, WEIGHTS, directory, model, zero_centered(given))
    steps = {item.step for item in parameters}
    moments: list[tuple[str, Assembly]] = []
    if all(kind in item.states for item in parameters for kind in MOMENTS):
        moments = [(kind, _assembly(parameters, kind, directory, model, False)) for kind in MOMENTS]
    if len(steps) > 1:
        raise CheckpointError(f"{directory}: its parameters are of {len(steps)} different steps of Adam; convert again")
    step = common.get("iteration", common.get("global_steps"))
    step = step if type(step) is int and step >= 0 else 0
    facts = facts_of(given, "DeepSpeed universal checkpoint of Megatron-DeepSpeed", step, rows)
    facts |= {"optimizer_steps": steps.pop() if moments else None}

    def optimizer() -> Iterator[Fragment]:
        return chain.from_iterable(assembly.fragments(kind) for kind, assembly in moments)

    return ForeignModel(model, weights.tensors, facts, step, precision_of(given), optimizer)


def _assembly(
    parameters: list[_Parameter], kind: str, directory: Path, model: ModelSection, from_zero: bool
) -> Assembly:
    assembly = Assembly(f"{directory}, {kind}", model, from_zero)
    for item in parameters:
        assembly.add(item.name, item.layer, item.place, [item.tensor(kind)])
    assembly.check()
    return assembly


def _parameters(zero: Path) -> list[_Parameter]:
    names = sorted(path.name for path in zero.iterdir() if path.is_dir() and not is_no_weight(path.name))
    for name in names:
        if not _NAME.fullmatch(name) or (zero / name).is_symlink():
            raise CheckpointError(f"{zero / name}: is no parameter's directory; remove it")
    places = _places(names, zero)
    kinds = {name: [kind for kind in (WEIGHTS, *MOMENTS, "step") if (zero / name / f"{kind}.pt").exists()]
             for name in names}  # fmt: skip
    files = [(name, kind) for name, known in kinds.items() for kind in known]
    values = dict(zip(files, read_files([Piece(zero / name / f"{kind}.pt") for name, kind in files]), strict=True))
    found = []
    for name in names:
        if WEIGHTS not in kinds[name]:
            raise CheckpointError(f"{zero / name}: has no {WEIGHTS}.pt; convert the checkpoint again")
        states = {kind: values[name, kind] for kind in kinds[name] if isinstance(values[name, kind], dict)}
        layer, place = places[name]
        found.append(_Parameter(name, layer, place, states, _step(values.get((name, "step")))))
    return found


def _step(value: Any) -> int | None:
    """Return the updates of a parameter, which are a number or a tensor of one."""
    if isinstance(value, StoredTensor) and value.shape in ((), (1,)):
        value = value.read().item()
    return int(value) if isinstance(value, int | float) and value == value and abs(value) < 2**53 else None


def _places(names: list[str], zero: Path) -> dict[str, tuple[int | None, Place]]:
    """Return each parameter's layer and place. A pipeline module counts embedding, layers, norm and head as one row."""
    numbered = {name: match for name in names if (match := _NUMBERED.fullmatch(name))}
    first = min((int(match[1]) for match in numbered.values() if match[2] in LAYER), default=0)
    found: dict[str, tuple[int | None, Place]] = {}
    for name in names:
        match = numbered.get(name)
        place: tuple[int | None, Place] | None
        if match is None:
            tied = name.startswith(_TIED)
            place = place_of(name.replace(_TIED, "embedding.", 1) if tied else name)
        elif match[2] in LAYER:
            place = (int(match[1]) - first, LAYER[match[2]])
        else:
            end = {"weight": "final_norm.weight", "bias": "final_norm.bias", "lm_head.weight": "output_layer.weight"}
            inner = end.get(match[2], f"embedding.{match[2]}")
            place = (None, ENDS[inner]) if inner in ENDS else None
        if place is None:
            raise CheckpointError(f"{zero / name}: a recipe has no tensor for it; nothing was imported")
        found[name] = place
    return found


def _check_gates(parameters: list[_Parameter], given: Mapping[str, Any], directory: Path) -> None:
    """Refuse gates whose tensor ranks were joined one behind the other, as DeepSpeed does that knows no gates."""
    if not given.get("swiglu") or given.get("tensor_model_parallel_size") in (None, 1):
        return
    for item in parameters:
        if item.place.name.startswith("mlp.up.") and item.states.get(WEIGHTS, {}).get("param_n_sub_params") != 2:
            raise CheckpointError(
                f"{directory}: {item.name} was joined without regard to its gate; convert the checkpoint again with "
                "a DeepSpeed and a Megatron-DeepSpeed that know `parameter_with_2_sub_params_cat_dim_0`"
            )
