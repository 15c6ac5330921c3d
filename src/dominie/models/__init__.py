"""Models: loaded and checked, their heads and their attention made accessible."""
