"""HOW, on arrays: pure functions over an array namespace `xp`. They see arrays and axes, never models."""
