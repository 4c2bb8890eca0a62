"""Measurements on the user's own machine, each beside its floor or its rivals in the same run.

``host``: attaching and staging on the CPU. ``gpu``: loads onto a GPU, and what the daemon costs. ``peers``: other loaders on
the same files. ``models``: a whole pipeline. ``lora``: LoRAs into a live one. ``restart``: a kernel, until it has its weights
back. What a kernel would do is measured in fresh processes (``isolation``, ``kernel``). A run that is cut off prints what it
has found, and with ``--save FILE`` the file has it. Times are wall clock; machines are noisy, so read ratios rather than
figures.
"""
