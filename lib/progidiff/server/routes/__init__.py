"""HTTP addresses, one module per subject."""
