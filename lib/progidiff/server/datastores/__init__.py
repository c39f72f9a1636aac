"""Where images and labels live: a folder or a DICOMweb server."""
