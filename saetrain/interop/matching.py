"""Whether a store holds what a checkpoint reads: the model and the hook point that the checkpoint names.

In: a hint, and the store that the user names. Out: the hook point to read, and what the user should know. What is
stated is held to, unless the user asks for something else; a guess only chooses among the store's hook points.
"""

from actcache import HookPoint, SettingsError
from actcache.store import StoreGroup, Tokens, recorded_name
from saetrain.interop.tower_names import Spelling, spell_model
from saetrain.interop.towers import TowerHint

NAMES = {"cls": "CLS", "patch": "patches"}


def match_store(
    hint: TowerHint | None, store: StoreGroup, layer: int | HookPoint | None, *, any_model: bool = False
) -> tuple[HookPoint, tuple[str, ...]]:
    """The hook point of the store that a checkpoint reads, and notes, one sentence each.

    Args:
        layer: what the user asks for; by default what the hint names.
        any_model: whether the user accepts another model than the hint states.

    Raises:
        SettingsError: the hint states another model, or a hook point that the store lacks; or the store has several
            and nothing says which.
    """
    if hint is None:
        return store.hook_point(layer), ()
    hook_point, notes = _match_hook_point(hint, store, layer)
    if hint.model_id is not None:
        notes += _match_model_id(hint, store, any_model)
    elif hint.model is not None:
        notes += _match_model(hint, store, any_model)
    return hook_point, (*notes, hint.caution) if hint.caution else tuple(notes)


def match_tokens(hint: TowerHint | None, store: StoreGroup) -> tuple[Tokens, tuple[str, ...]]:
    """The kind of tokens that a checkpoint was trained on, which `encode` reads then, and notes; all by default.

    Raises SettingsError for an SAE of CLS and a store without it.
    """
    if hint is None or hint.tokens in (None, "all"):
        return store.layout.token_kind("all"), ()
    if not store.layout.has_cls:
        if hint.tokens == "cls":
            raise SettingsError(
                f"By {hint.origin}, the SAE reads CLS, but the model of {store.path} has none. Give a store of the "
                "model that it was trained on."
            )
        return "patch", ()
    tokens = store.layout.token_kind(str(hint.tokens))
    says = "By" if hint.stated else "Guessed from"
    return tokens, (f"{says} {hint.origin}, the SAE was trained on {NAMES[tokens]} only, so only these are encoded.",)


def _match_hook_point(hint: TowerHint, store: StoreGroup, layer: int | HookPoint | None) -> tuple[HookPoint, list[str]]:
    named = hint.hook_point
    if layer is not None or named is None:
        chosen = store.hook_point(layer)
        differs = named is not None and chosen != named
        return chosen, [f"By {hint.origin}, the SAE reads {named}; you asked for {chosen}."] if differs else []
    if all(named in member.hook_points for member in store.stores):
        return named, [] if hint.layer_stated else [f"That the SAE reads {named} is guessed from {hint.origin}."]
    held = ", ".join(map(str, store.stores[0].hook_points))
    if hint.layer_stated:
        raise SettingsError(
            f"By {hint.origin}, the SAE reads {named}, but {store.path} holds {held}. Extract that layer, or ask for "
            "another one with --layer."
        )
    return store.hook_point(None), [f"{hint.origin} suggests that the SAE reads {named}; {store.path} holds {held}."]


def _match_model_id(hint: TowerHint, store: StoreGroup, any_model: bool) -> list[str]:
    """Compare the weights, the architecture and the preprocessing at once, which the id is a hash of."""
    if hint.model_id == store.model_id:
        return []
    text = f"By {hint.origin}, the SAE reads model {hint.model_id}, but {store.path} holds model {store.model_id}"
    if not any_model:
        raise SettingsError(
            f"{text}: other weights, another architecture or preprocessing. Give a store of that model, or --any-model "
            "if you know that they are the same."
        )
    return [f"{text}."]


def _match_model(hint: TowerHint, store: StoreGroup, any_model: bool) -> list[str]:
    assert hint.model is not None
    artifact = store.stores[0].artifact
    model, pretrained = (recorded_name(artifact, name) for name in ("model", "pretrained"))
    shown = " with ".join(str(artifact.provenance.get(name, "unknown")) for name in ("model", "pretrained"))
    is_other = _is_other(Spelling(hint.model, hint.pretrained), model, pretrained)
    named = hint.model + (f" with {hint.pretrained}" if hint.pretrained else "")
    if is_other and hint.stated and not any_model:
        raise SettingsError(
            f"By {hint.origin}, the SAE reads {named}, but {store.path} holds activations of {shown}. Give a store of "
            "that model, or --any-model if you know that they are the same."
        )
    if is_other or not hint.stated:
        says = "By" if hint.stated else "Guessed from"
        return [f"{says} {hint.origin}, the SAE reads {named}; {store.path} holds activations of {shown}."]
    if is_other is None:
        return [f"By {hint.origin}, the SAE reads {named}; the store's {shown} cannot be compared with it by name."]
    return []


def _is_other(named: Spelling, model: str | None, pretrained: str | None) -> bool | None:
    """Whether a store's model is known to be another one than the one that is named; None if the names do not tell."""
    if pretrained is not None and pretrained.startswith("random:"):
        return True
    if model is None:
        return None
    if model.startswith("hf-hub:"):
        model, pretrained = spell_model(model) or Spelling(model)
    if model.split(":")[0] != named.model.split(":")[0] and (":" in model or ":" in named.model):
        return None  # one model may be in several libraries
    if model.startswith("timm:"):
        ours, theirs = (name.partition(".") for name in (model, named.model))
        tags = ours[2] or pretrained, theirs[2]
        return True if ours[0] != theirs[0] or (all(tags) and tags[0] != tags[1]) else False if all(tags) else None
    if model != named.model:
        return True
    if pretrained is None or named.pretrained is None:
        return None if named.pretrained else False
    return pretrained != named.pretrained
