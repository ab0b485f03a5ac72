"""Flags from configurations: the parameters of a verb in, flags with help out, so an option is written down once.

A parameter whose type is a dataclass becomes one flag for each of its fields that `actcache.options.option` declares.
"""

import inspect as signatures
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer import Option

from actcache.errors import SettingsError
from actcache.hook_point import HookPoint
from analysis.terminal.checks import FIELDS, Check, OneOf, Takes, Writes
from analysis.terminal.remote_runs import fetch_runs


def with_flags(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb one flag for each field of its configuration parameters, and check its arguments before it runs.

    A parameter of type `Config` is built from the flags. A parameter of type `list[Config]` receives every combination
    of the values of its sweep fields, which may then be given several times. What stands in the annotation of another
    parameter beside typer's own objects are its checks, which the attribute `checks` of the result lists by name.
    """
    hints = get_type_hints(function, include_extras=True)
    parameters: list[signatures.Parameter] = []
    configs: dict[str, tuple[Any, bool]] = {}
    checks: dict[str, list[tuple[str, Check]]] = {}
    for name, parameter in signatures.signature(function).parameters.items():
        hint = hints[name]
        sweeps = get_origin(hint) is list and is_dataclass(get_args(hint)[0])
        config = get_args(hint)[0] if sweeps else hint
        if is_dataclass(config):
            configs[name] = (config, sweeps)
            parameters += [flag_of(field, get_type_hints(config)[field.name], sweeps) for field in options_of(config)]
            checks |= {
                field.name: [(flag_name(field.name), FIELDS[field.name])]
                for field in options_of(config)
                if field.name in FIELDS
            }
        else:
            info, *own = getattr(hint, "__metadata__", (None,))
            checks[name] = [(shown_name(name, info), check) for check in own]
            parameters.append(parameter.replace(annotation=hint, kind=signatures.Parameter.KEYWORD_ONLY))

    def run(**given: Any) -> None:
        all_checks = [(name, shown, check) for name, own in checks.items() for shown, check in own]
        for name, shown, check in sorted(all_checks, key=lambda each: not isinstance(each[2], Writes | OneOf)):
            check_value(shown, given.get(name), check)  # spelling first, then what must be there
        for name, own in checks.items():
            if any(isinstance(check, Takes) for _, check in own):
                given[name] = fetch_runs(given[name])
        for name, (config, sweeps) in configs.items():
            values = {field.name: given.pop(field.name) for field in options_of(config)}
            given[name] = combine(config, values) if sweeps else build(config, values)
        function(**given)

    paragraphs = (function.__doc__ or "").split("\n\n")
    run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)  # the help wraps them itself
    run.__name__ = function.__name__
    run.checks = checks  # type: ignore[attr-defined]
    run.__signature__ = signatures.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def check_value(name: str, value: Any, check: Check) -> None:
    """Apply a check to a value, or to each of several; None was not given."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if each is not None:
            check(name, each)


def shown_name(name: str, info: Any) -> str:
    """An argument as people write it: RUN, OUT, --result."""
    if isinstance(info, typer.models.ArgumentInfo):
        return str(info.metavar or name).strip("[].")
    flags = [text for text in getattr(info, "param_decls", None) or () if text.startswith("--")]
    return flags[0] if flags else flag_name(name)


def flag_name(name: str) -> str:
    """class_ -> --class; n_top -> --n-top."""
    return f"--{name.strip('_').replace('_', '-')}"


def options_of(config: Any) -> list[Field[Any]]:
    """The fields of a configuration that are flags: those declared by `actcache.options.option`."""
    return [field for field in fields(config) if "help" in field.metadata]


def flag_of(field: Field[Any], hint: Any, sweeps: bool) -> signatures.Parameter:
    """The flag of one field. A tuple of values is a flag that may be repeated, so its name is singular."""
    optional, kinds = NoneType in get_args(hint), leaf_types(hint)
    parser, default = field.metadata["parser"], ... if field.default is MISSING else field.default
    several = (get_origin(hint) in (tuple, Sequence) and parser is None) or (sweeps and field.metadata["sweep"])
    name = field.name.strip("_").replace("_", "-")
    kind: Any = str if parser or str in kinds else kinds[0]
    if several:
        kind = list[kind]
        if sweeps:
            kind, default = (kind | None, None) if default is None else (kind, [default])
        else:
            name = name.removesuffix("s")
            default = ... if default is ... else list(default)
    elif optional or (parser and not default):
        kind, default = kind | None, default or None
    names = f"--{name}/--no-{name}" if kinds == [bool] and optional else f"--{name}"
    option = Option(names, help=field.metadata["help"])
    return signatures.Parameter(
        field.name,
        signatures.Parameter.KEYWORD_ONLY,
        default=signatures.Parameter.empty if default is ... else default,
        annotation=Annotated[kind, option],
    )


def leaf_types(hint: Any) -> list[Any]:
    """The plain types of an annotation: int | None -> [int]; str | Sequence[str] -> [str, str]."""
    parts = [part for part in get_args(hint) if part is not NoneType and part is not ...]
    return [leaf for part in parts for leaf in leaf_types(part)] if parts else [hint]


def build(config: Any, values: Mapping[str, Any]) -> Any:
    """A configuration from the values of its flags. One that declares its errors as usage raises a usage error."""
    parsers = {field.name: field.metadata["parser"] for field in options_of(config)}
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    texts = {name: parsers[name](value) for name, value in plain.items() if parsers[name] and isinstance(value, str)}
    given = {name: value for name, value in {**plain, **texts}.items() if value is not None or not parsers[name]}
    try:
        return config(**given)
    except SettingsError as error:
        if not getattr(config, "IS_USAGE", False):
            raise
        raise typer.BadParameter(str(error)) from error


def combine(config: Any, values: Mapping[str, Any]) -> list[Any]:
    """A configuration for every combination of the values of the sweep fields, the last field varying fastest."""
    names = [field.name for field in options_of(config) if field.metadata["sweep"]]
    lists = [values[name] or [None] for name in names]
    rest = {name: value for name, value in values.items() if name not in names}
    return [build(config, {**rest, **dict(zip(names, chosen, strict=True))}) for chosen in itertools.product(*lists)]


# ---------------------------------------------------------------------------------------------------------------------
# Values with a notation of their own


def split_pair(flag: str, pair: str) -> tuple[int, str]:
    """907=red stripes -> (907, "red stripes")."""
    latent, equals, text = pair.partition("=")
    if not (equals and latent.strip().isdigit()):
        raise SettingsError(f'{flag} takes LATENT=TEXT, e.g. {flag} "907=red stripes", got {pair!r}.')
    return int(latent), text


def read_values(flag: str, pairs: Sequence[str]) -> dict[int, float]:
    """907=5 and so on -> {907: 5.0}."""
    values: dict[int, float] = {}
    for pair in pairs:
        latent, text = split_pair(flag, pair)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not abs(value) < float("inf") or latent in values:
            raise SettingsError(f"{flag} takes LATENT=NUMBER, each latent once, e.g. {flag} 907=5, got {pair!r}.")
        values[latent] = value
    return values


def read_hook_point(layer: int | None, site: str | None) -> int | HookPoint | None:
    """What the library takes for --layer and --site."""
    if site is None:
        return layer
    if layer is None:
        raise SettingsError("--site needs --layer.")
    return HookPoint(layer, site)


def repeat_flags(config: Any = None, **more: Any) -> list[str]:
    """The flags that give a configuration, and other parameters, again: those that are not at their default or None."""
    given: dict[str, object] = {}
    for field in [] if config is None else options_of(type(config)):
        if (value := getattr(config, field.name)) != field.default:
            given[field.name] = value
    words: list[str] = []
    for name, value in {**given, **more}.items():
        words += [] if value is None else [flag_name(name), str(value)]
    return words
