"""Where configuration lives, and how every command composes it and reports mistakes in it."""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mamba3_train.command_line import one_of_many
from mamba3_train.errors import UserError, nearest
from mamba3_train.schema import ROOTS

PACKAGE = Path(__file__).parent
WITH_RECIPES = ("train", "plan", "compare", "sweep")
MISTAKES = (UserError, HydraException, OmegaConfBaseException, YAMLError)


def shipped_folder(name: str) -> Path:
    """Folder of shipped yaml: inside the package in a wheel, beside it in a clone or editable install."""
    for candidate in (PACKAGE / name, PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"the folder {name} is missing from this installation of mamba3_train: install it again")


@functools.cache
def register_configs() -> None:
    """Store the root schemas, and every file of recipes/ as group `recipe`, in Hydra's ConfigStore, once a process."""
    store = ConfigStore.instance()
    for name, root in ROOTS.items():
        store.store(name=f"{name}_schema", node=root)
    folder = shipped_folder("recipes")
    for path in sorted(folder.rglob("*.yaml")):
        group = "/".join(["recipe", *path.relative_to(folder).parts[:-1]])
        store.store(group=group, name=path.stem, node=OmegaConf.load(path), package="_global_")


def compose(*overrides: str, config_name: str = "train") -> DictConfig:
    """Compose a config as a command would, for tests and other commands: `compose("+recipe=quickstart")`."""
    register_configs()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(shipped_folder("conf"))):
        config = hydra.compose(config_name, list(overrides))
    check_keys(config)
    return config


def verbatim(argument: str, keys: Sequence[str]) -> str:
    """`key=text` so quoted that Hydra takes any text for what it is, if the key is one of those; else unchanged."""
    key, equals, text = argument.partition("=")
    if key not in keys or not equals or text == "null":
        return argument
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    return f"{key}='{text}'"


def command(
    config_name: str, texts: Sequence[str] = ()
) -> Callable[[Callable[[DictConfig], int | None]], Callable[[], None]]:
    """Make a command line out of `run(config)`: Hydra's key=value, `--help`, `--cfg job`, multirun.

    A `UserError`, or a mistake in the config itself, is printed as one line; the exit code is then 2. Otherwise it is
    what `run` returns, None meaning 0.

    Args:
        config_name: the file in conf/.
        texts: keys whose values are taken as they are, whatever Hydra's grammar would make of them.
    """

    def decorate(run: Callable[[DictConfig], int | None]) -> Callable[[], None]:
        @functools.wraps(run)
        def task(config: DictConfig) -> None:
            # Mistakes are reported here, because Hydra adds a line of its own to any exception that leaves a job.
            try:
                with one_of_many(config):
                    check_keys(config)
                    code = run(config)
            except MISTAKES as error:
                _fail(explain(error, config_name, config))
            except SystemExit as stop:
                code = stop.code  # a process that started others has ended well, which must not end other jobs
            if code:
                sys.exit(code)

        @functools.wraps(run)
        def cli() -> None:
            register_configs()
            sys.argv[1:] = [verbatim(argument, texts) for argument in sys.argv[1:]]
            # Hydra would otherwise print a traceback of its own and leave with code 1.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            # Read when torch loads. OpenMP threads that spin for long take the cores from loader workers and from
            # whatever else runs: on two cores beside one busy process, training was ten times slower than with this.
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
            GlobalHydra.instance().clear()
            main = hydra.main(version_base="1.3", config_path=str(shipped_folder("conf")), config_name=config_name)
            try:
                main(task)()
            except MISTAKES as error:
                _fail(explain(error, config_name))

        return cli

    return decorate


def check_keys(config: DictConfig | ListConfig, path: str = "") -> None:
    """Raise UserError for a key that the `_target_` of its section does not take, with the nearest ones it does."""
    items = config.items_ex(resolve=False) if isinstance(config, DictConfig) else enumerate(config)
    for key, value in items:
        if isinstance(value, DictConfig | ListConfig) and not value._is_none():
            check_keys(value, f"{path}{key}.")
    target = config.get("_target_") if isinstance(config, DictConfig) else None
    if target is None:
        return
    try:
        parameters = inspect.signature(hydra.utils.get_object(target)).parameters
    except ValueError:  # a builtin without a signature
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in config:
        if not key.startswith("_") and key not in parameters:
            raise UserError(f"unknown key {path}{key}. {nearest(key, list(parameters))}")


def explain(error: Exception, config_name: str = "train", config: DictConfig | None = None) -> str:
    """One line for a mistake in the command line or a yaml file, with the nearest valid names.

    config: what had been composed when the mistake was found, if that far.
    """
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in chain:
        if isinstance(link, UserError):
            return link.line
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            group, _, name = link.missing_cfg_file.rpartition("/")
            return f"there is no {group or 'config'} named {name!r}. {nearest(name, link.options or [])}"
    lines = [line for link in chain for line in str(link).splitlines()]
    missing = re.search(r"Missing mandatory value: (\S+)", " ".join(lines))
    if missing:
        missing = missing[1] if config is None else _source_of(missing[1], config)
        recipe = ", or a recipe (+recipe=NAME) that sets it" if config_name in WITH_RECIPES else ""
        return f"{missing} is not set: give {missing}=VALUE{recipe}"
    unknown = re.search(r"Could not override '([^'@]+)", lines[0])
    if unknown:
        return _unknown(unknown.group(1), config_name)
    unknown = re.search(r"Key '\S+' (?:not in|is not in struct).*full_key: (\S+)", " ".join(lines))
    if unknown and "In '" in lines[0]:  # of a yaml file
        return f"{lines[0].partition(':')[0]}: {_unknown(unknown.group(1), config_name)}"
    key = re.search(r"full_key: (\S+)", " ".join(lines))
    reason = next((line for line in lines[1:] if "full_key" not in line), lines[0]) if len(chain) > 1 else lines[0]
    return f"{key.group(1)}: {reason.strip()}" if key else " ".join(line.strip() for line in lines)


def _source_of(key: str, config: DictConfig) -> str:
    """The key that a key takes its value from, or itself."""
    value = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    taken = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    return _source_of(taken[1], config) if taken else key


def _unknown(wrong: str, config_name: str) -> str:
    """What to say of a key that is none: names that could stand in its place."""
    node = _without(wrong, config_name)
    if node is None:
        return f"unknown key {wrong}"
    section, name = wrong.rpartition(".")[::2]
    while section and not OmegaConf.is_config(OmegaConf.select(node, section)):
        section, name = section.rpartition(".")[::2]
    places = [f"{key}.{name}" for key, value in node.items() if isinstance(value, DictConfig) and name in value]
    if not section and places:
        return f"unknown key {wrong}. Did you mean {' or '.join(places)}?"
    names = list(OmegaConf.select(node, section) if section else node)
    if not section:
        names += [folder.name for folder in shipped_folder("conf").iterdir() if folder.is_dir()]
    names = list(dict.fromkeys(str(key) for key in names if not str(key).startswith("_")))
    return f"unknown key {wrong}. {nearest(name, names)}"


def _without(wrong: str, config_name: str) -> DictConfig | None:
    """The config composed without the override of a wrong key, and without a recipe where that is what has it."""
    overrides = [
        o for o in sys.argv[1:] if "=" in o and not o.startswith("-") and o.split("=")[0].lstrip("+~") != wrong
    ]
    plain = [o for o in overrides if not o.startswith("+recipe")]
    for given in (overrides, plain):
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(shipped_folder("conf"))):
                return hydra.compose(config_name, given)
        except (HydraException, OmegaConfBaseException):
            continue
    return None


def _fail(message: str) -> None:
    # One line, however many processes find the same mistake.
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
