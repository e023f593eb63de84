"""Makes a RunConfig of a recipe (a shipped name or a file), what it inherits by `base:`, and the overrides.

All mistakes of all of them are reported together, each with its source: the file it stands in, or the command line.
It leaves the schema to `run`, the rules between keys to `checks` and YAML itself to `yaml_text`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalm.config import checks, mistakes, yaml_text
from megalm.config.run import RunConfig, key_fields, section_types
from megalm.errors import ConfigError
from megalm.registry import unknown_name

MOST_BASES = 8
COMMAND_LINE = "command line"


class _Draft:
    """Values by dotted key and the source that set each, what was given one after another, and the mistakes found."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.keys = key_fields()
        self.values: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.given: list[tuple[str, dict[str, Any]]] = []
        self.problems: list[str] = []
        self.wrong: set[str] = set()
        self.meant: set[str] = set()

    def put(self, key: str, value: Any, source: str) -> None:
        self.values[key] = value
        self.sources[key] = source
        self.given[-1][1][key] = value

    def add_recipe(self, recipe: dict[Any, Any], source: str) -> None:
        """Put the keys of a recipe over those already here; note the unknown ones."""
        sections = section_types()
        self.given.append((source, {}))
        for name, value in recipe.items():
            if name == "base":
                continue
            if name not in sections:
                self._put_known("", name, value, source)
            elif isinstance(value, dict):
                for key, inner in value.items():
                    self._put_known(name, key, inner, source)
            elif value is not None:
                shown = mistakes.show_value(value)
                self.problems.append(f"{source}: {name}={shown} is not a section; write its keys below `{name}:`")
                self.wrong |= {key for key in self.keys if key.startswith(f"{name}.")}

    def _put_known(self, section: str, key: Any, value: Any, source: str) -> None:
        path = f"{section}.{key}" if section else key
        if path in self.keys and not (section == "" and "." in str(key)):
            self.put(path, value, source)
            return
        problem, meant = mistakes.unknown_key(section, str(key), self.keys)
        self.problems.append(f"{source}: {problem}")
        if meant:
            self.meant |= {name for name in self.keys if name == meant or name.startswith(f"{meant}.")}

    def add_override(self, override: str) -> None:
        """Put one `key=value` of the command line over the rest."""
        self.given.append((COMMAND_LINE, {}))
        path, separator, text = override.partition("=")
        path = path.strip()
        if not separator or not path:
            hint = f"write {path}=VALUE" if path in self.keys else "write it as model.layers=4, without spaces"
            self.problems.append(f"{COMMAND_LINE}: {override!r} is not key=value; {hint}")
        elif path in section_types():
            keys = [key for key in self.keys if key.startswith(f"{path}.")]
            self.problems.append(f"{COMMAND_LINE}: {path} is a section; set one of its keys, such as {keys[0]}=VALUE")
        elif path not in self.keys:
            self.problems.append(f"{COMMAND_LINE}: {mistakes.unknown_override(path, self.keys)}")
        else:
            try:
                value = yaml_text.parse(text, f"{COMMAND_LINE}: {path}={text}")
            except ConfigError as error:
                self.problems.append(str(error))
                self.wrong.add(path)
                return
            if mistakes.takes_text(self.keys[path].annotation) and isinstance(value, (bool, int, float)):
                value = text.strip()  # a shell takes quotes away, so run.dir=7 can only mean the text
            self.put(path, value, COMMAND_LINE)

    def build(self) -> RunConfig:
        """Return the checked config. Raises one ConfigError with every mistake."""
        try:
            config = None if self.problems else RunConfig.model_validate(_nest(self.values))
        except (ValidationError, ConfigError):
            config = None
        if config is not None:
            return config
        self._check_values()
        self._check_rules()
        places = dict.fromkeys(problem.partition(": ")[0] for problem in self.problems)
        raise ConfigError(checks.report(self.problems, " and ".join(places)))

    def _check_values(self) -> None:
        """Note each wrong value, and each missing key that no misspelt one explains."""
        try:
            RunConfig.model_validate(_nest(self.values))
        except ConfigError:
            return
        except ValidationError as error:
            seen: set[str] = set()
            for detail in error.errors():
                for key in self._keys_of(detail["loc"]):
                    if key in seen or (key not in self.values and key in self.wrong | self.meant):
                        continue
                    seen.add(key)
                    source = self.sources.get(key, self.source)
                    line = mistakes.describe(detail, key, self.values.get(key), self.keys[key])
                    self.problems.append(f"{source}: {line}")
            self.wrong |= seen

    def _keys_of(self, location: tuple[int | str, ...]) -> list[str]:
        """Return the dotted keys at a location of pydantic's: of a missing section, those it must have."""
        path = ".".join(str(part) for part in location[:2])
        if path in self.keys:
            return [path]
        name = str(location[0])
        if name in self.keys:
            return [name]
        return [f"{name}.{key}" for key, field in section_types()[name].model_fields.items() if field.is_required()]

    def _check_rules(self) -> None:
        """Note each broken rule, with the source whose values broke it: those before it alone would keep it."""
        values: dict[str, Any] = {}
        places: dict[str, str] = {}
        for source, given in self.given:
            values |= given
            places = {line: places.get(line, source) for line in self._broken_rules(values)}
        self.problems += [f"{source}: {line}" for line, source in places.items()]

    def _broken_rules(self, values: dict[str, Any]) -> list[str]:
        """Return a line for each rule that `values` break and whose keys are all right by themselves."""
        sections = section_types()
        right = {key: value for key, value in values.items() if key not in self.wrong}
        filled = set(self.wrong)
        for name, section in sections.items():
            for key, field in section.model_fields.items():
                if field.is_required() and f"{name}.{key}" not in right:
                    right[f"{name}.{key}"] = 1  # stands in, so that the other keys' rules can be evaluated
                    filled.add(f"{name}.{key}")
        nested = _nest(right)
        try:
            parts: dict[str, Any] = {
                name: section.model_validate(nested.get(name, {})) for name, section in sections.items()
            }
        except ValidationError:  # of a value that a later source replaces
            return []
        parts |= {name: value for name, value in nested.items() if name not in sections}
        config = RunConfig.model_construct(_fields_set=None, **parts)
        return checks.broken_rules(config, frozenset(filled))


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    """Return sections of keys from dotted keys."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        section, dot, key = path.partition(".")
        if dot:
            nested.setdefault(section, {})[key] = value
        else:
            nested[path] = value
    return nested


def shipped_recipes() -> dict[str, Path]:
    """Return the file of each recipe that comes with megalm, by name."""
    folder = Path(str(resources.files("megalm") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str, relative_to: Path | None = None) -> Path:
    """Return the file of a shipped recipe's name, or of a path (relative to a folder, for `base:`)."""
    shipped = shipped_recipes()
    path = Path(name_or_path) if relative_to is None else relative_to / name_or_path
    looks_like_path = "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))
    if looks_like_path:
        return path
    if name_or_path in shipped:
        return shipped[name_or_path]
    if name_or_path and path.is_file():
        return path
    raise ConfigError(f"{name_or_path!r} is no shipped recipe and no file; {unknown_name(name_or_path, shipped)}")


def _read_with_bases(path: Path) -> list[tuple[Path, dict[Any, Any]]]:
    """Return the recipe's file and those that it inherits, the deepest base first."""
    chain: list[tuple[Path, dict[Any, Any]]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            circle = " -> ".join(str(file.name) for file in [*seen[seen.index(path.resolve()) :], path])
            raise ConfigError(f"{chain[-1][0]}: base: inherits from itself ({circle}); take one `base:` out")
        if len(chain) > MOST_BASES:
            raise ConfigError(f"{chain[0][0]}: base: more than {MOST_BASES} recipes deep; join some of them")
        recipe = yaml_text.read(path)
        seen.append(path.resolve())
        chain.append((path, recipe))
        base = recipe.get("base")
        if base is None:
            return chain[::-1]
        if not isinstance(base, str) or not base:
            shown = mistakes.show_value(base)
            raise ConfigError(f"{path}: base={shown} is not a name; write a shipped recipe's name or a path")
        try:
            path = find_recipe(base, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{chain[-1][0]}: base: {error}") from error


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked config of a shipped recipe's name or a file, with `a.b=value` overrides on top.

    Raises one ConfigError that holds every mistake of the recipe, of what it inherits, and of the overrides.
    """
    path = find_recipe(name_or_path)
    draft = _Draft(path.name)
    for file, recipe in _read_with_bases(path):
        draft.add_recipe(recipe, file.name)
    for override in overrides:
        draft.add_override(override)
    return draft.build()


def load_values(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked config of values by section, as `source` holds them, with overrides on top."""
    draft = _Draft(source)
    draft.add_recipe(values, source)
    for override in overrides:
        draft.add_override(override)
    return draft.build()


def dump_yaml(config: RunConfig) -> str:
    """Return the whole config as YAML, defaults included; `load_resolved` reads it back to an equal one."""
    return yaml_text.dump(config.model_dump(mode="json"))


def load_resolved(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the config that a run (its directory or config.yaml) saved, with overrides on top."""
    file = Path(path)
    if file.is_dir():
        file = file / "config.yaml"
        if not file.is_file():
            raise ConfigError(f"{path}: no run directory, config.yaml is missing; give the run.dir of a run")
    if not file.exists():
        raise ConfigError(f"{path}: no such run; give the run.dir of a run")
    return load_recipe(str(file.absolute()), overrides)
