"""Where the options of :class:`nbcache.config.NBCache` come from: Jupyter's configuration files, the environment, flags.

Files are ``jupyter_nbcache_config.py`` and ``.json`` in each folder of Jupyter's config path; what the environment says goes
before them, and flags and ``%config`` before that. What a file sets is passed on as the environment variable of that option
(:func:`adopt`), so that kernel, daemon and zygote agree. An option that does not exist is an error, with a suggestion.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec
from traitlets import TraitError
from traitlets.config import Config
from traitlets.config.loader import ConfigFileNotFound, JSONFileConfigLoader, PyFileConfigLoader

from nbcache.config import NBCache, check_names
from nbcache.errors import InvalidOption, NBCacheError
from nbcache.typos import did_you_mean

BASE = "jupyter_nbcache_config"
SECTION = "NBCache"
OTHER_VARIABLES = ("NBCACHE_RUNTIME_DIR", "NBCACHE_PROGRESS")
"""Variables that are no options: where the daemon is met, and whether loads show how far they are."""


DAEMON_OPTIONS = ("gpu_keep_s", "gpu_low_watermark", "host_limit")
"""Options that a daemon takes from whoever starts it, and keeps."""


class Setting(msgspec.Struct, frozen=True):
    """An option, its value now, what set it, and what it is for."""

    option: str
    value: Any
    source: str
    help: str
    daemon: str | None = None
    """What the daemon that runs was started with instead, as text; None if that is the same, or no concern of a daemon's."""


def options() -> tuple[str, ...]:
    """The names of all options."""
    return tuple(NBCache.class_trait_names(config=True))


def variable_of(option: str) -> str:
    """The environment variable of an option."""
    return f"NBCACHE_{option.upper()}"


def check_option(name: str, where: str) -> None:
    """InvalidOption, with the nearest one that exists, for an option that does not."""
    try:
        check_names([name])
    except TraitError as error:
        raise InvalidOption(f"{where}: {error}") from error


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """InvalidOption for a variable that is nearly one of ours. Others that begin like ours are somebody else's."""
    known = [*map(variable_of, options()), *OTHER_VARIABLES]
    for name in environment:
        if not name.startswith("NBCACHE_") or name in known or name.startswith("NBCACHE_TEST_"):
            continue
        meant = did_you_mean(name, known, 0.85)
        if meant:
            raise InvalidOption(f"environment: no option has the variable {name}{meant}")


def as_text(value: object) -> str:
    """A value as its environment variable holds it."""
    if isinstance(value, bool):
        return "1" if value else "0"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def files() -> list[str]:
    """The configuration files that would be read if they were there."""
    from jupyter_core.paths import jupyter_config_path

    return [os.path.join(folder, f"{BASE}.{suffix}") for folder in jupyter_config_path() for suffix in ("py", "json")]


def read_files(folders: Iterable[str] | None = None) -> dict[str, tuple[Any, str]]:
    """What the files set: option to value and path, the first folder of Jupyter's config path going before the later ones.

    InvalidOption, naming the file, for one that cannot be read, for an option that does not exist, and for a wrong value.
    """
    if folders is None:
        from jupyter_core.paths import jupyter_config_path

        folders = jupyter_config_path()
    found: dict[str, tuple[Any, str]] = {}
    for folder in reversed(list(folders)):
        for loader, suffix in ((PyFileConfigLoader, "py"), (JSONFileConfigLoader, "json")):
            name = f"{BASE}.{suffix}"
            path = os.path.join(folder, name)
            for option, value in _read(loader(name, path=folder), path).get(SECTION, {}).items():
                check_option(option, path)
                _check_value(option, value, path)
                found[option] = value, path
    return found


def _read(loader: PyFileConfigLoader | JSONFileConfigLoader, path: str) -> Config:
    try:
        return loader.load_config()
    except ConfigFileNotFound:
        return Config()
    except Exception as error:  # a configuration file is the user's program
        raise InvalidOption(f"{path}: {type(error).__name__}: {error}") from error


def _check_value(option: str, value: object, path: str) -> None:
    try:
        NBCache(**{option: value})
    except TraitError as error:
        raise InvalidOption(f"{path}: {error}") from error


def adopt(environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Put what the files set into the environment, where that is silent. InvalidOption as :func:`read_files`."""
    check_environment(environment)
    for option, (value, _) in read_files().items():
        if value is not None:
            environment.setdefault(variable_of(option), as_text(value))


def configured() -> NBCache:
    """The options as :func:`adopt` would have them, without touching the environment. InvalidOption as :func:`read_files`."""
    return NBCache(**{option: value for option, (value, _) in read_files().items() if variable_of(option) not in os.environ})


def set_flag(flag: str, environment: dict[str, str] | os._Environ[str] = os.environ) -> str:
    """Take ``NBCache.host_limit=48G`` in; the option's name. InvalidOption for an option that does not exist, or no value."""
    name, equals, value = flag.removeprefix(f"{SECTION}.").partition("=")
    check_option(name, f"--{flag}")
    if not equals:
        raise InvalidOption(f"--{flag}: give a value, as in --{SECTION}.{name}=...")
    environment[variable_of(name)] = value
    return name


def of_daemon(config: NBCache) -> dict[str, str]:
    """What a daemon of this configuration says that it was started with."""
    return {option: as_text(getattr(config, option)) for option in DAEMON_OPTIONS}


def in_force(flags: Iterable[str] = (), started_with: Mapping[str, str] = MappingProxyType({})) -> list[Setting]:
    """Every option: its value here and now, and what set it. InvalidOption for a value that cannot be.

    ``started_with`` is what the daemon that runs says of itself.
    """
    check_environment()
    files, flagged = read_files(), set(flags)
    adopt()
    config, settings = NBCache(), []
    for option in sorted(options()):
        variable = variable_of(option)
        text = os.environ.get(variable)
        source = "default"
        if option in flagged:
            source = f"flag --{SECTION}.{option}"
        elif option in files and text == as_text(files[option][0]):
            source = files[option][1]
        elif text is not None:
            source = f"environment {variable}"
        help_text = " ".join(NBCache.class_traits()[option].help.split())
        value = _value(config, option)
        other = started_with.get(option, as_text(value))
        settings.append(Setting(option, value, source, help_text, other if other != as_text(value) else None))
    return settings


def _value(config: NBCache, option: str) -> Any:  # noqa: ANN401
    try:
        value = getattr(config, option)
        NBCache(**{option: value})  # what comes from a variable is a default, which traitlets does not validate
    except (TraitError, NBCacheError) as error:
        raise InvalidOption(str(error)) from error
    return value
