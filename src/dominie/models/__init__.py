"""Models: loaded, placed, adapted, merged, exported; their heads and attention made accessible."""
