"""What a server can do beside showing files, found out without loading torch."""

from collections.abc import Mapping

from actcache import PipelineError
from analysis.explore.sources import Sources
from analysis.lineage import open_parents


def find_abilities(sources: Sources) -> Mapping[str, str]:
    """edit, upload and text -> why the server cannot do it, "" if it can, as far as can be told without the model."""
    if sources.codes is None or sources.run is None:
        why = sources.missing.get("codes") or sources.missing["run"]
        return dict.fromkeys(("edit", "upload", "text"), why)
    run = sources.run
    reasons = dict.fromkeys(("edit", "upload", "text"), "")
    try:
        stores = open_parents(sources.codes, sources.store, has_flag=True)
    except PipelineError as error:
        reasons |= {"edit": str(error), "text": str(error)}
        if run.tower.model is None:
            reasons["upload"] = str(error)
        return reasons
    if run.hook_point.site != "resid_post":
        reasons["edit"] = f"The rest of the model can only be run from a block's output, not from {run.hook_point}."
    elif len(sources.classes[0]) < 2:
        reasons["edit"] = "A classifier needs images of at least two classes."
    if str(stores.stores[0].artifact.provenance.get("model", "")).startswith("timm:"):
        reasons["text"] = "This model has no text tower."
    return reasons
