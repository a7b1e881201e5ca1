"""What the project page leaves for later: steadier pseudo-labels, and one more symmetry."""
