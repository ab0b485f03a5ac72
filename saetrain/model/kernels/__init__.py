"""Compiled loops over codes, blocks of pre-activations and rows of weights; see actcache/compiler.py."""
