"""Every number that a user gives has a range, checked in one place, wherever it is given: at construction, by the
command line, and by a verb. The fields are listed by reflection, so that a new one is covered too.
"""

import importlib
import json
import math
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import actcache
import analysis
import saetrain
from actcache import ExtractConfig, PromptConfig, SettingsError
from actcache.options import BOUNDS, FLOAT_MAX, INT_MAX, check_number
from saetrain import SAEConfig, TrainConfig


def configurations() -> list[type[Any]]:
    """Every dataclass of the packages with a field that `option` or `required` declared."""
    classes: set[type[Any]] = set()
    for package in (actcache, saetrain, analysis):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("config") or module.name.endswith("question"):
                for value in vars(importlib.import_module(module.name)).values():
                    if is_dataclass(value) and any("help" in each.metadata for each in fields(value)):
                        classes.add(value)  # type: ignore[arg-type]
    return sorted(classes, key=lambda config: config.__name__)


def number_type(hint: Any) -> type | None:
    """int or float, of an annotation that holds such numbers alone, in a sequence or with None."""
    leaves = [hint]
    while any(get_args(leaf) for leaf in leaves):
        leaves = [part for leaf in leaves for part in (get_args(leaf) or (leaf,)) if part not in (..., type(None))]
    return leaves[0] if leaves in ([int], [float]) else None


REQUIRED = {"model": "ViT-B-32", "pretrained": "openai", "layers": (1,)}
NEEDED = {"Question": {"latent": 1}, "ProbingConfig": {"label": "label_name"}}
"""What has to be given for a configuration to make sense at all."""
PARTNERS = {
    ("ComparisonConfig", "high"): {"low": INT_MAX}, ("ComparisonConfig", "low"): {"high": 1},
    ("SAEConfig", "n_latents"): {"variant": "relu"}, ("PromptConfig", "depth"): {"method": "maple"},
    ("Question", "sample"): {"latent": None}, ("Question", "seed"): {"latent": None, "sample": 1},
    ("Question", "tau"): {"latent": None, "class_": "cat"}, ("ResolvedSAEConfig", "target_l0"): {"n_latents": 2**62},
}  # fmt: skip
"""The values of other fields with which every value in range makes sense."""
RESOLVED = {
    "ResolvedSAEConfig": lambda: SAEConfig(variant="relu").resolve(8),
    "ResolvedTrainConfig": lambda: TrainConfig().resolve(SAEConfig().resolve(8), "float32"),
    "ResolvedPromptConfig": lambda: PromptConfig().resolve(12),
}


def cases() -> Iterator[tuple[type[Any], Field[Any], type]]:
    for config in configurations():
        hints = get_type_hints(config)
        for field in fields(config):
            if kind := number_type(hints[field.name]):
                yield config, field, kind


CASES = {f"{config.__name__}.{field.name}": (config, field, kind) for config, field, kind in cases()}


def bounds_of(config: type[Any], name: str) -> dict[str, float]:
    for base in config.__mro__:
        metadata = getattr(base, "__dataclass_fields__", {}).get(name)
        if metadata is not None and "help" in metadata.metadata:
            return {key: metadata.metadata[key] for key in BOUNDS if metadata.metadata.get(key) is not None}
    return {}


def make(config: type[Any], name: str, value: Any) -> Any:
    if config.__name__ in RESOLVED:
        given = {**vars(RESOLVED[config.__name__]())}
    else:
        given = {key: value for key, value in REQUIRED.items() if any(
            each.name == key and each.default is MISSING for each in fields(config))}  # fmt: skip
    given |= NEEDED.get(config.__name__, {})
    for base in config.__mro__:
        given |= PARTNERS.get((base.__name__, name), {})
    several = get_origin(get_type_hints(config)[name]) in (tuple, Sequence)
    return config(**given | {name: (value,) if several else value})


def flag_of(name: str) -> str:
    return f"--{name.strip('_').replace('_', '-')}"


def plain(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def test_the_packages_have_configurations() -> None:
    names = {config.__name__ for config in configurations()}
    assert names >= {"ExtractConfig", "PromptConfig", "SAEConfig", "TrainConfig", "AnalyzeConfig", "Question",
                     "ModelOptions", "StudyConfig", "MaskingConfig", "DeletionConfig", "SteerabilityConfig",
                     "ComparisonConfig", "RulesConfig", "ResolvedSAEConfig", "ResolvedTrainConfig"}  # fmt: skip
    assert len(CASES) > 60


@pytest.mark.parametrize("case", CASES)
def test_every_number_has_a_range(case: str) -> None:
    config, field, _ = CASES[case]
    bounds = bounds_of(config, field.name)
    assert "at_least" in bounds or "above" in bounds, f"{case} has no lower bound"


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_number_in_range_is_taken_as_plain_python(case: str, data: st.DataObject) -> None:
    config, field, kind = CASES[case]
    bounds = bounds_of(config, field.name)
    low, high = bounds.get("at_least", bounds.get("above")), bounds.get("at_most", bounds.get("below"))
    high = 2.0**62 if case == "ResolvedSAEConfig.target_l0" else high  # the number of latents, see PARTNERS
    if kind is int:
        low = low + 1 if "above" in bounds else low
        high = INT_MAX if high is None else high
        value = data.draw(st.integers(low, high))
        given_as = data.draw(st.sampled_from([value, np.int64(value), np.array(value)]))
    else:
        drawn = st.floats(
            low, FLOAT_MAX if high is None else high, exclude_min="above" in bounds, exclude_max="below" in bounds
        )
        value = data.draw(drawn)
        whole = [int(value), np.int64(int(value))] if abs(value) < 2**60 and value == int(value) else []
        given_as = data.draw(st.sampled_from([value, np.float64(value), np.array(value), *whole]))
    stored = plain(getattr(make(config, field.name, given_as), field.name))
    assert type(stored) is kind
    assert stored == value


def outside(kind: type, bounds: dict[str, float]) -> st.SearchStrategy[Any]:
    """Numbers beyond each bound, and what is no number of this kind."""
    low, high = bounds.get("at_least", bounds.get("above")), bounds.get("at_most", bounds.get("below"))
    wrong: list[st.SearchStrategy[Any]] = [
        st.sampled_from([True, False, np.bool_(True), "1", "", "many\nlines", b"1", [1], {}, object(), 1j, Path("1"),
                         math.nan, math.inf, -math.inf, np.float32("nan"), 10**400, -(10**400)]),
    ]  # fmt: skip
    if kind is int:
        wrong += [st.just(0.5), st.just(Fraction(1, 2)), st.integers(min_value=INT_MAX + 1)]
        wrong += [st.integers(max_value=low - (0 if "above" in bounds else 1))] if low is not None else []
        wrong += [st.integers(min_value=high + (0 if "below" in bounds else 1))] if high is not None else []
    else:
        wrong += [st.floats(FLOAT_MAX, exclude_min=True, allow_infinity=False)]
        if low is not None:
            wrong.append(st.floats(max_value=low, exclude_max="above" not in bounds, allow_infinity=False))
        if high is not None:
            wrong.append(st.floats(min_value=high, exclude_min="below" not in bounds, allow_infinity=False))
    return st.one_of(wrong)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_whatever_is_out_of_range_is_refused_in_one_line(case: str, data: st.DataObject) -> None:
    config, field, kind = CASES[case]
    value = data.draw(outside(kind, bounds_of(config, field.name)))
    with pytest.raises(SettingsError) as caught:
        make(config, field.name, value)
    text = str(caught.value)
    assert flag_of(field.name).removesuffix("s") in text
    assert " must be " in text
    assert ", got " in text
    assert "\n" not in text
    assert len(text) < 250


TEXTS = [
    (config, field)
    for config in configurations()
    for field in fields(config)
    if str in get_args(hint := get_type_hints(config)[field.name]) or hint is str
]


@pytest.mark.parametrize(("config", "field"), TEXTS, ids=[f"{c.__name__}.{f.name}" for c, f in TEXTS])
@pytest.mark.parametrize("value", [3, 2.5, True, b"raw", {"a": 1}, object()], ids=lambda value: type(value).__name__)
def test_a_text_is_text(config: type[Any], field: Field[Any], value: object) -> None:
    with pytest.raises(SettingsError, match=f"{flag_of(field.name).removesuffix('s')}.* must be .*, got "):
        make(config, field.name, value)


FLAGS = [
    (config, field)
    for config in configurations()
    for field in fields(config)
    if get_type_hints(config)[field.name] in (bool, bool | None)
]


@pytest.mark.parametrize(("config", "field"), FLAGS, ids=[f"{c.__name__}.{f.name}" for c, f in FLAGS])
def test_a_switch_takes_true_and_false_of_numpy_too_and_nothing_else(config: type[Any], field: Field[Any]) -> None:
    partners: dict[str, Any] = {"class_specific": {"method": "coop"}}.get(field.name, {})
    if config.__name__ not in RESOLVED:
        required = {
            k: v for k, v in REQUIRED.items() if any(f.name == k and f.default is MISSING for f in fields(config))
        }
        made = config(**required | partners | {field.name: np.bool_(True)})
        assert getattr(made, field.name) is True
    for value in (1, 0, "yes", 0.5):
        with pytest.raises(SettingsError, match=f"{flag_of(field.name)} must be true or false, got {value!r}"):
            make(config, field.name, value)


@pytest.mark.parametrize("value", [np.array([1, 2]), range(1, 3), [np.int32(1), np.int64(2)], (1, 2)], ids=repr)
def test_a_sequence_of_any_kind_becomes_a_tuple_of_plain_numbers(value: Any) -> None:
    layers = ExtractConfig("ViT-B-32", pretrained="openai", layers=value).layers
    assert layers == (1, 2)
    assert [type(layer) for layer in layers] == [int, int]
    json.dumps(layers)


@pytest.mark.parametrize("value", [1, "12", {1: 2}, None, np.array(1), Path("1")], ids=repr)
def test_what_is_no_sequence_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(SettingsError, match=r"--layer must be a list such as \[1, 2\], got "):
        ExtractConfig("ViT-B-32", pretrained="openai", layers=value)


def test_a_path_is_taken_for_a_text() -> None:
    assert ExtractConfig(Path("config.json"), pretrained=np.str_("openai"), layers=[1]).model == "config.json"  # type: ignore[arg-type]


@pytest.mark.parametrize("n_latents", [1, 8, np.int64(31)])
@pytest.mark.parametrize("variant", ["topk", "batchtopk", "jumprelu", "gated"])
def test_more_active_latents_than_latents_are_refused_at_construction(variant: str, n_latents: int) -> None:
    with pytest.raises(SettingsError, match=rf"--k must lie in 1\.\.{n_latents} .*got {n_latents + 1}"):
        SAEConfig(variant=variant, n_latents=n_latents, k=n_latents + 1)
    with pytest.raises(SettingsError, match=f"--target-l0 must be .* at most {n_latents}, got"):
        SAEConfig(variant=variant, n_latents=n_latents, k=1, target_l0=n_latents + 0.5)
    assert SAEConfig(variant=variant, n_latents=n_latents, k=n_latents).k == n_latents


@given(st.integers(-1000, 1000), st.integers(-1000, 1000))
def test_one_check_holds_any_range(low: int, value: int) -> None:
    if value >= low:
        assert check_number("batch_size", value, int, at_least=low) == value
    else:
        with pytest.raises(SettingsError, match=rf"^--batch-size must be at least {low}, got {value}\.$"):
            check_number("batch_size", value, int, at_least=low)
