"""What a sweep searches: ranges and choices for keys of a config, as yaml says them and as Hydra takes them."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mamba3_train.errors import UserError, nearest

KINDS = ("uniform", "log_uniform", "int", "log_int", "choice")
OPTIONS = ("points", "step")


@dataclass(frozen=True)
class Interval:
    """Numbers of a key from low to high, both included; on a grid `points` of them, or every `step`."""

    key: str
    low: float
    high: float
    log: bool
    integer: bool
    step: int = 1
    points: int | None = None

    def value(self, drawn: float) -> float | int:
        """The value that a trial uses: four digits, which a person can read and type."""
        return int(drawn) if self.integer else float(f"{drawn:.4g}")

    def grid(self) -> list[float | int]:
        """What is drawn on a grid, in order.

        Raises:
            UserError: an interval of real numbers without `points`.
        """
        if self.points is None:
            if not self.integer or self.log:
                raise UserError(f"sweep.space.{self.key} has no points: a grid needs them, e.g. points: 5")
            return list(range(self.low, self.high + 1, self.step))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        places = [low + (high - low) * i / max(self.points - 1, 1) for i in range(self.points)]
        values = [math.exp(place) if self.log else place for place in places]
        return list(dict.fromkeys(self.value(round(value) if self.integer else value) for value in values))

    def samples(self) -> list[Any]:
        """Values that show whether the config takes such values."""
        return [self.value(self.low), self.value(self.high)]


@dataclass(frozen=True)
class Choice:
    """Some values of a key, or some options of a group."""

    key: str
    values: tuple[Any, ...]
    log: bool = False

    @property
    def names(self) -> tuple[Any, ...]:
        """What stands for each value in a journal, which takes no lists."""
        return tuple(hydra_text(v) if isinstance(v, list | dict) else v for v in self.values)

    def value(self, name: Any) -> Any:
        """The value of a name."""
        return self.values[self.names.index(name)]

    def grid(self) -> list[Any]:
        """All names."""
        return list(self.names)

    def samples(self) -> list[Any]:
        """All values."""
        return list(self.values)


Dimension = Interval | Choice


def read_space(tree: Mapping, config: DictConfig) -> list[Dimension]:
    """The dimensions of a `space:` section, with multiples such as 0.5x of the config's own values worked out.

    Raises:
        UserError: a key that the config lacks, a kind that does not exist, bounds or values that do not fit the key.
    """
    dimensions = [_dimension(key, leaf, config) for key, leaf in _leaves(tree, "", config)]
    if not dimensions:
        raise UserError("sweep.space is empty: choose a sweep (sweep=lr), or give the keys to search")
    return dimensions


def grid(dimensions: Sequence[Dimension]) -> list[dict[str, Any]]:
    """What is drawn at every point of the grid, the last key changing first."""
    keys = [dimension.key for dimension in dimensions]
    values = [dimension.grid() for dimension in dimensions]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*values)]


def hydra_text(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{hydra_text(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(hydra_text, value)) + "]"
    return _quoted_if_needed(value) if isinstance(value, str) else repr(value)


def _quoted_if_needed(text: str) -> str:
    if re.fullmatch(r"[\w./-]+", text):
        try:
            if OverridesParser.create().parse_override(f"key={text}").value() == text:
                return text
        except HydraException:
            pass
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"


def _leaves(tree: Mapping, path: str, config: DictConfig):
    """(dotted key, leaf) of a tree whose leaves are mappings with a kind."""
    for name, node in tree.items():
        key = f"{path}{name}"
        if not isinstance(node, Mapping) or not node:
            raise UserError(
                f"sweep.space.{key}={node} must say how to search it: {{log_uniform: [low, high]}}, {{uniform: …}}, "
                "{int: …}, {log_int: …} or {choice: [a, b]}"
            )
        section = OmegaConf.select(config, key)
        inner = isinstance(section, DictConfig) and any(word in section for word in node)
        if inner or any(isinstance(value, Mapping) for value in node.values()):
            yield from _leaves(node, f"{key}.", config)
        else:
            yield key, node


def _dimension(key: str, leaf: Mapping, config: DictConfig) -> Dimension:
    for word in leaf:
        if word not in KINDS + OPTIONS:
            raise UserError(f"sweep.space.{key}: unknown {word}. {nearest(str(word), [*KINDS, *OPTIONS])}")
    kinds = [word for word in leaf if word in KINDS]
    if len(kinds) != 1:
        drop = f": drop one, e.g. '~sweep.space.{key}.{kinds[0]}'" if kinds else ""
        raise UserError(f"sweep.space.{key} must have one of {', '.join(KINDS)}, it has {kinds or 'none'}{drop}")
    (kind,) = kinds
    values = leaf[kind]
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise UserError(f"sweep.space.{key}.{kind}={values} must be a list")
    own = _own_value(key, config)
    values = [_multiple(key, value, own) for value in values]
    for value in values:
        _check_type(key, value, own, kind)
    if kind == "choice":
        return Choice(key, tuple(values))
    return _interval(key, kind, values, leaf)


def _interval(key: str, kind: str, values: list, leaf: Mapping) -> Interval:
    log, integer = kind.startswith("log_"), kind.endswith("int")
    name = f"sweep.space.{key}.{kind}"
    if len(values) != 2 or values[0] >= values[1] or (log and values[0] <= 0):
        condition = "0 < low < high" if log else "low < high"
        raise UserError(f"{name}={values} must be [low, high] with {condition}")
    options = {option: leaf[option] for option in OPTIONS if leaf.get(option) is not None}
    for option, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"sweep.space.{key}.{option}={value} must be a whole number of at least 1")
    if "step" in options and kind != "int":
        raise UserError(f"sweep.space.{key}.step={options['step']} goes with int, not with {kind}")
    return Interval(key, values[0], values[1], log, integer, **options)


def _own_value(key: str, config: DictConfig) -> Any:
    """What the config has for a key now; a group has a section."""
    parent, _, name = key.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    names = [str(k) for k in section if not str(k).startswith("_")] if isinstance(section, DictConfig) else []
    if name not in names:
        raise UserError(f"sweep.space has the unknown key {key}. {nearest(name, names)}")
    return None if OmegaConf.is_missing(section, name) else section[name]


def _multiple(key: str, value: Any, own: Any) -> Any:
    """2x is twice what the config has."""
    times = re.fullmatch(r"([\d.]+(?:e[-+]?\d+)?)x", value) if isinstance(value, str) else None
    if times is None or isinstance(own, str):
        return value
    if not _is_number(own):
        raise UserError(f"sweep.space.{key}: {value} is a multiple, but the config has {own}, which is no number")
    product = float(f"{float(times.group(1)) * own:.6g}")
    return int(product) if isinstance(own, int) and product.is_integer() else product


def _check_type(key: str, value: Any, own: Any, kind: str) -> None:
    if kind != "choice" and (not _is_number(value) or (kind.endswith("int") and not isinstance(value, int))):
        raise UserError(f"sweep.space.{key}.{kind}: {value!r} is not a {'whole ' * kind.endswith('int')}number")
    whole = isinstance(own, int) and not isinstance(own, bool)
    fits = (
        own is None
        or value is None
        or (isinstance(own, DictConfig) and isinstance(value, str))
        or (_is_number(own) and _is_number(value) and not (whole and (kind.endswith("uniform") or value % 1)))
        or (isinstance(own, bool | str) and type(own) is type(value))
        or (OmegaConf.is_list(own) and isinstance(value, list))
    )
    if not fits:
        shown = "a section" if isinstance(own, DictConfig) else repr(own)
        hint = ", which is whole: use int" if whole and kind.endswith("uniform") else ""
        raise UserError(f"sweep.space.{key}.{kind}: {value!r} does not fit, the config has {shown}{hint}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
