"""The part that Jupyter sees: magics and what they show."""
