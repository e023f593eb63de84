"""The DeepSpeed JSONs that ship, and those of users: found by name or path, and read strictly."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from megalm.config.deepspeed_keys import NVME, REFUSED, REFUSED_OFFLOAD
from megalm.errors import ConfigError
from megalm.files import require_regular
from megalm.registry import unknown_name

# What DeepSpeed has and megalm refuses, by a part of the names it goes by, with what comes closest.
_WITHOUT_A_JSON = {
    "nvme": (NVME, "zero3-offload, which keeps the optimizer in the host's memory"),
    "zenflow": (REFUSED["zenflow"], "zero2-offload"),
    "superoffload": (REFUSED_OFFLOAD["super_offload"], "zero3-offload"),
    "zero++": (f"the whole of ZeRO++ is refused: {REFUSED['zero_quantized_gradients']}", "zero3-plus-plus"),
}


def shipped_configs() -> dict[str, Path]:
    """Return the file of each DeepSpeed JSON that comes with megalm, by name."""
    folder = Path(str(resources.files("megalm.ds_configs").joinpath("zero0.json"))).parent
    return {path.stem: path for path in sorted(folder.glob("*.json"), key=lambda path: path.stem)}


def about_configs() -> dict[str, str]:
    """Return when to take each DeepSpeed JSON that comes with megalm, by name."""
    return {name: str(read_config(path)["about"]) for name, path in shipped_configs().items()}


def find_config(name_or_path: str) -> Path:
    """Return the file of a shipped name or a path. Raises ConfigError where there is none."""
    shipped = shipped_configs()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    if "/" in name_or_path or name_or_path.endswith(".json"):
        raise ConfigError(f"zero.config={name_or_path}: no such file; give a JSON file or one of {', '.join(shipped)}")
    said = f"zero.config={name_or_path}: no shipped DeepSpeed JSON"
    for part, (reason, instead) in _WITHOUT_A_JSON.items():
        if part in name_or_path.lower().replace("-", "").replace("_", ""):
            raise ConfigError(f"{said}, as {reason}; use {instead}")
    raise ConfigError(f"{said}; {unknown_name(name_or_path, shipped)}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs. Raises ValueError for a key that is given twice."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key} is given twice; keep one of them")
        values[key] = value
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write a number")


def read_config(path: Path) -> dict[str, Any]:
    """Return the object that the file holds. Raises ConfigError with the line where it is not JSON."""
    try:
        require_regular(path)
        text = path.read_bytes().decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a readable JSON file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start}); give a JSON file") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; check commas and quotes") from error
    except (ValueError, RecursionError) as error:
        reason = "values are nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path}: {reason}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not an object; write {{...}} with keys such as zero_optimization")
    return value
