from .errors import (
    ArtifactNotFoundError,
    CorruptError,
    HubError,
    ImageSourceError,
    IncompleteError,
    ModelError,
    NonFiniteError,
    OthersUnfinishedError,
    ParentMismatchError,
    PipelineError,
    SchemaError,
    SettingsError,
    StorageError,
)
from .extraction import ExtractConfig, estimate, extract, repair
from .hook_point import HookPoint
from .importing import ImportConfig, StoreWriter, import_activations, write_store
from .models import load_vision_tower
from .notebook import progress_bar
from .prompts import Adaptation, PromptConfig, Prompts, adapt, read_prompt_checkpoint, write_prompt_checkpoint
from .sources import HuggingFaceDataset, ImageFolder, ImageParquet, ImageTable, ImageTars
from .store import ActivationStore, describe, open_stores, verify

__all__ = [
    "ActivationStore",
    "Adaptation",
    "ArtifactNotFoundError",
    "CorruptError",
    "ExtractConfig",
    "HookPoint",
    "HubError",
    "HuggingFaceDataset",
    "ImageFolder",
    "ImageParquet",
    "ImageSourceError",
    "ImageTable",
    "ImageTars",
    "ImportConfig",
    "IncompleteError",
    "ModelError",
    "NonFiniteError",
    "OthersUnfinishedError",
    "ParentMismatchError",
    "PipelineError",
    "PromptConfig",
    "Prompts",
    "SchemaError",
    "SettingsError",
    "StorageError",
    "StoreWriter",
    "adapt",
    "describe",
    "estimate",
    "extract",
    "import_activations",
    "load_vision_tower",
    "open_stores",
    "progress_bar",
    "read_prompt_checkpoint",
    "repair",
    "verify",
    "write_prompt_checkpoint",
    "write_store",
]
