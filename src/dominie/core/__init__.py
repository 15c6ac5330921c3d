"""What every part uses: errors, display, files, processes, and the reader of run folders."""
