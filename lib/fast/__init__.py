"""Optional speed: the Fourier algorithm and its compiled kernel."""
