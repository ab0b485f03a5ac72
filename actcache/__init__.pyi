from .adaptation import Adaptation, adapt
from .artifact import (
    Artifact,
    Parent,
    begin_artifact,
    check_parent,
    open_artifact,
    read_manifest,
    require_complete,
    seal_artifact,
)
from .clip_model import Clip, load_clip
from .commits import missing_shards, read_record, read_records, write_record
from .description import describe
from .errors import (
    ArtifactNotFoundError,
    CorruptError,
    ImageSourceError,
    IncompleteError,
    ModelError,
    NonFiniteError,
    ParentMismatchError,
    PipelineError,
    SchemaError,
    SettingsError,
    StorageError,
)
from .extra import read_extra
from .extraction import extract
from .few_shot import ClassSplit, choose_shots, class_words, split_classes
from .files import (
    artifact_path,
    crc32c,
    digest,
    file_digest,
    fsync_directory,
    fsync_tree,
    read_json,
    remove_litter,
    temporary_path,
    write_atomic,
    write_json,
)
from .filter import select_images
from .group import StoreGroup, Stores, open_stores
from .hook_point import HookPoint
from .images import (
    ImagePlan,
    decode_image,
    resize_image,
    resize_mask,
)
from .layout import (
    StoreLayout,
    choose_shape,
)
from .origin import Towers, find_image_source, find_origin, open_towers
from .plan import ExtractionEstimate, estimate
from .prompt_artifact import open_prompts, read_prompts
from .prompt_checkpoints import read_prompt_checkpoint, write_prompt_checkpoint
from .prompt_config import PromptConfig
from .prompted_towers import PromptedText, classify, embed_images, prompt_text, prompt_vision
from .prompts import Prompts
from .repair import repair
from .settings import layout_of
from .shards import aligned_empty
from .sources import (
    HuggingFaceDataset,
    ImageFolder,
    ImageSource,
    ImageTable,
    ImageTars,
    open_source,
    read_table,
)
from .statistics import ChannelStatistics
from .store import (
    IMAGES_FILE,
    ActivationStore,
    Tokens,
)
from .text_tower import TEMPLATE_SETS, TextTower, make_text_tower, read_templates
from .verification import (
    Problem,
    Verification,
    verify,
)
from .vision_tower import (
    VisionTower,
    choose_device,
    has_cpu_bfloat16,
    load_vision_tower,
    make_vision_tower,
)
from .workers import Worker, find_worker

__all__ = [
    "IMAGES_FILE",
    "TEMPLATE_SETS",
    "ActivationStore",
    "Adaptation",
    "Artifact",
    "ArtifactNotFoundError",
    "ChannelStatistics",
    "ClassSplit",
    "Clip",
    "CorruptError",
    "ExtractionEstimate",
    "HookPoint",
    "HuggingFaceDataset",
    "ImageFolder",
    "ImagePlan",
    "ImageSource",
    "ImageSourceError",
    "ImageTable",
    "ImageTars",
    "IncompleteError",
    "ModelError",
    "NonFiniteError",
    "Parent",
    "ParentMismatchError",
    "PipelineError",
    "Problem",
    "PromptConfig",
    "PromptedText",
    "Prompts",
    "SchemaError",
    "SettingsError",
    "StorageError",
    "StoreGroup",
    "StoreLayout",
    "Stores",
    "TextTower",
    "Tokens",
    "Towers",
    "Verification",
    "VisionTower",
    "Worker",
    "adapt",
    "aligned_empty",
    "artifact_path",
    "begin_artifact",
    "check_parent",
    "choose_device",
    "choose_shape",
    "choose_shots",
    "class_words",
    "classify",
    "crc32c",
    "decode_image",
    "describe",
    "digest",
    "embed_images",
    "estimate",
    "extract",
    "file_digest",
    "find_image_source",
    "find_origin",
    "find_worker",
    "fsync_directory",
    "fsync_tree",
    "has_cpu_bfloat16",
    "layout_of",
    "load_clip",
    "load_vision_tower",
    "make_text_tower",
    "make_vision_tower",
    "missing_shards",
    "open_artifact",
    "open_prompts",
    "open_source",
    "open_stores",
    "open_towers",
    "prompt_text",
    "prompt_vision",
    "read_extra",
    "read_json",
    "read_manifest",
    "read_prompt_checkpoint",
    "read_prompts",
    "read_record",
    "read_records",
    "read_table",
    "read_templates",
    "remove_litter",
    "repair",
    "require_complete",
    "resize_image",
    "resize_mask",
    "seal_artifact",
    "select_images",
    "split_classes",
    "temporary_path",
    "verify",
    "write_atomic",
    "write_json",
    "write_prompt_checkpoint",
    "write_record",
]
