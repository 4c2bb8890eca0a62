"""Memory that outlives a process: blocks, and maps of them."""
