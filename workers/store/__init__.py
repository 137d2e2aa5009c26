"""Where models come from. ``sources`` resolves a source to a snapshot on disk; ``manifest`` names its content."""
