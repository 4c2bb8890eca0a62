"""Whole models: what stands between the cache and the libraries that make models of weights."""
