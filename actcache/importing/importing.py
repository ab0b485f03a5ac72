"""import_activations(): activations in files of others become a store.

In: files, what the user says of them, and the images if they are at hand. Out: the opened `ActivationStore`. Promises:
nothing is written before all shapes, dtypes and numbers of images agree; memory holds one block of images; the same
call twice is safe, and an interrupted one resumes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actcache.importing.activations import arrange
from actcache.importing.config import ImportConfig
from actcache.importing.files import open_files
from actcache.importing.plan import Images, plan_import
from actcache.importing.writer import StoreWriter
from actcache.progress import Progress
from actcache.store import ActivationStore, ImportedFrom

Acts = str | Path | Sequence[str | Path]


def import_activations(
    acts: Acts,
    store: str | Path,
    config: ImportConfig | None = None,
    *,
    images: Images = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
    **options: Any,
) -> ActivationStore:
    """Turn activations that another program has written into a store, which every verb then reads.

        import_activations("layer10.npy", "val.acts", images="photos", layers=[10], model_name="my-vit")

    Images are stored in a seeded random order, as by `extract`; their place in the files is `source_index` of the image
    table, or of a table of images the place after sorting.

    Args:
        acts: a file (.npy, .pt or .safetensors), several in their order, a folder of them, or a folder of saev's
            shards. `actcache.importing.activations` says which shapes are taken.
        store: the store to write, e.g. `val.acts`.
        config: what is said of the activations; or give its fields as keywords (`options`), see `ImportConfig`.
        images: the images in the order of the activations: a folder (in the order of the sorted names), a table (in
            the order of its rows), or what else `extract` takes. Without them, an image is known by its place.
        overwrite: replace another store at this path.
        on_progress: called with (images done, images in all).

    Raises:
        SettingsError: shapes, numbers or options do not fit, or a file holds something else.
        CorruptError: a file is damaged. NonFiniteError: a value is NaN or too large for the stored dtype.
        ImageSourceError, ModelError, StorageError: see `extract`.
        IncompleteError: this worker is done, others are not; the last one to finish seals the store.
    """
    config = config or ImportConfig(**options)
    places = [Path(acts)] if isinstance(acts, str | Path) else [Path(each) for each in acts]
    files = open_files(places)
    found = arrange(files, config)
    plan = plan_import(
        store,
        config,
        images=images,
        n_images=found.n_images,
        n_tokens=found.n_tokens,
        d_model=found.d_model,
        hook_points=found.hook_points,
        imported=ImportedFrom(files.format, files.fingerprint, found.layers),
        prefix=files.prefix,
        model_name=files.model,
        provenance={"acts": [place.name for place in places]},
    )
    with StoreWriter(plan, overwrite=overwrite, made_from={"activations": places[0]}) as writer:
        total = plan.layout.n_images
        done = total - writer.n_images
        for rows in writer:
            if on_progress:
                on_progress(done, total)
            writer.write({hook: found.read(hook, rows) for hook in found.hook_points})
            done += len(rows)
        if on_progress:
            on_progress(done, total)
    return writer.store
