"""What a server can do beside showing files, found out without loading a model."""

from collections.abc import Mapping

from actcache import PipelineError, SettingsError
from analysis.classifier import choose_classes
from analysis.explore.sources import Sources
from analysis.lineage import open_parents


def find_abilities(sources: Sources) -> Mapping[str, str]:
    """edit, upload and text -> why the server cannot do it, "" if it can. The model is not loaded for this."""
    reasons = dict.fromkeys(("edit", "upload", "text"), "")
    if sources.codes is None or sources.run is None:
        why = sources.missing.get("codes") or sources.missing["run"]
        return dict.fromkeys(reasons, why)
    try:
        stores = open_parents(sources.codes, sources.store, has_flag=True)
    except PipelineError as error:
        reasons |= {"edit": str(error), "text": str(error)}
        if sources.run.tower.model is None:
            reasons["upload"] = str(error)
        return reasons
    try:
        choose_classes(stores, sources.run.hook_point)
    except SettingsError as error:
        reasons["edit"] = str(error)
    if str(stores.stores[0].artifact.provenance.get("model", "")).startswith("timm:"):
        reasons["text"] = "This model has no text tower."
    return reasons
