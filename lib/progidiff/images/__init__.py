"""Volumes and pictures: reading, geometry, intensities, the working grid."""
