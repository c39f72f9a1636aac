"""One request for proposals, from its validation to K coherent volumes that are kept."""
