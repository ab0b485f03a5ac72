"""What several statistics share. Importing this loads no library."""

SCORES = ("mean", "max")
"""How an image's activations make a score: the mean over its tokens (PatchSAE 2.1), or the maximum."""

TAU = 0.2
"""PatchSAE's threshold of a patch activation (equation 4)."""
