"""Data sets that come from elsewhere and go elsewhere: folders of nnU-Net, of the Decathlon, of DICOM files."""
