"""Whole models out of cached weights: pipelines of diffusers, models of diffusers and transformers, single files."""
