"""File formats: what lies where. Client side only."""
