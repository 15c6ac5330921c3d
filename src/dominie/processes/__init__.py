"""The processes of one run, and the cores they have."""
