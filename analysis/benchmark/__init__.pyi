from .benchmarking import benchmark_runs

__all__ = ["benchmark_runs"]
