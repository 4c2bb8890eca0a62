"""The daemon: owns the memory, decides who gets what. Imports no torch and makes no GPU context."""
