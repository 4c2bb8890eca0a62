"""What the two wings say to each other. PROTOCOL.md is its description in prose."""
