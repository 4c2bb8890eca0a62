"""Measurements on the user's own machine, each beside its floor or its rivals in the same run.

``host``: attaching and staging on the CPU. ``gpu``: loads onto a GPU, and what the daemon costs. ``peers``: other loaders on
the same files. ``lora``: LoRAs into a live pipeline. What a kernel would do is measured in fresh processes (``isolation``,
``kernel``). Times are wall clock; machines are noisy, so read ratios rather than figures.
"""
