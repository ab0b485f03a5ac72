"""The command line with small defaults, for pages that leave the length of a training or a search to the program.

The names and the meaning of all flags stay as they are.
"""

import inspect

import cli
from analysis.classifier import logistic

SMALL = {"train": {"n_steps": 20, "batch_size": 64}, "adapt": {"shots": 4, "n_epochs": 1}}
"""Verb -> the defaults of its flags that are replaced."""


def main() -> None:
    for command in cli.app.registered_commands:
        assert command.callback
        if defaults := SMALL.get(command.callback.__name__):
            signature = inspect.signature(command.callback)
            assert set(defaults) <= set(signature.parameters)
            parameters = [
                each.replace(default=defaults.get(each.name, each.default)) for each in signature.parameters.values()
            ]
            command.callback.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    logistic.GRID = (0.1,)  # penalties that a probe tries
    cli.app()


if __name__ == "__main__":  # which worker processes do not run again
    main()
