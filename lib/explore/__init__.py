"""Look around in a finished run, and use it again."""
