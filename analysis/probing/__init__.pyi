from .curve import Scores, measure_curve
from .fitting import Task
from .probing import probe_latents
from .target import make_split, read_target

__all__ = ["Scores", "Task", "make_split", "measure_curve", "probe_latents", "read_target"]
