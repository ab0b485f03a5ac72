"""Every error this project raises on purpose. Imports nothing.

    PipelineError
    ├── SettingsError (ValueError)             a bad argument, or settings that differ from an artifact's
    ├── ImageSourceError (ValueError)          no images, or images that cannot be read
    ├── ModelError (ValueError)                an architecture, tag or checkpoint that cannot be used
    ├── HubError (OSError)                     a repository of the Hugging Face hub that cannot be read or written
    ├── NonFiniteError (ValueError)            a NaN or infinity, or a value the stored dtype cannot hold
    ├── ArtifactNotFoundError (FileNotFoundError)
    ├── SchemaError (ValueError)               not an artifact of the expected kind, or one of a newer format
    ├── IncompleteError                        an artifact whose writing has not finished
    │   └── OthersUnfinishedError              one of several workers has done its part, and others have not
    ├── ParentMismatchError (ValueError)       two artifacts that do not belong together
    ├── StorageError (OSError)                 the disk refuses: full, read-only, broken
    └── CorruptError (OSError)                 bytes on disk are not the bytes that were written

Each text says what was wrong, what was expected, and what to do next. `cli.py` catches PipelineError and
nothing else; a notebook can do the same:

    try:
        store = ActivationStore.open("val.acts")
    except PipelineError as error:
        print(error)
"""


class PipelineError(Exception):
    """Base of all errors that a user can cause or encounter."""


class SettingsError(PipelineError, ValueError):
    """An argument is wrong, or an existing artifact was made with other settings."""


class ImageSourceError(PipelineError, ValueError):
    """The image source is empty, or some of its images cannot be read."""


class ModelError(PipelineError, ValueError):
    """The architecture, pretrained tag or checkpoint cannot be used."""


class HubError(PipelineError, OSError):
    """A repository of the Hugging Face hub is absent, closed to the user or out of reach."""


class NonFiniteError(PipelineError, ValueError):
    """A value is NaN or infinite, or overflows the dtype in which it should be stored."""


class ArtifactNotFoundError(PipelineError, FileNotFoundError):
    """There is no artifact at this path."""


class SchemaError(PipelineError, ValueError):
    """The directory is not an artifact of the expected kind, or its format is newer than this program."""


class IncompleteError(PipelineError):
    """The artifact's writing has not finished."""


class OthersUnfinishedError(IncompleteError):
    """This worker has written its shards, and other workers' are missing. Nothing went wrong."""


class ParentMismatchError(PipelineError, ValueError):
    """Two artifacts do not belong together (another model, other images, other codes)."""


class StorageError(PipelineError, OSError):
    """The disk or object store refuses a write."""


class CorruptError(PipelineError, OSError):
    """Bytes on disk differ from the bytes that were written."""
