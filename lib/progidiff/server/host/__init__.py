"""What MONAI Label itself asks of the app."""
