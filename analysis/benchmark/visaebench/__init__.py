"""The seven metrics of visaebench 0.1.0 (Apache-2.0), under its names and with its values, from sparse codes.

The package encodes all activations for each metric anew and keeps dense codes of all images. Here everything follows
from the codes that the benchmark has anyway: one pass over (latent, image) pairs, one decode, and a second pass over
the few latents that the first one chose. `protocol.py` puts the parts together. What is known to be wrong with a metric
is left as it is, because the values are there to be compared with published ones, and is named in `DEFECTS`.
Source: the package's code, https://pypi.org/project/visaebench/0.1.0/.
"""
