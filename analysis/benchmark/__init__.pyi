from .benchmarking import benchmark_runs
from .morans import LEAST_IMAGES, LEAST_PATCHES, Grid, find_morans

__all__ = ["LEAST_IMAGES", "LEAST_PATCHES", "Grid", "benchmark_runs", "find_morans"]
