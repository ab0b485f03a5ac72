"""The types of progress callbacks: a function that is called with what is done and what there is to do in all."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (done, total), in units that the function that takes it names: images, bytes, tasks."""

ProgressWithNote = Callable[[int, int, str], None]
"""Called with (done, total, note); the note is a short text such as `loss 1.234` or `measuring`."""
