"""DICOM views of volumes that are no DICOM files, without HTTP and without the host.

A NIfTI or NRRD volume is served as one study with one series of axial slices: `geometry` says where its voxels lie in
the patient, `pixels` how its intensities fit 16 bits, `headers` what the data sets say, `catalogue` which images there
are and `frames` keeps their slices on disk. `query` answers searches, `multipart` is the wire format, `segmentation`
reads a DICOM SEG back onto the grid of an image, `export` writes a series to a folder.

Voxels come as the axial stack of a volume, (Z, Y, X): its slices ascend along the cross product of row and column
direction, which is how viewers sort them, so slice z is instance z + 1.
"""
